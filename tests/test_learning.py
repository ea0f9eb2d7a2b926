"""From statistics to a graph, without a model: relevance, certificates, and what strengths mean."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.statistics import Statistics, add_folds, empty_folds
from tl_circuitlasso.discover import growing, learning_read
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.discover.garrote import Asked, Child, aligned, children, garrotes, steadiness
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index
from tl_circuitlasso.graph.relevance import propagate


def activation_statistics(*, samples: int = 400, folds: int = 1, seed: int = 0) -> Statistics:
    """Two layers of three neurons: m1#0 = m0#0, m1#1 = m0#1 - m0#2, m1#2 = noise; target = 2 m1#1."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    second = torch.cat([first[:, :1], first[:, 1:2] - first[:, 2:], noise], dim=1) + 5.0
    nodes, target = torch.cat([first, second], dim=1), 2 * second[:, 1:2]
    index = NodeIndex(
        (Block(Site("mlp", 0), 0, (0, 1, 2)), Block(Site("mlp", 1), 1, (0, 1, 2)), Block(Site("target"), 2))
    )
    moments = empty_folds("nodes", folds, coords=1, nodes=6, device="cpu")
    moments |= empty_folds("target", folds, coords=1, nodes=7, device="cpu")
    fold = torch.arange(samples) % folds
    add_folds(moments, "nodes", nodes[:, None], fold, folds)
    add_folds(moments, "target", torch.cat([nodes, target], dim=1)[:, None], fold, folds)
    meta = {
        "index": index.to_json(),
        "columns": [["m0", 3], ["m1", 3]],
        "target_columns": 1,
        "design": "activation",
        "folds": folds,
    }
    return Statistics(moments=moments, meta=meta)


CIRCUIT = {("m0#1", "m1#1"), ("m0#2", "m1#1"), ("m1#1", "target")}


@pytest.mark.parametrize("strength", ["auto", "ebic", "mcp", "cv", "stability", 0.05, 0.5])
def test_every_rule_finds_a_clean_circuit(strength: Any) -> None:
    graph = learn(activation_statistics(folds=10), strength=strength)
    assert graph.kept_edges() >= CIRCUIT
    assert ("m0#0", "m1#0") not in graph.kept_edges()  # true, but it leads nowhere
    if strength != "cv":
        assert graph.kept_edges() == CIRCUIT
    matrix = graph.adjacency()
    assert float(matrix[1, 4]) > 0 > float(matrix[2, 4])
    assert bool(graph.certificate.converged.all()) and float(graph.certificate.gap.max()) < 1e-3


def test_relevance_is_what_separates_fitting_from_mattering() -> None:
    graph = learn(activation_statistics(), strength=0.005)
    weights = {(row.source, row.target): row for row in graph.edge_table().itertuples()}
    assert weights["m0#0", "m1#0"].weight > 0.9 and weights["m0#0", "m1#0"].score < 1e-3
    assert weights["m0#1", "m1#1"].score == pytest.approx(0.5, abs=0.1)
    assert weights["m1#1", "target"].score == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize("strength", ["auto", "ebic", "mcp"])
def test_rules_report_what_is_explained_without_shrinkage(strength: str) -> None:
    matrix = learn(activation_statistics(), strength=strength).adjacency(absolute=True)
    assert float(matrix[4, 6]) == pytest.approx(1.0, abs=0.01)
    assert float(matrix[1, 4]) == pytest.approx(0.5, abs=0.1) == float(matrix[2, 4])


@pytest.mark.parametrize("strength", ["cv", "stability"])
def test_resampling_needs_folds(strength: str) -> None:
    with pytest.raises(InputError, match="`strength`"):
        learn(activation_statistics(folds=1), strength=strength)


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_samples(samples: int) -> None:
    with pytest.raises(InputError, match="`tokens`"):
        learn(activation_statistics(samples=samples))


# ---- design read ----------------------------------------------------------------------------------------------------


