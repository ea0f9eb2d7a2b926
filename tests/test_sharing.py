"""Two processes under gloo find the graph of one: every design and target, checkpoints, and errors that reach all."""

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tl_circuitlasso as tcl
from tests import architectures
from tests.apart import as_two
from tests.helpers import join_two, message_of
from tl_circuitlasso.data.sharing import ALONE, as_ranks, under_torchrun
from tl_circuitlasso.data.statistics import Moments, Statistics
from tl_circuitlasso.discover.run import collect_statistics
from tl_circuitlasso.models import collect as collection
from tl_circuitlasso.models.designs import Activation, Sample

PROMPTS, BATCH = 40, 6  # seven batches, the last one smaller, so that the two processes get unequal parts
CASES = {
    "read": {"design": "read"},
    "read-confirmed": {"design": "read", "method": "lasso+confirm"},
    "read-labels": {"design": "read", "target": "labels"},
    "routed-difference": {"design": "routed", "target": "difference", "strength": 0.2},
    "activation-values": {"design": "activation", "target": "values", "strength": 0.2},
    "activation-labels": {"design": "activation", "target": "labels", "strength": 0.2},
    "neuron-stability": {"design": "activation", "basis": "neuron", "strength": "stability"},
}


def goal(name: str | None) -> Any:
    rows = range(PROMPTS)
    return {
        None: None,
        "difference": tcl.LogitDiff([3] * PROMPTS, [4] * PROMPTS),
        "labels": tcl.Labels([row % 2 for row in rows]),
        "values": tcl.Values([row / PROMPTS for row in rows]),
    }[name]


@cache
def found(case: str, process_group: Any = None) -> tcl.AttributionGraph:
    options: dict[str, Any] = {**CASES[case], "target": goal(CASES[case].get("target"))}
    if options.get("basis") == "neuron":
        options["basis"] = tcl.Neuron(max_nodes=12)
    if "method" in options:
        options["corrupted"] = architectures.prompts(batch=PROMPTS, seed=5)
    tokens = architectures.prompts(batch=PROMPTS)
    tokens[:, -1] = torch.arange(PROMPTS) % 2 + 3  # so that the labels are something that the model can say
    return tcl.circuit_lasso(
        architectures.small(), tokens, batch_size=BATCH, progress=False, process_group=process_group, **options
    )


def of_demo(process_group: Any = None) -> tcl.AttributionGraph:
    demo = tcl.load_demo(prompts=64)
    return tcl.circuit_lasso(
        demo.model, demo.tokens, positions="last", batch_size=16, progress=False, process_group=process_group
    )


def interrupted_and_resumed(folder: Path, rank: int) -> None:
    """A collection that is killed in its fifth batch, and goes on from the two files that were written."""
    model, tokens = architectures.small(), architectures.prompts(batch=PROMPTS)
    options = {"design": "activation", "batch_size": BATCH, "progress": False, "process_group": "world"}
    options["checkpoint"] = folder / "part.safetensors"
    collection.CHECKPOINT_SECONDS, ordinary = -1.0, Activation.add

    def killed(self: Activation, statistics: Statistics, adapter: Any, sample: Sample) -> Statistics:
        if int(sample.prompts[0]) == 4 * BATCH:
            raise tcl.ModelError("killed")
        return ordinary(self, statistics, adapter, sample)

    Activation.add = killed
    with message_of(folder, "killed", rank):
        collect_statistics(model, tokens, **options)
    Activation.add = ordinary
    whole = collect_statistics(model, tokens, **options)
    whole.save(folder / f"resumed-{rank}.safetensors")


def mapped(folder: Path, rank: int) -> None:
    """Five items, of which the third fails the second time."""
    worked: list[int] = []

    def work(item: int, bad: int = -1) -> dict[str, torch.Tensor]:
        worked.append(item)
        if item == bad:
            raise tcl.ModelError("bad item")
        return {"square": torch.tensor(item * item), **({"odd": torch.ones(item)} if item % 2 else {})}

    made = as_ranks("world").map(range(5), work, lambda made: {name: x.tolist() for name, x in made.items()})
    (folder / f"mapped-{rank}.json").write_text(json.dumps([made, worked]))
    with message_of(folder, "bad-item", rank), as_ranks("world").together():
        as_ranks("world").map(range(5), partial(work, bad=2), dict)


