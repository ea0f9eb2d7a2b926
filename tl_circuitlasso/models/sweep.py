"""What each edge contributes to the target: one linear sweep from the target back to the input.

Two prompts s and s' are each other's reference. Every nonlinearity is replaced by its *secant* (views.py): a straight
line from its value at s towards its value at s'. That makes the network linear, so that what flows adds up,

    sum over parents u of g[u -> v] = sum over children w of g[v -> w],

where g[u -> v] is the part of the target's difference that v passes on of its reading of u. No prompt is run again and
nothing is differentiated automatically, but the algebra is that of a backward pass, through secants instead of
derivatives: for a target direction t, the multiplier m_v (how much the target moves per unit of v's output) is pulled
through each component in turn,

    MLP    n = W_in [r * (W_out m)],   r = (act(h_t) - act(h)) / (h_t - h)
    v      n[q] = W_V sum_p P[p,q] W_O m[p]
    q      n[p] = W_Q sum_q w[p,q] k[q],     k: n[q] = W_K sum_p w[p,q] q[p]
           w = secant of the softmax between both patterns at b[p,q] = (W_O m[p]) . v[q]

then through the norm in front of its reader, and g[u -> v] = sum_p n_v[p] . (u'[p] - u[p]). Derivatives would hide an
edge behind a saturated softmax or a dead ReLU.

How far a secant reaches depends on the question. Between a prompt and its own counterpart it goes all the way, products
are taken at the mean of both ends, and the sums are exact but for norms of queries, keys and outputs, whose scale is
frozen. Between prompts paired at random it stops part of the way, and queries, keys, values and patterns stand at the
prompt's own: a secant over the whole way would blame an edge for what only the other edges did (compare Shrikumar et
al. 2017, DeepLIFT). Heads stay in their d_head-wide basis. Memory is bounded by the number of pairs swept at once
(`memory` says how much each takes), not by the data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.head_pull import score_slope, unrotated
from tl_circuitlasso.models.names import Kind, act, head_scale
from tl_circuitlasso.models.views import Pairing, View, secant, softmax_secant
from tl_circuitlasso.models.weights import MLP, Port

PORTS: tuple[Port, ...] = ("q", "k", "v")


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
    kinds: list[Kind] = ["q", "k", "v", "z", "pattern", "scale.attn", "scale.attn_out", "scale.q", "scale.k"]
    if not adapter.shape.attn_only:
        kinds.extend(["mlp_pre", "mlp_out", "scale.mlp", "scale.mlp_out"])
        kinds.extend(["mlp_linear"] if adapter.shape.gated else [])
    layers = range(adapter.shape.n_layers)
    kinds.append("resid_pre")
    return (adapter.final, "scale.final", *(act(kind, layer) for kind in kinds for layer in layers))


def sweep(
    adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing, directions: Float[Tensor, "pair direction d_model"]
) -> Iterator[Read]:
    """Every edge's contribution to the target's difference, the target's own edges first, then layer by layer down.

    directions: what the target reads of the normalised residual stream at `pairs.position`.
    """
    view = View(adapter, acts, pairs)
    sources = _Sources(view)
    m = at_target(view, directions)
    n_layers, parallel = adapter.shape.n_layers, adapter.shape.parallel
    yield Read(n_layers, "", sources.read(m.unsqueeze(2), n_layers, ""))
    for layer in reversed(range(n_layers)):
        here = view.at(layer)
        behind = total = m = m.to(here.device)
        if not adapter.shape.attn_only:
            n = through_mlp(here, layer, m)
            yield Read(layer, "", sources.read(n.unsqueeze(2), layer, ""))
            total = m + n
            behind = m if parallel else total
        n = through_heads(here, layer, behind)
        for port, value in zip(PORTS, sources.read(n, layer, "q").chunk(len(PORTS), dim=2)):
            yield Read(layer, port, value)
        m = total + n.sum(2)


def at_target(
    view: View, directions: Float[Tensor, "pair direction d_model"]
) -> Float[Tensor, "pair direction pos d_model"]:
    """The target's multiplier: what its directions read of the final residual stream, through the final norm."""
    rows = torch.arange(len(directions), device=directions.device)
    m = directions.new_zeros(*directions.shape[:2], view.width - view.first, directions.shape[2])
    m[rows, :, view.target] = directions
    return view.norm("scale.final").pull(m)


