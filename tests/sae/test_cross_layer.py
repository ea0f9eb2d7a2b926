"""Cross-layer transcoders as nodes: what their features do to each other, against the model run with them taken out."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae.training import plain_sae
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.learning import UnreadPair
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import CodePlan, encode_batch
from tl_circuitlasso.models.feature_layers import Layers, Rows
from tl_circuitlasso.models.feature_path import Path, known_paths
from tl_circuitlasso.models.feature_replay import replay
from tl_circuitlasso.models.tokens import Prompts

FEATURES = 24


@pytest.fixture(scope="module")
def demo() -> Demo:
    return tcl.load_demo(prompts=64)


def transcoder(model: Any, tokens: Tensor, seed: int = 0, read: str = "hook_resid_mid") -> dict[str, tcl.CrossLayer]:
    """Features that fire on a fifth of the samples, whose decoders to every later MLP are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    adapter, layers = adapt(model), model.cfg.n_layers
    hooks = [f"blocks.{layer}.{read}" for layer in range(layers)]
    acts, found = adapter.run(tokens, None, hooks), {}
    for layer, hook in enumerate(hooks):
        x = acts[hook].flatten(0, 1)
        encoder = torch.nn.functional.normalize(torch.randn(x.shape[1], FEATURES, generator=generator), dim=0)
        drawn = torch.randn(FEATURES, layers - layer, x.shape[1], generator=generator)
        outs = tuple(f"blocks.{later}.hook_mlp_out" for later in range(layer, layers))
        bias = -(x @ encoder).quantile(0.8, dim=0)
        found[hook] = tcl.CrossLayer(encoder, bias, 0.3 * x.std() * drawn / x.shape[1] ** 0.5, outs)
    return found


@torch.no_grad()
def ablated(model: Any, tokens: Tensor, parent: Any, hooks: tuple[str, str], child: Any, feature: int) -> Tensor:
    """What each code of the child loses where the feature fires: MLPs that it writes to give what they gave, less what
    it wrote; TransformerLens' own hooks do it."""
    adapter, names = adapt(model), [*hooks, *parent.hook_outs]
    plain = adapter.run(tokens, None, names)
    code = parent.encode(plain[hooks[0]])[..., feature]

    def held(activation: Tensor, hook: Any) -> Tensor:
        written = parent.W_dec[feature, parent.hook_outs.index(hook.name)]
        return plain[hook.name] - code[..., None] * written

    heard: list[Tensor] = []
    before = [(name, held) for name in parent.hook_outs]
    model.run_with_hooks(tokens, fwd_hooks=[*before, (hooks[1], lambda x, hook: heard.append(x))])
    return (child.encode(plain[hooks[1]]) - child.encode(heard[0])) * (code > 0)[..., None]


@pytest.mark.parametrize(("family", "read"), [("gpt2", "hook_resid_mid"), ("llama", "ln2.hook_normalized")])
def test_effects_are_those_of_taking_a_feature_out(family: str, read: str) -> None:
    model = architectures.hooked(family)
    tokens = torch.randint(0, 31, (6, 9), generator=torch.Generator().manual_seed(3))
    saes, adapter = transcoder(model, tokens, read=read), adapt(model)
    first, last, *_ = saes
    hooks = (first, last)
    ends = {hook: Encoder(saes[hook], hook, saes[hook].hook_outs[0], saes[hook].hook_outs[1:]) for hook in hooks}
    plan = CodePlan(ends, {}, False, {}, None, False, None, False)
    chunks = [encode_batch(adapter, plan, batch, number) for number, batch in enumerate(Prompts(adapter, tokens))]
    paths, unread = known_paths(adapter, ends, [hooks], next(iter(Prompts(adapter, tokens))))
    assert not unread
    found = replay(adapter, chunks, paths, dict.fromkeys(hooks, torch.arange(FEATURES)), {hooks: 1})[hooks]
    ours, oracle = found.dense(torch.arange(FEATURES)), torch.zeros(FEATURES, FEATURES).double()
    code = saes[hooks[0]].encode(adapter.run(tokens, None, [hooks[0]])[hooks[0]])
    for feature in range(FEATURES):
        lost = ablated(model, tokens, saes[hooks[0]], hooks, saes[hooks[1]], feature).sum((0, 1))
        oracle[feature] = lost.double() / float(code[..., feature].sum().clamp(min=1e-9))
    large = oracle.abs() > 0.05 * oracle.abs().max()
    assert int(large.sum()) > FEATURES
    if read == "hook_resid_mid":  # attention sees an edit of other positions only where one feature fires there, too
        assert bool((ours[large].sign() == oracle[large].sign()).all())
    torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=2e-3 * float(oracle.abs().max()))


@pytest.mark.parametrize("last", ["blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid", "blocks.2.attn.hook_z"])
def test_every_output_in_front_of_the_child_counts(last: str) -> None:
    """With all positions edited nothing is left out, so what the child reads is that of the model's own run."""
    model, tokens = architectures.hooked("gpt2", n_layers=3), architectures.prompts(batch=4)
    adapter, hooks = adapt(model), [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers)]
    first, sae = next(iter(transcoder(model, tokens).items()))
    x = adapter.run(tokens, None, [last])[last].flatten(0, 1).flatten(1)
    path = Path.of(adapter, Encoder(sae, first, hooks[0], tuple(hooks[1:])), Encoder(plain_sae(x, 8), last, last))
    acts = adapter.run(tokens, None, path.wanted() | set(hooks))
    shape = (*tokens.shape, len(hooks), model.cfg.d_model)
    taken = 0.3 * acts[hooks[0]].std() * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    where = torch.arange(tokens.shape[1]).expand(tokens.shape).clone()
    less = path.change(Layers(adapter, acts, mask), Rows(torch.arange(len(tokens)), where, mask), taken, None)
    heard: list[Tensor] = []
    edits: list[Any] = [
        (name, lambda x, hook, at=number: acts[hook.name] - taken[:, :, at]) for number, name in enumerate(hooks)
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*edits, (last, lambda x, hook: heard.append(x))])
    expected = acts[last] - heard[0]
    torch.testing.assert_close(less.reshape(expected.shape), expected, rtol=1e-3, atol=2e-4 * float(expected.std()))


