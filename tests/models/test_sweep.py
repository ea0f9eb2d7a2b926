"""The sweep: contributions add up, follow the weights, and don't depend on how the data were cut or padded."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import architectures
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.sweep import Read, sweep, wanted
from tl_circuitlasso.models.views import Pairing, logarithmic_mean, secant, softmax_secant

F64 = torch.float64
NORM_FREE = ["no_norm", "bidirectional"]
WITH_NORMS = [f for f in architectures.HOOKED if f not in (*NORM_FREE, "solu", "solu_ln", "moe")]
BRIDGES = ["gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "olmo2", "falcon", "granite", "cohere2"]
NATIVE = ["native_llama", "native_attn_only", "native_no_norm", "native_bidirectional"]


@dataclass(frozen=True, eq=False)
class Swept:
    """A sweep over some pairs of a batch, from random directions at each prompt's last token."""

    adapter: Adapter
    acts: dict[str, Tensor]
    pairs: Pairing
    directions: Tensor
    reads: list[Read]

    def into(self, layer: int, port: str) -> Tensor:
        """(pair, direction, head, source): the contributions of all edges into one group of children."""
        return next(one.value for one in self.reads if (one.layer, one.port) == (layer, port))

    @property
    def into_target(self) -> Tensor:
        """(pair, direction, source): the contributions of the target's own edges."""
        return self.into(self.adapter.shape.n_layers, "")[:, :, 0]

    def place(self, layer: int, head: int | None) -> int:
        """A component's number among the sources; `head` None is the MLP."""
        shape = self.adapter.shape
        return 1 + layer * (shape.n_heads + (not shape.attn_only)) + (shape.n_heads if head is None else head)

    def incoming(self) -> Tensor:
        """(pair, direction, source): what every component gets from its parents; nothing reaches the input."""
        n_layers = self.adapter.shape.n_layers
        total = torch.zeros_like(self.into_target)
        for one in self.reads:
            first = self.place(one.layer, 0 if one.port else None)
            if one.layer < n_layers:
                total[:, :, first : first + one.value.shape[2]] += one.value.sum(-1)
        return total

    def outgoing(self) -> Tensor:
        """(pair, direction, source): what every component hands on to its children."""
        total = torch.zeros_like(self.into_target)
        for one in self.reads:
            total[:, :, : one.value.shape[-1]] += one.value.sum(2)
        return total

    def change(self, key: str) -> Tensor:
        """(pair, pos, ...): an activation's difference between the two prompts."""
        return self.acts[key][self.pairs.partner] - self.acts[key][self.pairs.own]

    def at_target(self, stream: Tensor) -> Tensor:
        """(pair, direction): what the directions read of a residual stream (pair, pos, d_model)."""
        rows = torch.arange(len(self.pairs.own))
        return torch.einsum("skd,sd->sk", self.directions, stream[rows, self.pairs.position])


def swept(
    model: Any,
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Any = ([0, 1, 2], [1, 2, 3]),
    reach: float | None = 0.5,
    first: int = 0,
) -> Swept:
    adapter = adapt(model)
    tokens = architectures.prompts(adapter.shape.d_vocab, batch=4) if tokens is None else tokens
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    final = f"resid_post.{adapter.shape.n_layers - 1}"
    acts = adapter.run(tokens, mask, (*wanted(adapter), final))
    own, partner = (torch.tensor(side) for side in rows)
    last = tokens.shape[1] - 1 - mask[own].flip(1).int().argmax(1)
    reaches = None if reach is None else torch.full(own.shape, reach)
    pairs = Pairing(own, partner, last, mask[own] & mask[partner], position_ids(mask)[own], reaches, first=first)
    at = torch.randn(len(own), 2, adapter.shape.d_model, generator=torch.Generator().manual_seed(5), dtype=F64)
    at = at - at.mean(-1, keepdim=True)  # as with every norm that centres, once it's folded into what reads it
    at = at.to(adapter.compute_dtype) * acts["scale.final"][mask].mean()
    return Swept(adapter, acts, pairs, at, list(sweep(adapter, acts, pairs, at)))


