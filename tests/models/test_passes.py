"""Runs with edits: what an edit returns flows on, wherever it is made, and derivatives are those of the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.passes import ForwardPass

KEYS = {
    "z.0": "blocks.0.attn.hook_z",
    "resid_pre.1": "blocks.1.hook_resid_pre",
    "projected.k.1": "blocks.1.attn.hook_k",
    "mlp_post.0": "blocks.0.mlp.hook_post",
    "attn_out.1": "blocks.1.hook_attn_out",
    "mlp_read.1": "blocks.1.ln2.hook_normalized",
    "mlp_stream.1": "blocks.1.hook_resid_mid",
}


def doubled(activation: Tensor) -> Tensor:
    return 2 * activation


@pytest.mark.parametrize("key", KEYS)
def test_an_edit_is_transformer_lens_own(key: str) -> None:
    model, tokens = architectures.hooked("folded"), architectures.prompts()  # whose norms have no gain
    acts = adapt(model).run(tokens, None, ["logits", key], edits=[(key, doubled)])
    hook = KEYS[key]
    if key == "mlp_stream.1":  # read by the norm alone: the stream itself goes on past it
        normed = model.blocks[1].ln2(2 * model.run_with_cache(tokens)[1][hook])
        hooks: list[Any] = [("blocks.1.ln2.hook_normalized", lambda activation, hook: normed)]
    else:
        hooks = [(hook, lambda activation, hook: doubled(activation))]
    with torch.no_grad():
        theirs = model.run_with_hooks(tokens, fwd_hooks=hooks)
        plain = model.run_with_cache(tokens)[1][hook]
    torch.testing.assert_close(acts["logits"], theirs)
    torch.testing.assert_close(acts[key], doubled(plain))  # what is read is what flows on


def test_an_edit_sees_what_was_computed_in_front_of_it() -> None:
    adapter, tokens = adapt(architectures.hooked("gpt2")), architectures.prompts()
    made = ForwardPass(adapter, tokens, None, ["z.0", "mlp_out.1"])
    seen: list[Tensor] = []

    def note(activation: Tensor) -> None:
        seen.append(made["z.0"])
        with pytest.raises(ModelError, match=r"hook_mlp_out` of this model .* did not fire"):
            made["mlp_out.1"]

    made.run([("resid_pre.1", note)])
    torch.testing.assert_close(seen[0], adapter.run(tokens, None, ["z.0"])["z.0"])


def test_an_edit_that_does_not_happen_is_an_error() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    with pytest.raises(ModelError, match="did not fire"):
        adapter.run(architectures.prompts(), None, ["z.0"], edits=[("z.1", doubled)], stop_at_layer=1)


def test_a_run_is_long_enough_for_its_edits() -> None:
    adapter, heard = adapt(architectures.hooked("gpt2")), list[Tensor]()
    adapter.run(architectures.prompts(), None, ["z.0"], edits=[("mlp_out.1", heard.append)])
    assert len(heard) == 1


def test_hooks_that_cost_are_on_where_they_are_edited() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts()
    model.cfg.use_split_qkv_input = True
    adapter = adapt(model)
    edited = adapter.run(tokens, None, ["logits"], edits=[("blocks.1.hook_q_input", torch.zeros_like)])["logits"]
    assert not torch.allclose(edited, adapter.run(tokens, None, ["logits"])["logits"])
    assert model.cfg.use_split_qkv_input


@pytest.mark.parametrize("basis", ["head", "neuron"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_derivatives_at_nodes_of_bridges(family: str, basis: str) -> None:
    """A bridge shows views of some activations, at which the model has no derivative unless they flow on."""
    model, tokens = architectures.bridge(family), architectures.prompts()
    adapter = adapt(model)

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        return logits[:, -1, 3].tanh().sum()

    graph = baselines.gradient_activation(model, tokens, None, metric, basis=basis, max_nodes=None, progress=False)
    found = {edge.source: edge.score for edge in graph.edge_table().itertuples()}
    key, step = {"head": "z", "neuron": "mlp_post"}[basis], 0.004
    for layer, begin in enumerate(("a0.h", "a1.h") if basis == "head" else ("m0#", "m1#")):
        name = max((name for name in found if name.startswith(begin)), key=lambda name: abs(found[name]))
        node = int(name.removeprefix(begin))

        def value(factor: float, layer: int = layer, node: int = node) -> float:
            def scaled(activation: Tensor) -> Tensor:
                factors = activation.new_ones(activation.shape[-2] if basis == "head" else activation.shape[-1])
                factors[node] = factor
                return activation * (factors[:, None] if basis == "head" else factors)

            logits = adapter.run(tokens, None, ["logits"], edits=[(f"{key}.{layer}", scaled)])["logits"]
            return float(metric(logits, torch.arange(len(tokens)))) / len(tokens)

        slope = (value(1 + step) - value(1 - step)) / (2 * step)
        assert abs(slope) > 0.01
        assert found[name] == pytest.approx(slope, rel=0.02)
