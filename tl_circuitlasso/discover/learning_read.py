"""From the statistics of design `read` to a graph: a certified garrote per child, costs in nats, and where to stop."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data import schema
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover import growing
from tl_circuitlasso.discover.choice import Edges, between_counterparts, mean_of
from tl_circuitlasso.discover.garrote import Asked, Child, children, garrotes, steadiness
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.models.pairs import NO_PAIRS

MANY_PAIRS = 256  # where more pairs of components are costly enough, costs have no gap and the regression decides


@dataclass(frozen=True)
class Bars:
    """How the regression decides.

    least: of the target's mean squared difference, what an edge must explain. left_out: of its score, what an edge
    keeps that the regression leaves out, since others carry what that edge carries.
    """

    least: float
    left_out: float


COUNTERPARTS = Bars(least=1 / 30_000, left_out=0.1)
# Prompts paired at random differ in much that is idle, and weights change with who is paired with whom.
RANDOM_PARTNERS = Bars(least=1 / 10_000, left_out=0.5)


def learn_read(
    statistics: Statistics,
    *,
    strength: float | str = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> AttributionGraph:
    """The attribution graph of a sweep's statistics.

    Per child v the garrote min 1/2N sum (y - sum_u a_u g_u)^2 + lambda sum a_u, 0 <= a <= 1, gives each edge's weight
    a_u, the share of its contribution that explains the child. By default one lambda holds for all children, since all
    contributions are in the target's units.

    Score = expected cost to the target of the edge's contribution (nats, or units of the target), negative where it
    works against the child's whole contribution; for prompts with counterparts and a target that is a number, the
    signed size of its effect, choice.between_counterparts.

    Kept: both ends matter, and the cost lies above the widest gap near 1 % of the costliest edge into the target (in
    squares where it is a number), and never so high that no path is left. Where more than 256 pairs of components
    are that costly there's no such gap; and what is that costly may carry less than 80 % of the difference. Then the
    regression decides: kept are as many pairs as have a weight, grown back from the target by size and alignment, and
    more if these don't carry 80 % (`growing.grown`). Scores fall with the weight, to a tenth without one (a half
    without counterparts), and between counterparts with what the edge is worth, outside the circuit to a tenth, so that
    circuits of any size hold the chosen edges first. With a `strength` of your own, "ebic", "mcp" or "cv" edges need
    both, with "stability" a stability of 0.8.
    Then pruned to paths from input to target.

    Raises
    ------
    InputError: no prompt had a partner to be paired with.
    """
    index = NodeIndex.from_json(statistics.meta["index"])
    pairs = statistics.sums[schema.PAIRS].cpu()
    if not float(pairs.sum()):
        raise InputError(NO_PAIRS)
    found = children(statistics, index)
    total, count = found[-1].rows.sum(1), float(statistics.rows[schema.WEIGHT].sum())
    number = bool(statistics.meta["number"])
    edges = Edges.of(index, found, number)
    node_cost = statistics.sums[schema.NODE_COSTS].cpu()
    kept, level = edges.choose(mean_of(edges.judged, pairs), mean_of(node_cost, pairs))
    counted = edges.of_pairs(kept) & edges.ports_above(float(level), pairs)
    carried = edges.carried(found, edges.shares(found), counted)
    contrast = bool(statistics.meta["contrast"])
    bars = COUNTERPARTS if contrast else RANDOM_PARTNERS
    crowded, lacking = int(kept.sum()) > MANY_PAIRS, bool(kept.any()) and carried < growing.ENOUGH
    dense = strength == "auto" and (crowded or lacking)
    asked = Asked(strength, bars.least * float(total.square().sum()) / count, count, tol, decides=dense)
    solutions = garrotes(found, asked, ranks, progress=progress)
    weight = torch.cat([solution.value.flatten() for solution in solutions])
    generator = torch.Generator().manual_seed(seed)
    extras: dict[str, torch.Tensor] = {}
    if edges.port_effect is None:
        score = edges.port_scores(edges.bounded(mean_of(edges.cost, pairs))[0], mean_of(edges.port_cost, pairs))
        score = score * edges.sign
    else:
        extras = {"mean_effect": -mean_of(edges.port_effect, pairs), "mean_abs": mean_of(edges.port_cost, pairs)}
        score = between_counterparts(extras["mean_effect"], extras["mean_abs"])
    if dense:
        size = extras.get("mean_abs", score.abs())
        weighed = edges.pair[weight > 0].unique().numel()
        circuit = growing.grown(edges, found, size, weighed, contrast=contrast)
        keep, carried = circuit.kept, circuit.carried
        extras["stability"] = _steadiness(found, size * circuit.worth, keep, generator)
        score = score * (bars.left_out + (1 - bars.left_out) * weight)
        if contrast:
            score = score * torch.where(keep, circuit.worth.clamp_min(bars.left_out), bars.left_out)
    else:
        extras["stability"] = edges.of_pairs(edges.stability(pairs, node_cost, generator))
        allowed = {"auto": torch.ones_like(weight, dtype=torch.bool), "stability": extras["stability"] >= solve.STABLE}
        keep = counted & allowed.get(str(strength), weight > 0)
    graph = AttributionGraph(
        index=index,
        source=edges.source,
        target=edges.target,
        port=edges.port,
        score=score,
        weight=weight,
        kept=keep,
        extras=extras,
        certificates=tuple(_certificate(index.names[c.node], s) for c, s in zip(found, solutions)),
        provenance={"chosen_by": "regression" if dense else "cost"},
    )
    return _pruned(graph, carried)


def _steadiness(
    found: list[Child],
    value: Float[Tensor, " edge"],
    keep: Bool[Tensor, " edge"],
    generator: torch.Generator,
) -> Float[Tensor, " edge"]:
    """The share of resamples of the rows in which an edge is worth what the least kept one is; 0 for large ones that
    aren't kept, since what they feed isn't in the circuit."""
    relative = value / (value[keep].min() if bool(keep.any()) else torch.inf)
    return steadiness(found, relative.masked_fill((relative >= 1) & ~keep, 0.0), generator)


def _pruned(graph: AttributionGraph, carried: float) -> AttributionGraph:
    """The graph's edges on paths from input to target; the provenance says what was cut off, and how much of the
    target's difference the circuit is expected to carry."""
    pruned = graph.prune()
    off = graph.kept & ~pruned.kept
    record = {**graph.provenance, "expected_share": round(carried, 4), "pruned": {"edges": int(off.sum())}}
    if bool(off.any()):
        record["pruned"]["largest_score"] = float(graph.score[off].abs().max())
    return replace(pruned, provenance=record)


def _certificate(name: str, solution: solve.Solution) -> dict[str, Any]:
    return {
        "target": name,
        "gap": float(solution.gap.max()),
        "iterations": int(solution.stats["iterations"].max()),
        "converged": bool(solution.converged.all()),
    }
