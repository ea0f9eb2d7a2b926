"""A killed run loses one pair at most, and a checkpoint serves only the run that it belongs to."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_circuitlasso as tcl
from tests.apart import FORKED
from tests.sae.training import PlainSAE
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.features import learning as feature_learning
from tl_circuitlasso.features import regression as regression_module
from tl_circuitlasso.models import feature_replay as replay_module

PARTS = ("W_enc", "W_dec", "bias")


def stuck_at_the_target(weights: Path, folder: Path) -> None:
    """A run that sleeps at its last pair, with the earlier ones behind it: killed there."""
    real = feature_learning.regress

    def slow(data: Any, basis: Any, setup: Any, pair: tuple[str, str], kept: Any) -> Any:
        if pair[1] == "target":
            time.sleep(600)
        return real(data, basis, setup, pair, kept)

    feature_learning.regress = slow
    parts = load_file(weights)
    hooks = sorted({name.split("/")[0] for name in parts})
    saes = {hook: PlainSAE(*(parts[f"{hook}/{part}"] for part in PARTS)) for hook in hooks}
    circuit(tcl.load_demo(), saes, folder)


def circuit(demo: Demo, saes: Any, folder: Path | None, **options: Any) -> tcl.AttributionGraph:
    tokens = options.pop("tokens", demo.tokens)
    basis = tcl.SAEFeatures(saes, **options)
    return tcl.circuit_lasso(demo.model, tokens, basis=basis, checkpoint=folder, progress=False)


@pytest.fixture(scope="module")
def folder_and_graph(
    demo: Demo, demo_saes: dict[str, PlainSAE], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tcl.AttributionGraph]:
    """The checkpoint of a finished run, not to be written to, and its graph."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, circuit(demo, demo_saes, folder)


@pytest.fixture
def finished(folder_and_graph: tuple[Path, tcl.AttributionGraph]) -> Path:
    return folder_and_graph[0]


def save(saes: dict[str, PlainSAE], path: Path) -> None:
    save_file({f"{hook}/{name}": getattr(sae, name) for hook, sae in saes.items() for name in PARTS}, path)


