"""Neuron circuits from the command line."""

import csv
import json

import pytest
import torch
from safetensors.torch import save_file

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.__main__ import main


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A gated model on disk, prompts with their partners and answers, and the model itself."""
    folder = tmp_path_factory.mktemp("model")
    model = architectures.hooked("llama", tokenizer=architectures.tokenizer())
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**architectures.SIZES, **architectures.HOOKED["llama"], "seed": 0}))
    architectures.tokenizer().save_pretrained(folder)
    rows = torch.randint(5, 31, (12, 6), generator=torch.Generator().manual_seed(0))
    partners = rows.clone()
    partners[:, 2] = (rows[:, 2] - 4) % 26 + 5
    for name, tokens in (("p", rows), ("q", partners)):
        with (folder / f"{name}.csv").open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["prompt", "right", "wrong"])
            writer.writerows([" ".join(f"w{token}" for token in row), "w3", "w4"] for row in tokens.tolist())
    return folder, model, (rows, partners)


def run(folder, out, *more):
    words = ["discover", str(folder), str(folder / "p.csv"), "--column", "prompt", "--out", str(out)]
    return main([*words, "--basis", "neuron", "--design", "read", "--answers", "right", "--wrong", "wrong", *more])


def test_neurons_are_found_as_in_python(setting, tmp_path, capsys):
    folder, model, _ = setting
    assert run(folder, tmp_path, "--corrupted", str(folder / "q.csv")) == 0
    said = capsys.readouterr().out
    assert "contribution to the target, logits" in said and "m1#" in said
    graph = tcl.AttributionGraph.load(tmp_path)
    texts = {}
    for name in "pq":
        with (folder / f"{name}.csv").open(newline="") as opened:
            texts[name] = [row["prompt"] for row in csv.DictReader(opened)]
    target = tcl.LogitDiff([3] * 12, [4] * 12)
    same = tcl.circuit_lasso(
        model, texts["p"], corrupted=texts["q"], basis="neuron", design="read", target=target, positions="last",
        progress=False,
    )  # fmt: skip
    assert graph.index == same.index and torch.allclose(graph.score, same.score, atol=1e-5)
    assert (tmp_path / "graph.html").stat().st_size > 10_000
    assert graph.provenance["arguments"]["basis"] == "neuron"


def test_what_neurons_do_not_take_is_said(setting, tmp_path, capsys):
    folder, *_ = setting
    for option, value in (("--method", "lasso+confirm"), ("--strength", "ebic")):
        assert run(folder, tmp_path, option, value) == 2
        assert f"`{option[2:]}`" in capsys.readouterr().err
