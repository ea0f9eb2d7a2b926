"""The command line, run in this process: exit codes, files, and one line on stderr where the input is at fault."""

import html
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import tl_circuitlasso as tcl
from tests import architectures
from tests.helpers import shared_folder
from tl_circuitlasso.__main__ import main
from tl_circuitlasso.cli.options import saes
from tl_circuitlasso.cli.prompts import read_file, read_prompts
from tl_circuitlasso.demo.ioi import text
from tl_circuitlasso.discover import run as discover
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats.files import READERS
from tl_circuitlasso.models.loading import load_model


@pytest.fixture(scope="module")
def graph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "graph"
    tcl.circuit_lasso(architectures.small(), architectures.prompts(batch=16), progress=False, refined=False).save(
        folder
    )
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that fails: exit code 2, one line, no traceback."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert captured.err.startswith(f"circuitlasso {words[0]}: ")
    return captured.err


def test_info_says_what_a_graph_holds(graph_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (graph_folder, graph_folder / "graph.json", graph_folder / "graph.safetensors"):
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert "12 nodes" in out and "converged" in out and '"method": "CircuitLasso"' in out


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
def test_plot_draws_a_file(graph_folder: Path, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"picture.{suffix}"
    assert main(["plot", str(graph_folder), "--out", str(out), "--title", "A title"]) == 0
    assert out.stat().st_size > 1000
    assert main(["plot", str(graph_folder), "--out", str(out), "--threshold", "0.01"]) == 0


@pytest.mark.parametrize("command", ["info", "plot"])
def test_foreign_files_are_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "p.png")] if command == "plot" else []
    assert "none.json" in refused(capsys, command, str(tmp_path / "none.json"), *out)
    (tmp_path / "foreign.json").write_text("{}")
    assert "foreign.json" in refused(capsys, command, str(tmp_path / "foreign.json"), *out)


