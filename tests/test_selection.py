"""Circuits of k edges: every edge on a path, by three rules, each against a slow rule that can't be wrong."""

import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_graph import random_graph
from tl_circuitlasso.errors import InputError, SolveError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.graph.selection import HOW, Edges, grown, levels, on_path, optimum, ranked

SMALL = component_index(n_layers=1, n_heads=2)

seeds, sizes = st.integers(0, 10_000), st.integers(0, 40)


def tied(graph: AttributionGraph) -> AttributionGraph:
    """The same graph with many equal scores."""
    from dataclasses import replace

    return replace(graph, score=(graph.score * 2).round())


def edges_of(graph: AttributionGraph) -> Edges:
    return Edges(graph.source, graph.target, graph.index.ranks)


def size(graph: AttributionGraph, ports: bool) -> int:
    return int(graph.kept.sum()) if ports else graph.n_kept


def slowly_grown(graph: AttributionGraph, score: torch.Tensor) -> list[int]:
    inside, order = set(edges_of(graph).sinks.nonzero().flatten().tolist()), []
    while open_ := [e for e in range(len(graph)) if int(graph.target[e]) in inside and e not in order]:
        best = max(open_, key=lambda e: (float(score[e]), -e))
        order.append(best)
        inside.add(int(graph.source[best]))
    return order


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=10)
@given(seed=seeds, k=sizes, ports=st.booleans(), equal=st.booleans())
def test_no_chosen_edge_hangs_and_there_are_k(how: str, seed: int, k: int, ports: bool, equal: bool) -> None:
    graph = random_graph(seed)
    graph = (tied(graph) if equal else graph).top_k(k, how=how, ports=ports)
    assert torch.equal(graph.prune().kept, graph.kept)
    assert size(graph, ports) <= k
    if size(graph, ports) < k:  # then nothing is left out between the nodes that are inside
        inside = graph.kept_nodes() | {"input", "logits"}
        assert graph.kept_edges() == {edge for edge in graph.candidate_edges() if set(edge) <= inside}


@settings(max_examples=8)
@given(seeds, st.integers(1, 30), st.booleans())
def test_top_edges_are_those_that_a_threshold_and_pruning_leave(seed: int, k: int, ports: bool) -> None:
    """Cut at every place of the ranking and prune: the largest that fits is inside, and only its nodes' edges join."""
    graph = random_graph(seed)
    order = ranked(graph.score.abs())
    cuts = [graph.keep(torch.zeros(len(graph), dtype=torch.bool).index_fill(0, order[:n], True)) for n in range(47)]
    pruned = [cut.prune() for cut in cuts]
    largest = [one for one in pruned if size(one, ports) <= k][-1]
    chosen = graph.top_k(k, ports=ports)
    assert bool((largest.kept <= chosen.kept).all())
    assert chosen.kept_nodes() <= largest.kept_nodes() | {"input", "logits"}


@settings(max_examples=10)
@given(seeds, st.booleans())
def test_levels_are_the_cuts_after_which_pruning_leaves_an_edge(seed: int, equal: bool) -> None:
    graph = random_graph(seed)
    graph = tied(graph) if equal else graph
    for order in (ranked(graph.score), grown(edges_of(graph), graph.score.abs())):
        level = levels(edges_of(graph), order)
        for n in range(0, len(order) + 1, 7):
            cut = torch.zeros(len(graph), dtype=torch.bool).index_fill(0, order[:n], True)
            assert torch.equal(level < n, on_path(edges_of(graph), cut))


@settings(max_examples=10)
@given(seeds, st.booleans())
def test_growing_takes_the_best_edge_into_what_is_inside(seed: int, equal: bool) -> None:
    graph = random_graph(seed, index=SMALL)
    score = (tied(graph) if equal else graph).score
    assert grown(edges_of(graph), score).tolist() == slowly_grown(graph, score)


def test_growing_leaves_out_what_leads_nowhere_and_starts_at_every_sink() -> None:
    nodes = component_index(n_layers=2, n_heads=1)
    graph = AttributionGraph.from_edges(
        nodes, {("input", "m0"): 0.3, ("m0", "m1"): 0.2, ("input", "a1.h0"): 0.9, ("m0", "logits"): 0.1}
    )
    assert grown(edges_of(graph), graph.score).tolist() == [2, 1, 0, 3]  # m1 and a1.h0 feed nothing: they are sinks
    none = torch.zeros(0, dtype=torch.long)
    assert grown(Edges(none, none, nodes.ranks), torch.zeros(0)).tolist() == []


@settings(max_examples=6)
@given(seeds, st.integers(1, 5))
def test_the_integer_programme_finds_the_best_circuit_there_is(seed: int, k: int) -> None:
    graph = random_graph(seed, ports=False, index=SMALL)  # 13 edges: all subsets can be looked at
    edges, score = edges_of(graph), graph.score.abs()
    best = 0.0
    for count in range(1, k + 1):
        for some in itertools.combinations(range(len(graph)), count):
            kept = torch.zeros(len(graph), dtype=torch.bool).index_fill(0, torch.tensor(some), True)
            if torch.equal(on_path(edges, kept), kept):
                best = max(best, float(score[kept].sum()))
    found = optimum(edges, score, k)
    assert float(score[found].sum()) == pytest.approx(best, rel=1e-9)
    for how in ("top", "greedy"):
        assert float(score[graph.top_k(k, how=how).kept].sum()) <= best + 1e-9


def test_what_the_integer_programme_is_not_for_is_refused() -> None:
    graph = random_graph()
    with pytest.raises(InputError, match="negative"):
        optimum(edges_of(graph), graph.score, 5)
    with pytest.raises(SolveError, match="greedy"):
        optimum(edges_of(graph), graph.score.abs(), 5, seconds=0.0)
    many = component_index(n_layers=12, n_heads=12)
    graph = AttributionGraph.from_adjacency(many, many.allowed().double())
    large = Edges(*(part.repeat(3) for part in (graph.source, graph.target)), graph.index.ranks)
    with pytest.raises(InputError, match="20,000"):
        optimum(large, torch.ones(len(large)), 5)


def test_a_circuit_that_fits_no_path_is_empty_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    chain = {("input", "m0"): 3.0, ("m0", "m1"): 2.0, ("m1", "logits"): 1.0}
    graph = AttributionGraph.from_edges(component_index(n_layers=2, n_heads=1), chain)
    for how in HOW:
        with caplog.at_level(logging.WARNING):
            assert graph.top_k(2, how=how).n_kept == 0
        assert "whole paths" in caplog.text
        caplog.clear()
        assert graph.top_k(np.int64(3), how=how).n_kept == 3 and not caplog.text


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(InputError, match="top, greedy, milp"):
        random_graph().top_k(3, how="best")