def with_flat_norms(model: Any) -> Any:
    """The same model with norms of all but constant scale: an eps far above any variance, with gains to match."""
    size = 1e6
    for module in model.modules():
        if hasattr(module, "hook_scale") and hasattr(module, "config"):
            module.config.eps = size**2  # a bridge's norm reports its scale from here
        names = [name for name in ("eps", "variance_epsilon") if isinstance(vars(module).get(name), float)]
        for name in names:
            setattr(module, name, size**2)
        gain = next((g for g in (getattr(module, "w", None), getattr(module, "weight", None)) if g is not None), None)
        if names and isinstance(gain, torch.nn.Parameter):
            adds_one = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            gain.data.copy_(size * (gain.data + adds_one) - adds_one)
    return model


def with_close_tokens(model: Any, distance: float) -> Any:
    """The same model with all tokens' embeddings but a small `distance` apart."""
    weight = model.embed.W_E
    weight.data.copy_(weight.data[3:4] + distance * (weight.data - weight.data[3:4]))
    return model


def assert_conserved(found: Swept, tolerance: float) -> None:
    """A component hands on what it got; the target gets its own difference. In units of the largest contribution."""
    incoming, outgoing = found.incoming(), found.outgoing()
    size = float(outgoing.abs().amax())
    assert size > 1e-7
    torch.testing.assert_close(incoming[..., 1:], outgoing[..., 1:], rtol=0, atol=tolerance * size)
    stream = found.change(f"resid_post.{found.adapter.shape.n_layers - 1}")
    flat = found.acts["scale.final"]
    frozen = stream * (1 / flat[found.pairs.partner] + 1 / flat[found.pairs.own]) / 2
    torch.testing.assert_close(found.into_target.sum(-1), found.at_target(frozen), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("family", NORM_FREE + WITH_NORMS)
def test_contributions_are_conserved_to_first_order(family: str) -> None:
    """Between prompts that hardly differ: what is lost falls with the square of their distance."""
    model = with_flat_norms(architectures.hooked(family, dtype=F64))
    assert_conserved(swept(with_close_tokens(model, 1e-4)), 2e-3)


@pytest.mark.parametrize("family", BRIDGES + NATIVE)
def test_bridges_conserve_to_first_order(family: str) -> None:
    exact = family not in NATIVE
    model = architectures.bridge(family, dtype=F64) if exact else architectures.bridge(family)
    assert_conserved(swept(with_close_tokens(with_flat_norms(model), 1e-4 if exact else 1e-2)), 2e-3 if exact else 5e-2)


@pytest.mark.parametrize("family", ["no_norm", "gpt2", "llama", "gemma2"])
def test_at_no_distance_a_sweep_is_a_backward_pass(family: str) -> None:
    """Secants of no length are derivatives: the direct path apart, m is then what autograd finds with norms frozen."""
    model = with_flat_norms(architectures.hooked(family, dtype=F64))
    found = swept(model, reach=1e-3)
    tokens = architectures.prompts(model.cfg.d_vocab, batch=4)[:3]
    heard: dict[str, Tensor] = {}

    def listen(activation: Tensor, hook: Any) -> None:
        heard[hook.name] = activation

    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith(("0.hook_resid_pre", "resid_post")), listen)])
    stream = heard["blocks.1.hook_resid_post"] / found.acts["scale.final"][:3]
    for direction in range(2):
        read = found.at_target(stream)[:, direction].sum()
        slope = torch.autograd.grad(read, heard["blocks.0.hook_resid_pre"], retain_graph=True)[0]
        expected = (slope * found.change("resid_pre.0")).sum((1, 2))
        torch.testing.assert_close(found.outgoing()[:, direction, 0], expected, rtol=1e-2, atol=1e-2)


EXACT = [f for f in architectures.HOOKED if f not in ("gemma2", "qwen3", "olmo2", "solu", "solu_ln", "moe", "gemma3")]


