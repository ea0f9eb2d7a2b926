"""Two processes under gloo find the graph of one among SAE features, and what goes wrong in one is raised in both."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import tl_circuitlasso as tcl
from tests.apart import as_two
from tests.helpers import join_two, message_of
from tests.sae.training import PlainSAE
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.demo import Demo, load_demo
from tl_circuitlasso.features import learning
from tl_circuitlasso.features.regression import needed_bytes
from tl_circuitlasso.models import feature_replay

PARTS = ("W_enc", "W_dec", "bias")
PROMPTS = 110  # in batches of 24: five, the last one smaller, three for one process and two for the other
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "heads-ebic": {"mixing": "heads", "penalty": "l1", "strength": "ebic", "max_features": 16},
    "adaptive-draws": {"penalty": "adaptive", "draws": 4, "max_features": 20},
    "mean-labels": {"mixing": "mean", "target": "labels"},
    "values-cv": {"target": "values", "strength": "cv", "penalty": "l1", "max_features": 6},
    "few-samples": {"mixing": "pooled", "min_count": 3, "penalty": "l1", "strength": 0.3, "prompts": 20, "batch": 6},
    "one-batch": {"prompts": 60, "batch": 60},  # nothing is left for the second process
}


def saes_of(path: Path) -> dict[str, PlainSAE]:
    weights = load_file(path)
    hooks = sorted({name.split("/")[0] for name in weights})
    return {hook: PlainSAE(*(weights[f"{hook}/{part}"] for part in PARTS)) for hook in hooks}


def found(case: str, demo: Demo, saes: Any, process_group: Any = None) -> tcl.AttributionGraph:
    options = dict(CASES[case])
    count, batch = options.pop("prompts", PROMPTS), options.pop("batch", 24)
    goal, strength = options.pop("target", None), options.pop("strength", "auto")
    target = {
        None: None,
        "labels": tcl.Labels([int(demo.correct[row]) % 2 for row in range(count)]),
        "values": tcl.Values([float(row % 7) for row in range(count)]),
    }[goal]
    return tcl.circuit_lasso(
        demo.model, demo.tokens[:count], basis=tcl.SAEFeatures(saes, **options), target=target, strength=strength,
        batch_size=batch, progress=False, process_group=process_group,
    )  # fmt: skip


def resumed(folder: Path, rank: int, demo: Demo, saes: Any) -> None:
    """A run in which process 1 fails at the last pair, made again with the same checkpoint."""
    options = {"basis": tcl.SAEFeatures(saes), "batch_size": 24, "progress": False, "process_group": "world"}
    options["checkpoint"] = folder / "checkpoint"
    solved, ordinary = [], learning.regress

    def failing(data: Any, basis: Any, setup: Any, pair: tuple[str, str], kept: Any) -> Any:
        solved.append(pair)
        if pair[1] == "target" and rank == 1 and len(solved) == 3:
            raise tcl.ModelError("killed")
        return ordinary(data, basis, setup, pair, kept)

    learning.regress = failing
    with message_of(folder, "killed", rank):
        tcl.circuit_lasso(demo.model, demo.tokens[:PROMPTS], **options)
    graph = tcl.circuit_lasso(demo.model, demo.tokens[:PROMPTS], **options)
    learning.regress = ordinary
    graph.save(folder / f"resumed-{rank}.safetensors")
    (folder / f"solved-{rank}.txt").write_text(" ".join(child for _, child in solved))


def no_groups(*_: Any, **__: Any) -> Any:
    raise tcl.ModelError("no groups")


def wrong(folder: Path, rank: int, demo: Demo, saes: Any) -> None:
    """Different data, an SAE of another width in one process, too little memory in one, and no replay in one."""
    options = {"progress": False, "process_group": "world"}
    with message_of(folder, "other-data", rank):
        tokens = demo.tokens[rank : 40 + rank]
        tcl.circuit_lasso(demo.model, tokens, basis=tcl.SAEFeatures(saes, min_count=1), **options)
    hook, sae = next(iter(saes.items()))
    other = {**saes, hook: PlainSAE(sae.W_enc[:5], sae.W_dec[:, :5], sae.bias)} if rank else saes
    with message_of(folder, "other-width", rank):
        tcl.circuit_lasso(demo.model, demo.tokens[:40], basis=tcl.SAEFeatures(other), **options)
    memory = 100_000 if rank else None
    with message_of(folder, "memory", rank):
        tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes, memory=memory), **options)
    ordinary = feature_replay.chosen_groups
    if rank:
        feature_replay.chosen_groups = no_groups
    with message_of(folder, "replay", rank):
        tcl.circuit_lasso(demo.model, demo.tokens[:40], basis=tcl.SAEFeatures(saes, min_count=1), **options)
    feature_replay.chosen_groups = ordinary


def worker(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    join_two(rank, folder / "store")
    demo, saes = load_demo(), saes_of(folder / "saes.safetensors")
    for case in CASES:
        found(case, demo, saes, "world").save(folder / f"{case}-{rank}.safetensors")
    resumed(folder, rank, demo, saes)
    wrong(folder, rank, demo, saes)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(demo_saes: dict[str, PlainSAE], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    path = tmp_path_factory.mktemp("shared")
    save_file(
        {f"{hook}/{part}": getattr(sae, part) for hook, sae in demo_saes.items() for part in PARTS},
        path / "saes.safetensors",
    )
    as_two(worker, path)
    return path


def same(one: Any, other: Any, about: float = 1e-6) -> bool:
    """Equal plain data, numbers to a millionth, or `about`."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], about) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(*both, about) for both in zip(one, other))
    number = isinstance(one, int | float) and not isinstance(one, bool)
    return math.isclose(one, other, rel_tol=about, abs_tol=about) if number else one == other


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_graph_of_one(folder: Path, case: str, demo: Demo, demo_saes: Any) -> None:
    alone = found(case, demo, demo_saes)
    first, second = (tcl.AttributionGraph.load(folder / f"{case}-{rank}.safetensors") for rank in range(2))
    assert first.edge_table().equals(second.edge_table()) and first.node_info == second.node_info
    assert first.index.names == alone.index.names and alone.n_kept > 0
    assert first.kept_edges() == alone.kept_edges()
    ours, theirs = (one.edge_table().set_index(["source", "target", "port"]) for one in (first, alone))
    both = ours.index.intersection(theirs.index)
    assert len(both) >= 0.99 * max(len(ours), len(theirs)), "but for weights that are 0 but for rounding"
    for name in ours.select_dtypes("number"):
        left, right = (torch.tensor(table.loc[both, name].to_numpy(dtype=float)) for table in (ours, theirs))
        near = torch.isclose(left, right, rtol=0.01, atol=0.02 if name == "q" else 1e-3, equal_nan=True)
        assert near.double().mean() >= 0.99, name  # what is replayed depends on who shares its batch, by rounding
    assert same(first.node_info, alone.node_info)
    proofs = [one.certificate.drop(columns=["gap", "iterations"]).to_dict("list") for one in (first, alone)]
    assert same(
        *({key: [None if x != x else x for x in column] for key, column in one.items()} for one in proofs), about=0.01
    )
    assert bool(first.certificate.converged.all())
    ours, theirs = first.provenance, alone.provenance
    assert ours["processes"] == 2 and theirs["processes"] == 1
    for key in ("samples", "left_out", "alive", "candidates", "data_hash", "forward_passes", "active_per_sample"):
        assert same(ours[key], theirs[key]), key
    for figures in (*ours["pairs"], *theirs["pairs"]):
        del figures["seconds"], figures["largest_gap"]
    assert same(ours["pairs"], theirs["pairs"], about=0.01)