def test_a_circuit_of_cross_layer_features_agrees_with_ablation(demo: Demo) -> None:
    """Edges that are kept have the sign of what taking the feature out does, and nearly its size."""
    saes = transcoder(demo.model, demo.tokens)
    graph = tcl.circuit_lasso(
        demo.model, demo.tokens, basis=tcl.SAEFeatures(saes, error=False, pairs="all"), progress=False
    )
    table = graph.edge_table()
    kept = table[table.kept & table.target.str.contains("#")]
    assert len(kept) >= 10
    sites = [hook for hook in saes if kept.source.str.startswith(hook).any()]
    assert len(sites) >= 2 or len(saes) == 2
    for _, edge in itertools.islice(kept.iterrows(), 20):
        (first, i), (last, j) = (name.split("#") for name in (edge.source, edge.target))
        lost = ablated(demo.model, demo.tokens, saes[first], (first, last), saes[last], int(i))[..., int(j)]
        acts = adapt(demo.model).run(demo.tokens, None, [first])[first]
        effect = float(lost.sum()) / float(saes[first].encode(acts)[..., int(i)].detach().sum())
        assert edge.weight * effect > 0
        assert 0.5 < edge.weight / effect < 2.0


def test_circuit_tracers_object_of_all_layers_is_taken_apart(demo: Demo) -> None:
    layers = transcoder(demo.model, demo.tokens)
    parts = list(layers.values())
    whole = SimpleNamespace(
        n_layers=len(parts),
        feature_input_hook="hook_resid_mid",
        feature_output_hook="hook_mlp_out",
        W_enc=torch.stack([part.W_enc.T for part in parts]),
        b_enc=torch.stack([part.b_enc for part in parts]),
        W_dec=[part.W_dec for part in parts],
        activation_function=torch.relu,
        encode_layer=None,
    )
    given = {"progress": False, "target": demo.target, "positions": "last"}
    one, other = (
        tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes, error=False, min_count=5), **given)
        for saes in (whole, layers)
    )
    assert one.edge_table().equals(other.edge_table())
    for change, told in (
        ({"W_dec": None}, "lazy_decoder=False"),
        ({"W_skip": 1}, "skip connection"),
        ({"activation_function": torch.tanh}, "neither ReLU nor JumpReLU"),
    ):
        with pytest.raises(InputError, match=told):
            tcl.SAEFeatures(SimpleNamespace(**{**vars(whole), **change}))


def test_a_jump_is_where_the_threshold_is() -> None:
    layer = tcl.CrossLayer(torch.eye(2), torch.zeros(2), torch.ones(2, 1, 2), ("blocks.0.hook_mlp_out",), 0.5)
    assert layer.encode(torch.tensor([[0.4, 0.6]])).tolist() == [[0.0, pytest.approx(0.6)]]


def test_what_is_not_known_is_refused(demo: Demo) -> None:
    saes = transcoder(demo.model, demo.tokens)
    first, *_ = saes
    with pytest.raises(InputError, match="shares with the layers below: pass SAEFeatures"):
        tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes), progress=False)
    graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes, error=False), progress=False)
    with pytest.raises(InputError, match="only `circuit_lasso` knows what to do"):
        tcl.evaluate.faithfulness(
            demo.model, graph, demo.tokens, demo.tokens.flip(0), lambda x, rows: x[:, -1, 0].sum(), saes=saes,
            progress=False,
        )  # fmt: skip
    early = tcl.CrossLayer(saes[first].W_enc, saes[first].b_enc, saes[first].W_dec, saes[first].hook_outs)
    late = f"blocks.{len(saes) - 1}.hook_resid_post"
    with pytest.raises(InputError, match="computed before what it reads"):
        tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures({late: early}, error=False), progress=False)
    for outs, told in (
        (("blocks.0.hook_resid_post",), "are MLP outputs"),
        (("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out"), "order of computation"),
        (("blocks.0.hook_mlp_out",), r"must be \(feature, output, width\)"),
    ):
        decoder = torch.ones(FEATURES, 3, saes[first].W_enc.shape[0])
        with pytest.raises(InputError, match=told):
            Encoder(SimpleNamespace(encode=torch.relu, W_dec=decoder), first, outs[0], outs[1:])


def test_an_mlp_that_a_transcoder_stands_for_is_not_read(demo: Demo) -> None:
    saes: dict[str, Any] = transcoder(demo.model, demo.tokens)
    first = next(iter(saes))
    last = f"blocks.{len(saes) - 1}.hook_mlp_out"
    acts = adapt(demo.model).run(demo.tokens, None, [last])[last]
    both = {first: saes[first], last: plain_sae(acts.flatten(0, 1), 16)}
    with pytest.warns(UnreadPair, match="stands for the MLP that is read"):
        tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(both, error=False), progress=False)
