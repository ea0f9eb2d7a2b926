"""Circuits of neurons from one call: planted neurons are found, attention is seen, edges add up, misuse is named."""

import copy

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt, neuron_edges, outcome
from tl_circuitlasso.models.neuron_edges import direct_effects
from tl_circuitlasso.models.neuron_scores import Batch, BySweep, Pass, Scoring, goal_gradient
from tl_circuitlasso.models.neuron_sweep import SECANT, Ends, unembedded, wanted
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.neurons import links

PROMPTS = 8
TARGET = tcl.LogitDiff([3] * PROMPTS, [4] * PROMPTS)


def pair(length=6):
    return (architectures.prompts(length=length, batch=PROMPTS, seed=seed) for seed in (0, 3))


def circuit(model, clean, corrupted=None, **options):
    options = {"target": TARGET, "basis": "neuron", "design": "read", "progress": False, **options}
    return tcl.circuit_lasso(model, clean, corrupted=corrupted, **options)


def scores(graph):
    return dict(zip((graph.index.names[i] for i in graph.source.tolist()), graph.score.tolist()))


@pytest.mark.parametrize("paired", [True, False])
def test_only_neurons_that_write_are_found(paired):
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    planted = {"m0#3", "m0#17", "m1#5"}
    for layer, block in enumerate(model.blocks):
        keep = torch.tensor([f"m{layer}#{neuron}" in planted for neuron in range(40)])
        block.mlp.W_out.data[~keep] = 0.0
    graph = circuit(model, clean, corrupted if paired else None)
    found = scores(graph)
    assert {name for name, score in found.items() if abs(score) > 1e-12} == planted
    assert graph.kept_nodes() <= planted | {"logits"} and graph.kept_edges()


def test_a_neuron_that_only_attention_reads_is_found_at_its_position():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    model.blocks[1].mlp.W_out.data.zero_()
    corrupted[:, -3:] = clean[:, -3:]  # the prompts differ in early positions alone
    graph = circuit(model, clean, corrupted, basis=tcl.Neuron(reference="corrupted"))
    best = graph.edge_table().source[0]
    early = graph.node_info[best]["by_position"]
    assert "0" not in early and abs(early["2"]) > 0  # the first token is the same in all prompts
    assert sum(early.values()) == pytest.approx(graph.node_info[best]["contribution"])


def test_scores_are_what_patching_single_neurons_does():
    """In the last layer the secant of the final norm is all that is approximate, and pairs differ a little only."""
    model, (clean, _) = architectures.hooked("gpt2", dtype=torch.float64), pair()
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] - 3 + 1) % 28 + 3
    graph = circuit(model, clean, corrupted, basis=tcl.Neuron(reference="corrupted"))
    own, other = (model.run_with_cache(tokens)[1] for tokens in (clean, corrupted))
    full = difference(model(clean))
    truth = {}
    for layer in (0, 1):
        name = f"blocks.{layer}.mlp.hook_post"
        for neuron in range(40):

            def patch(post, hook, name=name, neuron=neuron):
                post[:, :, neuron] = other[name][:, :, neuron]
                return post

            truth[f"m{layer}#{neuron}"] = float(
                full - difference(model.run_with_hooks(clean, fwd_hooks=[(name, patch)]))
            )
    assert own[name].shape == other[name].shape
    mine, exact = (torch.tensor([values[name] for name in truth]) for values in (scores(graph), truth))
    assert torch.corrcoef(torch.stack([mine, exact]))[0, 1] > 0.97


def difference(logits):
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


