"""Derivatives at readers against finite differences, and edited reads against TransformerLens' own split inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import architectures
from tl_circuitlasso.baselines.edges import EdgeLayout, add_products, traced_derivative, written_out
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.patching import Edit, record, record_all, run_edited, unembed
from tl_circuitlasso.models.tracing import trace


def objective(adapter: Adapter) -> Any:
    weight = torch.randn(adapter.shape.d_vocab_out, generator=torch.Generator().manual_seed(3)).to(
        adapter.compute_dtype
    )
    return lambda logits: (logits[:, -2:].to(adapter.compute_dtype) * weight).tanh().sum()


def edited(adapter: Adapter, plain: Any, tokens: Tensor, mask: Tensor | None, layer: int, port: str, delta: Tensor):
    """Logits per column of (layer, port) with the reader seeing its stream less `delta`."""
    if layer == adapter.shape.n_layers:
        return unembed(adapter, plain.streams.logits - delta)[None]
    stream = (plain.streams.mlp if port == "" else plain.streams.attn)[layer] - delta
    heads = range(1 if port == "" else adapter.shape.n_heads)
    edits = [Edit(port, head, stream) for head in heads]  # type: ignore[arg-type]
    return run_edited(adapter, tokens, mask, layer, edits, plain.streams.attn[layer])


def check_derivatives(model: Any, step: float, tolerance: float, *, padded: bool = False) -> None:
    adapter = adapt(model)
    tokens, mask = architectures.padded() if padded else (architectures.prompts(length=6, batch=2), None)
    other = torch.where(tokens > 2, (tokens + 5) % 28 + 3, tokens)
    metric, layout = objective(adapter), EdgeLayout(adapter.shape)
    plain = record_all(adapter, tokens, mask)
    difference = plain.written.map(torch.sub, record(adapter, other, mask))
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64)
    traced = trace(adapter, tokens, mask, metric)
    add_products(layout, adapter, scores, difference, traced_derivative(adapter, traced), everywhere)
    deltas = written_out(adapter, difference, everywhere.nonzero(as_tuple=True)).unflatten(1, tokens.shape)
    wrong = []
    for layer, port in layout.readers():
        for source in {0, layout.sources_of(layer, port) // 2, layout.sources_of(layer, port) - 1}:
            delta = step * deltas[source]
            low, high = (
                [float(metric(logits)) for logits in edited(adapter, plain, tokens, mask, layer, port, change)]
                for change in (delta, -delta)
            )
            slopes = (torch.tensor(high, dtype=torch.float64) - torch.tensor(low, dtype=torch.float64)) / (2 * step)
            wrong.append((slopes - scores[source, layout.columns(layer, port)]).abs().max())
    assert max(wrong) < tolerance * scores.abs().max()


@pytest.mark.parametrize("family", [name for name in architectures.HOOKED if name != "moe"])
def test_derivatives_of_hooked_transformers(family):
    check_derivatives(architectures.hooked(family, dtype=torch.float64), 1e-5, 1e-7)


def test_derivatives_of_a_mixture_of_experts():
    check_derivatives(architectures.hooked("moe"), 1e-2, 5e-3)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "phi3"])
def test_derivatives_of_bridges(family):
    # Hugging Face's attention rounds to float32 inside, so steps are larger.
    check_derivatives(architectures.bridge(family, dtype=torch.float64), 2e-3, 2e-3)


@pytest.mark.parametrize("family", ["opt", "native_llama", "native_attn_only"])
def test_derivatives_of_other_bridges(family):
    check_derivatives(architectures.bridge(family), 1e-2, 1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_derivatives_under_padding(family):
    check_derivatives(architectures.hooked(family, dtype=torch.float64), 1e-5, 1e-7, padded=True)


@pytest.mark.parametrize("make", [architectures.hooked, architectures.bridge])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_reads_into_replaced_components_is_read_by_nobody(family, make):
    adapter, tokens = adapt(make(family)), architectures.prompts(length=6, batch=2)
    plain = trace(adapter, tokens, None, objective(adapter))
    heads, mlps = (dict(enumerate(values)) for values in (plain.values.heads, plain.values.mlps))
    replaced = trace(adapter, tokens, None, objective(adapter), heads=heads, mlps=mlps)
    assert replaced.value == pytest.approx(plain.value, abs=1e-5)
    torch.testing.assert_close(replaced.unembed, plain.unembed)
    for ports, z in zip(replaced.ports, plain.values.heads):
        assert all(grad.shape == z.shape and not grad.any() for grad in ports.values())
    assert not any(grad.any() for grad in replaced.mlps)


def test_shared_keys_under_a_joint_norm_are_refused():
    with pytest.raises(ModelError, match="normalises all of them together"):
        check_derivatives(architectures.bridge("olmo2"), 1e-2, 1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "olmo2", "pythia", "attn_only", "shortformer"])
def test_edited_reads_equal_split_inputs(family):
    """TransformerLens' own hooks on per-head inputs, which this library never switches on, give the same logits."""
    model = architectures.hooked(family, dtype=torch.float64)
    adapter, tokens = adapt(model), architectures.prompts(length=6, batch=2)
    plain = record_all(adapter, tokens, None)
    delta = torch.randn_like(plain.streams.logits)
    model.set_use_split_qkv_input(True)
    model.cfg.ungroup_grouped_query_attention = adapter.shape.n_kv_heads != adapter.shape.n_heads
    for layer in range(adapter.shape.n_layers):
        for port in ("q", "k", "v"):
            for head, ours in enumerate(edited(adapter, plain, tokens, None, layer, port, delta)):
                change = torch.zeros(*delta.shape[:2], adapter.shape.n_heads, delta.shape[2], dtype=torch.float64)
                change[:, :, head] = delta
                hook = (f"blocks.{layer}.hook_{port}_input", lambda act, hook, change=change: act - change)
                with torch.no_grad():
                    theirs = model.run_with_hooks(tokens, fwd_hooks=[hook])
                assert (ours - theirs).abs().max() < 1e-10