OPERATIONS = {
    "sum": lambda ranks: ranks.sum(torch.ones(2)),
    "count": lambda ranks: ranks.count(3),
    "add_up": lambda ranks: ranks.add_up(torch.ones(2, 3)),
    "sum_to": lambda ranks: ranks.sum_to(0, torch.ones(2, 3)),
    "largest": lambda ranks: ranks.largest(torch.ones(2)),
    "first": lambda ranks: ranks.first(torch.ones(2)),
    "gather": lambda ranks: ranks.gather({"one": torch.ones(2)}),
    "gather_data": lambda ranks: ranks.gather_data([1, "two"]),
    "agree": lambda ranks: ranks.agree({"fact": 1}),
    "map": lambda ranks: ranks.map([1], lambda one: {"one": torch.tensor(one)}, dict),
    "the end": lambda ranks: None,
}


def failing(folder: Path, rank: int) -> None:
    """Process 1 fails in a job within a job while process 0 is on its way to each operation; then none fails."""
    ranks = as_ranks("world")
    for name, operation in OPERATIONS.items():
        with message_of(folder, f"before {name}", rank), ranks.together(), ranks.together():
            if rank == 1:
                raise tcl.ModelError("gone")
            operation(ranks)
        with ranks.together():
            operation(ranks)


