"""An experiment in the model's place, and what every verb that takes one does with its arguments."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import component_index

CLEAN = architectures.prompts(batch=4)
CORRUPTED = CLEAN.flip(0)
METRIC = tcl.LogitDiff([3, 4, 5, 6], [7, 8, 9, 10])
ON_GRAPHS = ("faithfulness", "completeness", "minimality", "confirm", "curve", "tests")
METHODS = {**baselines.METHODS, **{name: getattr(baselines, name) for name in ("relp", "gradient_activation")}}
METHODS |= {name: getattr(baselines, name) for name in ("integrated_gradients", "node_scores", "exact_neurons")}
VERBS = {name: getattr(evaluate, name) for name in (*ON_GRAPHS, "curves", "magnitude", "report", "steer")} | METHODS


@pytest.fixture(scope="module")
def model() -> Any:
    return architectures.hooked("gpt2")


@pytest.fixture(scope="module")
def graph() -> tcl.AttributionGraph:
    edges = {("input", "m0"): 3.0, ("m0", "a1.h1"): 2.0, ("a1.h1", "logits"): 1.0, ("m0", "logits"): 0.5}
    return tcl.AttributionGraph.from_edges(component_index(n_layers=2, n_heads=4), edges)


@pytest.fixture(scope="module")
def experiment(model: Any) -> tcl.Experiment:
    return tcl.Experiment(model, CLEAN, CORRUPTED, METRIC, "mean", mean_over="corrupted", batch_size=3, progress=False)


def test_it_stands_in_the_place_of_the_model_and_all_that_it_holds(
    model: Any, graph: tcl.AttributionGraph, experiment: tcl.Experiment
) -> None:
    data, options = (CLEAN, CORRUPTED, METRIC), {"mean_over": "corrupted", "batch_size": 3, "progress": False}
    by_hand = evaluate.faithfulness(model, graph, *data, "mean", **options)
    assert evaluate.faithfulness(experiment, graph).faithfulness == by_hand.faithfulness
    found = baselines.eap_ig(experiment, steps=2)
    expected = baselines.eap_ig(model, *data, steps=2, ablation="mean", **options)
    assert torch.equal(found.score, expected.score)
    assert found.provenance["ablation"] == "mean" and found.provenance["target"] == "LogitDiff"


@pytest.mark.parametrize("name", ON_GRAPHS)
def test_every_test_of_a_graph_takes_one(name: str, graph: tcl.AttributionGraph, experiment: tcl.Experiment) -> None:
    own = {"curve": {"sizes": [2, 40]}, "tests": {"circuits": 10}}.get(name, {})
    assert VERBS[name](experiment, graph, **own) is not None


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("exact", "acdc", "eap-ig-activations")])
def test_every_method_takes_one(name: str, experiment: tcl.Experiment) -> None:
    own = {"exact_neurons": {"neurons": ["m0#1"]}, "bootstrap-eap-ig": {"resamples": 2}}.get(name, {})
    assert METHODS[name](replace(experiment, batch_size=4), **own)


def test_reports_comparisons_and_steering_take_one(graph: tcl.AttributionGraph, experiment: tcl.Experiment) -> None:
    assert "magnitude" in evaluate.report(experiment, {"some": graph}).table.index
    graphs = {"some": graph, "other": graph.top_k(2)}
    assert "faithfulness" in tcl.compare(graphs, model=experiment).table.columns
    assert evaluate.steer(experiment, graph, ["m0"], 1).change == pytest.approx(0, abs=1e-6)


def test_what_it_holds_is_not_given_again(graph: tcl.AttributionGraph, experiment: tcl.Experiment) -> None:
    for again in ({"clean": CLEAN}, {"metric": METRIC}, {"ablation": "patch"}, {"batch_size": 3}, {"progress": True}):
        with pytest.raises(InputError, match=f"`{next(iter(again))}` is given to faithfulness\\(\\) beside"):
            evaluate.faithfulness(experiment, graph, **again)
    with pytest.raises(InputError, match="`corrupted` is given to eap"):
        baselines.eap(experiment, None, CORRUPTED)
    with pytest.raises(InputError, match="`prompts` is given to steer"):
        evaluate.steer(experiment, graph, ["m0"], 1, CLEAN)


def test_another_choice_is_checked_again_and_prompts_are_read_once(model: Any, experiment: tcl.Experiment) -> None:
    with pytest.raises(InputError, match="`ablation` is 'noise'"):
        replace(experiment, ablation="noise")
    with pytest.raises(InputError, match="`batch_size` is 0"):
        replace(experiment, batch_size=0)
    stream = tcl.Experiment(model, iter([CLEAN[:3], CLEAN[3:]]), CORRUPTED, METRIC, batch_size=2)
    assert [len(batch.rows) for batch in stream.pairs] == [2, 2]
    other = replace(stream, ablation="zero", batch_size=3)
    assert [len(batch.rows) for batch in other.pairs] == [3, 1]
    assert torch.equal(baselines.eap(stream).score, baselines.eap(model, CLEAN, CORRUPTED, METRIC, batch_size=2).score)


def test_what_a_verb_needs_is_asked_for(model: Any, graph: tcl.AttributionGraph) -> None:
    with pytest.raises(InputError, match="`metric` is missing"):
        evaluate.faithfulness(tcl.Experiment(model, CLEAN, CORRUPTED), graph)
    for lacking in ({}, {"ablation": "mean", "mean_over": "corrupted"}):
        alone = tcl.Experiment(model, CLEAN, metric=METRIC, **lacking)
        for verb in (lambda some: evaluate.faithfulness(some, graph), baselines.eap, evaluate.magnitude):
            with pytest.raises(InputError, match="`corrupted` is missing"):
                verb(alone)
        assert len(baselines.relp(alone, basis="head"))
    fitted = tcl.Experiment(model, CLEAN, metric=METRIC, ablation=evaluate.Optimal())
    with pytest.raises(InputError, match="`ablation` 'optimal'"):
        baselines.eap(fitted)


@pytest.mark.parametrize("name", VERBS)
def test_an_unknown_keyword_is_answered_by_the_verb_that_was_called(name: str) -> None:
    own = VERBS[name].__name__
    with pytest.raises(TypeError, match=rf"^{own}\(\) got an unexpected keyword argument 'progres'; did you mean 'pr"):
        VERBS[name](None, None, progres=True)


@pytest.mark.parametrize("name", VERBS)
def test_signatures_name_every_option(name: str) -> None:
    shown = inspect.signature(VERBS[name]).parameters
    assert {"attention_mask", "batch_size", "progress"} <= set(shown)
    assert not any(one.kind is one.VAR_KEYWORD for one in shown.values())


Measure = Callable[[Any, tcl.AttributionGraph, Any], float]
MEASURES: dict[str, Measure] = {
    "faithfulness": lambda m, g, by: evaluate.faithfulness(m, g, CLEAN, CORRUPTED, by).faithfulness,
    "curve": lambda m, g, by: evaluate.curve(m, g, CLEAN, CORRUPTED, by, sizes=[2, 40]).cpr,
    "minimality": lambda m, g, by: float(evaluate.minimality(m, g, CLEAN, CORRUPTED, by)["drop"].sum()),
    "confirm": lambda m, g, by: float(evaluate.confirm(m, g, CLEAN, CORRUPTED, by).extras["effect"].sum()),
    "steer": lambda m, g, by: evaluate.steer(m, g, ["m0"], 0, CLEAN, by).change,
    "eap": lambda m, g, by: float(baselines.eap(m, CLEAN, CORRUPTED, by).score.abs().sum()),
    "relp": lambda m, g, by: float(baselines.relp(m, CLEAN, CORRUPTED, by, basis="head").score.abs().sum()),
    "compare": lambda m, g, by: float(
        tcl.compare({"a": g, "b": g.top_k(1)}, model=m, clean=CLEAN, corrupted=CORRUPTED, metric=by).table["cpr"].sum()
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_logit_difference_is_a_metric_as_it_is_a_target(name: str, model: Any, graph: tcl.AttributionGraph) -> None:
    by_hand = evaluate.logit_diff([3, 4, 5, 6], [7, 8, 9, 10])
    expected = MEASURES[name](model, graph, by_hand)
    assert MEASURES[name](model, graph, METRIC) == pytest.approx(expected, rel=1e-5)


def test_verbs_that_took_the_graph_first_still_do(model: Any, graph: tcl.AttributionGraph) -> None:
    found = [evaluate.confirm(*ends, CLEAN, CORRUPTED, METRIC) for ends in ((model, graph), (graph, model))]
    assert torch.equal(found[0].extras["effect"], found[1].extras["effect"])


def test_the_confirmed_circuit_takes_an_experiment_too() -> None:
    model = architectures.small()
    ragged = [torch.randint(31, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (6, 8, 7)]
    others = [row[::-1] for row in ragged]
    target = tcl.LogitDiff([3, 4, 5], [7, 8, 9])
    experiment = tcl.Experiment(model, ragged, others, target, progress=False)
    found = baselines.METHODS["lasso+confirm"](experiment, budget=2)
    plain = baselines.METHODS["lasso+confirm"](model, ragged, others, target, budget=2, progress=False)
    torch.testing.assert_close(found.score, plain.score)
    assert found.kept_edges() == plain.kept_edges()
