"""`evaluate.structure`: hand-counted graphs, scikit-learn as an independent oracle, and the statistics over cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate import bootstrap, paired_test, structure, summary
from tl_circuitlasso.evaluate.structure import auprc, auroc
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index

INDEX = component_index(n_layers=1, n_heads=2)
CANDIDATES = {
    ("input", "a0.h0"),
    ("input", "a0.h1"),
    ("input", "m0"),
    ("a0.h0", "m0"),
    ("a0.h1", "m0"),
    ("a0.h0", "logits"),
    ("a0.h1", "logits"),
    ("m0", "logits"),
}
TRUTH = {("input", "a0.h0"), ("a0.h0", "m0"), ("m0", "logits")}


def graph_of(scores: dict, threshold: float = 0.5) -> AttributionGraph:
    return AttributionGraph.from_edges(INDEX, scores).threshold(threshold)


def test_counts_by_hand():
    found = structure(
        graph_of({("input", "a0.h0"): 2.0, ("a0.h0", "m0"): -0.9, ("input", "m0"): 0.6, ("m0", "logits"): 0.1}),
        TRUTH,
        CANDIDATES,
    )
    assert (found.shd, found.empty_shd, found.kept, found.outside) == (2, 3, 3, 0)
    assert (found.precision, found.recall, found.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found.random_shd == pytest.approx(3 + 3 - 2 * 3 * 3 / 8)
    assert found.auroc == pytest.approx(1 - 1 / 15)  # only input->m0 (0.6) is above a true edge, m0->logits (0.1)
    assert found.random_auprc == 3 / 8
    assert found.node_shd == 1 and found.empty_node_shd == 4  # logits isn't touched by a kept edge


def test_the_truth_itself_is_perfect_and_the_empty_graph_scores_its_size():
    perfect = structure(graph_of(dict.fromkeys(TRUTH, 1.0)), TRUTH, CANDIDATES)
    assert (perfect.shd, perfect.node_shd, perfect.auroc, perfect.auprc, perfect.f1) == (0, 0, 1.0, 1.0, 1.0)
    empty = structure(graph_of(dict.fromkeys(TRUTH, 1.0), threshold=2.0), TRUTH, CANDIDATES)
    assert empty.shd == empty.empty_shd == 3 and empty.precision == empty.recall == empty.f1 == 0.0


def test_edges_outside_the_candidates_count_only_as_outside():
    scores = dict.fromkeys(TRUTH, 1.0)
    with_outside = structure(graph_of({**scores, ("input", "logits"): 9.0}), TRUTH, CANDIDATES)
    without = structure(graph_of(scores), TRUTH, CANDIDATES)
    assert with_outside.outside == 1 and without.outside == 0
    assert with_outside.shd == without.shd and with_outside.auroc == without.auroc


def test_ports_merge_for_pairs_and_count_apart_for_triples():
    graph = graph_of({("input", "a0.h0", "q"): 0.1, ("input", "a0.h0", "k"): -3.0, ("m0", "logits", ""): 1.0})
    pairs = structure(graph, {("input", "a0.h0"), ("m0", "logits")}, CANDIDATES)
    assert pairs.shd == 0
    triples = {("input", "a0.h0", port) for port in "qkv"} | {("m0", "logits", "")}
    apart = structure(graph, {("input", "a0.h0", "q"), ("m0", "logits", "")}, triples)
    assert apart.shd == 2  # k is kept and false, q is true and not kept


def test_true_nodes_can_be_given():
    graph = graph_of(dict.fromkeys(TRUTH, 1.0))
    found = structure(graph, TRUTH, CANDIDATES, true_nodes={"input", "a0.h0", "logits"})
    assert found.node_shd == 1  # m0 is found but isn't in the given circuit


def test_all_candidates_true_has_no_auroc():
    found = structure(graph_of(dict.fromkeys(TRUTH, 1.0)), TRUTH, TRUTH)
    assert math.isnan(found.auroc) and found.as_dict()["auroc"] is None and found.auprc == 1.0


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_rankings_agree_with_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    score, label = np.array([s for s, _ in pairs], float), np.array([y for _, y in pairs])
    if label.any():
        assert auprc(score, label) == pytest.approx(metrics.average_precision_score(label, score))
    if label.any() and not label.all():
        assert auroc(score, label) == pytest.approx(metrics.roc_auc_score(label, score))


@given(st.dictionaries(st.sampled_from(sorted(CANDIDATES)), st.floats(-2, 2), max_size=8))
def test_shd_is_the_hamming_distance_of_edge_indicators(scores):
    graph = graph_of(scores)
    found = structure(graph, TRUTH, CANDIDATES)
    kept = graph.kept_edges()
    assert found.shd == sum((edge in kept) != (edge in TRUTH) for edge in CANDIDATES)


@pytest.mark.parametrize(
    ("truth", "candidates", "message"),
    [
        ([], CANDIDATES, "`true_edges` is empty"),
        (TRUTH, [], "`candidate_edges` is empty"),
        ([("input", "logits")], CANDIDATES, "isn't in `candidate_edges`"),
        ([("input", "a9.h9")], [("input", "a9.h9")], "'a9.h9'"),
        ([("input", "a0.h0", "x")], [("input", "a0.h0", "x")], "port 'x'"),
        ([("input", "a0.h0"), ("input", "a0.h0", "q")], CANDIDATES, "mixes lengths"),
    ],
)
def test_bad_input_names_the_argument(truth, candidates, message):
    with pytest.raises(InputError) as caught:
        structure(graph_of(dict.fromkeys(TRUTH, 1.0)), truth, candidates)
    assert message in str(caught.value)


def test_an_unknown_true_node_is_an_error():
    with pytest.raises(InputError, match="`true_nodes`"):
        structure(graph_of(dict.fromkeys(TRUTH, 1.0)), TRUTH, CANDIDATES, true_nodes={"m7"})


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        interval = bootstrap(rng.normal(size=30).tolist(), level=0.9, draws=500)
        inside += interval.low <= 0 <= interval.high
    assert 0.80 <= inside / 200 <= 0.97


def test_paired_test_is_exact_on_small_samples():
    # Of 2^4 sign patterns only all plus and all minus reach the observed mean: p = 2/16.
    assert paired_test([2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0]).p_value == pytest.approx(2 / 16)
    same = paired_test([1.0, 2.0], [1.0, 2.0])
    assert same.difference == 0.0 and same.p_value == 1.0


def test_paired_test_of_many_cases_draws_patterns():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=40)
    assert paired_test((noise + 3).tolist(), noise.tolist()).p_value < 1e-3
    assert paired_test(noise.tolist(), rng.permutation(noise).tolist()).p_value > 0.2


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_statistics_refuse_bad_values(values):
    with pytest.raises(InputError):
        bootstrap(values)


def test_paired_test_needs_equal_lengths():
    with pytest.raises(InputError, match="same cases"):
        paired_test([1.0], [1.0, 2.0])


def test_summary_has_means_with_intervals():
    cases = {"a": structure(graph_of(dict.fromkeys(TRUTH, 1.0)), TRUTH, CANDIDATES)}
    cases["b"] = structure(graph_of({("input", "m0"): 1.0}), TRUTH, CANDIDATES)
    assert summary(cases)["shd"].mean == pytest.approx((0 + 4) / 2)


def test_the_graphs_own_candidates_are_the_default() -> None:
    index = component_index(n_layers=1, n_heads=2)
    edges = {("input", "a0.h0", "q"): 1.0, ("input", "a0.h0", "v"): 0.2, ("a0.h0", "logits", ""): 0.5}
    graph = AttributionGraph.from_edges(index, edges).threshold(0.4)
    for truth in ([("input", "a0.h0")], [("input", "a0.h0", "q")]):
        own = {edge[: len(truth[0])] for edge in edges}
        assert structure(graph, truth) == structure(graph, truth, own)
    with pytest.raises(InputError, match="true_edges"):
        structure(graph, [("input", "logits")])
