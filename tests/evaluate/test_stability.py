"""Agreement of circuits over resamples and over wordings, and verdicts that are calibrated on known circuits."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.stability import Stability
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


def test_resamples_keep_the_metric_with_its_prompts():
    """Each prompt carries its own number in the metric: what a method sees must be its prompts' own."""
    clean = torch.arange(6)[:, None].expand(6, 3)
    seen = []

    def method(model, clean, corrupted, metric, **options):
        value = metric(torch.zeros(len(clean), 3, 9), torch.arange(len(clean)))
        seen.append((clean[:, 0].tolist(), value.tolist(), corrupted[:, 0].tolist(), options))
        return AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})

    evaluate.stability(method, None, clean, clean + 10, lambda logits, rows: rows * 100, resamples=4, steps=7)
    assert len(seen) == 4 and len({tuple(drawn) for drawn, *_ in seen}) > 1
    for drawn, values, corrupted, options in seen:
        assert values == [100 * row for row in drawn] and corrupted == [row + 10 for row in drawn]
        assert options == {"steps": 7}


def test_agreement_of_methods_that_always_and_never_say_the_same():
    model = architectures.hooked("gpt2")
    clean, corrupted = (architectures.prompts(length=5, batch=4, seed=seed) for seed in (0, 9))
    draws = iter(range(100))

    def chance(model, clean, corrupted, metric):
        return baselines.random_edges(model, seed=next(draws))

    same = evaluate.stability(baselines.random_edges, model, clean, corrupted, None, resamples=20, k=20)
    assert same.jaccard == 1 and set(same.edges["share"]) == {1.0} and same.edges.verdict.eq("in").all()
    assert len(same.edges) == same.sizes[0] > 0 and len(set(same.sizes)) == 1
    other = evaluate.stability(chance, model, clean, corrupted, None, resamples=20, k=20)
    assert other.jaccard < 0.5 and max(other.sizes) <= 20
    assert set(other.edges.verdict) <= {"out", "abstain", "in"} and (other.edges.verdict == "out").any()


def test_jaccard_by_hand():
    both = AttributionGraph.from_edges(
        component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0, ("m0", "logits"): 1.0}
    )
    a, b, c = both.keep([True, False]), both, both.keep([False, False])
    assert evaluate.agreement([a, b, c]) == pytest.approx((0.5 + 0 + 0) / 3)
    assert evaluate.agreement([a, a, c, c]) == pytest.approx((1 + 0 * 4) / 5)  # c with c says nothing
    with pytest.warns(UserWarning, match="every circuit is empty"):
        assert math.isnan(evaluate.agreement([c, c]))
    with pytest.raises(InputError, match="two or more"):
        evaluate.agreement([])


def test_bad_resamples_are_refused():
    for wrong in ({"resamples": 1}, {"confidence": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            evaluate.stability(baselines.eap, None, torch.zeros(2, 2), None, None, **wrong)


def test_answers_go_with_their_prompts():
    """A LogitDiff stays one, so that a method may take it as its target; words too."""
    seen = []

    def method(model, clean, corrupted, metric):
        seen.append((clean[:, 0].tolist(), metric))
        return AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})

    clean = torch.arange(6)[:, None].expand(6, 3)
    evaluate.stability(method, None, clean, clean, tcl.LogitDiff(list(range(6)), [9] * 6), resamples=3)
    evaluate.stability(method, None, clean, clean, tcl.LogitDiff(list("abcdef"), ["z"] * 6), resamples=3)
    evaluate.stability(method, None, clean, clean, tcl.LogitDiff(3, 4), resamples=3)
    for drawn, metric in seen[:3]:
        assert metric.correct.tolist() == drawn and metric.incorrect.tolist() == [9] * 6
    for drawn, metric in seen[3:6]:
        assert [row[0] for row in metric.correct] == ["abcdef"[row] for row in drawn]
    assert all(metric.everyone and metric.correct.tolist() == [3] for _, metric in seen[6:])


# ---- wordings -------------------------------------------------------------------------------------------------------


def told_apart(edges):
    """A method whose circuit has an edge for each kind of prompt that it sees."""

    def method(model, clean, corrupted, metric):
        index = component_index(n_layers=2, n_heads=1)
        return AttributionGraph.from_edges(index, {edges[int(kind)]: 1.0 for kind in clean[:, 0].unique()})

    return method


def test_a_method_that_goes_by_the_wording_agrees_on_shuffled_prompts_only():
    edges = [("input", "m0"), ("input", "m1")]
    clean = torch.tensor([0, 1] * 8)[:, None].expand(16, 3)
    groups = ["when" if kind == 0 else "then" for kind in clean[:, 0].tolist()]
    found = evaluate.wording(told_apart(edges), None, clean, None, None, groups)
    assert found.jaccard == 0 and found.shuffled == 1.0 and found.sizes == {"when": 1, "then": 1}
    assert found.edges.to_dict("list") == {
        "source": ["input", "input"], "target": ["m0", "m1"], "when": [True, False], "then": [False, True],
    }  # fmt: skip
    same = evaluate.wording(told_apart([edges[0]] * 2), None, clean, None, None, groups)
    assert same.jaccard == same.shuffled == 1.0


def test_each_wording_sees_its_prompts_and_their_answers():
    seen = []

    def method(model, clean, corrupted, metric):
        seen.append((clean[:, 0].tolist(), metric.correct.tolist()))
        return AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})

    clean = torch.arange(5)[:, None].expand(5, 2)
    evaluate.wording(method, None, clean, None, tcl.LogitDiff(list(range(5)), [9] * 5), [1, 2, 1, 2, 1], shuffles=2)
    assert seen[:2] == [([0, 2, 4], [0, 2, 4]), ([1, 3], [1, 3])]
    assert len(seen) == 6 and all(prompts == answers for prompts, answers in seen)
    assert [len(prompts) for prompts, _ in seen[2:]] == [3, 2, 3, 2]


