"""Reading kept edges again, one by one and through each component's own nonlinearity.

A sweep judges every edge by straight lines shared by all of them: cheap, and it adds up, but two parents that only
work against each other look costly, and so does a path through a child that passes nothing on. For the few edges that
were kept this is done again without either shortcut: what v writes when it reads u from the partner prompt and all
else from its own is computed exactly,

    dv = v(x + (u' - u)) - v(x)         (norms, softmax and activation included; v alone, nothing downstream is run)

and the target's multiplier at v flows through v's *kept* children only. g[u -> v] = sum_p m_v[p] . dv[p].
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.models import outcome, sweep
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.closure import soft_cap
from tl_circuitlasso.models.norms import Norm, scale_of
from tl_circuitlasso.models.outcome import Outcome, Probe
from tl_circuitlasso.models.patching import mlp_norm
from tl_circuitlasso.models.read import in_parts, make_pairs
from tl_circuitlasso.models.readout import last_only
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.sweep import PORTS, TINY, View
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.models.weights import Port, repeat_heads
from tl_circuitlasso.sites import Site, parse_site
from tl_circuitlasso.targets import Target

Edge = tuple[str, str]


@dataclass(frozen=True)
class Costs:
    """Mean cost to the target of each edge, and of all that each node contributes, over `pairs` pairs."""

    edges: Mapping[Edge, float]
    nodes: Mapping[str, float]
    pairs: int
    passes: int = 1


def wanted(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """The activations that reading again needs."""
    layers = range(adapter.shape.n_layers)
    streams = [f"{kind}.{layer}" for kind in ("resid_pre", "resid_post") for layer in layers]
    return (*sweep.wanted(adapter), *outcome.wanted(adapter, target), *streams)


def reread(
    adapter: Adapter,
    batch: Batch,
    edges: Collection[Edge],
    target: Target,
    *,
    last: bool,
    probe: Probe | None,
    draws: int,
    seed: int,
) -> Costs:
    """What each of `edges` costs the target over the prompts of a batch, paired `draws` times; one forward pass."""
    acts = adapter.run(batch.tokens, batch.mask, set(wanted(adapter, target)))
    acts["positions"] = position_ids(batch.mask)
    keep = last_only(batch.keep) if last else batch.keep
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(batch.mask, keep, generator, draws=draws)
    prompts = torch.arange(batch.start, batch.start + len(batch.tokens))
    edge_cost: dict[Edge, float] = dict.fromkeys(edges, 0.0)
    node_cost: dict[str, float] = {source: 0.0 for source, _ in edges}
    directions = outcome.count(adapter, target, probe)
    for part in in_parts(adapter, pairs, directions):
        goal = outcome.outcome(adapter, acts, part, target, prompts, probe)
        by_edge, by_node = _contributions(View(adapter, acts, part), goal, edges)
        for edge, contribution in by_edge.items():
            edge_cost[edge] += float(goal.cost(contribution).sum())
        for node, contribution in by_node.items():
            node_cost[node] += float(goal.cost(contribution).sum())
    count = len(pairs.own)
    return Costs(
        edges={edge: cost / max(count, 1) for edge, cost in edge_cost.items()},
        nodes={node: cost / max(count, 1) for node, cost in node_cost.items()},
        pairs=count,
    )


def _contributions(
    view: View, goal: Outcome, edges: Collection[Edge]
) -> tuple[dict[Edge, Float[Tensor, "pair direction"]], dict[str, Float[Tensor, "pair direction"]]]:
    parents: dict[str, list[str]] = {}
    for source, target in edges:
        parents.setdefault(target, []).append(source)
    written = {name: _difference(view, parse_site(name)) for name in {source for source, _ in edges}}
    into = {name: _at_target(view, goal) for name in parents if parse_site(name).kind in ("logits", "target")}
    by_edge, by_node = {}, {}
    for name in sorted(written, key=_order, reverse=True):
        children = [target for source, target in edges if source == name and target in into]
        if not children:
            continue
        m = torch.stack([into[child] for child in children]).sum(0)
        by_node[name] = torch.einsum("sktd,std->sk", m, written[name])
        if name in parents:
            changes = _changes(view, parse_site(name), m, [written[parent] for parent in parents[name]])
            by_edge |= {(parent, name): change for parent, change in zip(parents[name], changes)}
            into[name] = _through(view, parse_site(name), m)
    for end in [name for name in into if parse_site(name).kind in ("logits", "target")]:
        for parent in parents[end]:
            by_edge[parent, end] = torch.einsum("sktd,std->sk", into[end], written[parent])
    return by_edge, by_node


def _order(name: str) -> tuple[int, int]:
    """Where a component stands in the order of computation."""
    site = parse_site(name)
    return (-1, 0) if site.kind == "input" else (site.layer, int(site.kind == "mlp"))


def _at_target(view: View, goal: Outcome) -> Float[Tensor, "pair direction pos d_model"]:
    rows = torch.arange(len(view.pairs.own), device=goal.directions.device)
    m = goal.directions.new_zeros(*goal.directions.shape[:2], view.width, goal.directions.shape[2])
    m[rows, :, view.pairs.position] = goal.directions * view.inverse("scale.final")[rows, view.pairs.position, None]
    return m


def _difference(view: View, site: Site) -> Float[Tensor, "pair pos d_model"]:
    """What a component writes differently in the partner prompt."""
    if site.kind == "input":
        return view.difference("resid_pre.0")
    if site.kind == "mlp":
        return view.difference(f"mlp_out.{site.layer}")
    own, partner = (
        z[:, :, site.head] / scale
        for z, scale in zip(view.ends(f"z.{site.layer}"), view.ends(f"scale.attn_out.{site.layer}"))
    )
    return (partner - own) @ view.adapter.writer(site.layer)[0][site.head]


def _through(view: View, site: Site, m: Float[Tensor, "pair direction pos d_model"]) -> Tensor:
    """The multiplier at what a component reads, by its secants, all ports together."""
    if site.kind == "mlp":
        return sweep.through_mlp(view, site.layer, m)
    return sweep.through_heads(view, site.layer, m, slice(site.head, site.head + 1)).sum(2)


def _changes(
    view: View, site: Site, m: Float[Tensor, "pair direction pos d_model"], deltas: list[Tensor]
) -> list[Float[Tensor, "pair direction"]]:
    """What the component contributes when it reads each of `deltas` more, exactly."""
    change = _mlp_change if site.kind == "mlp" else _head_change
    return change(view, site, m, deltas)


def _mlp_change(view: View, site: Site, m: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    adapter, layer = view.adapter, site.layer
    mlp, norm = adapter.mlp(layer), mlp_norm(adapter, layer)
    at_post = (m / view.ends(f"scale.mlp_out.{layer}")[0].unsqueeze(1)) @ mlp.w_out.T
    behind = view.ends(f"resid_post.{layer}")[0] - view.ends(f"mlp_out.{layer}")[0]
    stream = view.ends(f"resid_pre.{layer}")[0] if adapter.shape.parallel else behind
    pre = view.ends(f"mlp_pre.{layer}")[0]

    def post(moved: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_mlp"]:
        if mlp.w_gate is None:
            return mlp.act(pre + moved @ mlp.w_in)
        return mlp.act(pre + moved @ mlp.w_gate) * (view.ends(f"mlp_linear.{layer}")[0] + moved @ mlp.w_in)

    before = post(torch.zeros_like(stream))
    return [torch.einsum("sktf,stf->sk", at_post, post(_moved(stream, d, norm)) - before) for d in deltas]


def _head_change(view: View, site: Site, m: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    adapter, layer, head = view.adapter, site.layer, site.head
    stream = view.ends(f"resid_pre.{layer}")[0]
    norm = norm_at(adapter.model, layer, adapter.layouts[layer].attn_norm, adapter.compute_dtype)
    at_z = (m / view.ends(f"scale.attn_out.{layer}")[0].unsqueeze(1)) @ adapter.writer(layer)[0][head].T
    own = {port: _one_head(view, f"{port}.{layer}", head) for port in PORTS}
    pattern = view.patterns(layer)[0][:, head]
    cap, scale = soft_cap(adapter.attn_soft_cap), adapter.attn_scale(layer)
    scores, z = cap(own["q"] @ own["k"].mT / scale), pattern @ own["v"]
    found = []
    for delta in deltas:
        moved = _moved(stream, delta, norm)
        q, k, v = (own[port] + _projected(view, layer, port, head, moved) for port in PORTS)
        # What masks, sinks and biases do to the scores is in the pattern already: only their change is added.
        there = (pattern.clamp_min(TINY).log() + cap(q @ k.mT / scale) - scores).softmax(-1) @ v
        found.append(torch.einsum("skte,ste->sk", at_z, there - z))
    return found


def _moved(stream: Tensor, delta: Tensor, norm: Norm | None) -> Float[Tensor, "pair pos d_model"]:
    """How what a component reads, divided by its norm's scale, moves; the norm's own change is taken in."""
    if norm is None:
        return delta
    return (stream + delta) / scale_of(stream + delta, norm) - stream / scale_of(stream, norm)


def _one_head(view: View, key: str, head: int) -> Float[Tensor, "pair pos d_head"]:
    return repeat_heads(view.ends(key)[0].movedim(2, 0), view.adapter.shape.n_heads)[head]


def _projected(view: View, layer: int, port: Port, head: int, moved: Tensor) -> Float[Tensor, "pair pos d_head"]:
    """A move of what is read as a move of the head's query, key (rotated, at the frozen scale of its norm) or value."""
    adapter = view.adapter
    change = moved @ adapter.reader(layer, port).weight[head]
    if port == "v":
        return change
    scale = view.ends(f"scale.{port}.{layer}")[0]
    number = 0 if scale.shape[2] == 1 else head * scale.shape[2] // adapter.shape.n_heads
    positions = view.acts["positions"][view.pairs.own, : view.width]
    return adapter.rotate((change / scale[:, :, number]).unsqueeze(2), positions, layer).squeeze(2)
