"""Comparing graphs: circuits, agreement, truth and costs are what they are by definition, for any graphs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_circuitlasso as tcl
from tests.formats.helpers import feature_graph, random_graph
from tl_circuitlasso.comparison import Comparison, compare
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

INDEX = component_index(n_layers=2, n_heads=2)
PAIRS = sorted((s, t) for s in INDEX.names for t in INDEX.names if INDEX.may_feed(s, t))
SCORES = st.lists(st.integers(-6, 6), min_size=len(PAIRS), max_size=len(PAIRS))


def graph_of(scores: list[int], cut: float) -> AttributionGraph:
    """Every allowed pair of a small model scored, those of at least `cut` kept; heads' edges go through a port."""
    ports = {pair: "qkv"[n % 3] if pair[1].startswith("a") else "" for n, pair in enumerate(PAIRS)}
    edges = {(*pair, ports[pair]): float(score) for pair, score in zip(PAIRS, scores)}
    return AttributionGraph.from_edges(INDEX, edges).threshold(cut)


@given(SCORES, SCORES, st.sampled_from([1, 3, 5]), st.integers(0, 1 << 16))
def test_figures_are_what_their_names_say(first: list[int], second: list[int], cut: int, seed: int) -> None:
    a, b = graph_of(first, cut), graph_of(second, 4)
    truth = {pair for pair, flag in zip(PAIRS, np.random.default_rng(seed).random(len(PAIRS)) < 0.3) if flag}
    truth = truth or set(PAIRS[:1])
    found = compare({"a": a, "b": b}, truth)
    if not a.kept.all():
        assert found.graphs["a"].kept_edges() == a.kept_edges()
    for name in ("a", "b"):
        cut_graph = found.graphs[name]
        expected = tcl.evaluate.structure(cut_graph, truth, PAIRS)
        row = found.table.loc[name]
        assert (row.edges, row.shd) == (cut_graph.n_kept, expected.shd)
        assert (row.precision, row.recall) == (expected.precision, expected.recall)
        assert row.auroc == pytest.approx(expected.auroc, nan_ok=True)
    one, two = found.graphs["a"].kept_edges(), found.graphs["b"].kept_edges()
    pair = found.pairs.iloc[0]
    assert (pair.both, pair.only_a, pair.only_b) == (len(one & two), len(one - two), len(two - one))
    if one | two:
        assert pair.jaccard == len(one & two) / len(one | two)
    assert found.equal == min(len(one), len(two)) and found.candidates == len(PAIRS)
    where = dict(zip(zip(found.overlap.source, found.overlap.target), found.overlap["where"]))
    assert {edge for edge, place in where.items() if place == "both"} == one & two
    assert {edge for edge, place in where.items() if place == "a only"} == one - two
    assert {edge for edge, place in where.items() if place == "truth only"} == truth - one - two
    assert {edge for edge, true in zip(where, found.overlap.true) if true} == truth


@given(SCORES, SCORES, SCORES, st.integers(1, 30))
def test_every_circuit_can_be_cut_to_the_same_size(a: list[int], b: list[int], c: list[int], size: int) -> None:
    graphs = {name: graph_of(scores, 2) for name, scores in zip("abc", (a, b, c))}
    found = compare(graphs, edges=size)
    assert set(found.table.edges) == {min(size, len(PAIRS))}
    for name, graph in graphs.items():
        own, taken = graph.kept_edges(), found.graphs[name].kept_edges()
        assert len(taken) == min(size, len(PAIRS)) and (taken <= own or own <= taken)
        scores = graph.pair_scores()
        pool = own if taken <= own else set(PAIRS) - own
        inside = [scores[edge] for edge in taken & pool]
        outside = [scores[edge] for edge in pool - taken]
        assert not inside or not outside or min(inside) >= max(outside)
    for a_name, b_name in itertools.combinations(graphs, 2):
        row = found.pairs.set_index(["a", "b"]).loc[(a_name, b_name)]
        assert row.jaccard == row.jaccard_top


@given(st.integers(0, 1 << 16), st.floats(0.1, 50.0), st.booleans())
def test_agreement_is_symmetric_and_blind_to_scale_and_sign(seed: int, factor: float, flip: bool) -> None:
    a = random_graph(2, 2, False, False, True, seed, 0.5)
    b = random_graph(2, 2, False, False, True, seed + 1, 0.5)
    scaled = replace(b, score=b.score * factor * (-1 if flip else 1))
    there = compare({"a": a, "b": b}).pairs.iloc[0]
    back = compare({"b": scaled, "a": a}).pairs.iloc[0]
    assert there.jaccard == pytest.approx(back.jaccard, nan_ok=True)
    assert there.rank_correlation == pytest.approx(back.rank_correlation, nan_ok=True)
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)


