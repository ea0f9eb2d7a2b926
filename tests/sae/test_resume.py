"""A killed run loses one pair at most, and a checkpoint serves only the run that it belongs to."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests.sae.training import PlainSAE
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.features import learning as feature_learning

RUN = """
import sys, time
import torch
from safetensors.torch import load_file
import tl_circuitlasso as tcl
from tests.sae.training import PlainSAE
from tl_circuitlasso.features import learning as feature_learning

real = feature_learning._regress
def slow(data, basis, setup, pair):
    if pair[1] == "target":
        time.sleep(600)  # killed here, with the earlier pairs behind it
    return real(data, basis, setup, pair)
feature_learning._regress = slow

weights = load_file(sys.argv[1])
hooks = sorted({name.split("/")[0] for name in weights})
saes = {hook: PlainSAE(*(weights[f"{hook}/{part}"] for part in ("W_enc", "W_dec", "bias"))) for hook in hooks}
demo = tcl.load_demo()
tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes), checkpoint=sys.argv[2], progress=False)
"""


def circuit(demo: Demo, saes: Any, folder: Path | None, **options: Any) -> tcl.AttributionGraph:
    tokens = options.pop("tokens", demo.tokens)
    basis = tcl.SAEFeatures(saes, **options)
    return tcl.circuit_lasso(demo.model, tokens, basis=basis, checkpoint=folder, progress=False)


def save(saes: dict[str, PlainSAE], path: Path) -> None:
    from safetensors.torch import save_file

    names = ("W_enc", "W_dec", "bias")
    save_file({f"{hook}/{name}": getattr(sae, name) for hook, sae in saes.items() for name in names}, path)


def test_a_killed_run_goes_on_where_it_stopped(
    demo: Demo, demo_saes: dict[str, PlainSAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(demo_saes, tmp_path / "saes.safetensors")
    folder = tmp_path / "checkpoint"
    command = [sys.executable, "-c", RUN, str(tmp_path / "saes.safetensors"), str(folder)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        for _ in range(1200):
            if (folder / "pair-0001.safetensors").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "pair-0002.safetensors").exists()

    solved: list[tuple[str, str]] = []
    real = feature_learning._regress

    def counted(data: Any, basis: Any, setup: Any, pair: tuple[str, str]) -> Any:
        solved.append(pair)
        return real(data, basis, setup, pair)

    monkeypatch.setattr(feature_learning, "_regress", counted)
    resumed = circuit(demo, demo_saes, folder)
    assert [child for _, child in solved] == ["target"], "only the pair that was lost is solved again"
    assert resumed.provenance["forward_passes"] == 0
    fresh = circuit(demo, demo_saes, None)
    assert resumed.kept_edges() == fresh.kept_edges()
    torch.testing.assert_close(resumed.weight, fresh.weight)
    assert resumed.node_info == fresh.node_info


def test_a_finished_checkpoint_is_read_only(demo: Demo, demo_saes: Any, tmp_path: Path) -> None:
    circuit(demo, demo_saes, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    circuit(demo, demo_saes, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert not list(tmp_path.glob("*.tmp"))


def test_another_rule_solves_again_without_the_model(demo: Demo, demo_saes: Any, tmp_path: Path) -> None:
    first = circuit(demo, demo_saes, tmp_path, penalty="l1")
    other = circuit(demo, demo_saes, tmp_path, penalty="adaptive", min_count=40)
    assert other.provenance["forward_passes"] == 0 and first.provenance["forward_passes"] > 0
    assert other.kept_edges() != first.kept_edges()


def test_other_data_or_saes_are_refused(demo: Demo, demo_saes: dict[str, PlainSAE], tmp_path: Path) -> None:
    circuit(demo, demo_saes, tmp_path)
    with pytest.raises(InputError, match="holds other data"):
        circuit(demo, demo_saes, tmp_path, tokens=demo.tokens.flip(0))
    hook, sae = next(iter(demo_saes.items()))
    other = {**demo_saes, hook: PlainSAE(sae.W_enc * 2, sae.W_dec, sae.bias)}
    with pytest.raises(InputError, match="differs in saes"):
        circuit(demo, other, tmp_path)
    with pytest.raises(InputError, match="differs in mixing"):
        circuit(demo, demo_saes, tmp_path, mixing="mean")


def test_a_checkpoint_that_is_no_folder_or_broken(demo: Demo, demo_saes: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"name a folder|is a file"):
        circuit(demo, demo_saes, tmp_path / "file")
    folder = tmp_path / "broken"
    circuit(demo, demo_saes, folder)
    (folder / "pair-0000.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="pair-0000"):
        circuit(demo, demo_saes, folder)
