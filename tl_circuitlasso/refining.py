"""The second look of design `read`: kept edges are read again exactly, and those that don't survive are dropped."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.collect import Plan
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.reread import Costs, Edge, reread
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.stopping import widest_gap

logger = logging.getLogger(__name__)

ROUNDS = 3  # dropping an edge can leave its parents' edges with nothing to carry
PAIRS = 512  # pairs of prompts looked at, fewer where many edges are kept
FEW_EDGES = 64  # up to so many edges are looked at with all the pairs
EVIDENCE = 1 / 3  # of the first look's largest cost at the target: below, the sample has missed the behaviour


def refine(adapter: Adapter, sample: Sequence[Batch], plan: Plan, graph: AttributionGraph) -> AttributionGraph:
    """`graph` without the edges that cost the target too little when each is read alone and exactly (models/reread.py).

    The rule is the one by which they were kept: the widest gap near 1 % of the largest, for edges and for nodes. A
    dropped edge's score falls to what it was found to cost. Rounds are repeated until nothing more is dropped.
    """
    for _ in range(ROUNDS):
        edges = graph.kept_edges()
        costs = _costs(adapter, sample, plan, sorted(edges))
        if not _sees_behaviour(graph, costs):
            logger.info("the second look was left out: its sample of %d pairs misses the behaviour", costs.pairs)
            break
        survivors = edges & _worth(costs)
        if survivors == edges:
            break
        graph = _without(graph, {edge: costs.edges[edge] for edge in edges - survivors}).prune()
    return graph


def _costs(adapter: Adapter, sample: Sequence[Batch], plan: Plan, edges: Sequence[Edge]) -> Costs:
    assert isinstance(plan.design, ReadDesign)
    prompts = sum(len(batch.tokens) for batch in sample)
    wanted = PAIRS * min(1.0, FEW_EDGES / max(len(edges), 1))
    options = {"last": plan.last, "probe": plan.design.probe, "draws": max(1, round(wanted / prompts))}
    found = [
        reread(adapter, batch, edges, plan.target, seed=plan.seed + number, **options)
        for number, batch in enumerate(sample)
    ]
    pairs = max(sum(one.pairs for one in found), 1)

    def mean(costs: str) -> dict:
        names = getattr(found[0], costs)
        return {name: sum(getattr(one, costs)[name] * one.pairs for one in found) / pairs for name in names}

    return Costs(mean("edges"), mean("nodes"), pairs)


def _sees_behaviour(graph: AttributionGraph, costs: Costs) -> bool:
    """Whether the sample holds what the first look found: a rare behaviour can be missing from a small one."""
    end = graph.index.names[-1]
    first = {edge: score for edge, score in graph.pair_scores().items() if edge in costs.edges and edge[1] == end}
    if not first:
        return False
    largest = max(first, key=lambda edge: first[edge])
    return costs.edges[largest] >= EVIDENCE * first[largest]


def _worth(costs: Costs) -> set[Edge]:
    inner = {name: cost for name, cost in costs.nodes.items() if name != "input"}
    least = widest_gap(torch.tensor(list(inner.values()))) if inner else 0.0
    idle = {name for name, cost in inner.items() if cost <= least}
    inside = {edge: cost for edge, cost in costs.edges.items() if not idle & set(edge)}
    bar = widest_gap(torch.tensor(list(inside.values())))
    return {edge for edge, cost in inside.items() if cost > bar}


def _without(graph: AttributionGraph, dropped: dict[Edge, float]) -> AttributionGraph:
    score, kept = graph.score.clone(), graph.kept.clone()
    for (source, target), cost in dropped.items():
        rows = (graph.source == graph.index.position(source)) & (graph.target == graph.index.position(target))
        score[rows] = score[rows].clamp(-cost, cost)
        kept[rows] = False
    return replace(graph, score=score, kept=kept)