def test_a_graph_agrees_with_itself() -> None:
    graph = random_graph(2, 3, False, False, True, 0, 1.0)
    found = compare({"one": graph, "two": graph}).table.loc["two"]
    columns = ["jaccard", "jaccard_top", "rank_correlation", "rank_correlation_top"]
    assert list(found[columns]) == pytest.approx([1.0] * 4)


def test_a_ranking_is_cut_to_the_size_of_the_smallest_circuit() -> None:
    scores = list(range(1, len(PAIRS) + 1))
    ranking, ours = graph_of(scores, 0), graph_of(scores[::-1], len(PAIRS) - 4)
    assert ranking.kept.all() and ours.n_kept == 5
    found = compare({"ours": ours, "ranking": ranking})
    assert found.graphs["ranking"].kept_edges() == ranking.threshold(len(PAIRS) - 4).kept_edges()
    assert found.graphs["ours"].kept_edges() == ours.kept_edges()
    both = compare({"one": ranking, "two": ranking}, PAIRS[:7])
    assert set(both.table.edges) == {7}
    with pytest.raises(InputError, match="`edges`"):
        compare({"one": ranking, "two": ranking})


def test_ports_are_merged_and_kept_with_their_edge() -> None:
    edges = {("input", "a0.h0", "q"): 1.0, ("input", "a0.h0", "k"): -4.0, ("input", "a0.h0", "v"): 2.0}
    graph = AttributionGraph.from_edges(INDEX, {**edges, ("input", "m0"): 3.0}).threshold(2)
    other = AttributionGraph.from_edges(INDEX, {("input", "a0.h0"): 1.0, ("input", "m0"): 0.0}).threshold(1)
    found = compare({"ports": graph, "merged": other})
    assert list(found.overlap.loc[0, ["source", "target", "where", "ports"]]) == ["input", "a0.h0", "both", -4.0]
    assert torch.equal(found.graphs["ports"].kept, graph.kept)
    assert found.candidates == 2


def test_costs_are_read_from_provenance() -> None:
    graph = random_graph(1, 2, False, False, False, 0, 0.5)
    lasso = {"method": "CircuitLasso", "seconds": {"solve": 1.0, "total": 3.0}, "forward_passes": 40}
    passes = {"passes_per_prompt": {"forward": 1.25, "backward": 0.0}, "peak_mib": 12.5}
    facts = {
        "counted": lasso | passes,
        "of batches": lasso,
        "eap": {"method": "eap", "seconds": 2.5, "forward_passes": 2.0, "backward_passes": 1.0},
        "nothing": {"seconds": "soon", "forward_passes": True},
    }
    found = compare({name: replace(graph, provenance=own) for name, own in facts.items()}).table
    columns = ["seconds", "forward_passes", "backward_passes", "peak_mib"]
    rows = {name: list(found.loc[name, columns]) for name in facts}
    assert rows["counted"] == [3.0, 1.25, 0.0, 12.5]
    assert rows["of batches"][0] == 3.0 and np.isnan(rows["of batches"][1:]).all()
    assert rows["eap"][:3] == [2.5, 2.0, 1.0] and np.isnan(rows["nothing"]).all()


def test_graphs_can_be_made_and_measured_on_the_spot() -> None:
    graph = random_graph(1, 2, False, False, False, 0, 0.5)
    found = compare({"made": lambda: graph, "given": graph})
    assert found.table.loc["made", "seconds"] >= 0 and math.isnan(found.table.loc["given", "seconds"])
    assert "seconds" not in graph.provenance


def test_the_truth_may_be_a_graph() -> None:
    a, b = (random_graph(2, 2, False, False, True, seed, 1.5) for seed in (0, 1))
    found = compare({"a": a, "b": b}, a)
    assert found.table.loc["a", "shd"] == 0 and found.n_true == a.n_kept


def test_features_chosen_differently_are_compared_where_they_meet() -> None:
    one = feature_graph()
    first, *rest = one.index.blocks
    extra = Block(Site("hook", 0, hook="blocks.0.hook_mlp_out"), 1, (1, 2, 3))
    wider = NodeIndex(tuple(sorted((first, *rest, extra), key=lambda block: block.rank)))
    names = one.index.names
    edges = {
        (names[s], names[t]): score for s, t, score in zip(one.source.tolist(), one.target.tolist(), one.score.tolist())
    }
    other = AttributionGraph.from_edges(wider, edges | {("blocks.0.hook_mlp_out#2", "logits"): 9.0})
    found = compare({"one": one, "other": other}, edges=3)
    assert found.candidates == len(one) and found.table.loc["other", "jaccard"] == 1.0


