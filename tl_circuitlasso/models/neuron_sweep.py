"""What each neuron contributes to a target: one linear sweep from the target back to the input.

Every nonlinearity is replaced by a linear map between two runs, or at one of them where the two are the same; `Rules`
say which. The multiplier m of a place (how much the target moves per unit of it) is then pulled through one layer after
another, and what a node contributes is m times how much the node differs between the two runs. With all rules off and
two runs, every map is an exact secant, so that what flows adds up to the target's difference:

    product   a b                da mean(b) + mean(a) db
    norm      x / s              mean(1/s) dx - mean(x) (2 / d) (mean(x) . dx) / (s s' (s + s'))
    softmax   w = L (b - sum L b / sum L), L the logarithmic mean of the patterns
    act       (act(x') - act(x)) / (x' - x)

With all rules on and a single run it is RelP (arXiv 2508.21258): norms and patterns constant, act(x) = x (act(x) / x)
with the ratio constant, products shared half and half, so that in a model without biases the input's contributions add
up to the logit itself. Norms behind attention or an MLP, and those on queries and keys, are constant under every rule.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.head_pull import score_slope, unrotated
from tl_circuitlasso.models.names import Kind, act, head_scale
from tl_circuitlasso.models.views import NEAR, secant, softmax_secant
from tl_circuitlasso.models.weights import MLP, Port, repeat_heads


@dataclass(frozen=True)
class Rules:
    """Which nonlinearities count as constants; with none of them the maps are secants, or derivatives in one run.

    Attributes
    ----------
    norm: a norm's scale is constant. attention: patterns are. activation: act(x) / x is. half: each factor of a gated
        MLP passes on half of the product's relevance, not all of it.
    """

    norm: bool = False
    attention: bool = False
    activation: bool = False
    half: bool = False


RELP = Rules(norm=True, attention=True, activation=True, half=True)
SECANT = Rules()


@dataclass(frozen=True, eq=False)
class Layer:
    """The multipliers in a layer: behind it, at what its neurons put out, at the stream that its MLP reads, at each
    head's z and what it projects (`at_ports`), and in front of it."""

    layer: int
    behind: Float[Tensor, "prompt direction pos d_model"]
    neurons: Float[Tensor, "prompt direction pos d_mlp"] | None
    mlp: Float[Tensor, "prompt direction pos d_model"] | None
    heads: Float[Tensor, "prompt direction head pos d_head"]
    ports: Mapping[Port, Float[Tensor, "prompt direction head pos d_head"]]
    front: Float[Tensor, "prompt direction pos d_model"]


def wanted(adapter: Adapter, rules: Rules = SECANT) -> tuple[str, ...]:
    """The activations that a sweep reads."""
    shape = adapter.shape
    kinds: list[Kind] = ["v", "pattern", "scale.attn", "scale.attn_out"]
    if not rules.attention:
        kinds.extend(["q", "k", "scale.q", "scale.k"])
    if not rules.norm:
        kinds.extend(["resid_pre", "resid_post"])
        kinds.extend([] if shape.attn_only else ["mlp_out"])
    if not shape.attn_only:
        kinds.extend(["mlp_pre", "mlp_post", "scale.mlp", "scale.mlp_out"])
        kinds.extend(["mlp_linear"] if shape.gated else [])
    return (
        "scale.final",
        adapter.final,
        *(act(kind, layer) for kind in dict.fromkeys(kinds) for layer in range(shape.n_layers)),
    )


class Ends:
    """The two runs of every prompt, by activation; `other` may be `own` itself.

    Where `mask` is False the two count as equal.
    """

    def __init__(
        self,
        adapter: Adapter,
        own: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        mask: Bool[Tensor, "prompt pos"],
        positions: Int[Tensor, "prompt pos"],
    ) -> None:
        self.adapter, self.own, self.other, self.mask, self.positions = adapter, own, other, mask, positions
        self.same = own is other

    def both(self, key: str) -> tuple[Tensor, Tensor]:
        own, other = self.own[key], self.other[key]
        if self.same or bool(self.mask.all()):
            return own, other
        return own, torch.where(self.mask.view(*self.mask.shape, *[1] * (own.ndim - 2)), other, own)

    def patterns(self, layer: int) -> tuple[Float[Tensor, "prompt head q k"], Float[Tensor, "prompt head q k"]]:
        own, other = self.own[act("pattern", layer)], self.other[act("pattern", layer)]
        return own, own if self.same else torch.where(self.mask[:, None, :, None], other, own)

    def mean(self, key: str) -> Tensor:
        own, other = self.both(key)
        return own if self.same else (own + other) / 2

    def difference(self, key: str) -> Tensor:
        """What the own run has more than the other."""
        own, other = self.both(key)
        return own - other

    def inverse(self, key: str) -> Tensor:
        own, other = self.both(key)
        return (own.reciprocal() + other.reciprocal()) / 2

    def heads(self, key: str) -> Float[Tensor, "prompt 1 head pos d_head"]:
        """The mean queries, keys or values, shared ones repeated for every head."""
        mean = self.mean(key)
        return repeat_heads(mean.movedim(2, 0), self.adapter.shape.n_heads).movedim(0, 1).unsqueeze(1)

    def stream(self, layer: int, *, mlp: bool) -> Float[Tensor, "prompt pos d_model"]:
        """The mean residual stream in front of a layer's attention or MLP."""
        if layer == self.adapter.shape.n_layers:
            return self.mean(act("resid_post", layer - 1))
        if not mlp or self.adapter.shape.parallel:
            return self.mean(act("resid_pre", layer))
        return self.mean(act("resid_post", layer)) - self.mean(act("mlp_out", layer))


