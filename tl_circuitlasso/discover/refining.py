"""The second look of design `read`: kept edges are read again exactly, and those that don't survive are dropped."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool

from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.discover.choice import between_counterparts
from tl_circuitlasso.discover.looks import Looks
from tl_circuitlasso.discover.stopping import widest_gap
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.collect import Plan
from tl_circuitlasso.models.read import ReadDesign, operations
from tl_circuitlasso.models.reread import Costs, Edge, Reading, order, reread
from tl_circuitlasso.models.tokens import Batch, first_prompts
from tl_circuitlasso.progress import bar as counting

logger = logging.getLogger(__name__)

ROUNDS = 3  # dropping an edge can leave its parents' edges with nothing to carry
PAIRS = 64  # pairs of prompts looked at where that is cheap
FEWEST = 16  # pairs below which a look is no evidence, and is left out
CHEAP = 2e10  # operations that a round may take on any model
SHARE = 0.15  # of the operations of the forward passes behind the graph, where that is more
MANY_EDGES = 256  # a graph with more is no sparse circuit: edge by edge would cost more than the first look
EVIDENCE = 1 / 3  # of the first look's largest cost at the target: below, the sample has missed the behaviour


def refine(
    adapter: Adapter,
    sample: Sequence[Batch],
    plan: Plan[ReadDesign],
    graph: AttributionGraph,
    *,
    prompts: int,
    ranks: Ranks = ALONE,
    progress: bool = False,
    looks: Looks | None = None,
) -> tuple[AttributionGraph, int]:
    """The graph without edges that cost the target too little when read alone and exactly; and the passes it took.

    The rule is the one by which they were kept: the widest gap near 1 % of the costliest (in squares for a number), for
    edges and for nodes. Edges that were looked at have the score that was measured. Rounds are repeated until nothing
    more is dropped, and measure again only what led to the edges dropped. `prompts` is how many were behind the graph:
    the look is kept small beside them. `ranks` share the sample; `looks` keep what each batch said, for a run that goes
    on. The provenance says what came of it.
    """
    passes, came_of_it = 0, "no edge dropped"
    before = len(graph.kept_edges())
    shown = progress and ranks.rank == 0
    wanted, reading, costs = 0, None, None
    for _ in range(ROUNDS):
        edges = graph.kept_edges()
        if not 0 < len(edges) <= MANY_EDGES:
            came_of_it = f"left out: {len(edges)} pairs of components are kept"
            break
        wanted = wanted or _affordable(adapter, sample[0].tokens.shape[1], edges, prompts)
        if wanted < FEWEST:
            came_of_it = "left out: beside so few prompts it would take too long"
            break
        reading = Reading.all(edges) if reading is None else reading.after(edges)
        if costs is None or reading.edges or reading.nodes:
            found = _costs(adapter, sample, plan, reading, wanted, ranks, shown, looks)
            passes, costs = passes + found.passes, found if costs is None else costs.updated(found)
        costs = costs.among(edges)
        if not _sees_behaviour(graph, costs):
            came_of_it = f"left out: its sample of {costs.pairs} pairs misses the behaviour"
            break
        survivors = edges & _worth(costs)
        refined = _measured(graph, costs, survivors).prune()
        if not bool(refined.kept.any()):
            came_of_it = "left out: no path would have survived it"
            break
        graph = _without(refined, graph.kept & ~refined.kept)
        came_of_it = f"{before - len(graph.kept_edges())} edges dropped"
        if survivors == edges:
            break
    logger.info("second look: %s", came_of_it)
    return replace(graph, provenance={**graph.provenance, "second_look": came_of_it}), passes


def _costs(
    adapter: Adapter,
    sample: Sequence[Batch],
    plan: Plan[ReadDesign],
    reading: Reading,
    wanted: int,
    ranks: Ranks,
    progress: bool,
    looks: Looks | None,
) -> Costs:
    chosen, held = [], 0
    for batch in sample:
        if held < wanted:
            chosen.append(first_prompts(batch, wanted - held))
            held += len(chosen[-1].tokens)
    options = {"last": plan.last, "probe": plan.design.probe, "draws": max(1, round(wanted / held))}
    options["memory"] = plan.design.swept
    mine = {number: batch for number, batch in enumerate(chosen) if ranks.mine(number)}
    asked = (options, plan.seed, [len(batch.tokens) for batch in chosen])
    known = {} if looks is None else looks.known(mine, reading, *asked)
    found = []
    with counting(total=len(mine), progress=progress, desc="second look", unit="batch") as bar:
        bar.update(len(known))
        for number, batch in mine.items():
            one = known.get(number)
            if one is None:
                one = reread(adapter, batch, reading, plan.target, seed=plan.seed + number, tell=bar.update, **options)
                if looks is not None:
                    looks.store(number, one, reading, *asked)
            found.append(one)
    pairs = max(ranks.count(sum(one.pairs for one in found)), 1)

    def mean(costs: str, names: Sequence[Any]) -> dict:
        total = [sum(getattr(one, costs)[name] * one.pairs for one in found) for name in names]
        return dict(zip(names, (ranks.sum(torch.tensor(total, dtype=torch.float64)) / pairs).tolist()))

    return Costs(
        mean("edges", reading.edges),
        mean("judged", reading.edges),
        mean("nodes", reading.nodes),
        mean("effects", reading.edges),
        pairs,
        ranks.count(len(mine) - len(known)),
    )


def _affordable(adapter: Adapter, positions: int, edges: Collection[Edge], prompts: int) -> int:
    """How many pairs a round may look at: operations for one pair against those of the forward passes."""
    mlp, head, forward = operations(adapter)
    below: dict[str, set[str]] = {}  # all that each node feeds
    for name in sorted({name for edge in edges for name in edge}, key=order, reverse=True):
        fed = {target for source, target in edges if source == name}
        below[name] = fed.union(*(below[child] for child in fed))
    walked = [node for _, target in edges for node in {target, *below[target]}]
    walked += [node for source in {source for source, _ in edges} for node in below[source]]
    vocabulary = 2.0 * adapter.shape.d_model * adapter.shape.d_vocab_out / max(positions, 1)  # at one position
    walk = sum(mlp if node.startswith("m") else head if node.startswith("a") else vocabulary for node in walked)
    budget = max(CHEAP, SHARE * forward * positions * prompts)
    return int(min(PAIRS, budget / (positions * (forward + walk))))


def _sees_behaviour(graph: AttributionGraph, costs: Costs) -> bool:
    """Whether the sample holds what the first look found: a rare behaviour can be missing from a small one."""
    end = graph.index.names[-1]
    first = {edge: score for edge, score in graph.pair_scores().items() if edge in costs.edges and edge[1] == end}
    if not first:
        return False
    largest = max(first, key=lambda edge: first[edge])
    return costs.edges[largest] >= EVIDENCE * first[largest]


def _worth(costs: Costs) -> set[Edge]:
    """The edges that cost enough beside the costliest, between nodes that do: nothing runs away here."""
    least = widest_gap(torch.tensor(list(costs.nodes.values()))) if costs.nodes else 0.0
    idle = {name for name, cost in costs.nodes.items() if cost <= least}
    inside = {edge: cost for edge, cost in costs.judged.items() if not idle & set(edge)}
    bar = widest_gap(torch.tensor(list(inside.values())))
    return {edge for edge, cost in inside.items() if cost > bar}


def _without(graph: AttributionGraph, dropped: Bool[torch.Tensor, " edge"]) -> AttributionGraph:
    """The graph with a stability of 0 for what was dropped: no resample's rule keeps it behind this look."""
    stability = graph.extras["stability"].masked_fill(dropped, 0.0)
    return replace(graph, extras={**graph.extras, "stability": stability})


def _measured(graph: AttributionGraph, costs: Costs, survivors: Collection[Edge]) -> AttributionGraph:
    """The graph with what was measured as scores, ports in proportion, and only the survivors of what was looked at."""
    score, kept, names = graph.score.clone(), graph.kept.clone(), graph.index.names
    extras = {name: values.clone() for name, values in graph.extras.items()}
    signed = "mean_abs" in extras
    first = replace(graph, score=extras["mean_abs"]).pair_scores() if signed else graph.pair_scores()
    for edge, cost in costs.edges.items():
        source, target = (names.index(name) for name in edge)
        rows = (graph.source == source) & (graph.target == target)
        ratio = cost / max(first[edge], 1e-300)
        if signed:
            total = float(extras["mean_effect"][rows].sum())
            extras["mean_effect"][rows] *= -costs.effects[edge] / total if abs(total) > 1e-300 else 0.0
            extras["mean_abs"][rows] *= ratio
            score[rows] = between_counterparts(extras["mean_effect"][rows], extras["mean_abs"][rows])
        else:
            score[rows] *= ratio
        if edge not in survivors:
            kept[rows] = False
    return replace(graph, score=score, kept=kept, extras=extras)
