"""The second look of design `read`: kept edges are read again exactly, and those that don't survive are dropped."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.collect import Plan
from tl_circuitlasso.models.read import ReadDesign, operations
from tl_circuitlasso.models.reread import Costs, Edge, reread
from tl_circuitlasso.models.tokens import Batch, first_prompts
from tl_circuitlasso.sharing import ALONE, Ranks
from tl_circuitlasso.stopping import widest_gap

logger = logging.getLogger(__name__)

ROUNDS = 3  # dropping an edge can leave its parents' edges with nothing to carry
PAIRS = 512  # pairs of prompts looked at where that is cheap
FEWEST = 16  # pairs below which a look is no evidence, and is left out
CHEAP = 2e10  # operations that a round may take on any model
SHARE = 0.15  # of the operations of the forward passes behind the graph, where that is more
MANY_EDGES = 256  # a graph with more is no sparse circuit: edge by edge would cost more than the first look
EVIDENCE = 1 / 3  # of the first look's largest cost at the target: below, the sample has missed the behaviour


def refine(
    adapter: Adapter,
    sample: Sequence[Batch],
    plan: Plan,
    graph: AttributionGraph,
    *,
    prompts: int,
    ranks: Ranks = ALONE,
) -> tuple[AttributionGraph, int]:
    """The graph without edges that cost the target too little when read alone and exactly; and the passes it took.

    The rule is the one by which they were kept: the widest gap near 1 % of the largest, for edges and for nodes. A
    dropped edge's score falls to what it was found to cost. Rounds are repeated until nothing more is dropped.
    `prompts` is how many were behind the graph: the look is kept small beside them. `ranks` share the sample.
    """
    passes = 0
    for _ in range(ROUNDS):
        edges = graph.kept_edges()
        if not 0 < len(edges) <= MANY_EDGES:
            logger.info("the second look was left out: %d edges are kept", len(edges))
            break
        wanted = _affordable(adapter, sample[0].tokens.shape[1], edges, prompts)
        if wanted < FEWEST:
            logger.info("the second look was left out: beside so few prompts it would take too long")
            break
        costs = _costs(adapter, sample, plan, sorted(edges), wanted, ranks)
        passes += costs.passes
        if not _sees_behaviour(graph, costs):
            logger.info("the second look was left out: its sample of %d pairs misses the behaviour", costs.pairs)
            break
        survivors = edges & _worth(costs)
        if survivors == edges:
            break
        refined = _without(graph, {edge: costs.edges[edge] for edge in edges - survivors}).prune()
        if not bool(refined.kept.any()):
            logger.info("the second look was left out: no path would have survived it")
            break
        graph = refined
    return graph, passes


def _costs(
    adapter: Adapter, sample: Sequence[Batch], plan: Plan, edges: Sequence[Edge], wanted: int, ranks: Ranks
) -> Costs:
    assert isinstance(plan.design, ReadDesign)
    chosen, held = [], 0
    for batch in sample:
        if held < wanted:
            chosen.append(first_prompts(batch, wanted - held))
            held += len(chosen[-1].tokens)
    options = {"last": plan.last, "probe": plan.design.probe, "draws": max(1, round(wanted / held))}
    with ranks.together():
        found = [
            reread(adapter, batch, edges, plan.target, seed=plan.seed + number, **options)
            for number, batch in enumerate(chosen)
            if ranks.mine(number)
        ]
    pairs = max(int(ranks.sum(torch.tensor(sum(one.pairs for one in found)))), 1)

    def mean(costs: str, names: Sequence[Any]) -> dict:
        total = [sum(getattr(one, costs)[name] * one.pairs for one in found) for name in names]
        return dict(zip(names, (ranks.sum(torch.tensor(total, dtype=torch.float64)) / pairs).tolist()))

    nodes = sorted({source for source, _ in edges})
    return Costs(mean("edges", edges), mean("nodes", nodes), pairs, passes=len(chosen))


def _affordable(adapter: Adapter, positions: int, edges: Collection[Edge], prompts: int) -> int:
    """How many pairs a round may look at: operations for one pair against those of the forward passes."""
    mlp, head, forward = operations(adapter)
    into_mlps = sum(target.startswith("m") for _, target in edges)
    into_heads = sum(target.startswith("a") for _, target in edges)
    budget = max(CHEAP, SHARE * forward * positions * prompts)
    return int(min(PAIRS, budget / (positions * (forward + into_mlps * mlp + into_heads * head))))


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
