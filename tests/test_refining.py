"""The second look: what was kept for nothing is dropped, and edges that stay have the cost that was measured."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.discover.looks import Looks
from tl_circuitlasso.discover.refining import MANY_EDGES, refine
from tl_circuitlasso.models import Prompts, adapt
from tl_circuitlasso.models.bases import Component
from tl_circuitlasso.models.collect import Plan
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.reread import Costs, Reading, reread

IDLE = {("input", "m1"), ("m1", "logits"), ("input", "a0.h3"), ("a0.h3", "logits")}  # no part of what was planted


@pytest.fixture(scope="module")
def demo() -> Demo:
    return tcl.load_demo(prompts=64)


@pytest.fixture(scope="module")
def first(demo: Demo) -> tcl.AttributionGraph:
    """The first look."""
    return tcl.circuit_lasso(
        demo.model, demo.tokens, target=demo.target, positions="last", refined=False, progress=False
    )


def keeping(graph: tcl.AttributionGraph, edges: set[tuple[str, str]]) -> tcl.AttributionGraph:
    names = graph.index.names
    return graph.keep([(names[s], names[t]) in edges for s, t in zip(graph.source.tolist(), graph.target.tolist())])


def looked(demo: Demo, graph: tcl.AttributionGraph, **options: Any) -> tuple[tcl.AttributionGraph, int]:
    adapter = adapt(demo.model)
    sample = list(Prompts(adapter, demo.tokens, positions="last"))
    plan = Plan(ReadDesign(Component()), demo.target, last=True)
    return refine(adapter, sample, plan, graph, **{"prompts": len(demo.tokens), **options})


def test_edges_that_cost_nothing_alone_are_dropped(demo: Demo, first: tcl.AttributionGraph) -> None:
    assert not IDLE & demo.true_edges
    graph, passes = looked(demo, keeping(first, demo.true_edges | IDLE))
    assert graph.kept_edges() == demo.true_edges
    assert graph.provenance["second_look"] == f"{len(IDLE)} edges dropped" and passes >= 2


def test_what_stays_has_the_cost_that_was_measured(demo: Demo, first: tcl.AttributionGraph) -> None:
    kept = keeping(first, demo.true_edges)
    graph, _ = looked(demo, kept)
    adapter = adapt(demo.model)
    batches = list(Prompts(adapter, demo.tokens, positions="last"))
    options = {"last": True, "probe": None, "draws": 1}
    costs = [
        reread(adapter, batch, Reading.all(demo.true_edges), demo.target, seed=number, **options)
        for number, batch in enumerate(batches)
    ]
    pairs = sum(one.pairs for one in costs)
    before, after = kept.pair_scores(), graph.pair_scores()
    for edge in demo.true_edges:
        measured = sum(one.edges[edge] * one.pairs for one in costs) / pairs
        assert after[edge] == pytest.approx(measured, rel=1e-4)
    assert any(abs(after[edge] - before[edge]) > 0.01 * before[edge] for edge in demo.true_edges)
    others = [edge for edge in before if edge not in demo.true_edges]
    assert all(after[edge] == before[edge] for edge in others)


def test_it_is_left_out_where_it_would_be_no_evidence(demo: Demo, first: tcl.AttributionGraph) -> None:
    """And the provenance says so: the graph stays as it was."""
    true = keeping(first, demo.true_edges)
    louder = replace(true, score=true.score * 1000)
    every = first.keep(torch.ones_like(first.kept))
    assert len(every.kept_edges()) <= MANY_EDGES
    for graph, told in ((louder, "misses the behaviour"), (keeping(first, set()), "0 pairs of components")):
        same, _ = looked(demo, graph)
        assert told in same.provenance["second_look"]
        assert torch.equal(same.kept, graph.kept) and torch.equal(same.score, graph.score)


def test_the_default_looks_again(demo: Demo, first: tcl.AttributionGraph) -> None:
    options = {"target": demo.target, "positions": "last", "progress": False}
    graph = tcl.circuit_lasso(demo.model, demo.tokens, **options)
    assert "second_look" in graph.provenance and "second_look" not in first.provenance
    assert graph.kept_edges() <= first.kept_edges()
    assert graph.provenance["forward_passes"] > first.provenance["forward_passes"]


class Killed(Exception):
    """What a run is stopped by, between two batches of its second look."""


def test_a_second_look_that_was_killed_goes_on_behind_its_last_batch(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit as if it had never been stopped; a finished one is only read."""
    made: list[int] = []

    def counted(*given: Any, stop: int, **options: Any) -> Any:
        if len(made) == stop:
            raise Killed
        made.append(options["seed"])
        return reread(*given, **options)

    def found(file: Path | None, stop: int, target: Any = demo.target) -> tcl.AttributionGraph:
        made.clear()
        monkeypatch.setattr("tl_circuitlasso.discover.refining.reread", partial(counted, stop=stop))
        options = {"positions": "last", "batch_size": 16, "checkpoint": file, "progress": False}
        return tcl.circuit_lasso(demo.model, demo.tokens, target=target, **options)

    whole = found(None, stop=-1)
    every = len(made)
    assert every >= 4
    with pytest.raises(Killed):
        found(tmp_path / "run.safetensors", stop=2)
    resumed = found(tmp_path / "run.safetensors", stop=-1)
    assert len(made) == every - 2 and resumed.provenance["forward_passes"] < whole.provenance["forward_passes"]
    assert torch.equal(resumed.score, whole.score) and torch.equal(resumed.kept, whole.kept)
    assert resumed.provenance["second_look"] == whole.provenance["second_look"]
    found(tmp_path / "run.safetensors", stop=-1)
    assert not made