def test_batches_and_padding_change_nothing():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    whole, parts = (circuit(model, clean, corrupted, batch_size=size) for size in (32, 3))
    assert whole.index == parts.index and torch.allclose(whole.score, parts.score)
    pads = torch.full((PROMPTS, 2), 2)
    longer = [torch.cat([pads, tokens], 1) for tokens in (clean, corrupted)]
    mask = torch.cat([pads == 0, clean >= 0], 1)
    padded = circuit(model, *longer, attention_mask=mask)
    assert torch.allclose(whole.score, padded.score)
    for name in whole.kept_nodes() - {"logits"}:  # places are counted from the first real token
        ours, theirs = ([place["at"] for place in graph.node_info[name]["contexts"]] for graph in (whole, padded))
        assert ours == theirs, name
    assert [padded.provenance[name] for name in ("forward_passes", "backward_passes", "sweeps")] == [2.0, 0.0, 1.0]


def test_one_pass_against_the_mean_is_what_two_passes_give():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    graph = circuit(model, clean, corrupted, batch_size=3)
    scoring = Scoring(adapt(model), lambda logits, batch: 8 * difference(logits), "neuron", "mean")
    batch = Batch(clean, corrupted, torch.ones_like(clean, dtype=torch.bool), torch.arange(PROMPTS))
    own, other = (
        adapt(model).run(tokens, None, {*wanted(scoring.adapter), "logits", *scoring.keys})
        for tokens in (clean, corrupted)
    )
    mean = {key: other[key].mean(0) for key in scoring.keys}
    found = dict(BySweep(SECANT, alone=False).multipliers(Pass(scoring, batch, 1.0, own, other)))
    expected = torch.cat([(found[key] * (own[key] - mean[key])).sum((0, 1)) / PROMPTS for key in scoring.keys])
    assert torch.allclose(torch.tensor([scores(graph)[f"m{i // 40}#{i % 40}"] for i in range(80)]).double(), expected)


def test_the_difference_is_the_target_s():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    graph = circuit(model, clean, corrupted)
    assert graph.provenance["difference"] == pytest.approx(
        float(difference(model(clean)) - difference(model(corrupted)))
    )


def test_answers_are_one_for_all_or_several_a_prompt():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    by = {name: circuit(model, clean, corrupted, target=target) for name, target in {
        "each": TARGET,
        "all": tcl.LogitDiff(3, 4),
        "more": tcl.LogitDiff([[3, 5]] * PROMPTS, [[4]] * PROMPTS),
        "other": tcl.LogitDiff(5, 4),
    }.items()}  # fmt: skip
    own = {name: graph.provenance["difference"] for name, graph in by.items()}
    assert own["all"] == own["each"] and scores(by["all"]) == scores(by["each"])
    assert own["more"] == pytest.approx((own["each"] + own["other"]) / 2)
    expected = {name: (scores(by["each"])[name] + score) / 2 for name, score in scores(by["other"]).items()}
    assert scores(by["more"]) == pytest.approx(expected)


def test_without_a_target_the_two_tokens_that_runs_differ_about_are_compared():
    model, (clean, corrupted) = architectures.hooked("llama", dtype=torch.float64), pair()
    graph = circuit(model, clean, corrupted, target=None, positions="last")
    own, other = (model(tokens)[:, -1] for tokens in (clean, corrupted))
    plus, minus = outcome.contrast(own, other)
    rows = torch.arange(PROMPTS)
    change = (own - other)[rows, plus] - (own - other)[rows, minus]
    assert graph.provenance["difference"] == pytest.approx(float(change.mean()))


def test_random_pairs_count_from_the_lower_target_to_the_higher():
    """Over a random cycle signed differences cancel; oriented ones don't."""
    model, (clean, _) = architectures.hooked("llama", dtype=torch.float64), pair()
    graph = circuit(model, clean)
    assert graph.provenance["difference"] > 0.1 and graph.n_kept < len(graph)


def test_graphs_go_into_files_and_explanations(tmp_path):
    model, (clean, corrupted) = architectures.hooked("llama", tokenizer=architectures.tokenizer()), pair()
    graph = circuit(model, clean, corrupted)
    graph.save(tmp_path / "g.json")
    again = tcl.AttributionGraph.load(tmp_path / "g.json")
    assert again.index == graph.index and torch.equal(again.score, graph.score)
    text = str(again.explain(again.edge_table().source[0]))
    assert "promotes" in text and "contexts" in text and "w" in text


