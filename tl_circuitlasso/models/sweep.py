"""What each edge contributes to the target: one linear sweep from the target back to the input.

Two prompts s and s' are each other's reference. Every nonlinearity is replaced by its *secant*: the straight line from
its value at s to its value half-way to s'. That makes the network linear, so that what flows adds up,

    sum over parents u of g[u -> v] = sum over children w of g[v -> w]        (to first order between close prompts),

where g[u -> v] is the part of the target's difference that v passes on of its reading of u. No prompt is run again and
nothing is differentiated automatically, but the algebra is that of a backward pass, through secants instead of
derivatives: for a target direction t, the multiplier m_v (how much the target moves per unit of v's output) is pulled
through each component in turn,

    MLP    n = W_in [r * (W_out m)],   r = (act(h_t) - act(h)) / (h_t - h),   h_t = h + (h' - h) / 2
    v      n[q] = W_V sum_p P[p,q] W_O m[p]
    q      n[p] = W_Q sum_q w[p,q] k[q],     k: n[q] = W_K sum_p w[p,q] q[p]
           w = mean over the line of scores of P (b - sum_q P b),   b[p,q] = (W_O m[p]) . v[q]

with norms frozen at the mean of their two scales, and g[u -> v] = sum_p n_v[p] . (u'[p] - u[p]). Derivatives would
hide an edge behind a saturated softmax or a dead ReLU; a secant over the whole way would blame it for what only the
other edges did (compare Shrikumar et al. 2017, DeepLIFT). Heads stay in their d_head-wide basis. Memory is bounded by
the number of pairs swept at once (`memory` says how much each takes), not by the data.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.rotary import is_rotary
from tl_circuitlasso.models.weights import MLP, Port, repeat_heads

PATH_POINTS = 4  # midpoints of the line of attention scores along which the softmax is averaged
PARTWAY = 0.5  # how far from the prompt to its partner secants reach
TINY = 1e-30  # stands for a probability of 0 in a logarithm
PORTS: tuple[Port, ...] = ("q", "k", "v")
NEAR = 1e-3  # below this difference a secant is a central difference


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts with their partners: rows of the batch, the position at which the target is read, and which positions
    are real tokens in both (elsewhere the partner counts as equal)."""

    own: Int[Tensor, " pair"]
    partner: Int[Tensor, " pair"]
    position: Int[Tensor, " pair"]
    valid: Bool[Tensor, "pair pos"]


@dataclass(frozen=True, eq=False)
class Read:
    """The contributions of all edges into one layer's heads (through one port), its MLP, or the target.

    value: (pair, direction, head, source); one `head` for an MLP or the target. Sources are the components in order.
    """

    layer: int
    port: str
    value: Float[Tensor, "pair direction head source"]


def wanted(adapter: Adapter) -> tuple[str, ...]:
    """The activations that a sweep reads."""
    kinds = ["q", "k", "v", "z", "pattern", "scale.attn", "scale.attn_out", "scale.q", "scale.k"]
    if not adapter.shape.attn_only:
        kinds += ["mlp_pre", "mlp_post", "mlp_out", "scale.mlp", "scale.mlp_out"] + ["mlp_linear"] * adapter.shape.gated
    layers = range(adapter.shape.n_layers)
    return ("resid_pre.0", "scale.final", *(f"{kind}.{layer}" for kind in kinds for layer in layers))


