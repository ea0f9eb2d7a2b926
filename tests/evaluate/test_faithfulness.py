"""Circuits by intervention: against the real packages, exact patching, and at both ends on every architecture."""

import json
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.helpers import shared_folder, to_matrix
from tl_circuitlasso import baselines
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import as_circuits, kept_matrix, prune
from tl_circuitlasso.evaluate.interventions import measure
from tl_circuitlasso.evaluate.minimal import without_each
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models import Adapter, adapt, patch, sources
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.build import build_hooked_transformer
from tl_circuitlasso.models.patching import unembed

MODELS = ("A_gpt2", "B_llama", "C_pythia", "D_interpbench13")
ABLATIONS = {"patching": "patch", "zero": "zero", "mean-positional": "mean"}
RELATIVE = {"f32": 1e-4, "f64": 1e-9}
# With every edge cut to zero, RMSNorm divides a stream of exact zeros: rounding errors are all that is left.
ILL_CONDITIONED = {("B_llama", "f32", f"topn|{n}|abs|zero") for n in (0, 5, 10)}


@lru_cache(maxsize=1)
def loaded(name: str, precision: str) -> tuple[Any, dict[str, Tensor]]:
    folder = shared_folder("reference", name)
    dtype = {"f32": "float32", "f64": "float64"}[precision]
    config = {**json.loads((folder / "config.json").read_text())["hooked_transformer_config"], "dtype": dtype}
    weights = {key: w.to(getattr(torch, dtype)) for key, w in load_file(folder / "model.safetensors").items()}
    return build_hooked_transformer(config, weights), load_file(folder / "tokens.safetensors")


def read(name: str, file: str) -> Any:
    return json.loads((shared_folder("reference", name) / file).read_text())


def circuit(names: list[str], model: Any) -> AttributionGraph:
    """A graph that keeps edges written as EAP-IG does, `a0.h1->a1.h0<q>`."""
    edges = {}
    for name in names:
        source, target = name.split("->")
        target, _, port = target.rstrip(">").partition("<")
        edges[source, target, port] = 1.0
    return AttributionGraph.from_edges(EdgeLayout(adapt(model).shape).index, edges)


def stored_metric(tokens: dict[str, Tensor]) -> Any:
    return tcl.evaluate.logit_diff(tokens["labels"][:, 0], tokens["labels"][:, 1])


@pytest.mark.parametrize("theirs", ABLATIONS)
@pytest.mark.parametrize("precision", RELATIVE)
@pytest.mark.parametrize("name", MODELS)
def test_circuits_equal_the_packages_evaluate_graph(name, precision, theirs):
    model, tokens = loaded(name, precision)
    values, selections = read(name, f"evaluate.{precision}.json"), read(name, "selections.json")
    rules = ("topn", "greedy", "threshold")
    keys = [key for key in values if key.endswith(f"|{theirs}") and key.startswith(rules)]
    keys = [key for key in keys if (name, precision, key) not in ILL_CONDITIONED]
    layout = EdgeLayout(adapt(model).shape)
    kept = [kept_matrix(circuit(selections[key.rpartition("|")[0]]["edges"], model), layout) for key in keys]
    setup = Experiment(
        model, tokens["clean"], tokens["corrupted"], stored_metric(tokens), ABLATIONS[theirs], batch_size=8
    )
    found = measure(setup, torch.cat(kept))
    expected = torch.tensor([values[key] for key in keys], dtype=torch.float64)
    assert (found.circuits - expected).abs().max() < RELATIVE[precision] * expected.abs().max()
    plain = torch.tensor([values["baseline_clean"], values["baseline_corrupted"]], dtype=torch.float64)
    assert (found.model - plain[0]).abs().max() < RELATIVE[precision] * plain.abs().max()
    assert theirs != "patching" or (found.ablated - plain[1]).abs().max() < RELATIVE[precision] * plain.abs().max()