def test_bad_wordings_are_refused():
    clean = torch.zeros(3, 2)
    for groups, words in ((["a", "b"], "2 entries for 3"), (["a"] * 3, "one wording")):
        with pytest.raises(InputError, match=words):
            evaluate.wording(baselines.eap, None, clean, clean, None, groups)


# ---- calibration ----------------------------------------------------------------------------------------------------


def steady(shares: dict[str, float]) -> Stability:
    """Edges from the input, by the share of resamples that keep them."""
    kept = {target: share for target, share in shares.items() if share > 0}
    table = pd.DataFrame({"source": "input", "target": list(kept), "share": list(kept.values())})
    return Stability(1.0, table, (len(kept),) * 2, frozenset(("input", target) for target in shares))


def drawn(rng, true, false):
    """Shares of true edges near 1, of false ones near 0; circuits are clear or less so."""
    clear = rng.uniform(0.75, 1.0)
    shares = np.concatenate([rng.binomial(20, clear, true), rng.binomial(20, 1 - clear, false)]) / 20
    found = steady({f"m{i}": float(share) for i, share in enumerate(shares)})
    return found, {("input", f"m{i}") for i in range(true)}


def test_verdicts_keep_their_promise_on_circuits_that_were_not_learnt_from():
    """Few circuits, their edges alike within each: on average no verdict is wrong oftener than it may."""
    rng = np.random.default_rng(0)
    wrong_in, wrong_out, abstained = [], [], []
    for _ in range(60):
        learnt = evaluate.calibrate([drawn(rng, 5, 40) for _ in range(12)], confidence=0.9)
        counts = learnt.judge(*drawn(rng, 5, 40))
        called, lost = counts.sum(axis=1), counts.loc["out", "true"]
        wrong_in.append(counts.loc["in", "false"] / max(1, called["in"]))
        wrong_out.append(max(lost / 5, lost / max(1, called["out"])))
        abstained.append(called["abstain"] / 45)
    assert np.mean(wrong_in) <= 0.1 and np.mean(wrong_out) <= 0.1
    assert np.mean(abstained) < 0.5


def test_thresholds_go_as_far_as_the_errors_of_known_circuits_allow():
    """By hand: of 19 circuits so many have a false, or a true, edge at .5; (1 + errors) / 20 may be .1."""
    true = {("input", "m0")}
    clean = (steady({"m0": 1.0, "m1": 0.5, "m2": 0.0}), true | {("input", "m1")})
    fault = (steady({"m0": 1.0, "m1": 0.5, "m2": 0.0}), true)
    for faults, keep in ((2, 0.5), (3, 1.0)):  # half of what each fault calls in is false
        learnt = evaluate.calibrate([clean] * (19 - faults) + [fault] * faults)
        assert (learnt.keep, learnt.circuits, learnt.true_edges) == (keep, 19, 38 - faults)
    for lost, drop in ((2, 0.5), (3, 0.0)):  # half of the true edges of each are called out at .5
        learnt = evaluate.calibrate([fault] * (19 - lost) + [clean] * lost)
        assert learnt.drop == drop and learnt.keep == 1.0


def test_a_circuit_is_one_draw_however_many_edges_it_has():
    many = steady({f"m{i}": 1.0 for i in range(500)} | {f"m{i}": 0.0 for i in range(500, 600)})
    truth = {("input", f"m{i}") for i in range(500)}
    with pytest.raises(InputError, match=r"has 8 circuits: at confidence 0\.9 thresholds rest on 9 or more"):
        evaluate.calibrate([(many, truth)] * 8)
    assert evaluate.calibrate([(many, truth)] * 9).keep == 1.0
    assert evaluate.calibrate([(many, truth)] * 4, confidence=0.8).drop == 0.0


def test_a_method_that_knows_nothing_calls_nothing_in():
    rng = np.random.default_rng(1)
    known = []
    for _ in range(20):
        found = steady({f"m{i}": float(share) for i, share in enumerate(rng.random(100))})
        known.append((found, {("input", f"m{i}") for i in range(20)}))
    learnt = evaluate.calibrate(known)
    assert learnt.keep is None and (learnt.true_edges, learnt.false_edges) == (400, 1600)
    assert set(learnt.verdicts(known[0][0]).verdict) <= {"abstain", "out"}


def test_thresholds_do_not_cross_and_verdicts_are_of_every_candidate():
    everything = steady({f"m{i}": 1.0 for i in range(60)} | {f"m{i}": 0.0 for i in range(60, 90)})
    learnt = evaluate.calibrate([(everything, {("input", f"m{i}") for i in range(60)})] * 9)
    assert (learnt.keep, learnt.drop) == (1.0, 0.0)
    table = learnt.verdicts(steady({"m0": 1.0, "m1": 0.4, "m2": 0.0}))
    assert table.verdict.tolist() == ["in", "abstain", "out"] and table.target.tolist() == ["m0", "m1", "m2"]
    alike = [(steady({f"m{i}": 0.5 for i in range(40)}), {("input", f"m{i}") for i in range(38)})] * 40
    assert evaluate.calibrate(alike).keep == 0.5 and evaluate.calibrate(alike).drop is None


def test_bad_calibrations_are_refused():
    found = steady({"m0": 1.0})
    for known, options, words in (
        ([], {}, "`known` has 0 circuits"),
        ([(found, [("input", "m7")])] * 9, {}, "couldn't have kept"),
        ([(found, [])], {"confidence": 1}, "`confidence`"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.calibrate(known, **options)
