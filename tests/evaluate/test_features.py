"""Circuits of neurons, residual dimensions and SAE features: at both ends, and against edits made by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import pair
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.features import circuit_of, feature_sites, measure_features, node_scores
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models import adapt

HOOKS = ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post")
METRIC = tcl.evaluate.logit_diff([3, 4], [5, 6])


class Sae:
    """A small ReLU autoencoder that misses a part of what it reads."""

    def __init__(self, width: int = 24, features: int = 40, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(width, features, generator=generator) / width**0.5
        self.W_dec = torch.randn(features, width, generator=generator) / features**0.5
        self.b_enc = 0.1 * torch.randn(features, generator=generator)
        self.b_dec = 0.1 * torch.randn(width, generator=generator)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec + self.b_dec


SAES = {hook: Sae(seed=number) for number, hook in enumerate(HOOKS)}


def hook_site(hook: str) -> Site:
    return Site("hook", int(hook.split(".")[1]), hook=hook)


def feature_graph(sites: dict[Site, list[int]], kept: list[str], errors: tuple[str, ...] = ()) -> AttributionGraph:
    """All features feed the target; those of `kept` are kept."""
    blocks = [Block(site, rank, tuple(features)) for rank, (site, features) in enumerate(sites.items())]
    blocks += [Block(Site("hook", 0, hook=f"{hook}.hook_sae_error"), len(blocks)) for hook in errors]
    index = NodeIndex((*blocks, Block(Site("target"), len(sites) + 1)))
    edges = {(name, "target"): 1.0 + position for position, name in enumerate(index.names[:-1])}
    graph = AttributionGraph.from_edges(index, edges)
    inside = torch.tensor([index.names[s] in kept for s in graph.source.tolist()])
    return graph.keep(inside)


def by_hand(model: Any, tokens: Tensor, edits: dict[str, Any]) -> Tensor:
    hooks = [(name, lambda x, hook, change=change: change(x)) for name, change in edits.items()]
    with torch.no_grad():
        return METRIC.each(model.run_with_hooks(tokens, fwd_hooks=hooks), torch.arange(len(tokens))).double()


def cached(model: Any, tokens: Tensor, hook: str) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1][hook]


ALL = {hook_site(hook): list(range(40)) for hook in HOOKS}
EVERY = [f"{hook}#{feature}" for hook in HOOKS for feature in range(40)]
SOME = [f"{hook}#{feature}" for hook in HOOKS for feature in range(0, 40, 3)]


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero"])
def test_all_features_with_their_error_are_the_model(ablation):
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    found = tcl.evaluate.faithfulness(
        model, feature_graph(ALL, EVERY), clean, corrupted, METRIC, ablation, saes=SAES, error="keep"
    )
    assert found.faithfulness == pytest.approx(1, abs=1e-6) and found.circuit == pytest.approx(found.model, abs=1e-6)
    assert found.nodes == 80 and found.edges == 80 and found.ablated != pytest.approx(found.model, abs=1e-3)


def test_nothing_kept_behind_the_last_layer_is_the_corrupted_run():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    expected = METRIC.each(model(corrupted), torch.arange(2)).mean().item()
    hook = HOOKS[1]
    nothing = feature_graph({hook_site(hook): list(range(40))}, [], errors=(hook,))
    adapter = adapt(model)
    setup = Experiment(adapter, clean, corrupted, METRIC, saes={hook: SAES[hook]})
    sites = feature_sites(nothing, adapter, setup.saes)
    empty = circuit_of(setup, nothing, sites, set())
    assert float(measure_features(setup, sites, [empty]).ablated.mean()) == pytest.approx(expected, abs=1e-5)
    dimensions = feature_graph({Site("resid", 2): list(range(24))}, ["resid.2#3"])
    found = tcl.evaluate.faithfulness(model, dimensions, clean, corrupted, METRIC)
    assert found.ablated == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("error", ["keep", "remove"])
@pytest.mark.parametrize("ablation", ["patch", "mean", "mean-all", "zero"])
def test_features_outside_carry_what_was_asked_for(ablation, error):
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    keep = torch.arange(40) % 3 == 0

    def edit(hook: str) -> Any:
        sae, other = SAES[hook], SAES[hook].encode(cached(model, corrupted, hook))
        own = SAES[hook].encode(cached(model, clean, hook))
        values = {"patch": other, "mean": own.mean(0), "mean-all": own.mean((0, 1)), "zero": torch.zeros(40)}[ablation]

        def change(x: Tensor) -> Tensor:
            codes = sae.encode(x)
            edited = sae.decode(torch.where(keep, codes, values))
            return edited + (x - sae.decode(codes) if error == "keep" else 0)

        return change

    found = tcl.evaluate.faithfulness(
        model, feature_graph(ALL, SOME), clean, corrupted, METRIC, ablation, saes=SAES, error=error
    )
    expected = by_hand(model, clean, {hook: edit(hook) for hook in HOOKS})
    torch.testing.assert_close(found.per_prompt["circuit"], expected, atol=1e-5, rtol=1e-4)
    assert found.nodes == len(SOME)


def test_an_error_node_is_ablated_where_the_graph_does_not_keep_it():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    hook, sae = HOOKS[0], SAES[HOOKS[0]]
    other = cached(model, corrupted, hook)
    missed = other - sae.decode(sae.encode(other))
    site = {hook_site(hook): list(range(40))}
    names = [f"{hook}#{feature}" for feature in range(40)]
    values = {}
    for kept in (names, [*names, f"{hook}.hook_sae_error"]):
        graph = feature_graph(site, kept, errors=(hook,))
        found = tcl.evaluate.faithfulness(model, graph, clean, corrupted, METRIC, saes={hook: sae})
        values[len(kept)] = found.per_prompt["circuit"]
    expected = by_hand(model, clean, {hook: lambda x: sae.decode(sae.encode(x)) + missed})
    torch.testing.assert_close(values[40], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values[41], by_hand(model, clean, {}), atol=1e-6, rtol=1e-6)


NEURON_MODELS = [
    *((architectures.hooked, name) for name in ("gpt2", "pythia", "gemma2", "solu_ln", "bidirectional")),
    *((architectures.bridge, name) for name in ("gpt2", "llama", "gemma2", "opt", "falcon", "native_llama")),
]


@pytest.mark.parametrize(("make", "family"), [pytest.param(*c, id=f"{c[0].__name__}-{c[1]}") for c in NEURON_MODELS])
def test_neurons_are_ablated_on_every_kind_of_model(make, family):
    model = make(family)
    clean, corrupted, mask = pair(padded=family != "bidirectional")
    adapter = adapt(model)
    width = adapter.shape.d_mlp
    rows = list(range(len(clean)))
    metric = tcl.evaluate.logit_diff([3 + row for row in rows], [20 + row for row in rows], position=4)
    every = {Site("mlp", layer): list(range(width)) for layer in range(2)}
    last = [f"m1#{neuron}" for neuron in range(width)]
    options = {"attention_mask": mask, "ablation": "zero"}
    whole = tcl.evaluate.faithfulness(
        model, feature_graph(every, [f"m0#{n}" for n in range(width)] + last), clean, corrupted, metric, **options
    )
    assert whole.faithfulness == pytest.approx(1, abs=1e-5) and whole.nodes == 2 * width
    # Without layer 1's neurons, its MLP writes its output bias; what layer 1's attention writes stays.
    found = tcl.evaluate.faithfulness(
        model, feature_graph({Site("mlp", 1): list(range(width))}, []), clean, corrupted, metric, **options
    )
    mlp, post = adapter.mlp(1), "scale.mlp_out.1"
    acts = adapter.run(clean, mask, ["resid_post.1", "mlp_out.1", post])
    if adapter.layouts[1].mlp_post is None:
        from tl_circuitlasso.models.patching import unembed

        bias = mlp.b_out if mlp.b_post is None else mlp.b_out + mlp.b_post @ mlp.w_out
        logits = unembed(adapter, acts["resid_post.1"] - acts["mlp_out.1"] + bias)
        expected = metric.each(logits, torch.arange(len(clean))).double()
        torch.testing.assert_close(found.per_prompt["ablated"], expected, atol=2e-4, rtol=1e-3)
    assert found.ablated != pytest.approx(found.model, abs=1e-4)


def test_features_without_a_node_are_outside_unless_told_otherwise():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    some = feature_graph({Site("mlp", 0): [1, 4]}, ["m0#1"])
    data = (model, some, clean, corrupted, METRIC)
    out, stay = (tcl.evaluate.faithfulness(*data, rest=rest) for rest in ("ablate", "keep"))
    other = cached(model, corrupted, "blocks.0.mlp.hook_post")
    numbers = torch.arange(other.shape[-1])
    for found, keep in ((out, numbers == 1), (stay, numbers != 4)):
        expected = by_hand(model, clean, {"blocks.0.mlp.hook_post": lambda x, k=keep: torch.where(k, x, other)})
        torch.testing.assert_close(found.per_prompt["circuit"], expected, atol=1e-5, rtol=1e-4)
    rest = tcl.evaluate.completeness(*data)
    expected = by_hand(model, clean, {"blocks.0.mlp.hook_post": lambda x: torch.where(numbers == 1, other, x)})
    torch.testing.assert_close(rest.per_prompt["circuit"], expected, atol=1e-5, rtol=1e-4)


def test_what_each_feature_is_worth_and_how_soon_they_suffice():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    graph = feature_graph({Site("mlp", 1): [0, 3, 5, 8]}, ["m1#0", "m1#5", "m1#8"])
    data = (clean, corrupted, METRIC)
    table = tcl.evaluate.minimality(model, graph, *data)
    assert set(table.node) == {"m1#0", "m1#5", "m1#8"} and table["drop"].is_monotonic_decreasing
    whole = tcl.evaluate.faithfulness(model, graph, *data)
    without = feature_graph({Site("mlp", 1): [0, 3, 5, 8]}, ["m1#0", "m1#8"])
    less = tcl.evaluate.faithfulness(model, without, *data)
    drop = float(table.set_index("node").loc["m1#5", "drop"])  # type: ignore[arg-type]
    assert drop == pytest.approx(whole.circuit - less.circuit, abs=1e-6)
    curve = tcl.evaluate.curve(model, graph, *data, sizes=(0.25, 0.5, 1.0))
    assert curve.sizes == curve.requested == (1, 2, 4)
    best = feature_graph({Site("mlp", 1): [0, 3, 5, 8]}, ["m1#8", "m1#5"])
    assert curve.faithfulness[1] == pytest.approx(tcl.evaluate.faithfulness(model, best, *data).faithfulness, abs=1e-6)
    made = tcl.evaluate.report(model, {"neurons": graph}, *data)
    assert list(made.table.index) == ["neurons", "random"]


def test_local_scores_are_followed_to_the_target():
    first, second = (Block(hook_site(hook), rank, (0, 1)) for rank, hook in enumerate(HOOKS))
    index = NodeIndex((first, second, Block(Site("logits"), 2)))
    a, b = HOOKS
    edges: dict[Any, float] = {(f"{a}#0", f"{b}#0"): 5.0, (f"{a}#1", f"{b}#1"): 1.0, (f"{a}#1", f"{b}#0"): -2.0}
    edges |= {(f"{b}#0", "logits"): 0.1, (f"{b}#1", "logits"): -3.0}
    scores = node_scores(AttributionGraph.from_edges(index, edges))
    assert scores == pytest.approx({f"{a}#0": 0.5, f"{a}#1": 3.2, f"{b}#0": 0.1, f"{b}#1": 3.0})
    neurons = NodeIndex((Block(Site("mlp", 0), 0, (0, 1)), Block(Site("mlp", 1), 1, (0,)), Block(Site("logits"), 2)))
    edges = {("m0#0", "m1#0"): -5.0, ("m0#0", "logits"): 1.0, ("m0#1", "logits"): 2.0, ("m1#0", "logits"): 3.0}
    assert node_scores(AttributionGraph.from_edges(neurons, edges)) == {"m0#0": 5.0, "m0#1": 2.0, "m1#0": 3.0}


def test_a_transcoder_reads_one_hook_and_writes_another():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    coder: Any = Sae(seed=5)
    reads, writes = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"

    class Config:
        class metadata:
            hook_name_out = writes

    coder.cfg = Config
    graph = feature_graph({hook_site(reads): list(range(40))}, [f"{reads}#{n}" for n in range(20)])
    found = tcl.evaluate.faithfulness(model, graph, clean, corrupted, METRIC, "zero", saes={reads: coder})
    codes = coder.encode(cached(model, clean, reads))
    gone = codes[..., 20:] @ coder.W_dec[20:]
    expected = by_hand(model, clean, {writes: lambda out: out - gone})
    torch.testing.assert_close(found.per_prompt["circuit"], expected, atol=1e-5, rtol=1e-4)


def test_steering_a_feature_is_scaling_its_code():
    model = architectures.hooked("gpt2")
    clean, _, _ = pair()
    hook, sae = HOOKS[0], SAES[HOOKS[0]]
    graph = feature_graph({hook_site(hook): [2, 7, 9]}, [f"{hook}#2", f"{hook}#7"])
    found = tcl.evaluate.steer(model, graph, [f"{hook}#7"], 3, clean, METRIC, saes={hook: sae}, other=clean)
    expected = by_hand(model, clean, {hook: lambda x: x + 2 * sae.encode(x)[..., 7:8] * sae.W_dec[7]})
    assert found.after == pytest.approx(float(expected.mean()), abs=1e-5) and found.nodes == (f"{hook}#7",)
    assert found.loss_change != 0
    neurons = feature_graph({Site("mlp", 0): [2, 7]}, ["m0#2", "m0#7"])
    off = tcl.evaluate.steer(model, neurons, None, 0, clean, METRIC)
    numbers = torch.arange(40)
    edit = {"blocks.0.mlp.hook_post": lambda x: torch.where((numbers == 2) | (numbers == 7), 0.0, x)}
    assert off.after == pytest.approx(float(by_hand(model, clean, edit).mean()), abs=1e-5)
    other = tcl.evaluate.steer(model, graph, [f"{hook}#31"], 3, clean, METRIC, saes={hook: sae})  # not in the graph
    expected = by_hand(model, clean, {hook: lambda x: x + 2 * sae.encode(x)[..., 31:32] * sae.W_dec[31]})
    assert other.after == pytest.approx(float(expected.mean()), abs=1e-5)
    with pytest.raises(InputError, match="which isn't a feature of"):
        tcl.evaluate.steer(model, graph, [f"{hook}#40"], 2, clean, METRIC, saes={hook: sae})


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        (feature_graph(ALL, SOME), {}, "`saes` has no SAE for 'blocks.0.hook_mlp_out'"),
        (feature_graph(ALL, SOME), {"saes": SAES, "error": "drop"}, "`error` is 'drop'"),
        (feature_graph(ALL, SOME), {"saes": SAES, "rest": "drop"}, "`rest` is 'drop'"),
        (feature_graph(ALL, SOME), {"saes": SAES, "level": "port"}, "`level` is 'port'"),
        (
            feature_graph(ALL, SOME),
            {"saes": SAES, "ablation": "optimal"},
            "'optimal' fits constants to whole components",
        ),
        (feature_graph(ALL, SOME), {"saes": {**SAES, "blocks.7.hook_mlp_out": Sae()}}, "which the model doesn't have"),
        (feature_graph(ALL, SOME), {"saes": {**SAES, HOOKS[0]: object()}}, "without encode, decode, W_dec"),
        (feature_graph(ALL, SOME), {"saes": {**SAES, HOOKS[0]: Sae(width=9)}}, "can't read activations"),
        (feature_graph({hook_site(HOOKS[0]): [99]}, []), {"saes": SAES}, "has the node blocks.0.hook_mlp_out#99"),
        (feature_graph({Site("mlp", 5): [1]}, []), {}, "this one has no features at 'm5'"),
        (feature_graph({Site("mlp", 1): [4000]}, []), {}, "has the node m1#4000"),
    ],
)
def test_what_does_not_fit_is_named(graph, options, message):
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    with pytest.raises(InputError, match=message):
        tcl.evaluate.faithfulness(model, graph, clean, corrupted, METRIC, **options)


def test_graphs_of_two_kinds_are_kept_apart():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    data = (clean, corrupted, METRIC)
    whole, neurons = tcl.baselines.random_edges(model), feature_graph({Site("mlp", 1): [0]}, ["m1#0"])
    with pytest.raises(InputError, match="`saes` goes with a graph of SAE features"):
        tcl.evaluate.faithfulness(model, whole, *data, saes=SAES)
    with pytest.raises(InputError, match="mixes features with whole components"):
        tcl.evaluate.curves(model, {"a": neurons, "b": whole}, *data)
    with pytest.raises(InputError, match="keeps no feature"):
        tcl.evaluate.minimality(model, neurons.keep(~neurons.kept), *data)
    mixed = NodeIndex((Block(Site("head", 0, 1), 0), Block(Site("mlp", 1), 1, (0,)), Block(Site("target"), 2)))
    with pytest.raises(InputError, match=r"mixes features with the whole component 'a0\.h1'"):
        tcl.evaluate.faithfulness(model, AttributionGraph.from_edges(mixed, {("a0.h1", "target"): 1.0}), *data)
    with pytest.raises(InputError, match="graphs of features are for `faithfulness`"):
        tcl.evaluate.confirm(model, neurons, *data)