def test_logits_equal_auto_circuits():
    model, tokens = loaded("A_gpt2", "f32")
    selections, adapter = read("A_gpt2", "selections.json"), adapt(model)
    layout = EdgeLayout(adapter.shape)
    stored = load_file(shared_folder("reference", "A_gpt2") / "auto_circuit_logits.safetensors")
    ablated = from_run(adapter, tokens["corrupted"], None)
    names = [key.removeprefix("RESAMPLE|TREE_PATCH|") for key in stored]
    kept = torch.cat([kept_matrix(circuit(selections[name]["edges"], model), layout) for name in names])
    logits = patch.run_circuits(adapter, tokens["clean"], None, as_circuits(kept, layout), ablated)
    expected = torch.stack(list(stored.values()))
    assert (logits[:, :, -1] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_node_circuits_equal_the_packages():
    model, tokens = loaded("A_gpt2", "f64")
    values, selections = read("A_gpt2", "evaluate.f64.json"), read("A_gpt2", "selections.json")
    for count in (3, 5, 8):
        nodes = set(selections[f"node-topn|{count}|abs"]["nodes"]) - {"logits"}
        layout = EdgeLayout(adapt(model).shape)
        edges = {(s, t): 1.0 for s in nodes for t in (nodes | {"logits"}) if layout.index.may_feed(s, t)}
        graph = AttributionGraph.from_edges(layout.index, edges)
        pair = (model, graph, tokens["clean"], tokens["corrupted"], stored_metric(tokens))
        found = tcl.evaluate.faithfulness(*pair, level="node")
        expected = torch.tensor(values[f"node-topn|{count}|abs|patching"], dtype=torch.float64)
        assert (found.per_prompt["circuit"] - expected).abs().max() < 1e-9 * expected.abs().max()


# ---- every architecture ---------------------------------------------------------------------------------------------

HOOKED = [(architectures.hooked, name) for name in architectures.HOOKED]
MANY = ("gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "olmo", "opt", "phi3", "granite", "falcon", "bloom")
NATIVE = ("native", "native_llama", "native_attn_only")
BRIDGES = [(architectures.bridge, name) for name in (*MANY, *NATIVE)]
ALL = [pytest.param(make, name, id=f"{make.__name__}-{name}") for make, name in HOOKED + BRIDGES]


def pair(*, padded: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    tokens, mask = architectures.padded() if padded else (architectures.prompts(length=6, batch=2), None)
    return tokens, torch.where(tokens > 2, (tokens + 5) % 28 + 3, tokens), mask


def random_circuits(adapter: Adapter, count: int, share: float) -> tuple[Tensor, EdgeLayout]:
    layout = EdgeLayout(adapter.shape)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.rand(count, layout.n_sources, layout.n_readers, generator=generator) < share
    return drawn & layout.mask(), layout


@pytest.mark.parametrize(("make", "family"), ALL)
def test_ends_are_the_model_and_the_corrupted_run(make, family):
    adapter = adapt(make(family))
    clean, corrupted, _ = pair()
    layout = EdgeLayout(adapter.shape)
    kept = torch.stack([layout.mask(), torch.zeros_like(layout.mask())])
    logits = patch.run_circuits(adapter, clean, None, as_circuits(kept, layout), from_run(adapter, corrupted, None))
    for made, tokens in zip(logits, (clean, corrupted)):
        expected = adapter.run(tokens, None, ["logits"])["logits"]
        assert (made - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("make", "family"), ALL)
def test_both_ways_to_sum_a_stream_agree(make, family):
    adapter = adapt(make(family))
    clean, corrupted, mask = pair(padded=adapter.shape.causal)
    kept, layout = random_circuits(adapter, 3, 0.6)
    circuits, ablated = as_circuits(prune(kept, layout), layout), from_run(adapter, corrupted, mask)
    always, never = -1.0, 1.0
    made = [
        patch.run_circuits(adapter, clean, mask, circuits, ablated, subtract_above=share) for share in (always, never)
    ]
    assert not torch.equal(*made)  # they are two ways
    real = torch.ones_like(clean, dtype=torch.bool) if mask is None else mask
    assert (made[0] - made[1])[:, real].abs().max() < 2e-5 * made[0].abs().max()
    plain = adapter.run(clean, mask, ["logits"])["logits"]
    assert (made[0] - plain)[:, real].abs().max() > 1e-3 * plain.abs().max()  # something was cut


@pytest.mark.parametrize(
    ("make", "family"),
    [
        pytest.param(make, name, id=f"{make.__name__}-{name}")
        for make, name in [
            *((architectures.hooked, n) for n in ("gpt2", "shortformer", "gptj", "qwen3", "gemma2", "olmo2", "moe")),
            *((architectures.bridge, n) for n in ("gpt2", "llama", "gemma2", "opt", "native_llama")),
        ]
    ],
)
def test_cutting_one_edge_equals_exact_patching(make, family):
    model = make(family)
    clean, corrupted, _ = pair()
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    layout = EdgeLayout(adapt(model).shape)
    everything = layout.graph(layout.mask().double(), {})
    setup = Experiment(model, clean, corrupted, metric)
    rows = list(range(0, len(everything), 7))
    found = without_each(setup, everything, layout, layout.mask()[None], rows)
    scores = baselines.exact(model, clean, corrupted, metric, batch_size=64).score[rows]
    effects = (found.base - found.values).mean(1)
    assert (effects - scores).abs().max() < 1e-4 * scores.abs().max()


@pytest.mark.parametrize("over", ["clean", "corrupted"])
@pytest.mark.parametrize("ablation", ["mean", "mean-all", "zero"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_baselines_and_circuits_mean_the_same_by_an_ablation(family, ablation, over):
    model = architectures.hooked(family)
    tokens, mask = architectures.padded()
    other = torch.where(tokens > 2, (tokens + 5) % 28 + 3, tokens)
    metric = tcl.evaluate.logit_diff([3, 4, 5], [5, 6, 7], position=5)
    options = {"attention_mask": mask, "ablation": ablation, "mean_over": over}
    layout = EdgeLayout(adapt(model).shape)
    everything = layout.graph(layout.mask().double(), {})
    rows = list(range(0, len(everything), 11))
    found = without_each(
        Experiment(model, tokens, other, metric, **options), everything, layout, layout.mask()[None], rows
    )
    scores = baselines.exact(model, tokens, other, metric, batch_size=128, **options).score[rows]
    effects = (found.base - found.values).mean(1)
    assert (effects - scores).abs().max() < 1e-4 * scores.abs().max()


@pytest.mark.parametrize("method", [baselines.eap, baselines.eap_ig, baselines.exact])
def test_means_over_clean_prompts_need_no_corrupted_ones(method):
    model = _tiny()
    clean, corrupted, _ = pair()
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    alone = method(model, clean, None, metric, ablation="mean")
    assert torch.equal(alone.score, method(model, clean, corrupted, metric, ablation="mean").score)
    swapped = method(model, clean, clean, metric, ablation="mean", mean_over="corrupted")
    torch.testing.assert_close(alone.score, swapped.score)
    with pytest.raises(InputError, match="`corrupted` is missing"):
        method(model, clean, None, metric, ablation="mean", mean_over="corrupted")
    with pytest.raises(InputError, match="`mean_over` is 'both'"):
        method(model, clean, corrupted, metric, ablation="mean", mean_over="both")


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-all"])
def test_both_ends_with_given_values(ablation):
    model = architectures.hooked("gpt2")
    clean, _, _ = pair()
    layout = EdgeLayout(adapt(model).shape)
    full = layout.graph(layout.mask().double(), {})
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    found = tcl.evaluate.faithfulness(model, full, clean, None, metric, ablation)
    assert found.faithfulness == pytest.approx(1, abs=1e-5) and found.ablated != pytest.approx(found.model, abs=1e-4)
    assert found.circuit == pytest.approx(found.model, abs=1e-5)
    empty = tcl.evaluate.faithfulness(model, full.keep(~full.kept), clean, None, metric, ablation)
    assert empty.faithfulness == 0 and empty.edges == 0


def test_learned_positions_belong_to_the_input_only_if_asked():
    model = architectures.hooked("gpt2")
    adapter, (clean, _, _) = adapt(model), pair()
    layout = EdgeLayout(adapter.shape)
    made = {}
    for node in ("embed", "resid"):
        setup = Experiment(model, clean, None, tcl.evaluate.logit_diff([3, 4], [5, 6]), "zero", input_node=node)
        made[node] = measure(setup, torch.zeros(1, layout.n_sources, layout.n_readers, dtype=torch.bool)).ablated
    bias = sum(adapter.writer(layer)[1] for layer in range(2))
    positions = adapter.run(clean, None, ["pos_embed"])["pos_embed"].expand(*clean.shape, -1)
    for node, stream in {"embed": positions + bias, "resid": torch.zeros_like(positions) + bias}.items():
        last = unembed(adapter, stream)[:, -1]
        expected = last.gather(1, torch.tensor([[3], [4]])) - last.gather(1, torch.tensor([[5], [6]]))
        assert torch.allclose(made[node], expected[:, 0].double(), atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_pruning_keeps_exactly_the_edges_on_a_path(seed, share):
    index = component_index(n_layers=2, n_heads=2)
    layout = EdgeLayout(adapt(_tiny()).shape)
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(1, layout.n_sources, layout.n_readers, generator=generator) < share) & layout.mask()
    pruned = prune(kept, layout)
    columns = layout.targets()[0]
    arrows = {(s, columns[c]) for s, c in kept[0].nonzero().tolist()}
    forward, backward = {0}, {len(index) - 1}
    for _ in range(len(index)):
        forward |= {t for s, t in arrows if s in forward}
        backward |= {s for s, t in arrows if t in backward}
    on_path = {(s, c) for s, c in kept[0].nonzero().tolist() if s in forward and columns[c] in backward}
    assert {tuple(cell) for cell in pruned[0].nonzero().tolist()} == on_path


@lru_cache(maxsize=1)
def _tiny() -> Any:
    return architectures.hooked("gpt2", n_heads=2, d_head=12)


def test_results_do_not_depend_on_batches_or_memory(monkeypatch):
    adapter = adapt(architectures.hooked("gemma2"))
    tokens = architectures.prompts(batch=7)
    kept, _ = random_circuits(adapter, 4, 0.5)
    metric = tcl.evaluate.next_token(tokens)
    whole = measure(Experiment(adapter, tokens, tokens.flip(0), metric), kept)
    for module, name in ((patch, "PIECE"), (sources, "WRITTEN_OUT")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr("tl_circuitlasso.evaluate.interventions.AT_ONCE", 1)
    single = measure(Experiment(adapter, tokens, tokens.flip(0), metric, batch_size=3), kept)
    assert torch.allclose(whole.circuits, single.circuits, atol=1e-5)


def test_completeness_and_minimality_tell_needed_edges_from_useless_ones():
    demo = tcl.load_demo(prompts=32)
    index = EdgeLayout(adapt(demo.model).shape).index
    graph = AttributionGraph.from_edges(
        index, dict.fromkeys({*demo.true_edges, ("m1", "logits"), ("input", "m1")}, 1.0)
    )
    data = (demo.model, graph, demo.tokens, demo.corrupted, tcl.evaluate.logit_diff(demo.correct, demo.incorrect))
    assert abs(tcl.evaluate.completeness(*data).faithfulness) < 0.2
    table = tcl.evaluate.minimality(*data)
    useless = set(zip(table.source[table.useless], table.target[table.useless]))
    assert useless == {("m1", "logits"), ("input", "m1")}
    assert table["drop"].is_monotonic_decreasing and bool((table.low <= table["drop"]).all())


def test_the_interval_holds_the_estimate_and_shrinks_with_prompts():
    widths = []
    for prompts in (16, 256):
        demo = tcl.load_demo(prompts=prompts)
        graph = AttributionGraph.from_edges(
            EdgeLayout(adapt(demo.model).shape).index, {e: 1.0 for e in demo.true_edges if e != ("input", "a2.h0")}
        )
        metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
        found = tcl.evaluate.faithfulness(demo.model, graph, demo.tokens, demo.corrupted, metric)
        assert found.low <= found.faithfulness <= found.high
        widths.append(found.high - found.low)
    assert 0 < widths[1] < widths[0]


def test_a_plain_function_counts_as_a_metric_and_is_asked_prompt_by_prompt():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    graph = baselines.random_edges(model).top_k(10)
    ours = tcl.evaluate.logit_diff([3, 4], [5, 6])

    def theirs(logits: Tensor, rows: Tensor) -> Tensor:
        right, wrong = torch.tensor([3, 4])[rows], torch.tensor([5, 6])[rows]
        last = logits[:, -1]
        return (last[torch.arange(len(rows)), right] - last[torch.arange(len(rows)), wrong]).sum()

    first, second = (tcl.evaluate.faithfulness(model, graph, clean, corrupted, m) for m in (ours, theirs))
    assert torch.allclose(first.per_prompt["circuit"], second.per_prompt["circuit"])
    assert first.faithfulness == pytest.approx(second.faithfulness)


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_say():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    rows, right, wrong = torch.tensor([2, 0, 1]), [0, 1, 2], [3, 3, 3]
    last, place = logits[:, -1], torch.arange(3)
    ids = torch.tensor(right)[rows]
    evaluate = tcl.evaluate
    assert torch.allclose(evaluate.logit_diff(right, wrong).each(logits, rows), last[place, ids] - last[:, 3])
    probability = last.softmax(-1)
    assert torch.allclose(
        evaluate.prob_diff(right, wrong).each(logits, rows), probability[place, ids] - probability[:, 3]
    )
    assert torch.allclose(
        evaluate.cross_entropy(right).each(logits, rows),
        -torch.nn.functional.cross_entropy(last, ids, reduction="none"),
    )
    assert torch.equal(evaluate.accuracy(last.argmax(-1)[[1, 2, 0]]).each(logits, rows), torch.ones(3))
    other = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(last.log_softmax(-1), other[rows].softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(evaluate.kl(other).each(logits, rows), -expected)
    assert float(evaluate.kl(last)(logits, torch.arange(3))) == pytest.approx(0, abs=1e-12)
    places = evaluate.logit_diff(right, wrong, position=[0, 1, 2]).each(logits, rows)
    assert torch.allclose(places, logits[place, rows, ids] - logits[place, rows, 3])


def test_next_token_leaves_pads_out():
    tokens, mask = architectures.padded()
    logits = torch.randn(3, 9, 31)
    found = tcl.evaluate.next_token(tokens, mask).each(logits, torch.arange(3))
    for prompt in range(3):
        real = tokens[prompt, mask[prompt]]
        expected = torch.nn.functional.cross_entropy(logits[prompt, mask[prompt]][:-1], real[1:])
        assert float(found[prompt]) == pytest.approx(-float(expected), rel=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> Any:
    model = _tiny()
    clean, corrupted, _ = pair()
    arguments = {
        "model": model,
        "graph": baselines.random_edges(model),
        "clean": clean,
        "corrupted": corrupted,
        "metric": tcl.evaluate.logit_diff([3, 4], [5, 6]),
    } | changes
    return tcl.evaluate.faithfulness(**arguments)


class NanWhenAblated:
    """A metric that is a number for the model, which is asked first, and none after that."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        self.asked += 1
        return logits.sum() if self.asked <= 2 else logits.sum() * float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": lambda logits, rows: logits[:, -1]}, "`metric` returned shape"),
        ({"metric": lambda logits, rows: "high"}, "`metric` returned a str"),
        ({"metric": lambda logits, rows: logits.sum() * float("nan")}, "`metric` is NaN or infinite for the model"),
        ({"metric": lambda logits, rows: logits.sum() * 0}, "faithfulness has no scale"),
        ({"metric": NanWhenAblated()}, "`metric` is NaN or infinite for the ablated model on prompt 0"),
        ({"clean": [], "corrupted": []}, "`clean` is empty"),
        ({"corrupted": torch.full((2, 6), 99)}, "`corrupted` run from 99 to 99"),
        ({"corrupted": None, "ablation": "mean", "mean_over": "corrupted"}, "`corrupted` is missing"),
        ({"corrupted": None}, "use ablation='mean', 'mean-all', 'optimal' or 'zero'"),
        ({"corrupted": torch.ones(2, 5, dtype=torch.long)}, "same length"),
        ({"clean": torch.ones(0, 5, dtype=torch.long)}, "`clean` has shape"),
        ({"ablation": "noise"}, "`ablation` is 'noise'"),
        ({"level": "feature"}, "`level` is 'feature'"),
        ({"input_node": "tokens"}, "`input_node` is 'tokens'"),
        ({"mean_over": "all"}, "`mean_over` is 'all'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        call(**changes)


def test_graphs_of_other_models_are_refused():
    other = AttributionGraph.from_edges(component_index(n_layers=3, n_heads=2), {("input", "a2.h0"): 1.0})
    with pytest.raises(InputError, match="belongs to another model: the model doesn't have"):
        call(graph=other)
    wide = AttributionGraph.from_edges(
        component_index(n_layers=2, n_heads=2), {("input", "logits"): 1.0}, provenance={"d_model": 768}
    )
    with pytest.raises(InputError, match="d_model is 768"):
        call(graph=wide)
    neurons = tcl.NodeIndex.from_json(
        [{"site": "m7", "rank": 0, "features": [0]}, {"site": "logits", "rank": 1, "features": None}]
    )
    with pytest.raises(InputError, match="belongs to another model: this one has no features at 'm7'"):
        call(graph=AttributionGraph.from_edges(neurons, {("m7#0", "logits"): 1.0}))


def test_the_model_is_left_as_it_was():
    model = architectures.hooked("llama")
    model.cfg.use_attn_result = True
    before = {name: w.clone() for name, w in model.named_parameters()}
    clean, corrupted, _ = pair()
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    tcl.evaluate.faithfulness(model, baselines.random_edges(model).top_k(9), clean, corrupted, metric)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.cfg.use_attn_result and not model.cfg.ungroup_grouped_query_attention
    assert all(torch.equal(before[name], w) for name, w in model.named_parameters())
    assert to_matrix(baselines.random_edges(model), adapt(model).shape).any()


def test_prompts_that_the_ablation_leaves_alone_make_no_interval() -> None:
    demo = tcl.load_demo(prompts=4)
    corrupted = demo.tokens.clone()
    corrupted[0] = demo.corrupted[0]
    given = (demo.model, demo.circuit, demo.tokens)
    with pytest.warns(UserWarning, match="changes 1 of 4 prompts") as told:
        found = tcl.evaluate.faithfulness(*given, corrupted, demo.target, progress=False)
    assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.faithfulness)
    assert all("divide" not in str(one.message) for one in told)
    whole = tcl.evaluate.faithfulness(*given, demo.corrupted, demo.target, progress=False)
    assert whole.low <= whole.faithfulness <= whole.high


def test_the_whole_model_and_the_empty_circuit_are_not_run_as_circuits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over no copies of the prompts is one that some models can't make."""
    from tl_circuitlasso.evaluate import interventions

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a circuit was run")

    monkeypatch.setattr(interventions, "run_circuits", refuse)
    demo = tcl.load_demo(prompts=4)
    none = demo.circuit.keep(torch.zeros_like(demo.circuit.kept))
    found = tcl.evaluate.faithfulness(demo.model, none, demo.tokens, demo.corrupted, demo.target, progress=False)
    assert found.faithfulness == 0.0