def read_statistics(weak: float = 0.0, folds: int = 10) -> Statistics:
    """One layer, one head: input -> a0.h0 (v) -> m0 -> logits, and `weak` of the cost from input to logits directly."""
    index = component_index(n_layers=1, n_heads=1)

    def spread(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).expand(folds, 1, -1).clone()

    pairs = torch.full((folds,), 10.0, dtype=torch.float64)
    sums = {
        "pairs": pairs,
        "count": pairs,
        "node": 10 * spread(1.0, 1.0, 1.0)[:, 0],
        "cost/a0/": 10 * spread(1.0),
        "cost/a0/q": 10 * spread(0.0),
        "cost/a0/k": 10 * spread(0.001),
        "cost/a0/v": 10 * spread(1.0),
        "cost/m0/": 10 * spread(0.0, 1.0),
        "cost/target/": 10 * spread(weak, 0.0, 1.0),
    }
    size = torch.tensor([0.0, 1e-6, 1.0, 0.0, 1.0, weak, 0.0, 1.0]).sqrt()  # q, k, v; into m0; into the target
    drawn = torch.randn(10 * folds, len(size), generator=torch.Generator().manual_seed(0))
    rows = {"contributions": drawn * size, "weight": torch.ones(10 * folds, dtype=torch.float64)}
    meta = {"index": index.to_json(), "design": "read", "cost_folds": folds, "number": False, "contrast": False}
    return Statistics(sums=sums, rows=rows, meta=meta)


CHAIN = {("input", "a0.h0"), ("a0.h0", "m0"), ("m0", "logits")}


def test_a_chain_of_contributions_is_kept() -> None:
    graph = learn(read_statistics())
    assert graph.kept_edges() == CHAIN
    table = graph.edge_table()
    assert "v" in set(table[table.kept].port) and "q" not in set(table[table.kept].port)
    assert table.score.max() == pytest.approx(1.0) and (table[table.kept].stability == 1).all()
    assert float(graph.adjacency(port="k")[0, 1]) == pytest.approx(0.001)


