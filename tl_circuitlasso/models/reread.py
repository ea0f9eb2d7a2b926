"""Reading kept edges again, one by one and through every component's own nonlinearity.

A sweep judges every edge by straight lines shared by all of them: cheap, and it adds up, but two parents that only
work against each other look costly, so does a path through a child that passes nothing on, and where two parents act
together each gets half. For the few edges that were kept this is done again without any straight line: when v reads u
from the partner prompt and all else from its own, it writes

    dv = v(x + (u' - u)) - v(x)         (norms, softmax and activation included),

what v feeds among the kept edges changes in turn, w(x + sum of changes) - w(x), and so on down to the target. This is
what patching the edge does, as far as it acts through kept edges.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.models import outcome, sweep
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.closure import soft_cap
from tl_circuitlasso.models.names import act, head_scale
from tl_circuitlasso.models.norms import Norm, scale_of
from tl_circuitlasso.models.outcome import Outcome, Probe
from tl_circuitlasso.models.pairing import compared
from tl_circuitlasso.models.read import in_parts
from tl_circuitlasso.models.readout import last_only
from tl_circuitlasso.models.sweep import PORTS
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.models.views import TINY, View
from tl_circuitlasso.models.weights import Port, repeat_heads

Edge = tuple[str, str]


@dataclass(frozen=True)
class Reading:
    """Which edges to measure, and which nodes, in a graph of `kept` edges.

    >>> Reading.all([("input", "m0"), ("m0", "logits")]).nodes
    ('m0',)
    """

    kept: tuple[Edge, ...]
    edges: tuple[Edge, ...]
    nodes: tuple[str, ...]

    @classmethod
    def all(cls, kept: Collection[Edge]) -> "Reading":
        """Every edge, and every component that feeds one: nobody asks whether the input matters."""
        every = tuple(sorted(kept))
        return cls(every, every, tuple(sorted({source for source, _ in every if source != "input"})))

    def after(self, kept: Collection[Edge]) -> "Reading":
        """What has to be measured again in a graph of fewer edges: what fed, near or far, one that is gone."""
        reached = {source for source, target in self.kept if (source, target) not in kept}
        for source, target in sorted(self.kept, key=lambda edge: order(edge[0]), reverse=True):
            if target in reached:
                reached.add(source)
        every = Reading.all(kept)
        edges = tuple(edge for edge in every.edges if edge[1] in reached)
        return Reading(every.kept, edges, tuple(node for node in every.nodes if node in reached))


@dataclass(frozen=True)
class Costs:
    """Mean cost to the target of each edge over `pairs` pairs; what edges, and all that each node contributes, are
    judged by; and each edge's mean change of the target's first direction, with its sign."""

    edges: Mapping[Edge, float]
    judged: Mapping[Edge, float]
    nodes: Mapping[str, float]
    effects: Mapping[Edge, float]
    pairs: int
    passes: int = 1

    def among(self, edges: Collection[Edge]) -> "Costs":
        """The costs of some edges and of the nodes that feed them."""
        some = [{edge: costs[edge] for edge in edges} for costs in (self.edges, self.judged, self.effects)]
        nodes = {node: self.nodes[node] for node in Reading.all(edges).nodes}
        return Costs(some[0], some[1], nodes, some[2], self.pairs, self.passes)

    def stored(self, reading: Reading) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As a file holds it; `of` makes it again, to the last bit."""
        by_edge = {"edges": self.edges, "judged": self.judged, "effects": self.effects}
        columns = {name: [costs[edge] for edge in reading.edges] for name, costs in by_edge.items()}
        columns["nodes"] = [self.nodes[node] for node in reading.nodes]
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
        return tensors, {"pairs": self.pairs, "passes": self.passes}

    @classmethod
    def of(cls, reading: Reading, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> "Costs":
        """What was `stored` of the reading."""
        names = {"edges": reading.edges, "judged": reading.edges, "nodes": reading.nodes, "effects": reading.edges}
        costs = {name: dict(zip(of, tensors[name].tolist())) for name, of in names.items()}
        return cls(**costs, pairs=data["pairs"], passes=data["passes"])

    def updated(self, later: "Costs") -> "Costs":
        """What was measured later in place of what was measured here."""
        return Costs(
            {**self.edges, **later.edges},
            {**self.judged, **later.judged},
            {**self.nodes, **later.nodes},
            {**self.effects, **later.effects},
            later.pairs,
            later.passes,
        )


def wanted(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """The activations that reading again needs."""
    return (*sweep.wanted(adapter), *outcome.wanted(adapter, target))


def reread(
    adapter: Adapter,
    batch: Batch,
    reading: Reading,
    target: Target,
    *,
    last: bool,
    probe: Probe | None,
    draws: int,
    seed: int,
    memory: int | None = None,
    tell: Callable[[float], object] = lambda share: None,
) -> Costs:
    """What each edge that is asked for costs the target over the prompts of a batch, paired `draws` times, or with
    their own counterparts; one forward pass, and `memory` bytes for the pairs looked at together (`read.in_parts`).
    `tell` hears of every share of the work that is done."""
    acts = adapter.run(*batch.run, set(wanted(adapter, target)), gathered=False)
    keep = last_only(batch.keep) if last else batch.keep
    question = outcome.Question(target, torch.arange(batch.start, batch.start + len(batch.tokens)), probe)
    options: Any = {"contrast": batch.partners is not None, "draws": draws}
    generator = torch.Generator().manual_seed(seed)
    pairs = compared(adapter, acts, batch.mask, keep, question, generator=generator, **options)
    edge_cost: dict[Edge, float] = dict.fromkeys(reading.edges, 0.0)
    effects, judged = dict(edge_cost), dict(edge_cost)
    node_cost: dict[str, float] = dict.fromkeys(reading.nodes, 0.0)
    for part in in_parts(adapter, pairs, outcome.count(adapter, target, probe), memory=memory):
        goal = outcome.outcome(adapter, acts, part, question, few=sys.maxsize)
        weight = goal.directions.new_ones(len(part)) if part.weight is None else part.weight.to(goal.directions)
        by_edge, by_node = _contributions(View(adapter, acts, part), goal, reading, tell, len(part) / len(pairs))
        for edge, contribution in by_edge.items():
            edge_cost[edge] += float((goal.cost(contribution) * weight).sum())
            judged[edge] += float((goal.judged(contribution) * weight).sum())
            effects[edge] += float((contribution[:, 0] * weight).sum())
        for node, contribution in by_node.items():
            node_cost[node] += float((goal.judged(contribution) * weight).sum())
    count = len(pairs) if pairs.drawn_of is None else float(pairs.drawn_of.sum())

    def means(totals: dict) -> dict:
        return {name: total / max(count, 1) for name, total in totals.items()}

    return Costs(means(edge_cost), means(judged), means(node_cost), means(effects), len(pairs))


@dataclass(frozen=True, eq=False)
class Kept:
    """The kept edges as a graph to walk: nodes in the order of computation, the children of each."""

    view: View
    goal: Outcome
    children: Mapping[str, list[str]]
    order: list[str]

    @classmethod
    def of(cls, view: View, goal: Outcome, edges: Collection[Edge]) -> "Kept":
        children: dict[str, list[str]] = {}
        for source, target in sorted(edges):
            children.setdefault(source, []).append(target)
        return cls(view, goal, children, sorted({name for edge in edges for name in edge}, key=order))

    def walk(self, inbox: dict[str, Float[Tensor, "pair pos d_model"]]) -> Float[Tensor, "pair direction"]:
        """How the target changes when components read what `inbox` says beside what they read on their own prompt."""
        for name in self.order:
            if name not in inbox:
                continue
            site = parse_site(name)
            if site.kind in ("logits", "target"):
                return self._at_target(inbox[name])
            here = self.view.at(site.layer)
            change = (_mlp_change if site.kind == "mlp" else _head_change)(here, site, inbox[name].to(here.device))
            change = change.to(self.view.device)
            for child in self.children.get(name, ()):
                inbox[child] = inbox[child] + change if child in inbox else change
        return self.goal.directions.new_zeros(self.goal.directions.shape[:2])

    def _at_target(self, change: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair direction"]:
        view = self.view
        last = view.adapter.final
        rows = torch.arange(len(change), device=change.device)
        here, stream = change[rows, view.target], view.own(last)[rows, view.target]
        return self.goal.reads(_moved(stream, here, view.adapter.norm("scale.final")))


def _contributions(
    view: View, goal: Outcome, reading: Reading, tell: Callable[[float], object], share: float
) -> tuple[dict[Edge, Float[Tensor, "pair direction"]], dict[str, Float[Tensor, "pair direction"]]]:
    kept = Kept.of(view, goal, reading.kept)
    sources = {source for source, _ in reading.edges} | set(reading.nodes)
    written = {name: _difference(view, parse_site(name)).to(view.device) for name in sources}

    def walked(inbox: dict[str, Float[Tensor, "pair pos d_model"]]) -> Float[Tensor, "pair direction"]:
        change = kept.walk(inbox)
        tell(share / (len(reading.edges) + len(reading.nodes)))
        return change

    by_edge = {(source, target): walked({target: written[source]}) for source, target in reading.edges}
    by_node = {name: walked(dict.fromkeys(kept.children[name], written[name])) for name in reading.nodes}
    return by_edge, by_node


def order(name: str) -> tuple[int, int]:
    """Where a component stands in the order of computation."""
    site = parse_site(name)
    if site.kind in ("logits", "target"):
        return sys.maxsize, 0
    return (-1, 0) if site.kind == "input" else (site.layer, int(site.kind == "mlp"))


def _difference(view: View, site: Site) -> Float[Tensor, "pair pos d_model"]:
    """What a component writes differently in the partner prompt."""
    if site.kind == "input":
        return view.difference(act("resid_pre", 0))
    view = view.at(site.layer)
    if site.kind == "mlp":
        return view.difference(act("mlp_out", site.layer))
    own, partner = (
        z[:, :, site.head] / scale
        for z, scale in zip(view.ends(act("z", site.layer)), view.ends(act("scale.attn_out", site.layer)))
    )
    return (partner - own) @ view.adapter.writer(site.layer)[0][site.head]


def _mlp_change(view: View, site: Site, delta: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_model"]:
    """How what an MLP writes changes when it reads `delta` more."""
    adapter, layer = view.adapter, site.layer
    mlp, norm = adapter.mlp(layer), adapter.norm(act("scale.mlp", layer))
    last = adapter.shape.n_layers - 1
    behind = view.own(act("resid_post", last) if layer == last else act("resid_pre", layer + 1))
    at_mlp = behind - view.own(act("mlp_out", layer))
    stream = view.own(act("resid_pre", layer)) if adapter.shape.parallel else at_mlp
    pre, moved = view.own(act("mlp_pre", layer)), _moved(stream, delta, norm)
    if mlp.w_gate is None:
        change = mlp.act(pre + moved @ mlp.w_in) - mlp.act(pre)
    else:
        linear = view.own(act("mlp_linear", layer))
        change = mlp.act(pre + moved @ mlp.w_gate) * (linear + moved @ mlp.w_in) - mlp.act(pre) * linear
    return (change @ mlp.w_out) / view.own(act("scale.mlp_out", layer))


def _head_change(view: View, site: Site, delta: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_model"]:
    """How what a head writes changes when it reads `delta` more, through queries, keys and values together."""
    adapter, layer, head = view.adapter, site.layer, site.head
    moved = _moved(view.own(act("resid_pre", layer)), delta, adapter.norm(act("scale.attn", layer)))
    own = {port: _one_head(view, act(port, layer), head) for port in PORTS}
    pattern = view.own_pattern(layer, head)
    cap, scale = soft_cap(adapter.attn_soft_cap), adapter.attn_scale(layer)
    q, k, v = (own[port] + _projected(view, layer, port, head, moved) for port in PORTS)
    # What masks, sinks and biases do to the scores is in the pattern already: only their change is added.
    scores = cap(q @ k.mT / scale) - cap(own["q"] @ own["k"].mT / scale)
    change = (pattern.clamp_min(TINY).log() + scores).softmax(-1) @ v - pattern @ own["v"]
    return (change @ adapter.writer(layer)[0][head]) / view.own(act("scale.attn_out", layer))


def _moved(stream: Tensor, delta: Tensor, norm: Norm | None) -> Float[Tensor, "pair *pos d_model"]:
    """How what a component reads, divided by its norm's scale, moves; the norm's own change is taken in."""
    if norm is None:
        return delta
    return (stream + delta) / scale_of(stream + delta, norm) - stream / scale_of(stream, norm)


def _one_head(view: View, key: str, head: int) -> Float[Tensor, "pair pos d_head"]:
    return repeat_heads(view.own(key).movedim(2, 0), view.adapter.shape.n_heads)[head]


def _projected(view: View, layer: int, port: Port, head: int, moved: Tensor) -> Float[Tensor, "pair pos d_head"]:
    """A move of what is read as a move of the head's query, key (rotated, at the frozen scale of its norm) or value."""
    adapter = view.adapter
    change = moved @ adapter.reader(layer, port).weight[head]
    if port == "v":
        return change
    scale = view.own(head_scale(port, layer))
    number = 0 if scale.shape[2] == 1 else head * scale.shape[2] // adapter.shape.n_heads
    positions = view.pairs.places[:, : view.width]
    return adapter.rotate((change / scale[:, :, number]).unsqueeze(2), positions, layer).squeeze(2)