def test_the_largest_circuit_is_the_model():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    metric = tcl.evaluate.logit_diff(TARGET.correct, TARGET.incorrect)
    graph = circuit(model, clean, corrupted)
    options = {"mean_over": "corrupted", "ablation": "mean"}
    found = tcl.evaluate.curve(model, graph, clean, corrupted, metric, sizes=[1, 40, 80], **options)
    assert found.sizes == (1, 40, 80) and found.faithfulness[-1] == pytest.approx(1.0, abs=1e-4)
    assert found.shares == (1 / 80, 0.5, 1.0)
    with pytest.raises(InputError, match="only 80 nodes"):
        tcl.evaluate.curve(model, graph, clean, corrupted, metric, sizes=[10, 81], **options)
    outputs = tcl.baselines.relp(model, clean, corrupted, metric, basis="mlp_out")
    made = tcl.evaluate.curve(model, outputs, clean, corrupted, metric, sizes=[1, 48], **options)
    assert made.faithfulness[-1] == pytest.approx(1.0, abs=1e-4)


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "pythia"])
def test_what_flows_into_a_neuron_adds_up_to_what_it_contributes(family):
    model = architectures.hooked(family, dtype=torch.float64)
    clean, corrupted = pair()
    adapter, mask = adapt(model), torch.ones_like(clean, dtype=torch.bool)
    keys = {"logits", "resid_pre.0", *wanted(adapter)}
    own, other = (adapter.run(tokens, mask, keys) for tokens in (clean, corrupted))
    ends = Ends(adapter, own, other, mask, position_ids(mask))
    batch = Batch(clean, corrupted, mask, torch.arange(PROMPTS))
    goal = lambda logits, batch: (logits[:, -1, 3] - logits[:, -1, 4]).sum()  # noqa: E731
    _, at_logits = goal_gradient(goal, own["logits"], batch)
    start = unembedded(adapter, own["logits"], other["logits"], at_logits)
    effects = direct_effects(ends, start, {0: list(range(40)), 1: list(range(40))}, SECANT)
    into = effects.value.sum(1)
    whole = (own["logits"] - other["logits"])[:, -1]
    scale = effects.own.abs().max()
    assert (into[:, :-1] - effects.own).abs().max() < 1e-5 * scale
    assert torch.allclose(into[:, -1], whole[:, 3] - whole[:, 4], atol=1e-5)
    assert float(effects.value[:, 41:, :40].abs().max()) == 0.0  # nothing flows from a later layer to an earlier one


@pytest.mark.parametrize("family", ["llama", "pythia"])  # heads before the MLP, and beside it
def test_targets_swept_one_by_one_are_those_swept_together(family, monkeypatch):
    model, (clean, corrupted) = architectures.hooked(family, dtype=torch.float64), pair()
    together = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=12))
    monkeypatch.setattr(neuron_edges, "WORKSPACE", 1)
    alone = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=12))
    assert bool(together.score.any()) and torch.allclose(alone.score, together.score, rtol=1e-6, atol=1e-9)


def test_linked_neurons_have_edges_in_and_out():
    model, (clean, corrupted) = architectures.hooked("llama", tokenizer=architectures.tokenizer()), pair()
    graph = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=20))
    assert len(graph.index) == 22 and graph.index.names[0] == "input"
    inner = graph.kept_nodes() - {"input", "logits"}
    sources, targets = ({edge[end] for edge in graph.kept_edges()} for end in (0, 1))
    assert inner and inner <= sources & targets
    picked = graph.extras["garrote"] > 0
    assert graph.n_kept <= 0.1 * len(graph) and bool(picked.any())
    assert bool((graph.extras["garrote"] >= 0).all()) and bool((graph.certificate.gap < 1e-3).all())
    ranked = tcl.evaluate.curve(
        model, graph, clean, corrupted, tcl.evaluate.logit_diff(TARGET.correct, TARGET.incorrect), "mean", sizes=[5, 20]
    )
    assert ranked.sizes == (5, 20)