class _Sources:
    """What each component wrote differently in the two prompts, as rows (pair, source, pos x d_model), on the device of
    its layer; what is read of them meets on that of the view.

    The one place where heads are expanded to d_model for all layers at once: callers bound the number of pairs.
    """

    def __init__(self, view: View) -> None:
        self.home, self.parts = view.device, view.adapter.shape.components
        self.shares: list[tuple[int, Tensor]] = []  # of neighbouring layers on one device: the first source, the rows
        for _, together in groupby(range(self.parts.n_layers), view.adapter.places.__getitem__):
            layers = list(together)
            start = 0 if layers[0] == 0 else self.parts.before(layers[0])
            self.shares.append((start, self._written(view.at(layers[0]), layers, start).flatten(2)))

    def _written(self, view: View, layers: list[int], before: int) -> Float[Tensor, "pair source pos d_model"]:
        parts, first = self.parts, view.difference(act("resid_pre", 0))
        pairs, positions, d_model = first.shape
        rows = first.new_empty(pairs, parts.before(layers[-1] + 1) - before, positions, d_model)
        if not before:
            rows[:, 0] = first
        for layer in layers:
            own, partner = (
                z / scale.unsqueeze(-1)
                for z, scale in zip(view.ends(act("z", layer)), view.ends(act("scale.attn_out", layer)))
            )
            heads = (partner - own).transpose(1, 2)  # pair head pos d_head
            start = parts.before(layer) - before
            rows[:, start : start + parts.n_heads] = by_head(heads, view.adapter.writer(layer)[0])
            if not parts.attn_only:
                rows[:, parts.mlp(layer) - before] = view.difference(act("mlp_out", layer))
        return rows

    def read(
        self, n: Float[Tensor, "pair direction head pos d_model"], layer: int, port: str
    ) -> Float[Tensor, "pair direction head source"]:
        """sum over positions and d_model of n times each source that the reader (layer, port) may read."""
        count = self.parts.sources_of(layer, port)
        reads = n.flatten(3).flatten(1, 2)  # pair (direction head) (pos d_model)
        found = [
            (reads.to(rows.device) @ rows[:, : count - start].mT).to(self.home)
            for start, rows in self.shares
            if start < count
        ]
        return (found[0] if len(found) == 1 else torch.cat(found, dim=-1)).unflatten(1, n.shape[1:3])


def memory(adapter: Adapter, positions: int, directions: int) -> int:
    """Bytes that sweeping one pair of prompts takes, to the leading term."""
    shape = adapter.shape
    sources = shape.components.n_sources
    reads = 2 * len(PORTS) * shape.n_heads * directions
    return 4 * positions * (shape.d_model * (sources + reads) + 8 * directions * shape.n_heads * positions)


def through_mlp(
    view: View, layer: int, m: Float[Tensor, "pair direction pos d_model"]
) -> Float[Tensor, "pair direction pos d_model"]:
    mlp = view.adapter.mlp(layer)
    at_post = (m * view.inverse(act("scale.mlp_out", layer)).unsqueeze(1)) @ mlp.w_out.T
    pre = view.sides(act("mlp_pre", layer))
    active = (mlp.act(pre[0]), mlp.act(pre[1]))
    norm = view.norm(act("scale.mlp", layer))
    if mlp.w_gate is None:
        return norm.pull(_through_act(mlp, pre, active, at_post) @ mlp.w_in.T)
    linear = view.mean(act("mlp_linear", layer)).unsqueeze(1)
    gate = _through_act(mlp, pre, active, at_post * linear) @ mlp.w_gate.T
    return norm.pull(gate + (at_post * ((active[0] + active[1]) / 2).unsqueeze(1)) @ mlp.w_in.T)


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
    written = m * view.inverse(act("scale.attn_out", layer)).unsqueeze(1)
    at_z = (
        (written @ w_o.flatten(0, 1).T).unflatten(-1, w_o.shape[:2]).transpose(2, 3)
    )  # pair direction head pos d_head
    own, reached = view.patterns(layer, heads)
    at_score = at_z @ view.anchored(act("v", layer), heads).mT
    slope = score_slope(adapter, layer, lambda port: view.sides(act(port, layer), whole=port == "k"), heads)
    weight = softmax_secant(own, reached, at_score) * slope
    inside = slice(view.first, None)  # keys before the window don't differ, so nothing of theirs is read
    reads = {
        "q": _projected(view, layer, "q", weight @ view.anchored(act("k", layer), heads), heads),
        "k": _projected(view, layer, "k", weight[..., inside].mT @ view.anchored(act("q", layer), heads), heads),
        "v": view.anchor(own, reached)[..., inside].mT.unsqueeze(1) @ at_z,
    }
    weights = torch.cat([adapter.reader(layer, port).weight[heads] for port in PORTS])
    return view.norm(act("scale.attn", layer)).pull(
        by_head(torch.cat([reads[port] for port in PORTS], dim=2), weights.mT)
    )


def by_head(
    x: Float[Tensor, "pair *direction head pos d_in"], weight: Float[Tensor, "head d_in d_out"]
) -> Float[Tensor, "pair *direction head pos d_out"]:
    """x @ weight, one product a head over all pairs: broadcasting would copy the weights for each of them."""
    heads = x.movedim(-3, 0)
    product = torch.bmm(heads.flatten(1, -2), weight)
    return product.unflatten(1, heads.shape[1:-1]).movedim(0, -3).contiguous()


def _projected(
    view: View, layer: int, port: Port, n: Float[Tensor, "pair direction head pos d_head"], heads: slice
) -> Float[Tensor, "pair direction head pos d_head"]:
    positions = view.pairs.places[:, view.first :]
    return unrotated(view.adapter, layer, n, positions, view.inverse(head_scale(port, layer)), heads)