def test_what_was_said_of_something_else_is_asked_again(tmp_path: Path) -> None:
    reading = Reading.all({("input", "m0"), ("m0", "logits")})
    costs = Costs(*({edge: number / 3 for number, edge in enumerate(reading.edges)} for _ in range(2)), {"m0": 0.7},
                  dict.fromkeys(reading.edges, -1 / 3), 5)  # fmt: skip
    looks = Looks.beside(tmp_path / "run.safetensors", {"model": "this"})
    looks.store(3, costs, reading, "prompts")
    assert looks.known([3, 4], reading, "prompts") == {3: costs}
    assert looks.known([3], reading, "other prompts") == {} == replace(looks, identity={}).known([3], reading, "x")
    other = Looks.beside(tmp_path / "run.safetensors", {"model": "another"})
    assert other.known([3], reading, "prompts") == {}
    assert looks.known([3], Reading.all({("input", "logits")}), "prompts") == {}


def test_a_later_round_measures_again_what_led_to_an_edge_that_is_gone() -> None:
    """And nothing else: what an edge costs depends on what it feeds alone."""
    kept = {("input", "m0"), ("m0", "a1.h0"), ("a1.h0", "logits"), ("input", "a1.h1"), ("a1.h1", "logits")}
    after = Reading.all(kept).after(kept - {("a1.h0", "logits")})
    assert after.edges == (("input", "m0"), ("m0", "a1.h0"))  # they fed it; a1.h0 itself feeds nothing any more
    assert after.nodes == ("m0",) and set(after.kept) == kept - {("a1.h0", "logits")}
    assert Reading.all(kept).after(kept).edges == ()


def test_rounds_that_measure_less_find_what_measuring_everything_does(
    demo: Demo, first: tcl.AttributionGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = keeping(first, demo.true_edges | IDLE)
    short, _ = looked(demo, dense)
    monkeypatch.setattr(Reading, "after", lambda self, kept: Reading.all(kept))
    whole, _ = looked(demo, dense)
    torch.testing.assert_close(short.score, whole.score, rtol=1e-5, atol=1e-9)
    assert torch.equal(short.kept, whole.kept)