# ---- on a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_demo() -> Comparison:
    demo = tcl.load_demo(prompts=64)
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    ours = tcl.circuit_lasso(demo.model, demo.tokens, positions="last", progress=False)
    return tcl.compare(
        {"ours": ours, "EAP": lambda: tcl.baselines.eap(demo.model, demo.tokens, demo.corrupted, metric)},
        demo.true_edges,
        model=demo.model,
        clean=demo.tokens,
        corrupted=demo.corrupted,
        metric=metric,
        seed=1,
    )


def test_faithfulness_on_the_model(on_the_demo: Comparison) -> None:
    table = on_the_demo.table
    assert set(on_the_demo.curves) == {"ours", "EAP", "random"}
    assert table.loc["ours", "faithfulness"] > 0.8 and table.loc["ours", "shd"] == 0
    assert table.loc["ours", "cpr"] == on_the_demo.curves["ours"].cpr
    assert table.loc["ours", "cpr"] > on_the_demo.curves["random"].cpr
    assert list(table.forward_passes.isna()) == [False, False] and table.loc["EAP", "backward_passes"] == 1


def test_it_shows_itself(on_the_demo: Comparison, tmp_path) -> None:
    assert "faithfulness" in repr(on_the_demo) and "empty graph's SHD is 6" in repr(on_the_demo)
    page = on_the_demo._repr_html_()
    assert page.count("<table") == 2 and "EAP only" in page
    axes = on_the_demo.plot(tmp_path / "figure.png", title="A title").axes
    assert len(axes) == 3 and (tmp_path / "figure.png").stat().st_size > 10_000
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == [f"{s} → {t}" for s, t in zip(on_the_demo.overlap.source, on_the_demo.overlap.target)]


def test_names_are_shown_as_text() -> None:
    graph = random_graph(1, 2, False, False, False, 0, 0.5)
    page = compare({"<script>": graph, "b": graph})._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_more_graphs_are_drawn_as_a_map(tmp_path) -> None:
    graphs = {f"graph {n}": random_graph(2, 3, False, False, True, n, 0.2) for n in range(4)}
    found = compare(graphs)
    figure = found.plot(tmp_path / "figure.svg")
    assert len(found.pairs) == 6 and len(figure.axes) == 2
    drawn = {text.get_text() for text in figure.axes[1].texts}
    assert {f"{value:.2f}" for value in found.pairs.jaccard} <= drawn
    assert isinstance(found.table, pd.DataFrame) and "more edges" in {t.get_text()[-10:] for t in figure.axes[0].texts}


# ---- what is refused ------------------------------------------------------------------------------------------------


def small(n_layers: int = 1, n_heads: int = 2) -> AttributionGraph:
    return random_graph(n_layers, n_heads, False, False, False, 0, 0.5)


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ({}, "at least two"),
        ({"one": small()}, "at least two"),
        ({"one": small(), "two": small(2)}, "different nodes.*'two' has a1.h0"),
        ({"one": small(), "two": small(1, 3)}, "'two' has a0.h2"),
        ({"one": small(), "features": feature_graph()}, "share no candidate edge"),
        ({"one": small(), "two": lambda: None}, "`graphs\\['two'\\]` is a NoneType"),
    ],
)
def test_graphs_that_cannot_be_compared(graphs, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(graphs)


def test_graphs_of_other_weights_are_told_by_their_hash() -> None:
    one, two = (replace(small(), provenance={"config_hash": name}) for name in "ab")
    with pytest.raises(InputError, match="different models"):
        compare({"one": one, "two": two})


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([], "`true_edges`.*at least one"),
        ([("input", "a0.h0", "q")], "ports are merged"),
        ([("input", "a9.h9")], "names 'a9.h9', which the graph 'one' doesn't know"),
        ([("logits", "input")], "logits->input, which isn't a candidate"),
    ],
)
def test_a_truth_that_cannot_be_used(truth, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare({"one": small(), "two": small()}, truth)


def test_candidates_can_be_given() -> None:
    shared = [("input", "a0.h0"), ("a0.h0", "m0")]
    found = compare({"one": small(), "two": small(2)}, candidate_edges=shared, edges=1)
    assert found.candidates == 2
    with pytest.raises(InputError, match=r"`candidate_edges` names 'a1\.h0', which the graph 'one'"):
        compare({"one": small(), "two": small(2)}, candidate_edges=[("input", "a1.h0")], edges=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": 0}, "`edges` is 0"),
        ({"model": object()}, "`clean` is missing"),
        ({"clean": torch.zeros(2, 2), "metric": len}, "`model` is missing"),
        ({"batch_size": 3}, "`batch_size` is for measuring"),
    ],
)
def test_options_that_cannot_be_used(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare({"one": small(), "two": small()}, **options)