@pytest.mark.parametrize("family", EXACT)
def test_between_counterparts_contributions_add_up_exactly(family: str) -> None:
    """Whatever the distance, and with norms whose scale changes; those of queries, keys and outputs stay frozen."""
    found = swept(architectures.hooked(family, dtype=F64), reach=None)
    incoming, outgoing = found.incoming(), found.outgoing()
    size = float(outgoing.abs().amax())
    torch.testing.assert_close(incoming[..., 1:], outgoing[..., 1:], rtol=0, atol=1e-4 * size)
    ends = [found.acts["resid_post.1"][rows] / found.acts["scale.final"][rows] for rows in found.pairs.sides]
    change = found.at_target(ends[1] - ends[0])
    torch.testing.assert_close(found.into_target.sum(-1), change, rtol=0, atol=1e-6 * size)
    torch.testing.assert_close(outgoing[..., 0], change, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("family", ["gpt2", "llama", "no_norm"])
def test_a_common_beginning_can_be_left_out(family: str, reach: float | None) -> None:
    tokens = architectures.prompts(batch=4, length=9)
    tokens[:, :4] = tokens[:1, :4]
    model = architectures.hooked(family, dtype=F64)
    whole, cut = (swept(model, tokens=tokens, reach=reach, first=first) for first in (0, 4))
    for one, other in zip(whole.reads, cut.reads):
        torch.testing.assert_close(one.value, other.value, rtol=1e-7, atol=1e-10)


def test_a_norm_passes_on_what_only_moves_its_scale() -> None:
    """A source that writes across the direction that is read still changes what is read, through the final norm."""
    found = swept(architectures.hooked("gpt2", dtype=F64), reach=1.0)
    ends = [found.acts["resid_post.1"][rows] / found.acts["scale.final"][rows] for rows in found.pairs.sides]
    torch.testing.assert_close(found.into_target.sum(-1), found.at_target(ends[1] - ends[0]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["no_norm", "bidirectional"])
def test_a_linear_network_gives_the_derivative_of_every_edge(family: str, way: float) -> None:
    """With constant attention and an identity for an activation, autograd on the model itself is an oracle."""
    model = architectures.hooked(family, dtype=F64)
    for block in model.blocks:
        block.attn.W_Q.data.zero_()
        block.attn.W_K.data.zero_()
        block.mlp.act_fn = lambda x: x
    found = swept(model, reach=way)
    tokens = architectures.prompts(model.cfg.d_vocab, batch=4)[:1]
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    heard: dict[str, Tensor] = {}

    def listen(activation: Tensor, hook: Any) -> None:
        heard[hook.name] = activation

    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith(("_input", "_mlp_in", "resid_post")), listen)])
    inputs = [name for name in heard if not name.endswith("resid_post")]
    for direction in range(found.directions.shape[1]):
        read = heard["blocks.1.hook_resid_post"][0, int(found.pairs.position[0])] @ found.directions[0, direction]
        slopes = torch.autograd.grad(read, [heard[name] for name in inputs], retain_graph=True)
        at = {name: slope[0] for name, slope in zip(inputs, slopes)}
        for layer in range(2):
            values = torch.einsum("pdu,phd->hu", written(found)[0], at[f"blocks.{layer}.hook_v_input"])
            mlp = torch.einsum("pdu,pd->u", written(found)[0], at[f"blocks.{layer}.hook_mlp_in"])
            v, m = found.into(layer, "v")[0, direction], found.into(layer, "")[0, direction, 0]
            torch.testing.assert_close(v, values[:, : v.shape[-1]])
            torch.testing.assert_close(m, mlp[: m.shape[-1]])
            assert float(v.abs().max()) > 1e-3
            assert not any(bool(found.into(layer, port).any()) for port in "qk")


def written(found: Swept) -> Tensor:
    """(pair, pos, d_model, source): what every component wrote differently in a model without norms."""
    columns = [found.change("resid_pre.0")]
    for layer in range(found.adapter.shape.n_layers):
        heads = torch.einsum("sphe,hed->hspd", found.change(f"z.{layer}"), found.adapter.writer(layer)[0])
        columns += [*heads, found.change(f"mlp_out.{layer}")]
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_one_hidden_layer_is_explained_without_remainder(act: str) -> None:
    model = architectures.hooked("no_norm", n_layers=1, act_fn=act, dtype=F64)
    model.blocks[0].attn.W_O.data.zero_()
    found = swept(model, reach=1.0)
    edge = found.into(0, "")[:, :, 0, 0]
    torch.testing.assert_close(edge, found.at_target(found.change("mlp_out.0")), rtol=1e-5, atol=1e-6)
    assert float(edge.abs().min()) > 1e-3


def test_a_child_that_does_not_read_a_parent_gets_exactly_nothing_from_it() -> None:
    model = architectures.hooked("no_norm")
    half = model.cfg.d_model // 2
    first, second = model.blocks
    first.attn.W_O.data[1, :, half:] = 0  # head 1 of layer 0 writes to the first half only,
    second.mlp.W_in.data[:half] = 0  # which the last MLP doesn't read,
    for weight in (second.attn.W_Q, second.attn.W_K, second.attn.W_V):
        weight.data[2, :half] = 0  # nor does head 2 of layer 1 through any port
    found = swept(model)
    parent = found.place(0, 1)
    assert not bool(found.into(1, "")[..., parent].any())
    for port in "qkv":
        assert not bool(found.into(1, port)[:, :, 2, parent].any())
        assert bool(found.into(1, port)[:, :, 1, parent].all())
    assert bool(found.into(0, "")[..., parent].all())