def test_plot_says_what_is_wrong(graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ".bmp" in refused(capsys, "plot", str(graph_folder), "--out", str(tmp_path / "p.bmp"))
    assert "`x`" in refused(capsys, "plot", str(graph_folder), "--out", str(tmp_path / "p.png"), "--threshold", "-1")
    (tmp_path / "file").write_text("")
    for name in ("p.png", "p.html"):
        assert "file" in refused(capsys, "plot", str(graph_folder), "--out", str(tmp_path / "file" / name))


def test_only_the_bundled_model_brings_its_own_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`prompts`" in refused(capsys, "discover", "some-model")


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["info"], ["plot", "x"], ["discover"], ["discover", "m", "p", "--basis", "x"]]
)
def test_usage_errors_leave_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["demo", "discover", "evaluate", "baseline", "plot", "info", "bench", "compare", "convert", "check"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0 and "usage" in capsys.readouterr().out


def test_ctrl_c_is_no_crash(
    graph_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(path: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tcl.AttributionGraph, "load", interrupt)
    assert main(["info", str(graph_folder)]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    files = {
        "p.txt": "one two\n\nthree\n",
        "p.csv": 'label,text\n1,"one two"\n0,three\n',
        "p.tsv": "label\ttext\n1\tone two\n0\tthree\n",
        "p.jsonl": '{"label": 1, "text": "one two"}\n\n{"label": 0, "text": "three"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        column = None if name == "p.txt" else "text"
        assert read_prompts(tmp_path / name, column, None) == ["one two", "three"]
        assert read_prompts(tmp_path / name, column, 1) == ["one two"]
    (tmp_path / "gaps.jsonl").write_text('{"text": "one"}\n{"other": "two"}\n{"text": ""}\n')
    assert read_prompts(tmp_path / "gaps.jsonl", "text", None) == ["one"]
    assert read_prompts(tmp_path / "p.csv", None, None) == ["one two", "three"]


def test_marks_capitals_and_separators_of_unicode_do_no_harm(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree\x0cfour\x85five"
    files = {
        "p.txt": f"\ufeff{text}\nsix\n",
        "p.CSV": f"\ufeffprompt\n{text}\nsix\n",
        "p.jsonl": "\ufeff" + "\n".join(json.dumps({"Text": row}, ensure_ascii=False) for row in (text, "six")),
        "p.json": json.dumps([text, "six"]),
        "rows.json": json.dumps([{"id": 1, "clean": text}, {"id": 2, "clean": "six"}]),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_prompts(tmp_path / name, None, None) == [text, "six"], name
    (tmp_path / "pairs.csv").write_text("\ufeffclean,corrupted\nw3,NA\n", encoding="utf-8")
    pairs = tcl.evaluate.read_pairs(tmp_path / "pairs.csv")
    assert pairs.clean == ["w3"] and pairs.corrupted == ["NA"]


def test_the_column_of_the_prompts_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,sentence\n1,one two\n")
    with pytest.raises(InputError, match=r"`--column` is missing: .* has id, sentence"):
        read_prompts(tmp_path / "p.csv", None, None)
    assert read_prompts(tmp_path / "p.csv", "sentence", None) == ["one two"]


def test_a_quoted_line_break_stays_in_its_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('text\n"one\ntwo"\nthree\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv", None, None) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "column", "error", "message"),
    [
        ("p.txt", b"\n \n", None, InputError, "`--prompts`"),
        ("p.txt", b"\xff\xfe\x00", None, InputError, "`--prompts`"),
        ("p.csv", b"", None, InputError, "`--prompts`"),
        ("p.csv", b"a,b\n1,2\n", "c", InputError, "`--column`.*a, b"),
        ("p.csv", b"a,b\n,2\n", "a", InputError, "`--prompts`"),
        ("p.jsonl", b"{", None, FormatError, "line 1"),
        ("p.json", b"{", None, FormatError, "not valid JSON"),
        ("p.json", b"{}", None, FormatError, "a list of prompts is expected"),
        ("p.json", b"[3]", None, FormatError, "entry 1"),
        ("p.csv", b"a\n1,2,3\n4,5\n", None, FormatError, "`--column` is missing|no prompts|rows of different"),
        ("p.jsonl", b'{"a": "x"}\n[1]\n', None, FormatError, "line 2"),
    ],
)
def test_prompts_that_cannot_be_read(
    name: str, content: bytes, column: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((error, InputError), match=message):
        read_prompts(tmp_path / name, column, None)


def test_a_missing_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`--prompts`"):
        read_prompts(tmp_path / "none.txt", None, None)


# ---- discover -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk: config.json, model.safetensors and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model = architectures.hooked("gpt2", tokenizer=architectures.tokenizer())
    save_file(
        {name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / "model.safetensors"
    )
    config = {**architectures.SIZES, **architectures.HOOKED["gpt2"], "seed": 0}
    (folder / "config.json").write_text(json.dumps(config))
    architectures.tokenizer().save_pretrained(folder)
    return folder


def test_discover_runs_a_local_model_to_files(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 31, (24, 6), generator=generator).tolist()
    (tmp_path / "p.txt").write_text("\n".join(" ".join(f"w{token}" for token in row) for row in rows))
    words = ["discover", str(model_folder), str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    assert main(["--quiet", *words]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "graph.json", "graph.safetensors", "graph.html", "graph.png"
    }  # fmt: skip
    graph = tcl.AttributionGraph.load(tmp_path / "out")
    assert graph.provenance["prompts"] == 24 and graph.n_kept > 0
    page = (tmp_path / "out" / "graph.html").read_text(encoding="utf-8")
    assert f"<title>{model_folder.name}: p.txt</title>" in page  # names, not the folders of this machine
    assert "Edges kept" in capsys.readouterr().out
    options = ["--design", "activation", "--nonlinear", "--basis", "neuron", "--strength", "0.3"]
    assert main([*words, "--limit", "8", *options]) == 0
    made = tcl.AttributionGraph.load(tmp_path / "out").provenance
    assert made["prompts"] == 8 and made["arguments"]["nonlinear"] is True


def test_discover_says_what_is_wrong(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("w3 w4\nw5 w6\n")
    prompts, out = str(tmp_path / "p.txt"), ["--out", str(tmp_path / "out")]
    assert "`--prompts`" in refused(capsys, "discover", str(model_folder), str(tmp_path / "no.txt"), *out)
    for option, value in (("strength", "much"), ("positions", "first"), ("device", "abacus")):
        message = refused(capsys, "discover", str(model_folder), prompts, f"--{option}", value, *out)
        assert f"`{option}`" in message
    assert "`model`" in refused(capsys, "discover", str(tmp_path / "nowhere" / "model"), prompts, *out)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "discover", str(tmp_path / "empty"), prompts, *out)


def test_discover_plans_and_stops(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(f"w{a} w{b} w{a}" for a in range(3, 9) for b in range(9, 13)))
    words = ["--quiet", "discover", str(model_folder), "p.txt", "--plan"]
    assert main([*words, "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "kept below 1.0 GB" in out and re.search(r"^statistics +\d+\.\d [MG]B +1\.00 ", out, re.M)
    assert os.listdir(tmp_path) == ["p.txt"]
    assert "`memory`" in refused(capsys, "discover", str(model_folder), "p.txt", "--plan", "--memory", "9 XB")


def test_discover_confirms_edges_with_corrupted_prompts(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("p.txt", 0), ("c.txt", 1)):
        rows = torch.randint(3, 31, (12, 6), generator=torch.Generator().manual_seed(seed)).tolist()
        (tmp_path / name).write_text("\n".join(" ".join(f"w{token}" for token in row) for row in rows))
    words = ["discover", str(model_folder), str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    assert "`corrupted`" in refused(capsys, *words, "--method", "lasso+confirm")
    partners = ["--method", "lasso+confirm", "--corrupted", str(tmp_path / "c.txt")]
    assert main(["--quiet", *words, *partners]) == 0
    graph = tcl.AttributionGraph.load(tmp_path / "out")
    assert graph.provenance["confirm"]["tested"] > 0 and {"measured", "effect"} <= set(graph.extras)


def test_discover_on_a_real_model(tmp_path: Path) -> None:
    folder = shared_folder("models", "stories260K")
    (tmp_path / "p.txt").write_text(
        "\n".join(
            f"Once upon a time there was a {name} who"
            for name in ("cat", "dog", "girl", "boy", "bird", "bear", "frog", "fish")
        )
    )
    assert main(["--quiet", "discover", str(folder), str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]) == 0


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_the_demo_finds_its_circuit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quiet", "demo", "--out", str(tmp_path / "demo"), "--prompts", "256"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"Open {tmp_path / 'demo' / 'graph.html'} in a web browser"
    assert "SHD to the known circuit: 0 " in out and "FALSE" not in out and "missed" not in out
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {
        "graph.json", "graph.safetensors", "graph.html", "graph.png"
    }  # fmt: skip


def test_the_demo_asks_for_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`prompts`" in refused(capsys, "demo", "--out", str(tmp_path), "--prompts", "0")


# ---- compare, convert, check ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eap_file(graph_folder: Path) -> Path:
    """Another ranking of the same model, in EAP-IG's JSON."""
    graph = tcl.AttributionGraph.load(graph_folder)
    path = graph_folder.parent / "eap.json"
    other = replace(graph, score=graph.score.roll(1), kept=graph.kept.roll(1), provenance={"method": "eap"})
    tcl.formats.to_eap(other, path)
    return path


def test_compare_prints_and_writes(
    graph_folder: Path, eap_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = tcl.AttributionGraph.load(graph_folder)
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(sorted(graph.kept_edges())))
    outs = [tmp_path / f"c.{suffix}" for suffix in ("html", "csv", "png")]
    words = ["compare", f"ours={graph_folder}", str(eap_file), "--truth", str(truth)]
    assert main([*words, *(word for out in outs for word in ("--out", str(out)))]) == 0
    printed = capsys.readouterr().out
    assert "ours" in printed and "eap" in printed and "jaccard" in printed and "shd" in printed
    assert all(out.stat().st_size > 500 for out in outs)
    page = outs[0].read_text()
    assert page.startswith("<!doctype html>") and "data:image/png;base64," in page
    assert "<iframe" in page and not re.search(r"(src|href)=[\"']?https?:", html.unescape(page))
    assert "graph,edges" in outs[1].read_text()
    assert main(["compare", str(graph_folder), str(graph_folder), "--truth", str(graph_folder)]) == 0
    assert "(2)" in capsys.readouterr().out


def test_compare_measures_faithfulness(
    graph_folder: Path, eap_file: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"clean": f"w{n} w5 w6", "corrupted": f"w{n} w7 w8", "correct": "w9", "incorrect": "w10"} for n in range(3, 9)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    words = ["compare", str(graph_folder), str(eap_file), "--edges", "5"]
    assert main([*words, "--faithfulness", str(model_folder), str(pairs), "--limit", "5"]) == 0
    assert "faithfulness" in capsys.readouterr().out
    assert "`metric`" in refused(capsys, *words, "--faithfulness", str(model_folder), str(pairs), "--metric", "luck")


def test_compare_says_what_is_wrong(graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(graph_folder)
    assert "at least two" in refused(capsys, "compare", one)
    assert ".bmp" in refused(capsys, "compare", one, one, "--out", "c.bmp")
    for content in ("{", "[1]", "[[1, 2]]", "{}"):
        (tmp_path / "truth.json").write_text(content)
        assert "truth.json" in refused(capsys, "compare", one, one, "--truth", str(tmp_path / "truth.json"))
    (tmp_path / "truth.json").write_text('[["input", "m9"]]')
    assert "`true_edges` names 'm9'" in refused(capsys, "compare", one, one, "--truth", str(tmp_path / "truth.json"))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("g.json", "eap"), ("g.pt", "eap"), ("g.pth", "acdc"), ("g.pkl", "auto-circuit"),
        ("list.json", "circuits-benchmark"), ("page.json", "neuronpedia"), ("page2.json", "circuit-tracer"),
        ("g.graphml", ""), ("g.gexf", ""), ("g.cyjs", ""), ("elements.json", "cytoscape"), ("g.safetensors", ""),
        ("own.json", "circuit-lasso"), ("folder", ""), ("submission", "mib"),
    ],
)  # fmt: skip
def test_convert_writes_every_format_and_knows_it_again(
    name: str, format: str, graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / name, tmp_path / "back.safetensors"
    words = ["convert", str(graph_folder), str(there), *(["--to", format] if format else [])]
    assert main([*words, *(["--option", "model=tiny"] if format == "mib" else [])]) == 0
    assert main(["convert", str(there), str(back)]) == 0
    assert f"({format or ''}" in capsys.readouterr().out
    kept = tcl.AttributionGraph.load(graph_folder).kept_edges()
    found = tcl.AttributionGraph.load(back).kept_edges()
    if format == "auto-circuit":  # scores only: every edge with one is kept
        assert kept <= found
    elif format in ("neuronpedia", "circuit-tracer"):
        assert len(found) == len(kept)
    else:
        assert found == kept


def test_convert_says_what_is_wrong(
    graph_folder: Path, eap_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.json")
    assert "`format`" in refused(capsys, "convert", str(eap_file), out)
    assert "`format`" in refused(capsys, "convert", str(eap_file), out, "--to", "pdf")
    assert "no such file" in refused(capsys, "convert", str(tmp_path / "none.json"), out, "--to", "eap")
    assert "eap.json" in refused(capsys, "convert", str(eap_file), out, "--from", "acdc", "--to", "eap")
    assert "`colour`" in refused(capsys, "convert", str(eap_file), out, "--to", "eap", "--option", "colour=red")
    assert "key=value" in refused(capsys, "convert", str(eap_file), out, "--to", "eap", "--option", "colour")
    (tmp_path / "odd.json").write_text('{"a": 1}')
    assert "none of the formats" in refused(capsys, "convert", str(tmp_path / "odd.json"), out, "--to", "eap")
    (tmp_path / "odd.txt").write_text("x")
    assert "`format`" not in refused(capsys, "convert", str(tmp_path / "odd.txt"), out, "--to", "eap")
    assert not Path(out).exists()


def test_check_tells_a_submission_that_would_fail(
    graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(graph_folder), str(tmp_path / "mib"), "--to", "mib"]
    assert "2 layers of 4 heads" in refused(capsys, *words)  # MIB's GPT-2 has others
    assert main([*words, "--option", "model=tiny"]) == 0
    capsys.readouterr()
    assert main(["check", str(tmp_path / "mib" / "CircuitLasso_patching_edge")]) == 1
    assert "at least two tasks are asked for" in capsys.readouterr().out
    assert main(["convert", str(graph_folder), str(tmp_path / "page.json"), "--to", "neuronpedia"]) == 0
    assert main(["check", str(tmp_path / "page.json")]) == 0
    (tmp_path / "page.json").write_text("{}")
    assert "page.json" in refused(capsys, "check", str(tmp_path / "page.json"))


def test_foreign_graphs_are_drawn_and_told_about(
    graph_folder: Path, eap_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(eap_file)]) == 0
    assert main(["plot", str(eap_file), "--out", str(tmp_path / "h.svg"), "--heatmap"]) == 0
    both = ["plot", str(graph_folder), "--other", str(eap_file), "--out"]
    assert main([*both, str(tmp_path / "two.html")]) == 0
    assert "`--other`" in refused(capsys, *both, str(tmp_path / "two.png"))


def test_sae_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert saes(["blocks.1.hook_resid_post=a/b", "x=y=z"]) == {"blocks.1.hook_resid_post": "a/b", "x": "y=z"}
    assert "`--sae`" in refused(capsys, "discover", "demo", "--sae", "blocks.1.hook_resid_post")
    twice = ["--sae", "blocks.1.hook_resid_post=a", "--sae", "blocks.1.hook_resid_post=b"]
    assert "a hook twice" in refused(capsys, "discover", "demo", *twice)
    assert "two bases" in refused(capsys, "discover", "demo", "--basis", "neuron", *twice[:2])


SAE_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def sae_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name two SAEs, saved by SAELens."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens isn't installed: pip install 'tl-circuitlasso[sae]'")
    words, folder = [], tmp_path_factory.mktemp("saes")
    for seed, hook in enumerate(SAE_HOOKS):
        config = sae_lens.StandardSAEConfig(
            d_in=architectures.SIZES["d_model"], d_sae=32, dtype="float32", device="cpu"
        )
        config.metadata.hook_name = hook
        sae, generator = sae_lens.StandardSAE(config), torch.Generator().manual_seed(seed)
        for weight in sae.parameters():
            weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        sae.save_model(folder / hook)
        words += ["--sae", f"{hook}={folder / hook}"]
    return words


@pytest.fixture(scope="module")
def feature_graph(model_folder: Path, sae_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `discover --sae` writes."""
    folder = tmp_path_factory.mktemp("features")
    rows = torch.randint(3, 31, (48, 8), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "p.txt").write_text("\n".join(" ".join(f"w{token}" for token in row) for row in rows))
    words = ["discover", str(model_folder), str(folder / "p.txt"), *sae_words, "--strength", "0.3"]
    assert main(["--quiet", *words, "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_discover_takes_saes(
    feature_graph: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tcl.AttributionGraph.load(feature_graph).index.names
    assert any(name.startswith(f"{SAE_HOOKS[0]}#") for name in names)
    assert (feature_graph / "graph.html").exists()
    words = ["discover", str(model_folder), str(feature_graph.parent / "p.txt"), "--out", str(tmp_path)]
    assert "`saes`" in refused(capsys, *words, "--sae", f"{SAE_HOOKS[0]}={tmp_path / 'nowhere'}")
    assert "penalty='l1'" in refused(capsys, *words, "--sae", f"{SAE_HOOKS[0]}={tmp_path}", "--strength", "mcp")


def test_evaluate_takes_saes(
    feature_graph: Path,
    graph_folder: Path,
    model_folder: Path,
    sae_words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"clean": f"w{n} w5 w6 w7", "corrupted": f"w{n} w8 w9 w4", "correct": "w9", "incorrect": "w10"}
        for n in range(3, 9)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", str(model_folder), str(tmp_path / "pairs.jsonl")]
    features = [*words, f"features={feature_graph}", "--limit", "5", "--error", "keep"]
    assert main([*features, *sae_words, "--out", str(tmp_path / "curves.png")]) == 0
    printed = capsys.readouterr().out
    assert "features" in printed and "random" in printed and "magnitude" not in printed
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "`saes` has no SAE" in refused(capsys, *features)
    assert "`--sae`" in refused(capsys, *features, "--sae", "nothing")
    assert "`saes` goes with" in refused(capsys, *words, str(graph_folder), *sae_words)


def test_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")
    assert all(name in told for name in READERS)


# ---- what is asked --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with an id in front, and a right and a wrong answer behind."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 31, (12, 6), generator=generator).tolist()
    path = tmp_path_factory.mktemp("answers") / "p.csv"
    lines = [f"{n},{' '.join(f'w{t}' for t in row)},w{n + 3},w{n + 4}" for n, row in enumerate(rows)]
    path.write_text("\n".join(["id,prompt,answer,wrong", *lines]))
    return path


def test_prompts_of_ones_own_for_the_bundled_model_are_saved_as_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [
        f"When {a} and {b} went to the store , {b} gave a drink to"
        for a, b in (("Mary", "John"), ("Tom", "Anna"), ("Paul", "Lucy"))
    ]
    (tmp_path / "o\u00f6.json").write_text(json.dumps(own))
    words = ["discover", "demo", str(tmp_path / "o\u00f6.json"), "--out", str(tmp_path / "\u00f6ut"), "--quiet"]
    assert main([*words, "--save-prompts"]) == 0
    assert (tmp_path / "\u00f6ut" / "prompts.csv").read_text().splitlines()[1:] == [f'"{line}"' for line in own]
    assert capsys.readouterr().out.splitlines()[-1].endswith("graph.html in a web browser")


def test_a_comparison_says_what_to_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = tcl.load_demo(prompts=1).circuit
    for name, graph in (("a", circuit), ("b", circuit.top_k(4))):
        graph.save(tmp_path / f"{name}.json")
    out = ["--out", str(tmp_path / "both.html"), "--out", str(tmp_path / "both.csv")]
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {tmp_path / 'both.html'} in a web browser"


def test_discover_asks_about_answers(
    model_folder: Path, answers_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["discover", str(model_folder), str(answers_file), "--column", "prompt", "--out", str(tmp_path / "out")]
    assert main([*words, "--quiet", "--target", "logit-diff", "--save-prompts"]) == 0
    out = capsys.readouterr().out
    assert (
        "Explained: the logit of the answer (column 'answer') minus that of the wrong one (column 'wrong'), at the"
        in out
    )
    assert "(score: expected cost of the cut, logits)" in out
    saved = (tmp_path / "out" / "prompts.csv").read_text().splitlines()
    assert saved[0] == "prompt,answer,wrong" and saved[1].endswith(",w3,w4") and len(saved) == 13
    from_columns = tcl.AttributionGraph.load(tmp_path / "out")
    assert from_columns.provenance["arguments"]["target"] == "LogitDiff"
    model, prompts = load_model(str(model_folder)), read_prompts(answers_file, "prompt", None)
    target = tcl.LogitDiff([n + 3 for n in range(12)], [n + 4 for n in range(12)])
    asked = tcl.circuit_lasso(model, prompts, target=target, positions="last", progress=False)
    assert torch.allclose(asked.score, from_columns.score)
    assert main([*words, "--answers", "w5", "--wrong", "w6"]) == 0
    assert "the answer ('w5' for all prompts)" in capsys.readouterr().out
    assert not torch.allclose(tcl.AttributionGraph.load(tmp_path / "out").score, from_columns.score)
    assert "did you mean answer?" in refused(capsys, *words, "--answers", "anwser", "--wrong", "w6")
    assert "doesn't know" in refused(capsys, *words, "--answers", "Rome", "--wrong", "w6")


def test_a_gap_shifts_no_answer(tmp_path: Path) -> None:
    rows = ["prompt,answer,wrong,flipped", "a b,w1,w9,c d", ",w2,w9,x", "e f,w3,w9,g h"]
    (tmp_path / "p.csv").write_text("\n".join(rows))
    found = read_file(tmp_path / "p.csv", None, None)
    assert found.prompts == ["a b", "e f"] and [row["answer"] for row in found.rows] == ["w1", "w3"]


def test_counterparts_stand_beside_the_prompts_or_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = tcl.load_demo(prompts=8)
    twins = [line.split(" ", 1)[1] for line in text(demo.corrupted)]
    table = pd.DataFrame({"clean": demo.prompts, "corrupted": twins, "correct": demo.answers})
    table.assign(incorrect=demo.decode(demo.incorrect)).to_csv(tmp_path / "pairs.csv", index=False)
    words = ["discover", "demo", str(tmp_path / "pairs.csv"), "--target", "logit-diff", "--out", str(tmp_path / "out")]
    options: dict[str, Any] = {"target": demo.target, "positions": "last", "progress": False}
    expected = tcl.circuit_lasso(demo.model, demo.tokens, corrupted=demo.corrupted, **options)
    for partners in ("corrupted", str(tmp_path / "pairs.csv")):
        assert main([*words, "--quiet", "--corrupted", partners]) == 0
        assert torch.allclose(tcl.load(tmp_path / "out").score, expected.score)
    assert "neither a column of" in refused(capsys, *words, "--corrupted", "flipped")
    assert "doesn't know, or a column" in refused(capsys, *words, "--answers", "Zoe", "--wrong", "Tom")
    own = ["discover", "demo", "--quiet", "--limit", "8", "--target", "logit-diff", "--out", str(tmp_path / "out")]
    assert main([*own, "--corrupted", "demo"]) == 0
    assert torch.allclose(tcl.load(tmp_path / "out").score, expected.score)
    assert "`--corrupted` is twins.txt" in refused(capsys, *own, "--corrupted", "twins.txt")


def test_a_file_is_read_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("id,sentence\n1,a b\n")
    assert "`--column` is missing" in refused(
        capsys, "discover", "no-such-model", str(tmp_path / "p.csv"), "--out", str(tmp_path / "out")
    )


def test_answers_that_cannot_be_used_are_named(
    model_folder: Path, answers_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["discover", str(model_folder), str(answers_file), "--column", "prompt", "--out", str(tmp_path / "out")]
    assert "w5 w6" in refused(capsys, *words, "--answers", "w5 w6", "--wrong", "w7")
    (tmp_path / "p.txt").write_text("w3 w4\nw5 w6\n")
    bare = ["discover", str(model_folder), str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]
    assert "`--wrong` is missing" in refused(capsys, *bare, "--answers", "w5")
    assert "`--target` logits takes no answers" in refused(capsys, *words, "--target", "logits", "--answers", "w5")
    assert "isn't numbers" in refused(capsys, *words, "--target", "values", "--answers", "answer")


def test_out_is_tried_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(discover, "circuit_lasso", lambda *_, **__: pytest.fail("worked first"))
    for command in (["demo"], ["discover", "demo"], ["baseline", "eap", "demo", "demo"]):
        assert "`--out`" in refused(capsys, *command, "--out", str(tmp_path / "file" / "out"))


def test_a_mistyped_model_gets_the_names_near_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer", reason="this TransformerLens keeps no list of names")
    (tmp_path / "p.txt").write_text("one\n")
    message = refused(capsys, "discover", "gpt2-smal", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"))
    assert "did you mean gpt2-small" in message and len(message) < 400


def test_other_methods_run_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "eap"
    assert main(["baseline", "eap", "demo", "demo", "--limit", "16", "--top", "6", "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "Explained: logit-diff, 16 prompt pairs" in told and "draw it with" in told
    graph = tcl.load(folder)
    demo = tcl.load_demo(prompts=16)
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    assert (
        graph.kept_edges() == tcl.baselines.eap(demo.model, demo.tokens, demo.corrupted, metric).top_k(6).kept_edges()
    )
    assert main(["evaluate", "demo", "demo", str(folder), "--limit", "8"]) == 0
    assert "eap" in capsys.readouterr().out
    assert "its own prompts" in refused(capsys, "evaluate", "demo", "pairs.csv", str(folder))


def test_every_method_that_scores_all_edges_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "baseline", "eap-gi", "demo", "demo", "--out", str(tmp_path / "out"))
    assert all(name in message for name in tcl.baselines.METHODS) and not (tmp_path / "out").exists()
    for name in ("acdc", "magnitude"):  # with a rule of its own; without a metric
        folder = str(tmp_path / name)
        assert main(["baseline", name, "demo", "demo", "--limit", "8", "--out", folder]) == 0
        assert tcl.load(folder).provenance["method"] == name
        capsys.readouterr()


def test_the_regression_is_refined_at_a_given_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "demo", "--limit", "32", "--budget", "2", "--out", str(tmp_path / "out")]
    assert "`--budget` is for lasso+confirm" in refused(capsys, "baseline", "eap", *words)
    assert not (tmp_path / "out").exists()
    assert main(["baseline", "lasso+confirm", *words]) == 0
    made = tcl.load(tmp_path / "out")
    assert made.provenance["confirm"]["tested"] == 2 and made.provenance["arguments"]["method"] == "lasso+confirm"
    assert len(made.kept_edges() & tcl.load_demo(prompts=1).true_edges) >= 4


def test_plot_refuses_what_it_would_ignore(
    graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ["plot", str(graph_folder), "--out", str(tmp_path / "g.html")]
    assert "`--heatmap`" in refused(capsys, *page, "--heatmap")
    assert "`--other`" in refused(
        capsys, "plot", str(graph_folder), "--out", str(tmp_path / "g.png"), "--other", str(graph_folder)
    )
    assert main([*page, "--quiet"]) == 0 and "web browser" in capsys.readouterr().out


def test_version_and_terminals_of_few_letters(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "tl_circuitlasso"]
    told = subprocess.run([*command, "--version"], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == f"circuitlasso {tcl.__version__}\n"
    missing = subprocess.run([*command, "info", "schön"], env=environment, capture_output=True, text=True)
    assert missing.returncode == 2 and "sch\\xf6n: no such file" in missing.stderr


@pytest.mark.parametrize(
    ("target", "partners", "options", "asks"),
    [
        ("logits", "random", [], "--target logit-diff and --corrupted"),
        ("LogitDiff", "random", [], "--target logit-diff and --corrupted"),
        ("LogitDiff", "corrupted", ["--metric", "kl"], "--target logits and --corrupted"),
        ("LogitDiff", "corrupted", ["--ablation", "mean"], "--target logit-diff and without --corrupted"),
        ("LogitDiff", "corrupted", [], None),
        ("logits", "random", ["--metric", "kl", "--ablation", "mean"], None),
        (None, None, [], None),
    ],
)
def test_a_circuit_that_answers_another_question_is_judged_with_a_note(
    tmp_path, capsys, target, partners, options, asks
):
    known = {name: value for name, value in (("target", target), ("partners", partners)) if value}
    replace(tcl.load_demo(prompts=1).circuit, provenance=known).save(tmp_path / "mine")
    assert main(["--quiet", "evaluate", "demo", "demo", str(tmp_path / "mine"), "--limit", "2", *options]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("Note: mine answers another question") == (asks is not None)
    assert last.endswith(asks or "")


def test_a_comparison_says_which_of_its_circuits_answers_another_question(tmp_path, capsys):
    plain = tcl.load_demo(prompts=1).circuit
    plain.save(tmp_path / "plain")
    replace(plain, provenance={"target": "logits", "partners": "random"}).save(tmp_path / "own")
    words = ["--quiet", "compare", str(tmp_path / "plain"), str(tmp_path / "own"), "--limit", "2"]
    assert main([*words, "--faithfulness", "demo", "demo"]) == 0
    said = capsys.readouterr().out
    assert "Note: own answers another question" in said and "Note: plain" not in said
    assert main(words) == 0 and "Note:" not in capsys.readouterr().out
