"""The five tests of a circuit, and agreement over resamples: against counts by hand, true circuits and random ones."""

import pytest
import torch
from scipy.stats import binom

import tl_circuitlasso as tcl
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate import hypotheses
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


@pytest.fixture(scope="module")
def demo():
    return tcl.load_demo(prompts=16)


@pytest.fixture(scope="module")
def truth(demo) -> AttributionGraph:
    index = component_index(n_layers=3, n_heads=4)
    return AttributionGraph.from_edges(index, dict.fromkeys(demo.true_edges, 1.0))


def run(demo, graph, **options):
    metric = evaluate.logit_diff(demo.correct, demo.incorrect)
    options = {"circuits": 40, **options}
    return evaluate.tests(demo.model, graph, demo.tokens, demo.corrupted, metric, **options)


def test_a_true_circuit_is_sufficient_and_a_random_one_is_not(demo, truth):
    found = run(demo, truth)
    assert list(found.table.index) == [
        "equivalence", "independence", "minimality", "sufficiency", "partial necessity",
    ]  # fmt: skip
    assert found.table.loc["sufficiency", "p_value"] == pytest.approx(0.9**40)
    assert found.table.loc["sufficiency", "passes"]
    wins = round(40 * found.table.loc["partial necessity", "statistic"])
    assert found.table.loc["partial necessity", "p_value"] == pytest.approx(binom.sf(wins - 1, 40, 0.9))
    assert len(found.edges) == truth.n_kept and found.edges.effect.is_monotonic_decreasing
    assert found.table.loc["minimality", "p_value"] == found.edges.p_value.max()
    assert found.forward_passes > 2 * 40 + 2 * 40 + truth.n_kept
    assert "sufficiency" in str(found)
    once, again = (run(demo, truth, circuits=10).table for _ in range(2))
    assert once.equals(again)  # the seed draws the same circuits
    random = baselines.random_edges(demo.model, seed=5).top_k(truth.n_kept)
    judged = run(demo, random)
    assert not judged.table.loc["sufficiency", "passes"] and not judged.table.loc["minimality", "passes"]


def test_a_useless_edge_is_found(demo, truth):
    useless = ("input", "a0.h0") if ("input", "a0.h0") not in demo.true_edges else ("input", "a0.h1")
    edges = {**dict.fromkeys(demo.true_edges, 1.0), useless: 1.0, (useless[1], "logits"): 1.0}
    found = run(demo, AttributionGraph.from_edges(truth.index, edges))
    rows = found.edges.set_index(["source", "target"])
    assert rows.loc[useless, "p_value"] > 0.05 and not found.table.loc["minimality", "passes"]


def test_random_circuits_have_the_size_and_only_edges_on_paths(demo):
    layout = hypotheses.EdgeLayout(tcl.models.adapt(demo.model).shape)
    draw = hypotheses._Random(layout, 0)
    circuits = torch.cat([draw.circuit(size) for size in (12, 12, 30)])
    assert circuits.flatten(1).sum(1).tolist() == [12, 12, 30]
    assert torch.equal(hypotheses.prune(circuits, layout), circuits)
    larger, without = draw.inflated(circuits[:1])
    assert int((larger & ~without).sum()) == 1 and bool((circuits[0] <= without).all())


def test_random_circuits_of_pairs_keep_all_ports_or_none(demo, truth):
    """Else the circuits that one without ports has to beat would be of heads that read q here and v there."""
    layout = hypotheses.EdgeLayout(tcl.models.adapt(demo.model).shape)
    draw = hypotheses._Random(layout, 0, merged=True)
    circuits = torch.cat([draw.circuit(12) for _ in range(5)])
    assert torch.equal(hypotheses.prune(circuits, layout), circuits)
    nodes = torch.tensor(layout.targets()[0])
    for circuit in circuits:
        assert draw.size(circuit[None]) == 12
        for node in nodes.unique():
            ports = circuit[:, nodes == node][layout.mask()[:, nodes == node].any(1)]
            assert bool((ports.all(1) == ports.any(1)).all())
    larger, without = draw.inflated(circuits[:1])
    assert draw.size(larger[None]) == draw.size(without[None]) + 1
    kept = hypotheses.prune(hypotheses.kept_matrix(truth, layout), layout)
    assert draw.size(kept) == truth.n_kept < int(kept.sum())


def test_p_values_are_those_of_counts():
    wins = torch.arange(100) < 97
    assert hypotheses._beats("x", "", wins, 0.9, 0.05)["p_value"] == pytest.approx(binom.sf(96, 100, 0.9))
    model = torch.zeros(30, dtype=torch.float64)
    worse = hypotheses._equivalence(model - 1, model, 0.1, 0.05, 1.0)
    assert worse["statistic"] == 0.5 and not worse["passes"]
    assert worse["p_value"] == pytest.approx(0.6**30 + 0.4**30)
    same = hypotheses._equivalence(model + 1e-9, model, 0.1, 0.05, 1.0)
    assert same["statistic"] == 0 and same["p_value"] == 1 and same["passes"]


def test_equivalence_counts_prompts_exactly():
    """Both tails at the edge of the margin, for every count of wins; a share that is rounded misses by one."""
    for n in (5, 10, 30):
        for wins in range(n + 1):
            model = torch.zeros(n, dtype=torch.float64)
            circuit = torch.where(torch.arange(n) < wins, 1.0, -1.0).double()
            row = hypotheses._equivalence(circuit, model, 0.1, 0.05, 1.0)
            more = max(wins, n - wins)
            tails = binom.pmf(range(more, n + 1), n, 0.6).sum() + binom.pmf(range(n - more + 1), n, 0.6).sum()
            assert row["p_value"] == pytest.approx(min(1.0, tails))
            assert row["statistic"] == pytest.approx(abs(wins / n - 0.5))


def test_independence_is_rejected_where_there_is_none():
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)
    curved = hypotheses._independence(values.square(), values, 0.05, 0)  # no correlation, but no independence
    assert curved["p_value"] < 0.01 and not curved["passes"]
    shuffled = values[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    assert hypotheses._independence(shuffled, values, 0.05, 0)["passes"]
    constant = hypotheses._independence(torch.ones(40, dtype=torch.float64), values, 0.05, 0)
    assert constant["p_value"] == 1 and constant["passes"]


def test_what_cannot_be_tested_is_refused(demo, truth):
    for wrong in ({"quantile": 1.0}, {"margin": 0.5}, {"level": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            run(demo, truth, **wrong)
    with pytest.raises(InputError, match="every edge"):
        run(demo, baselines.random_edges(demo.model))
    metric = evaluate.logit_diff(demo.correct, demo.incorrect)
    with pytest.raises(InputError, match="`circuits`"):
        evaluate.tests(demo.model, truth, demo.tokens, demo.corrupted, metric, circuits=3)