def test_the_garrote_picks_the_parents():
    """What works against its child on every pair is left out, however much it does; the rank by |score| has it in."""
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    graph = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=30))
    helped, kept = graph.extras["garrote"] > 0, graph.kept
    large = links.rank_by(graph, "attribution").top_k(graph.n_kept).kept
    assert bool(kept.any()) and int((kept & helped).sum()) > int((large & helped).sum())
    assert int(kept.sum()) <= int(helped.sum())
    score, rest = links.rank_by(graph, "garrote").score, ~helped & (graph.score != 0)
    assert float(score[rest].max()) < float(score[helped & (graph.score != 0)].min())
    assert torch.equal(score[rest].argsort(stable=True), graph.score.abs()[rest].argsort(stable=True))
    signed = links.rank_by(graph, "signed")
    assert bool((signed.score >= 0).all()) and torch.equal(signed.score.argsort(), graph.score.argsort())


def test_a_share_joins_the_neurons_that_carry_it():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    whole = circuit(model, clean, corrupted)
    sizes = (whole.score.abs() / abs(whole.provenance["difference"])).sort(descending=True).values
    share = float(sizes[11] + sizes[12]) / 2
    graph = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=share))
    same = circuit(model, clean, corrupted, basis=tcl.Neuron(linked=12))
    assert graph.index == same.index and torch.equal(graph.score, same.score) and len(graph.index) == 14
    weak = copy.deepcopy(model)
    with torch.no_grad():
        for block in weak.blocks:
            block.mlp.W_out *= 1e-3
    with pytest.raises(InputError, match="no neuron carries so much"):
        circuit(weak, clean, corrupted, basis=tcl.Neuron(linked=0.5))


def test_edges_that_would_not_fit_are_refused(monkeypatch):
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    monkeypatch.setattr(links, "MOST", 8 * 8 * 100)
    with pytest.raises(InputError, match="`linked` joins 20 neurons"):
        circuit(model, clean, corrupted, basis=tcl.Neuron(linked=20))


def test_bad_input_is_named():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    bad = (
        ({"corrupted": corrupted[:, :-1]}, "corrupted"),
        ({"corrupted": corrupted[:-1]}, "one partner for each"),
        ({"target": tcl.Labels([0, 1] * 4)}, "LogitDiff"),
        ({"target": tcl.LogitDiff([3], [4])}, "entries"),
        ({"target": tcl.LogitDiff([99] * 8, [4] * 8)}, "token 99"),
        ({"strength": "ebic"}, "strength"),
        ({"checkpoint": "x.safetensors"}, "checkpoint"),
        ({"method": "lasso+confirm"}, "method"),
        ({"basis": tcl.Neuron(linked=81)}, "linked"),
        ({"basis": tcl.Neuron(linked=8), "design": "activation"}, "without seeing attention"),
        ({"basis": tcl.Neuron(reference="corrupted"), "design": "activation"}, "reference"),
        ({"design": "routed"}, "design='read'"),
        ({"metric": difference}, "metric"),
    )
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            circuit(model, clean, **options)
    for linked in (-1, 1.0, -0.1, True, float("nan")):
        with pytest.raises(InputError, match="linked"):
            tcl.Neuron(linked=linked)
    with pytest.raises(InputError, match="reference"):
        tcl.Neuron(reference="median")
    with pytest.raises(InputError, match="pairs"):
        circuit(model, clean[:1], target=None)
    with pytest.raises(ModelError, match="no MLPs"):
        circuit(architectures.hooked("attn_only"), clean)
    with pytest.raises(ModelError, match="experts"):
        circuit(architectures.hooked("moe"), clean)