def sweep(ends: Ends, at_final: Float[Tensor, "prompt direction pos d_model"], rules: Rules) -> Iterator[Layer]:
    """The multipliers of every layer, from the last to the first.

    at_final: what the target reads of the final residual stream over its norm's scale (`unembedded` gives it).
    """
    adapter = ends.adapter
    m = through_norm(ends, adapter.shape.n_layers, at_final, rules, mlp=False)
    for layer in reversed(range(adapter.shape.n_layers)):
        behind = total = m
        at_post = at_mlp = None
        if not adapter.shape.attn_only:
            at_post = at_neurons(ends, layer, m)
            at_mlp = through_mlp(ends, layer, at_post, rules)
            total = m + at_mlp
        at_z = at_heads(ends, layer, behind if adapter.shape.parallel else total)
        ports = at_ports(ends, layer, at_z, rules)
        m = total + through_ports(ends, layer, ports, rules)
        yield Layer(layer, behind, at_post, at_mlp, at_z, ports, m)


def through_norm(
    ends: Ends, layer: int, m: Float[Tensor, "prompt direction pos d_model"], rules: Rules, *, mlp: bool
) -> Float[Tensor, "prompt direction pos d_model"]:
    """From what reads (x - centred mean) / scale, centred already by folded weights, back to x."""
    n_layers = ends.adapter.shape.n_layers
    key = "scale.final" if layer == n_layers else act("scale.mlp" if mlp else "scale.attn", layer)
    back = m * ends.inverse(key).unsqueeze(1)
    norm = ends.adapter.norm(key)
    if rules.norm or norm is None:
        return back
    x = ends.stream(layer, mlp=mlp).unsqueeze(1)
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    own, other = (scale.unsqueeze(1) for scale in ends.both(key))
    return back - x * ((m * x).sum(-1, keepdim=True) * 2 / (x.shape[-1] * own * other * (own + other)))


def at_neurons(
    ends: Ends, layer: int, m: Float[Tensor, "prompt direction pos d_model"]
) -> Float[Tensor, "prompt direction pos d_mlp"]:
    """The multipliers at what a layer's neurons put out."""
    return (m * ends.inverse(act("scale.mlp_out", layer)).unsqueeze(1)) @ ends.adapter.mlp(layer).w_out.T


def through_mlp(
    ends: Ends, layer: int, at_post: Float[Tensor, "prompt direction pos d_mlp"], rules: Rules
) -> Float[Tensor, "prompt direction pos d_model"]:
    """From the neurons back to the residual stream that they read."""
    mlp = ends.adapter.mlp(layer)
    if mlp.w_gate is None:
        read = _through_act(ends, layer, at_post, rules) @ mlp.w_in.T
    else:
        linear, active = gate_slopes(ends, layer, rules)
        read = _through_act(ends, layer, at_post * linear, rules) @ mlp.w_gate.T + (at_post * active) @ mlp.w_in.T
    return through_norm(ends, layer, read, rules, mlp=True)


def gate_slopes(
    ends: Ends, layer: int, rules: Rules
) -> tuple[Float[Tensor, "prompt 1 pos d_mlp"], Float[Tensor, "prompt 1 pos d_mlp"]]:
    """By what each factor of a gated MLP is multiplied: the activation, then the linear one."""
    mlp, share = ends.adapter.mlp(layer), 0.5 if rules.half else 1.0
    own, other = ends.both(act("mlp_pre", layer))
    active = mlp.act(own) if ends.same else (mlp.act(own) + mlp.act(other)) / 2
    return share * ends.mean(act("mlp_linear", layer)).unsqueeze(1), share * active.unsqueeze(1)


def _through_act(
    ends: Ends, layer: int, m: Float[Tensor, "prompt direction pos d_mlp"], rules: Rules
) -> Float[Tensor, "prompt direction pos d_mlp"]:
    mlp = ends.adapter.mlp(layer)
    if rules.activation or mlp.elementwise:
        return m * slope_of_act(ends, layer, rules).unsqueeze(1)
    pull = torch.func.vjp(mlp.act, ends.mean(act("mlp_pre", layer)))[1]  # neurons that mix (SoLU) have no secant each
    return torch.stack([pull(one)[0] for one in m.unbind(1)], dim=1)


