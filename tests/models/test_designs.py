"""Bases and same-position designs: what is collected is what was observed, and planted edges are found."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import architectures
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Labels, LogitDiff, Values
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.bases import (
    Basis,
    Component,
    Neuron,
    Residual,
    as_basis,
    head_coordinates,
    most_varying,
    principal_directions,
)
from tl_circuitlasso.models.collect import Plan, collect
from tl_circuitlasso.models.designs import NODES, TARGET, Activation, Routed
from tl_circuitlasso.models.readout import columns, last_only, logit_metric
from tl_circuitlasso.models.tokens import Prompts


def collected(model: Any, tokens: Tensor, design: Any, **options: Any) -> Statistics:
    prompts = Prompts(adapt(model), tokens, batch_size=16, positions=options.pop("positions", "all"))
    plan = Plan(design, options.pop("target", None), last=options.pop("last", False), **options)
    return collect(adapt(model), prompts, plan, progress=False).statistics


def covariance(x: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(0)
    return centred.T @ centred / len(x)


# ---- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "pythia", "attn_only"])
def test_a_head_in_its_own_basis_keeps_every_distance(family: str) -> None:
    adapter = adapt(architectures.hooked(family, dtype=torch.float64))
    basis = Component()
    acts = adapter.run(architectures.prompts(), None, basis.wanted(adapter))
    short = head_coordinates(adapter, acts, 1).flatten(0, 1).movedim(1, 0)
    scale = acts["scale.attn_out.1"].flatten(0, 1)
    full = torch.einsum("sae,aed->asd", acts["z.1"].flatten(0, 1), adapter.writer(1)[0]) / scale
    torch.testing.assert_close(torch.cdist(short, short), torch.cdist(full, full), rtol=1e-4, atol=1e-4)
    sites = [str(site) for site in basis.features(adapter, acts)]
    assert sites == list(basis.index(adapter, {}, Site("logits")).names[:-1])


def test_principal_directions_are_the_leading_ones() -> None:
    x = torch.randn(400, 5) * torch.tensor([0.1, 5.0, 1.0, 0.01, 2.0]) + 100
    found = principal_directions(x, 2)
    assert found.abs().argmax(0).tolist() == [1, 4]
    torch.testing.assert_close(found.T @ found, torch.eye(2), rtol=0, atol=1e-5)
    assert principal_directions(x, 9).shape == (5, 5)


def test_the_coordinates_that_vary_most_are_chosen_over_all_sites() -> None:
    one, two = torch.randn(50, 3) * torch.tensor([1.0, 0.0, 3.0]), torch.randn(50, 2) * torch.tensor([2.0, 0.5])
    found = most_varying({Site("mlp", 0): one, Site("mlp", 1): two}, 2)
    assert found["m0"].tolist() == [False, False, True] and found["m1"].tolist() == [True, False]
    everything = most_varying({Site("mlp", 0): one, Site("mlp", 1): two}, 99)
    assert everything["m0"].tolist() == [True, False, True]  # a constant is never a node


@pytest.mark.parametrize("basis", [Neuron, Residual])
def test_a_limit_bounds_the_nodes(basis: Any) -> None:
    model = architectures.hooked("gpt2")
    statistics = collected(model, architectures.prompts(batch=8), Activation(basis(max_nodes=7)))
    assert sum(size for _, size in statistics.meta["columns"]) == 7
    with pytest.raises(InputError, match="`max_nodes`"):
        basis(max_nodes=0)


def test_unknown_bases_and_impossible_ones_are_refused() -> None:
    with pytest.raises(InputError, match="`basis`"):
        as_basis("nodes")
    with pytest.raises(InputError, match="`directions`"):
        Component(directions=0)
    with pytest.raises(ModelError, match="`basis` 'neuron'"):
        Neuron().wanted(adapt(architectures.hooked("attn_only")))
    assert as_basis("residual") == Residual() and as_basis(Neuron(3)) == Neuron(3)


# ---- what is collected ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", [Component(), Neuron(), Residual()])
def test_moments_are_those_of_the_features(basis: Basis) -> None:
    model, tokens = architectures.hooked("gpt2", dtype=torch.float64), architectures.prompts(batch=16)
    statistics = collected(model, tokens, Activation(basis))
    adapter = adapt(model)
    raw = basis.features(adapter, adapter.run(tokens, None, basis.wanted(adapter)))
    encoded = torch.cat([basis.encode(x, statistics.fixed[str(site)]) for site, x in raw.items()], dim=-1)
    expected = covariance(encoded[:, 1:].flatten(0, 1))  # without BOS
    torch.testing.assert_close(statistics.whole(NODES).gram(), expected, rtol=1e-8, atol=1e-10)
    assert statistics.whole(NODES).count == 16 * 8


def test_routed_heads_see_their_parents_through_their_pattern() -> None:
    model, tokens = architectures.hooked("llama", dtype=torch.float64), architectures.prompts(batch=16)
    basis = Component(4)
    statistics = collected(model, tokens, Routed(basis))
    adapter = adapt(model)
    acts = adapter.run(tokens, None, Routed(basis).wanted(adapter, None))
    features = {s: basis.encode(x, statistics.fixed[str(s)]) for s, x in basis.features(adapter, acts).items()}
    site = Site("head", 1, 2)
    parents = torch.cat([x for s, x in features.items() if s.layer < 1], dim=-1)
    mixed = torch.einsum("bqk,bkd->bqd", acts["pattern.1"][:, 2], parents)
    expected = covariance(torch.cat([mixed, features[site]], dim=-1)[:, 1:].flatten(0, 1))
    torch.testing.assert_close(statistics.whole("a1.h2").gram(), expected, rtol=1e-8, atol=1e-10)


def test_folds_keep_a_prompts_positions_together() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts(batch=10)
    statistics = collected(model, tokens, Activation(Component(2)), folds=4)
    assert [statistics.part(NODES, [fold]).count for fold in range(4)] == [24, 24, 16, 16]
    whole = collected(model, tokens, Activation(Component(2)))
    torch.testing.assert_close(statistics.whole(NODES).gram(), whole.whole(NODES).gram(), rtol=1e-5, atol=1e-6)


def test_targets_reach_the_last_column() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts(batch=8)
    y = torch.randn(8, dtype=torch.float64)
    values = collected(model, tokens, Activation(Component(2)), target=Values(y), last=True)
    assert values.whole(TARGET).count == 8 and not values.rows
    torch.testing.assert_close(values.whole(TARGET).gram()[-1, -1], covariance(y[:, None])[0, 0], rtol=1e-6, atol=0)
    labels = collected(model, tokens, Activation(Component(2)), target=Labels([0, 1, 2, 0] * 2), last=True)
    assert sorted(labels.rows["samples"][:, -1].tolist()) == [0, 0, 0, 0, 1, 1, 2, 2]


def test_logit_differences_are_the_models_own() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts(batch=4)
    adapter, mask = adapt(model), torch.ones(4, 9, dtype=torch.bool)
    acts = adapter.run(tokens, None, ["logits"])
    target = LogitDiff([3, 4, 5, 6], [7, 8, 9, 10])
    found = columns(adapter, acts, last_only(mask), target, torch.arange(4), None)
    with torch.no_grad():
        logits = model(tokens)[:, -1]
    rows = torch.arange(4)
    torch.testing.assert_close(found[:, 0], logits[rows, target.correct] - logits[rows, target.incorrect])
    with pytest.raises(InputError, match="`target`"):
        columns(adapter, acts, mask, LogitDiff([99] * 4, [1] * 4), torch.arange(4), None)


def test_the_logit_metric_keeps_distances_up_to_a_shift() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    weight, _ = adapter.unembed()
    metric, x = logit_metric(adapter), torch.randn(5, 24)
    logits = x @ weight
    relative = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(torch.cdist(x @ metric, x @ metric), torch.cdist(relative, relative))


# ---- known truths ---------------------------------------------------------------------------------------------------


def silent(family: str = "no_norm", **changes: Any) -> Any:
    """A model whose heads and MLPs write nothing yet."""
    model = architectures.hooked(family, **changes)
    for block in model.blocks:
        block.attn.W_O.data.zero_()
        block.mlp.W_out.data.zero_()
    return model


def learned(model: Any, design: Any, strength: Any = "auto", batch: int = 64, **options: Any) -> AttributionGraph:
    return learn(collected(model, architectures.prompts(batch=batch), design, **options), strength=strength)


@pytest.mark.parametrize("strength", ["auto", 0.1, "ebic", "cv", "stability"])
def test_a_planted_neuron_path_is_found(strength: Any) -> None:
    model = silent()
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    model.embed.W_E.data[:, 22:] = 0
    model.pos_embed.W_pos.data[:, 22:] = 0
    first.W_out.data[3, 22] = 1.0  # neuron 3 of the first MLP writes dimension 22,
    second.W_in.data.zero_()
    second.W_in.data[22, 5] = 1.0  # which neuron 5 of the second reads,
    second.W_out.data[5, 23] = 1.0  # to write dimension 23,
    model.unembed.W_U.data[:23] = 0  # which alone the logits read
    graph = learned(model, Activation(Neuron()), strength, folds=5 if strength in ("cv", "stability") else 1)
    assert graph.kept_edges() >= {("m0#3", "m1#5"), ("m1#5", "logits")}
    assert graph.top_k(2).kept_edges() == {("m0#3", "m1#5"), ("m1#5", "logits")}
    if strength in ("auto", 0.1):
        assert graph.n_kept == 2
    assert bool(graph.certificate.converged.all())


def test_a_residual_dimension_that_is_carried_along_is_followed() -> None:
    model = silent()
    model.unembed.W_U.data[:4] = 0
    model.unembed.W_U.data[5:] = 0
    graph = learned(model, Activation(Residual()), 0.1)
    # resid.0#4, resid.1#4 and resid.2#4 are one and the same number: any of them explains the logits
    assert {name.split("#")[-1] for name in graph.kept_nodes()} == {"4", "logits"}


def test_only_the_routed_design_sees_what_a_head_moved() -> None:
    model = silent()
    head = architectures.hooked("no_norm").blocks[0].attn.W_O.data[1]
    model.blocks[0].attn.W_O.data[1] = head
    model.blocks[0].attn.W_Q.data.zero_()
    model.blocks[0].attn.b_Q.data.zero_()  # an even mean over what came before: linear in the routed input
    share = {}
    for design in (Activation(Component(24)), Routed(Component(24))):
        graph = learned(model, design, 0.005)
        table = graph.edge_table().set_index(["source", "target"])
        into_target = float(table.loc[("a0.h1", "logits"), "score"])
        share[design.name] = float(table.loc[("input", "a0.h1"), "score"]) / into_target
    assert share["routed"] > 0.9 and share["activation"] < 0.5


@pytest.mark.parametrize("design", [Activation, Routed])
def test_a_component_that_writes_nothing_has_no_edge(design: Any) -> None:
    model = silent()
    model.blocks[0].mlp.W_out.data = architectures.hooked("no_norm").blocks[0].mlp.W_out.data
    graph = learned(model, design(Component(8)), 0.05)
    assert graph.kept_nodes() <= {"input", "m0", "logits"} and ("m0", "logits") in graph.kept_edges()
    assert bool(graph.score.isfinite().all())


@pytest.mark.parametrize("target", ["labels", "values"])
def test_a_target_that_one_neuron_decides_is_explained_by_it(target: str) -> None:
    model, tokens = silent(), architectures.prompts(batch=96)
    value = adapt(model).run(tokens, None, ["mlp_post.0"])["mlp_post.0"][:, -1, 7].double()
    goal = Labels((value > value.median()).long()) if target == "labels" else Values(3 * value + 1)
    statistics = collected(model, tokens, Activation(Neuron()), target=goal, last=True)
    graph = learn(statistics, strength=0.2)
    into = graph.edge_table().query("target == 'target' and score > 0")
    assert into.iloc[0].source in ("m0#7", "m1#7") or (into.source == "m0#7").any()
    assert str(graph.index.blocks[-1].site) == "target"