def sweep(
    adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairs, directions: Float[Tensor, "pair direction d_model"]
) -> Iterator[Read]:
    """Every edge's contribution to the target's difference, the target's own edges first, then layer by layer down.

    directions: what the target reads of the normalised residual stream at `pairs.position`.
    """
    view = View(adapter, acts, pairs)
    sources = _Sources(view)
    rows = torch.arange(len(pairs.own), device=directions.device)
    scale = view.inverse("scale.final")[rows, pairs.position, None]
    m = directions.new_zeros(*directions.shape[:2], view.width, directions.shape[2])  # pair direction pos d_model
    m[rows, :, pairs.position] = directions * scale
    n_layers, parallel = adapter.shape.n_layers, adapter.shape.parallel
    yield Read(n_layers, "", sources.read(m.unsqueeze(2), n_layers, False))
    for layer in reversed(range(n_layers)):
        behind = total = m
        if not adapter.shape.attn_only:
            n = through_mlp(view, layer, m)
            yield Read(layer, "", sources.read(n.unsqueeze(2), layer, not parallel))
            total = m + n
            behind = m if parallel else total
        n = through_heads(view, layer, behind)
        for port, value in zip(PORTS, sources.read(n, layer, False).chunk(len(PORTS), dim=2)):
            yield Read(layer, port, value)
        m = total + n.sum(2)