def worker(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    join_two(rank, folder / "store")
    for case in CASES:
        found(case, "world").save(folder / f"{case}-{rank}.safetensors")
    of_demo(dist.group.WORLD).save(folder / f"demo-{rank}.safetensors")
    interrupted_and_resumed(folder, rank)
    mapped(folder, rank)
    failing(folder, rank)
    model = architectures.small()
    if rank == 1:
        model.blocks[0].mlp.W_out.data[:] = torch.nan
    with message_of(folder, "broken", rank):
        tcl.circuit_lasso(model, architectures.prompts(batch=12), progress=False, process_group="world")
    with message_of(folder, "other-data", rank):
        tcl.circuit_lasso(
            architectures.small(), architectures.prompts(batch=12, seed=rank), progress=False, process_group="world"
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    path = tmp_path_factory.mktemp("shared")
    as_two(worker, path)
    return path


@pytest.mark.parametrize("case", [*CASES, "demo"])
def test_two_processes_find_the_graph_of_one(folder: Path, case: str) -> None:
    alone = of_demo() if case == "demo" else found(case)
    first, second = (tcl.AttributionGraph.load(folder / f"{case}-{rank}.safetensors") for rank in range(2))
    assert first.edge_table().equals(second.edge_table())
    assert first.kept_edges() == alone.kept_edges() and alone.n_kept > 0
    scale = float(alone.score.abs().max())
    for name in ("source", "target", "port", "kept"):
        assert torch.equal(getattr(first, name), getattr(alone, name))
    torch.testing.assert_close(first.score, alone.score, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(first.weight, alone.weight, rtol=0, atol=1e-6)
    assert list(first.certificate.index) == list(alone.certificate.index)
    assert bool(first.certificate.converged.all())
    assert first.provenance["processes"] == 2 and first.provenance["data_hash"] == alone.provenance["data_hash"]


def test_edges_to_confirm_are_shared(folder: Path) -> None:
    graph, alone = tcl.AttributionGraph.load(folder / "read-confirmed-0.safetensors"), found("read-confirmed")
    assert torch.equal(graph.extras["measured"], alone.extras["measured"]) and bool(alone.extras["measured"].any())
    for name in ("effect", "effect_low", "effect_high"):
        torch.testing.assert_close(graph.extras[name], alone.extras[name], rtol=1e-4, atol=1e-6)
    ours, theirs = graph.provenance["confirm"], alone.provenance["confirm"]
    assert ours["tested"] == theirs["tested"] > 1 and ours["refuted"] == theirs["refuted"]
    assert ours["forward_passes"] == theirs["forward_passes"] + 2  # each runs the model and the ablated model


def test_forward_passes_are_shared_not_repeated(folder: Path) -> None:
    graph, alone = tcl.AttributionGraph.load(folder / "read-0.safetensors"), found("read")
    assert graph.provenance["forward_passes"] == alone.provenance["forward_passes"]


def test_a_killed_collection_goes_on_from_the_files_of_both_processes(folder: Path) -> None:
    messages = [(folder / f"killed-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == "ModelError: killed" and "rank 0 of 2 failed: ModelError: killed" in messages[1]
    assert {file.name for file in folder.glob("part*")} == {"part-0-of-2.safetensors", "part-1-of-2.safetensors"}
    alone = collect_statistics(
        architectures.small(),
        architectures.prompts(batch=PROMPTS),
        design="activation",
        batch_size=BATCH,
        progress=False,
    )
    for rank in range(2):
        resumed = Statistics.load(folder / f"resumed-{rank}.safetensors")
        assert resumed.done == alone.done and resumed.origin == alone.origin
        for key, moments in alone.moments.items():
            assert resumed.moments[key].count == moments.count
            torch.testing.assert_close(resumed.moments[key].gram(), moments.gram(), rtol=1e-9, atol=1e-12)


def test_items_are_dealt_out_and_all_have_what_is_made_of_each(folder: Path) -> None:
    found = [json.loads((folder / f"mapped-{rank}.json").read_text()) for rank in range(2)]
    whole = [{"square": n * n, **({"odd": [1.0] * n} if n % 2 else {})} for n in range(5)]
    assert [made for made, _ in found] == [whole, whole]
    assert [worked for _, worked in found] == [[0, 2, 4], [1, 3]]
    messages = [(folder / f"bad-item-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0].startswith("ModelError") and "rank 0 of 2 failed: ModelError: bad item" in messages[1]


@pytest.mark.parametrize("name", OPERATIONS)
def test_who_needs_another_process_learns_that_it_failed(folder: Path, name: str) -> None:
    messages = [(folder / f"before {name}-{rank}.txt").read_text() for rank in range(2)]
    assert messages == ["CircuitLassoError: rank 1 of 2 failed: ModelError: gone", "ModelError: gone"]


def leaving(rank: int, folder: Path) -> None:
    join_two(rank, folder / "left")
    ranks = as_ranks("world")
    with message_of(folder, "left", rank), ranks.together():
        ranks.count(1)
        if rank == 1:
            os._exit(0)  # as if killed: without a word to the other
        ranks.count(1)
    os._exit(0)


def test_a_process_that_was_killed_is_an_error_in_the_others(tmp_path: Path) -> None:
    as_two(leaving, tmp_path)
    said = (tmp_path / "left-0.txt").read_text()
    assert said.startswith("CircuitLassoError: another process is gone or can't be reached") and "checkpoint" in said


def test_an_error_in_one_process_is_raised_in_all(folder: Path) -> None:
    messages = [(folder / f"broken-{rank}.txt").read_text() for rank in range(2)]
    assert messages[1].startswith("ModelError") and "rank 1 of 2 failed: ModelError" in messages[0]


def test_processes_with_different_prompts_are_refused(folder: Path) -> None:
    for rank in range(2):
        assert "the processes differ in data" in (folder / f"other-data-{rank}.txt").read_text()


def test_without_torch_distributed_there_is_one_process() -> None:
    assert as_ranks(None) is ALONE and as_ranks(ALONE) is ALONE
    with under_torchrun() as ranks:
        assert ranks is ALONE
    with pytest.raises(tcl.InputError, match=r"`process_group` needs torch\.distributed"):
        as_ranks("world")
    with pytest.raises(tcl.InputError, match="`process_group` is 'all'"):
        tcl.circuit_lasso(architectures.small(), architectures.prompts(batch=4), process_group="all")


def test_alone_an_error_passes_through_unchanged() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, ALONE.together():
        raise error
    assert caught.value is error
    moments = Moments.empty(coords=1, nodes=2).add(torch.randn(5, 1, 2))
    assert ALONE.sum(moments.scatter) is moments.scatter and ALONE.gather({"a": moments.total})[0]["a"] is moments.total


def test_statistics_move_between_devices_whole() -> None:
    rows = {"samples": torch.ones(2, 3), "priority": torch.ones(2, dtype=torch.float64)}
    some = Statistics(
        {"nodes@0": Moments.empty(coords=1, nodes=2)}, {"pairs": torch.ones(3)}, rows, {"pilot": torch.eye(2)}
    )
    moved = some.to("meta")
    tensors = [*moved.sums.values(), *moved.rows.values(), *moved.fixed.values()]
    tensors += [part for moments in moved.moments.values() for part in (moments.shift, moments.total, moments.scatter)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.fresh().moments["nodes@0"].scatter.device.type == "meta"