def test_a_run_that_failed_goes_on_with_the_pairs_of_process_0_and_everyones_codes(folder: Path) -> None:
    messages = [(folder / f"killed-{rank}.txt").read_text() for rank in range(2)]
    assert messages[1] == "ModelError: killed" and "rank 1 of 2 failed: ModelError: killed" in messages[0]
    assert {path.name for path in (folder / "checkpoint").iterdir()} == {
        "directions.safetensors", "rank-0-of-2", "rank-1-of-2", *(f"pair-{n:04d}.safetensors" for n in range(3)),
    }  # fmt: skip
    uninterrupted = tcl.AttributionGraph.load(folder / "default-0.safetensors")
    for rank in range(2):
        solved = (folder / f"solved-{rank}.txt").read_text().split()
        assert len(solved) == 4 and solved[2:] == ["target", "target"], "only the pair that was lost is solved again"
        graph = tcl.AttributionGraph.load(folder / f"resumed-{rank}.safetensors")
        assert graph.provenance["forward_passes"] == 0
        assert graph.edge_table().equals(uninterrupted.edge_table()) and graph.node_info == uninterrupted.node_info


def test_what_is_wrong_in_one_process_is_raised_in_both(folder: Path) -> None:
    for rank in range(2):
        assert "the processes differ in data" in (folder / f"other-data-{rank}.txt").read_text()
    for name, told in (("other-width", "InputError: `saes`"), ("memory", "InputError"), ("replay", "ModelError: no")):
        messages = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]
        assert messages[1].startswith(told) and f"rank 1 of 2 failed: {told}" in messages[0]


def test_every_child_is_one_processes_own() -> None:
    for targets in (0, 1, 2, 7):
        shares = [Ranks(rank, 3).dealt(targets) for rank in range(3)]
        assert sorted(torch.cat(shares).tolist()) == list(range(targets))
    assert ALONE.dealt(4).tolist() == [0, 1, 2, 3]


def test_processes_need_less_memory_each() -> None:
    assert needed_bytes(1000, 1000, processes=4) < 0.7 * needed_bytes(1000, 1000)
    assert needed_bytes(1000, 8000, processes=4) < 0.4 * needed_bytes(1000, 8000)