class View:
    """The two sides of every pair, by activation."""

    def __init__(self, adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairs) -> None:
        self.adapter, self.acts, self.pairs = adapter, acts, pairs
        self.all_valid = bool(pairs.valid.all())
        self.width = pairs.valid.shape[1]

    def sides(self, key: str) -> tuple[Tensor, Tensor]:
        """The activation of each prompt, and what it becomes part of the way to its partner's."""
        own, partner = self.ends(key)
        return own, torch.lerp(own, partner, PARTWAY)

    def ends(self, key: str) -> tuple[Tensor, Tensor]:
        """The activation of each prompt, and of its partner where both have a real token."""
        own, partner = (self.acts[key][rows, : self.width] for rows in (self.pairs.own, self.pairs.partner))
        if self.all_valid:
            return own, partner
        valid = self.pairs.valid.view(*self.pairs.valid.shape, *[1] * (own.ndim - 2))
        return own, torch.where(valid, partner, own)

    def mean(self, key: str) -> Tensor:
        own, partway = self.sides(key)
        return (own + partway) / 2

    def difference(self, key: str) -> Tensor:
        own, partner = self.ends(key)
        return partner - own

    def inverse(self, key: str) -> Tensor:
        """One over a norm's scale, the mean of both ends of a secant: the frozen norm."""
        own, partway = self.sides(key)
        return (own.reciprocal() + partway.reciprocal()) / 2

    def patterns(self, layer: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The prompt's attention patterns and those part of the way along the line of scores: (pair, head, query, key).

        log P_t = (1 - t) log P + t log P' + const.
        """
        pattern, width = self.acts[f"pattern.{layer}"], self.width
        own, partner = (pattern[rows, heads, :width, :width] for rows in (self.pairs.own, self.pairs.partner))
        if not self.all_valid:
            partner = torch.where(self.pairs.valid[:, None, :, None], partner, own)
        logs = torch.lerp(own.clamp_min(TINY).log(), partner.clamp_min(TINY).log(), PARTWAY)
        return own, logs.softmax(-1)

    def own_heads(self, key: str, heads: slice = slice(None)) -> Tensor:
        """The prompt's queries, keys or values, (pair, 1, head, pos, d_head), shared ones repeated for every head."""
        own = self.ends(key)[0]
        return repeat_heads(own.movedim(2, 0), self.adapter.shape.n_heads)[heads].movedim(0, 1).unsqueeze(1)


class _Sources:
    """What each component wrote differently in the two prompts, as columns (pair, pos x d_model, source).

    The one place where heads are expanded to d_model for all layers at once: callers bound the number of pairs.
    """

    def __init__(self, view: View) -> None:
        shape = view.adapter.shape
        self.per_layer = shape.n_heads + (not shape.attn_only)
        first = view.difference("resid_pre.0")
        self.columns = first.new_empty(*first.shape, 1 + shape.n_layers * self.per_layer)
        self.columns[..., 0] = first
        for layer in range(shape.n_layers):
            start = 1 + layer * self.per_layer
            own, partner = (
                z / scale.unsqueeze(-1)
                for z, scale in zip(view.ends(f"z.{layer}"), view.ends(f"scale.attn_out.{layer}"))
            )
            self.columns[..., start : start + shape.n_heads] = torch.einsum(
                "sthe,hed->stdh", partner - own, view.adapter.writer(layer)[0]
            )
            if not shape.attn_only:
                self.columns[..., start + shape.n_heads] = view.difference(f"mlp_out.{layer}")
        self.columns = self.columns.flatten(1, 2)
        self.n_heads = shape.n_heads

    def read(
        self, n: Float[Tensor, "pair direction head pos d_model"], layers: int, own_heads: bool
    ) -> Float[Tensor, "pair direction head source"]:
        """sum over positions and d_model of n times each source below layer `layers` (and that layer's heads)."""
        count = 1 + layers * self.per_layer + own_heads * self.n_heads
        rows = n.flatten(3).flatten(1, 2)  # pair (direction head) (pos d_model)
        return (rows @ self.columns[:, :, :count]).unflatten(1, n.shape[1:3])


def memory(adapter: Adapter, positions: int, directions: int) -> int:
    """Bytes that sweeping one pair of prompts takes, to the leading term."""
    shape = adapter.shape
    sources = 1 + shape.n_layers * (shape.n_heads + 1)
    reads = 2 * len(PORTS) * shape.n_heads * directions
    return 4 * positions * (shape.d_model * (sources + reads) + 8 * directions * shape.n_heads * positions)


def secant(
    act: Callable[[Tensor], Tensor],
    a: Float[Tensor, "*x"],
    b: Float[Tensor, "*x"],
    values: tuple[Float[Tensor, "*x"], Float[Tensor, "*x"]] | None = None,
) -> Float[Tensor, "*x"]:
    """(act(b) - act(a)) / (b - a), a central difference at the middle where the two nearly meet.

    `values` are act(a) and act(b) where they are known already.

    >>> secant(torch.relu, torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 1.0]))
    tensor([0.7500, 1.0000])
    """
    low, high = (act(a), act(b)) if values is None else values
    near = (b - a).abs() < NEAR
    slope = (high - low) / torch.where(near, 1.0, b - a)
    middle = ((a + b) / 2)[near]
    slope[near] = (act(middle + NEAR) - act(middle - NEAR)) / (2 * NEAR)
    return slope


def through_mlp(
    view: View, layer: int, m: Float[Tensor, "pair direction pos d_model"]
) -> Float[Tensor, "pair direction pos d_model"]:
    mlp = view.adapter.mlp(layer)
    at_post = (m * view.inverse(f"scale.mlp_out.{layer}").unsqueeze(1)) @ mlp.w_out.T
    pre = view.sides(f"mlp_pre.{layer}")
    inverse = view.inverse(f"scale.mlp.{layer}").unsqueeze(1)
    if mlp.w_gate is None:
        active = (view.ends(f"mlp_post.{layer}")[0], mlp.act(pre[1]))
        return (_through_act(mlp, pre, active, at_post) @ mlp.w_in.T) * inverse
    linear = view.mean(f"mlp_linear.{layer}").unsqueeze(1)
    active = (mlp.act(pre[0]), mlp.act(pre[1]))
    gate = _through_act(mlp, pre, active, at_post * linear) @ mlp.w_gate.T
    return (gate + (at_post * ((active[0] + active[1]) / 2).unsqueeze(1)) @ mlp.w_in.T) * inverse


def _through_act(mlp: MLP, pre: tuple[Tensor, Tensor], active: tuple[Tensor, Tensor], multiplier: Tensor) -> Tensor:
    if mlp.elementwise:
        return multiplier * secant(mlp.act, *pre, active).unsqueeze(1)
    # An activation that mixes neurons (SoLU) has no secant per neuron: its derivative at the middle takes the place.
    pull = torch.func.vjp(mlp.act, (pre[0] + pre[1]) / 2)[1]
    return torch.stack([pull(one)[0] for one in multiplier.unbind(1)], dim=1)


def through_heads(
    view: View, layer: int, m: Float[Tensor, "pair direction pos d_model"], heads: slice = slice(None)
) -> Float[Tensor, "pair direction port_head pos d_model"]:
    """The multipliers at what every head (or some of them) reads through q, then k, then v."""
    adapter = view.adapter
    w_o = adapter.writer(layer)[0][heads]
    at_z = (m * view.inverse(f"scale.attn_out.{layer}").unsqueeze(1)).unsqueeze(2) @ w_o.mT
    own, partner = view.patterns(layer, heads)
    at_score = at_z @ view.own_heads(f"v.{layer}", heads).mT
    weight = softmax_secant(own, partner, at_score) * _score_slope(view, layer, heads)
    reads = {
        "q": _unrotate(view, layer, "q", weight @ view.own_heads(f"k.{layer}", heads), heads),
        "k": _unrotate(view, layer, "k", weight.mT @ view.own_heads(f"q.{layer}", heads), heads),
        "v": own.mT.unsqueeze(1) @ at_z,
    }
    inverse = view.inverse(f"scale.attn.{layer}")[:, None, None]
    weights = torch.cat([adapter.reader(layer, port).weight[heads] for port in PORTS])
    return (torch.cat([reads[port] for port in PORTS], dim=2) * inverse) @ weights.mT


def _unrotate(
    view: View, layer: int, port: str, n: Float[Tensor, "pair direction head pos d_head"], heads: slice
) -> Float[Tensor, "pair direction head pos d_head"]:
    """From rotated and normalised queries or keys back to what the head projects: the transpose of both."""
    adapter = view.adapter
    if is_rotary(adapter.model):
        positions = view.acts["positions"][view.pairs.own, : view.width]
        like = torch.zeros_like(n[:, 0]).transpose(1, 2)
        pull = torch.func.vjp(lambda x: adapter.rotate(x, positions, layer), like)[1]
        n = torch.stack([pull(one.transpose(1, 2))[0].transpose(1, 2) for one in n.unbind(1)], dim=1)
    scale = view.inverse(f"scale.{port}.{layer}")  # pair pos (head, group or 1) 1
    shared = scale.shape[2] not in (1, adapter.shape.n_heads)
    scale = repeat_heads(scale.movedim(2, 0), adapter.shape.n_heads).movedim(0, 2) if shared else scale
    scale = scale if scale.shape[2] == 1 else scale[:, :, heads]
    return n * scale.transpose(1, 2).unsqueeze(1)


def softmax_secant(
    own: Float[Tensor, "pair head query key"],
    partner: Float[Tensor, "pair head query key"],
    b: Float[Tensor, "pair direction head query key"],
) -> Float[Tensor, "pair direction head query key"]:
    """w with sum_q w ds = sum_q (P' - P) b: the softmax's derivative averaged over the straight line of scores.

    log P_t = (1 - t) log P + t log P' + const, w = mean_t P_t (b - sum_q P_t b), midpoint rule.
    """
    low, high = (side.clamp_min(TINY).log() for side in (own, partner))
    total = torch.zeros_like(b)
    for point in range(PATH_POINTS):
        t = (point + 0.5) / PATH_POINTS
        pattern = ((1 - t) * low + t * high).softmax(-1)[:, None]
        total += pattern * (b - (pattern * b).sum(-1, keepdim=True))
    return total / PATH_POINTS


def _score_slope(view: View, layer: int, heads: slice) -> Tensor | float:
    """Change of a score per change of q . k: one over the scale, times the secant of a soft cap if there is one."""
    adapter = view.adapter
    scale, cap = adapter.attn_scale(layer), adapter.attn_soft_cap
    if cap is None:
        return 1 / scale
    sides = []
    for q, k in zip(view.sides(f"q.{layer}"), view.sides(f"k.{layer}")):
        keys = repeat_heads(k.movedim(2, 0), adapter.shape.n_heads)[heads].movedim(0, 1)
        sides.append(q[:, :, heads].transpose(1, 2) @ keys.mT / scale)
    return secant(lambda score: cap * torch.tanh(score / cap), *sides)[:, None] / scale