def test_equal_prompts_have_no_contributions() -> None:
    tokens = architectures.prompts(batch=1).expand(4, -1)
    found = swept(architectures.hooked("gpt2"), tokens=tokens)
    assert all(not bool(one.value.any()) for one in found.reads)


def test_what_follows_the_target_in_a_causal_model_does_not_matter() -> None:
    model = architectures.hooked("llama", dtype=F64)
    tokens = architectures.prompts(batch=4, length=9)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 6:] = False
    found, cut = swept(model, tokens=tokens, mask=mask), swept(model, tokens=tokens[:, :6])
    for one, other in zip(found.reads, cut.reads):
        torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_padding_on_either_side_gives_the_same_contributions(family: str) -> None:
    model = architectures.hooked(family, dtype=F64)
    real = architectures.prompts(batch=4, length=6)
    pads = torch.full((4, 3), 2)
    on, off = torch.ones(4, 6, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    left = swept(model, tokens=torch.cat([pads, real], 1), mask=torch.cat([off, on], 1))
    right = swept(model, tokens=torch.cat([real, pads], 1), mask=torch.cat([on, off], 1))
    for one, other in zip(left.reads, right.reads):
        torch.testing.assert_close(one.value, other.value, rtol=1e-7, atol=1e-10)


def test_a_longer_partner_counts_only_as_far_as_the_prompt_goes() -> None:
    tokens, mask = architectures.prompts(batch=4), torch.ones(4, 9, dtype=torch.bool)
    mask[0, 5:] = False
    model = with_close_tokens(architectures.hooked("no_norm", dtype=F64), 1e-4)
    found = swept(model, tokens=tokens, mask=mask, rows=([0], [1]))
    assert_conserved(found, 2e-3)
    assert int(found.pairs.position[0]) == 4


@given(a=st.floats(-4, 4), b=st.floats(-4, 4))
def test_a_secant_takes_one_value_to_the_other(a: float, b: float) -> None:
    low, high = torch.tensor([a], dtype=F64), torch.tensor([b], dtype=F64)
    for act in (torch.relu, torch.nn.functional.gelu, torch.tanh):
        slope = secant(act, low, high)
        tolerance = 1e-3 if act is torch.relu else 1e-6  # near a kink the central difference is a compromise
        torch.testing.assert_close(slope * (high - low), act(high) - act(low), rtol=0, atol=tolerance)
        assert bool((slope.abs() <= 1.2).all())


@given(seed=st.integers(0, 100), spread=st.sampled_from([0.1, 1.0, 3.0, 30.0, 100.0]))
def test_a_softmax_secant_takes_one_pattern_to_the_other(seed: int, spread: float) -> None:
    """Exactly, however sharp the patterns are."""
    generator = torch.Generator().manual_seed(seed)
    scores, b = torch.randn(2, 1, 1, 4, 5, generator=generator, dtype=F64) * spread, torch.randn(1, 3, 1, 4, 5)
    scores = scores.clamp(-45, 45)  # probabilities stay above the smallest one that is told from 0
    own, partner = scores.softmax(-1)
    weight = softmax_secant(own, partner, b.double())
    found = (weight * (scores[1] - scores[0])[:, None]).sum(-1)
    wanted_change = ((partner - own)[:, None] * b).sum(-1)
    torch.testing.assert_close(found, wanted_change, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.sum(-1), torch.zeros_like(found), rtol=0, atol=1e-12)


@given(p=st.floats(1e-12, 1), q=st.floats(1e-12, 1))
def test_a_logarithmic_mean_lies_between(p: float, q: float) -> None:
    low, high = torch.tensor([p], dtype=F64), torch.tensor([q], dtype=F64)
    mean = float(logarithmic_mean(low, high))
    assert min(p, q) * (1 - 1e-6) <= mean <= max(p, q) * (1 + 1e-6)
    assert mean == pytest.approx(float(logarithmic_mean(high, low)), rel=1e-9)