def test_where_costs_have_no_gap_the_regression_says_how_many_and_size_and_alignment_which(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_cost = learn(read_statistics(1e-4))
    monkeypatch.setattr(learning_read, "MANY_PAIRS", 0)
    decided = learn(read_statistics(1e-4))
    assert (by_cost.provenance["chosen_by"], decided.provenance["chosen_by"]) == ("cost", "regression")
    weighed = {(int(s), int(t)) for s, t in zip(decided.source[decided.weight > 0], decided.target[decided.weight > 0])}
    value = by_cost.score.abs() * (0.4 + 0.6 * aligned(children(read_statistics(1e-4), decided.index)))
    grown = replace(decided, score=value).top_k(len(weighed), how="greedy")
    assert decided.kept_edges() == grown.kept_edges() >= CHAIN
    least = learning_read.RANDOM_PARTNERS.left_out
    torch.testing.assert_close(decided.score, by_cost.score * (least + (1 - least) * decided.weight))
    assert bool((decided.extras["stability"][value == 0] == 0).all())


def test_without_counterparts_too_the_regression_decides_where_costly_edges_carry_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few prompts of a real model differ in so much that a handful of edges stands out, which carries little."""
    some = read_statistics(0.5)
    assert learn(some).provenance["chosen_by"] == "cost"
    monkeypatch.setattr(growing, "ENOUGH", 1.0)
    assert learn(some).provenance["chosen_by"] == "regression"


@pytest.mark.parametrize("contrast", [True, False])
def test_random_partners_ask_more_of_an_edge_than_counterparts(monkeypatch: pytest.MonkeyPatch, contrast: bool) -> None:
    """One part in 20,000 of the target's squared difference: enough between counterparts, of which it needs 30,000."""
    monkeypatch.setattr(learning_read, "MANY_PAIRS", 0)
    some = read_statistics(1e-4)
    rows = some.rows["contributions"]
    rows[:, 5] = (1 / 20_000) ** 0.5 * rows[:, 7]  # from the input to the target, beside what comes through the MLP
    graph = learn(replace(some, meta={**some.meta, "contrast": contrast}))
    row = next(row for row in graph.edge_table().itertuples() if (row.source, row.target) == ("input", "logits"))
    assert (row.weight > 0) is contrast


@pytest.mark.parametrize(("weak", "kept"), [(0.5, True), (0.05, True), (1e-4, False)])
def test_an_edge_counts_from_about_one_percent(weak: float, kept: bool) -> None:
    assert (("input", "logits") in learn(read_statistics(weak)).kept_edges()) is kept


def test_strength_one_is_empty_and_zero_is_dense() -> None:
    assert learn(read_statistics(0.5), strength=1.0).n_kept == 0
    dense = learn(read_statistics(0.5), strength=0.0)
    assert float(dense.weight.max()) == pytest.approx(1.0, abs=1e-3) and dense.kept_edges() >= CHAIN


def test_no_pairs_no_graph() -> None:
    empty = read_statistics()
    sums = {key: torch.zeros_like(value) for key, value in empty.sums.items()}
    with pytest.raises(InputError, match="`tokens`"):
        learn(replace(empty, sums=sums))


def test_contributions_without_cost_make_an_empty_graph() -> None:
    some = read_statistics()
    sums = {key: value if key == "pairs" else torch.zeros_like(value) for key, value in some.sums.items()}
    graph = learn(replace(some, sums=sums))
    assert graph.n_kept == 0 and bool(graph.score.isfinite().all())


def test_bootstrap_doubts_what_few_folds_show() -> None:
    some = read_statistics(0.0)
    some.sums["cost/target/"][0, 0, 0] = 3.0  # one fold of ten shows three percent of the cost there
    graph = learn(some, seed=1)
    row = next(row for row in graph.edge_table().itertuples() if (row.source, row.target) == ("input", "logits"))
    assert 0 <= row.stability < 0.9
    again = learn(some, seed=1)
    assert graph.edge_table().equals(again.edge_table())


# ---- relevance ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 500), size=st.integers(2, 7))
def test_relevance_is_the_best_product_of_shares_over_paths(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(size, size, generator=generator, dtype=torch.float64).triu(1)
    source, target = share.nonzero(as_tuple=True)
    found = propagate(source, target, share[source, target], ranks=torch.arange(size), roots=torch.tensor([size - 1]))

    def best(node: int) -> float:
        if node == size - 1:
            return 1.0
        return max((float(share[node, child]) * best(child) for child in range(node + 1, size)), default=0.0)

    expected = [float(share[s, t]) * best(int(t)) for s, t in zip(source.tolist(), target.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_parents_that_work_alike_each_keep_their_own_share() -> None:
    """Without the bound at 1 one of the two would stand for both, and which one would change with the prompts."""
    whole = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat([0.5 * whole, 0.4 * whole, 1e-4 * whole.flip(0)], dim=1)
    empty = torch.zeros(1, 3, dtype=torch.float64)
    child = Child(1, (0,), torch.arange(3), rows, empty, None, empty, empty)
    asked = Asked("auto", 1e-3, 200.0, 1e-6, decides=True)
    (solution,) = garrotes([child], asked)
    assert solution.value[:2, 0].min() > 0.9 and float(solution.value.max()) <= 1 and float(solution.value[2]) == 0
    assert bool(solution.converged.all())


def test_an_edge_is_steady_as_far_as_its_size_is() -> None:
    rows = torch.ones(100, 3)
    rows[1:, 1] = 0.0  # all that the second edge does, it does on one prompt of a hundred
    empty = torch.zeros(1, 3, dtype=torch.float64)
    child = Child(1, (0,), torch.arange(3), rows, empty, None, empty, empty)
    share = steadiness([child], torch.tensor([1.2, 1.2, 0.8]).double(), torch.Generator().manual_seed(0))
    assert share[0] == 1 and 0.4 < float(share[1]) < 0.85 and share[2] == 0  # 1 - (1 - 1/100)^100 is .63


def test_an_edge_is_aligned_as_far_as_it_works_for_its_child() -> None:
    whole = torch.tensor([1.0, -1.0, 2.0, -2.0])
    halves = torch.tensor([1.0, 1.0, 1.0, 1.0])  # with the child in two rows, as much against it in the others
    rows = torch.stack([2 * whole, halves, -0.5 * whole, torch.zeros(4)], dim=1)
    empty = torch.zeros(1, 4, dtype=torch.float64)
    child = Child(1, (0,), torch.arange(4), rows, empty, None, empty, empty)
    found = aligned([child])
    assert found[0] == 1 and found[2] == 0 and found[3] == 0 and 0 < float(found[1]) < 0.5