def written(folder: Path) -> dict[str, int]:
    """The regressions of a checkpoint, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("pair-*.safetensors")}


def test_a_killed_run_goes_on_where_it_stopped(
    demo: Demo, demo_saes: dict[str, PlainSAE], tmp_path: Path, folder_and_graph: Any
) -> None:
    save(demo_saes, tmp_path / "saes.safetensors")
    folder = tmp_path / "checkpoint"
    process = FORKED.Process(target=stuck_at_the_target, args=(tmp_path / "saes.safetensors", folder))
    process.start()
    try:
        for _ in range(6000):
            if (folder / "pair-0001.safetensors").exists() or process.exitcode is not None:
                break
            time.sleep(0.1)
        assert process.exitcode is None, "the run ended before it could be killed"
    finally:
        process.kill()
        process.join()
    assert not (folder / "pair-0002.safetensors").exists()

    done = written(folder)
    resumed = circuit(demo, demo_saes, folder)
    solved = {name for name, when in written(folder).items() if done.get(name) != when}
    assert solved == {"pair-0002.safetensors"}, "only the pair that was lost is solved again"
    assert resumed.provenance["forward_passes"] == 0
    fresh = folder_and_graph[1]
    assert resumed.kept_edges() == fresh.kept_edges()
    torch.testing.assert_close(resumed.weight, fresh.weight)
    assert resumed.node_info == fresh.node_info


def test_a_finished_checkpoint_is_read_only(demo: Demo, demo_saes: Any, finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    circuit(demo, demo_saes, finished)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    assert not list(finished.glob("*.tmp"))


def test_another_rule_solves_again_without_the_model(demo: Demo, demo_saes: Any, tmp_path: Path) -> None:
    first = circuit(demo, demo_saes, tmp_path, penalty="l1")
    other = circuit(demo, demo_saes, tmp_path, penalty="adaptive", min_count=40)
    assert other.provenance["forward_passes"] == 0 and first.provenance["forward_passes"] > 0
    assert other.kept_edges() != first.kept_edges()


def test_other_data_or_saes_are_refused(demo: Demo, demo_saes: dict[str, PlainSAE], finished: Path) -> None:
    with pytest.raises(InputError, match="holds other data"):
        circuit(demo, demo_saes, finished, tokens=demo.tokens.flip(0))
    hook, sae = next(iter(demo_saes.items()))
    other = {**demo_saes, hook: PlainSAE(sae.W_enc * 2, sae.W_dec, sae.bias)}
    with pytest.raises(InputError, match="differs in saes"):
        circuit(demo, other, finished)
    with pytest.raises(InputError, match="differs in mixing"):
        circuit(demo, demo_saes, finished, mixing="mean")


def test_a_checkpoint_that_is_no_folder_or_broken(demo: Demo, demo_saes: Any, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"name a folder|is a file"):
        circuit(demo, demo_saes, tmp_path / "file")
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    (folder / "pair-0000.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="pair-0000"):
        circuit(demo, demo_saes, folder)


def test_a_full_disk_is_named(demo: Demo, demo_saes: dict[str, PlainSAE], tmp_path: Path) -> None:
    """Here a file that may grow no further; what stands there already stays as it was."""
    resource = pytest.importorskip("resource", reason="no limits on file sizes here")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(InputError, match=r"can't be written .*make room") as caught:
            circuit(demo, demo_saes, tmp_path / "run", tokens=demo.tokens[:32], min_count=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(tmp_path) in str(caught.value) and not list(tmp_path.rglob("*.tmp"))


class Killed(Exception):
    """What a run is stopped by."""


def stopping(real: Any, at: int, made: list[int]) -> Any:
    """`real`, noted each time in `made`, and killed in place of its call number `at`."""

    def call(*given: Any, **options: Any) -> Any:
        if len(made) == at:
            raise Killed
        made.append(1)
        return real(*given, **options)

    return call


STAGES = {
    "replay": (replay_module, "Layers", 3),  # once a batch of prompts
    "solve": (regression_module, "read_lasso", 4),  # once a block of children
}


@pytest.mark.parametrize(("stage", "mixing"), [("replay", "heads"), ("solve", "same")])
def test_a_run_killed_within_a_stage_goes_on_within_it(
    demo: Demo, demo_saes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, mixing: str
) -> None:
    """And gives what a run that was never stopped does, to the last bit."""
    monkeypatch.setattr(replay_module, "PROMPTS", 16)
    monkeypatch.setattr(replay_module, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(regression_module, "BLOCK", 5)
    module, name, at = STAGES[stage]
    real, options = getattr(module, name), {"mixing": mixing, "tokens": demo.tokens[:64], "min_count": 5}

    def found(folder: Path | None, at: int) -> tuple[tcl.AttributionGraph, int]:
        made: list[int] = []
        monkeypatch.setattr(module, name, stopping(real, at, made))
        return circuit(demo, demo_saes, folder, **options), len(made)

    whole, every = found(None, -1)
    assert every > at
    with pytest.raises(Killed):
        found(tmp_path / "run", at)
    resumed, rest = found(tmp_path / "run", -1)
    assert rest == every - at, "nothing that was finished is made again"
    for column in ("source", "target", "weight", "score", "kept"):
        assert torch.equal(getattr(resumed, column), getattr(whole, column)), column
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert all(name.startswith(("codes-", "pair-0", "directions")) and name.endswith("tensors") for name in left)


def test_effects_of_other_features_are_measured_again(
    demo: Demo, demo_saes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_learning, "regress_pair", stopping(feature_learning.regress_pair, 0, []))
    for count in (5, 6):
        with pytest.raises(Killed):
            circuit(demo, demo_saes, tmp_path, tokens=demo.tokens[:64], min_count=5, max_features=count)
    monkeypatch.undo()
    options = {"tokens": demo.tokens[:64], "min_count": 5, "max_features": 6}
    resumed, fresh = circuit(demo, demo_saes, tmp_path, **options), circuit(demo, demo_saes, None, **options)
    assert torch.equal(resumed.weight, fresh.weight) and torch.equal(resumed.kept, fresh.kept)