def slope_of_act(ends: Ends, layer: int, rules: Rules) -> Float[Tensor, "prompt pos d_mlp"]:
    """What the activation function multiplies a change of its argument by.

    Raises
    ------
    ModelError: an activation that mixes neurons (SoLU) where its ratio isn't constant.
    """
    mlp, (own, other) = ends.adapter.mlp(layer), ends.both(act("mlp_pre", layer))
    return _ratio(mlp, (own + other) / 2) if rules.activation else slope(mlp, own, other)


def _ratio(mlp: MLP, x: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    zero = x == 0
    ratio = mlp.act(x) / torch.where(zero, 1.0, x)
    return torch.where(zero, mlp.act_grad(x), ratio) if bool(zero.any()) and mlp.elementwise else ratio


def slope(mlp: MLP, own: Float[Tensor, "*x"], other: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """(act(other) - act(own)) / (other - own), the derivative where the two nearly meet."""
    near = (other - own).abs() < NEAR
    if bool(near.all()):
        return mlp.act_grad((own + other) / 2)
    straight = (mlp.act(other) - mlp.act(own)) / torch.where(near, 1.0, other - own)
    return torch.where(near, mlp.act_grad((own + other) / 2), straight)


def through_attention(
    ends: Ends, layer: int, m: Float[Tensor, "prompt direction pos d_model"], rules: Rules
) -> Float[Tensor, "prompt direction pos d_model"]:
    """From what a layer's heads write back to the residual stream that they read."""
    return through_ports(ends, layer, at_ports(ends, layer, at_heads(ends, layer, m), rules), rules)


def at_heads(
    ends: Ends, layer: int, m: Float[Tensor, "prompt direction pos d_model"]
) -> Float[Tensor, "prompt direction head pos d_head"]:
    """The multipliers at every head's z."""
    w_o = ends.adapter.writer(layer)[0]
    written = m * ends.inverse(act("scale.attn_out", layer)).unsqueeze(1)
    return (written @ w_o.flatten(0, 1).T).unflatten(-1, w_o.shape[:2]).transpose(2, 3)  # one product for all heads


def at_ports(
    ends: Ends, layer: int, at_z: Float[Tensor, "prompt direction head pos d_head"], rules: Rules
) -> dict[Port, Float[Tensor, "prompt direction head pos d_head"]]:
    """The multipliers at each head's own projected values, and at its queries and keys unless patterns are constant."""
    own, other = ends.patterns(layer)
    ports: dict[Port, Tensor] = {"v": ((own + other) / 2).mT.unsqueeze(1) @ at_z}
    if not rules.attention:
        slope = score_slope(ends.adapter, layer, lambda port: ends.both(act(port, layer)))
        weight = softmax_secant(own, other, at_z @ ends.heads(act("v", layer)).mT) * slope
        ports["q"] = _unrotated(ends, layer, "q", weight @ ends.heads(act("k", layer)))
        ports["k"] = _unrotated(ends, layer, "k", weight.mT @ ends.heads(act("q", layer)))
    return ports


def through_ports(
    ends: Ends, layer: int, ports: Mapping[Port, Float[Tensor, "prompt direction head pos d_head"]], rules: Rules
) -> Float[Tensor, "prompt direction pos d_model"]:
    """From what the heads project back to the residual stream, over all heads and ports."""
    read = sum(_projected_back(ends.adapter, layer, port, m) for port, m in ports.items())
    assert isinstance(read, Tensor)
    return through_norm(ends, layer, read, rules, mlp=False)


def _projected_back(
    adapter: Adapter, layer: int, port: Port, m: Float[Tensor, "prompt direction head pos d_head"]
) -> Float[Tensor, "prompt direction pos d_model"]:
    weight = adapter.reader(layer, port).weight
    return m.transpose(2, 3).flatten(3) @ weight.transpose(1, 2).flatten(0, 1)


def _unrotated(
    ends: Ends, layer: int, port: Port, m: Float[Tensor, "prompt direction head pos d_head"]
) -> Float[Tensor, "prompt direction head pos d_head"]:
    return unrotated(ends.adapter, layer, m, ends.positions, ends.inverse(head_scale(port, layer)))


def unembedded(
    adapter: Adapter,
    own: Float[Tensor, "prompt pos vocab"],
    other: Float[Tensor, "prompt pos vocab"],
    at_logits: Float[Tensor, "prompt pos vocab"],
) -> Float[Tensor, "prompt 1 pos d_model"]:
    """From multipliers at the logits of two runs back to the final residual stream over its norm's scale."""
    used = at_logits.abs().amax((0, 1)).nonzero().flatten()  # a metric reads a few tokens, the vocabulary is wide
    m, cap = at_logits[..., used], adapter.logit_soft_cap
    if cap is not None:
        low, high = (cap * torch.atanh((side[..., used] / cap).clamp(-1 + 1e-7, 1 - 1e-7)) for side in (own, other))
        m = m * secant(lambda x: cap * torch.tanh(x / cap), low, high)
    return (m @ adapter.unembed(used)[0].T).unsqueeze(1)
