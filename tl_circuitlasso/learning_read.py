"""From the statistics of design `read` to a graph: a certified garrote per child, costs in nats, and where to stop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import schema, solve
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.nodes import NodeIndex
from tl_circuitlasso.relevance import bound, narrowest
from tl_circuitlasso.schema import FOLDS
from tl_circuitlasso.sharing import ALONE, Ranks
from tl_circuitlasso.sites import PORTS
from tl_circuitlasso.solve.distributed import gather_solutions
from tl_circuitlasso.statistics import Statistics
from tl_circuitlasso.stopping import CENTRE, widest_gap

log = logging.getLogger(__name__)

LEAST_SHARE = 1e-6  # of the target's mean squared difference: what an edge must explain where the regression decides
MANY_PAIRS = 256  # where more pairs of components are costly enough, costs have no gap and the regression decides
RUNAWAY = 10.0  # times the target's costliest edge: estimates beyond are bounded by what is passed on
SMALL = 128  # columns up to which FISTA is done before a compiled solver has been loaded
STABLE = 0.8  # share of resamples that strength "stability" asks of an edge
FINEST = 1e-9  # relative duality gap that double precision reaches safely
RESAMPLES = 50  # bootstrap resamples of the folds behind an edge's stability
RULES = ("cv", "ebic", "mcp")  # strengths that choose themselves


@dataclass(frozen=True, eq=False)
class Child:
    """One child's regression and costs; columns are the parents in the order of computation, ports q, k, v in turn.

    rows: what each parent contributes, a row a pair and direction; cost, effect: by fold and column; merged: cost by
    fold and parent; judged: by what parents are chosen, the same or a number's squared change.
    """

    node: int
    ports: tuple[int, ...]
    parents: Int[Tensor, " parent"]
    rows: Float[Tensor, "row column"]
    cost: Float[Tensor, "fold column"]
    effect: Float[Tensor, "fold column"] | None
    merged: Float[Tensor, "fold parent"]
    judged: Float[Tensor, "fold parent"]


@dataclass(frozen=True)
class Asked:
    """How sparse the regressions are to be: a fraction of each one's lambda_max, a rule's name, or "auto" and
    "stability", where one lambda holds for all: the same explained part of the target's difference from every edge.

    least: that lambda, in squared units of the target (or nats); pairs: how many the rows stand for; decides: whether
    edges are chosen by it, so that zeros have to be told from small numbers.
    """

    strength: float | str
    least: float
    pairs: float
    tol: float
    decides: bool

    def tolerance(self, square: float) -> float:
        """The relative gap that a child of mean square contribution `square` needs."""
        return min(self.tol, max(FINEST, 0.2 * self.least / max(square, 1e-300))) if self.decides else self.tol


def learn_read(
    statistics: Statistics,
    *,
    strength: float | str = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> AttributionGraph:
    """The attribution graph of a sweep's statistics.

    Per child v the non-negative garrote min 1/2N sum (y - sum_u a_u g_u)^2 + lambda sum a_u, a >= 0, gives each edge's
    weight a_u. By default one lambda holds for all children, since all contributions are in the target's units.

    Score = expected cost to the target of the edge's contribution (nats, or units of the target), negative where it
    works against the child's whole contribution; for prompts with counterparts and a target that is a number, how much
    of the target's mean difference the edge carries.

    Kept: both ends matter, and the cost lies above the widest gap near 1 % of the costliest edge into the target (in
    squares where it is a number), and never so high that no path is left. Where more than 256 pairs of components
    are that costly there's no such gap, and the regression decides: kept is what has a weight. With a `strength` of
    your own, "ebic", "mcp" or "cv" edges need both, with "stability" a stability of 0.8. Then pruned to paths from
    input to target.

    Raises
    ------
    InputError: no prompt had a partner to be paired with.
    """
    index = NodeIndex.from_json(statistics.meta["index"])
    pairs = statistics.sums[schema.PAIRS].cpu()
    if not float(pairs.sum()):
        raise InputError("`tokens` gave no pairs of prompts: design 'read' needs two or more prompts in each batch")
    found = children(statistics, index)
    total, count = found[-1].rows.sum(1), float(statistics.rows[schema.WEIGHT].sum())
    number = bool(statistics.meta["number"])
    edges = _Edges.of(index, found, number)
    node_cost = statistics.sums[schema.NODE_COSTS].cpu()
    kept, bar = edges.choose(_mean(edges.judged, pairs), _mean(node_cost, pairs))
    dense = strength == "auto" and int(kept.sum()) > MANY_PAIRS
    asked = Asked(strength, LEAST_SHARE * float(total.square().sum()) / count, count, tol, decides=dense)
    with ranks.together():
        own = {number: _garrote(child, asked) for number, child in enumerate(found) if ranks.mine(number)}
    solutions = gather_solutions(own, ranks)
    weight = torch.cat([solution.value.flatten() for solution in solutions])
    generator = torch.Generator().manual_seed(seed)
    score = edges.port_scores(edges.bounded(_mean(edges.cost, pairs))[0], _mean(edges.port_cost, pairs))
    extras = {"stability": edges.of_pairs(edges.stability(pairs, node_cost, generator))}
    if edges.port_effect is not None:
        extras["mean_abs"] = _mean(edges.port_cost, pairs)
    if dense:
        log.info("%d pairs of components are costly and no gap tells them apart: the regression decides", kept.sum())
        extras["stability"] = _resampled(found, solutions, asked, generator)
        keep = weight > 0
    else:
        allowed = {"auto": torch.ones_like(weight, dtype=torch.bool), "stability": extras["stability"] >= STABLE}
        keep = edges.of_pairs(kept) & edges.ports_above(bar, pairs) & allowed.get(str(strength), weight > 0)
    graph = AttributionGraph(
        index=index,
        source=edges.source,
        target=edges.target,
        port=edges.port,
        score=score * edges.sign if edges.port_effect is None else -_mean(edges.port_effect, pairs),
        weight=weight,
        kept=keep,
        extras=extras,
        certificates=tuple(_certificate(index.names[c.node], s) for c, s in zip(found, solutions)),
        provenance={"unit": "target" if number else "nats", "chosen_by": "regression" if dense else "cost"},
    )
    return graph.prune()


def children(statistics: Statistics, index: NodeIndex) -> list[Child]:
    """Every child's regression and costs, in the order of computation."""
    numbers: dict[str, int] = {}
    found, start = [], 0
    rows = statistics.rows[schema.CONTRIBUTIONS]
    for block, where in zip(index.blocks[1:], index.slices[1:]):
        site = block.site
        key = schema.group(site)
        number = numbers[key] = numbers.get(key, -1) + 1
        merged = statistics.sums[schema.cost(key)].cpu()[:, number]
        ports = (1, 2, 3) if site.kind == "head" else (0,)

        def columns(name: Callable[[str, str], str]) -> Tensor:
            return torch.cat([statistics.sums[name(key, PORTS[port])].cpu()[:, number] for port in ports], dim=1)

        stop = start + merged.shape[1] * len(ports)
        effect = columns(schema.effect) if schema.effect(key, PORTS[ports[0]]) in statistics.sums else None
        parents = torch.arange(merged.shape[1])
        judged = statistics.sums.get(schema.square(key), statistics.sums[schema.cost(key)]).cpu()[:, number]
        cost = columns(schema.cost)
        found.append(Child(where.start, ports, parents, rows[:, start:stop], cost, effect, merged, judged))
        start = stop
    return found


def _garrote(child: Child, asked: Asked) -> solve.Solution:
    """The child's regression. Columns that can't enter at this lambda, |g_u| |y| <= N lambda, are left out beforehand."""
    rows = child.rows.double()
    total = rows.sum(1)
    square = float(total.square().sum()) / asked.pairs
    penalty = solve.L1(non_negative=True)
    if asked.strength in RULES:
        everything = _moments(rows, total, asked.pairs)
        parts = torch.arange(len(rows)).tensor_split(FOLDS)
        folds = [_moments(rows[part], total[part], asked.pairs / FOLDS) for part in parts]
        choice = solve.select(everything, rule=str(asked.strength), folds=folds, penalty=penalty, tol=asked.tol)
        return choice.solution
    largest = float((rows.T @ total).amax().clamp_min(0)) / asked.pairs
    least = asked.least if isinstance(asked.strength, str) else float(asked.strength) * largest
    bound = rows.square().sum(0).div(asked.pairs).sqrt() * square**0.5
    able = bound > least if least < largest else torch.zeros_like(bound, dtype=torch.bool)
    if not bool(able.any()):
        able[:1] = True  # a regression on one column, which stays at 0, for the proof
    data = _moments(rows[:, able], total, asked.pairs)
    start = None if asked.decides or not isinstance(asked.strength, str) else torch.ones_like(data.cross)
    solution = solve.lasso(
        data.gram,
        data.cross,
        target_sq_norm=data.target_sq_norm,
        strength=least,
        strength_is="absolute",
        penalty=penalty,
        tol=asked.tolerance(square),
        init=start,  # without a penalty the child is the sum of its parents, each with weight 1
        solver="fista" if len(data.cross) <= SMALL and not asked.decides else "auto",
    )
    value = solution.value.new_zeros(rows.shape[1], 1)
    value[able] = solution.value
    return replace(solution, value=value)


def _moments(rows: Float[Tensor, "row column"], total: Float[Tensor, " row"], pairs: float) -> solve.Moments:
    gram, cross = rows.T @ rows / pairs, (rows.T @ total)[:, None] / pairs
    return solve.Moments(gram, cross, total.square().sum()[None] / pairs, pairs)


def _resampled(
    found: list[Child], solutions: list[solve.Solution], asked: Asked, generator: torch.Generator
) -> Float[Tensor, " edge"]:
    """The share of bootstrap resamples of the rows in which an edge keeps its weight, all other weights being as they
    are: its column's product with what is left without it exceeds lambda."""
    parts = []
    for child, solution in zip(found, solutions):
        rows, weight = child.rows.double(), solution.value[:, 0]
        stability = torch.zeros_like(weight)
        active = (weight > 0).nonzero().flatten()
        if len(active):
            left = rows.sum(1) - rows[:, active] @ weight[active]
            products = rows[:, active] * (left[:, None] + rows[:, active] * weight[active])
            draws = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)
            counts = torch.zeros(RESAMPLES, len(rows), dtype=torch.float64)
            counts.scatter_add_(1, draws, torch.ones_like(counts))
            stability[active] = (counts @ products / asked.pairs > asked.least).double().mean(0)
        parts.append(stability)
    return torch.cat(parts)


def _mean(total: Float[Tensor, "fold *edges"], pairs: Float[Tensor, " fold"]) -> Float[Tensor, "*edges"]:
    return total.sum(0) / pairs.sum()


def _certificate(name: str, solution: solve.Solution) -> dict[str, Any]:
    return {
        "target": name,
        "gap": float(solution.gap.max()),
        "iterations": int(solution.stats["iterations"].max()),
        "converged": bool(solution.converged.all()),
    }


@dataclass(frozen=True, eq=False)
class _Edges:
    """All candidate edges as columns; `pair` numbers the (source, target) pair that an edge's ports belong to."""

    ranks: Int[Tensor, " node"]
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    port: Int[Tensor, " edge"]
    sign: Float[Tensor, " edge"]
    port_cost: Float[Tensor, "fold edge"]
    port_effect: Float[Tensor, "fold edge"] | None
    pair: Int[Tensor, " edge"]
    pair_source: Int[Tensor, " pair"]
    pair_target: Int[Tensor, " pair"]
    cost: Float[Tensor, "fold pair"]
    judged: Float[Tensor, "fold pair"]
    squares: bool

    @classmethod
    def of(cls, index: NodeIndex, found: list[Child], squares: bool) -> "_Edges":
        start, columns = 0, []
        for child in found:
            n, p = len(child.parents), len(child.ports)
            columns.append(
                {
                    "source": child.parents.repeat(p),
                    "target": torch.full((n * p,), child.node),
                    "port": torch.tensor(child.ports).repeat_interleave(n),
                    "sign": torch.where(child.rows.T @ child.rows.sum(1) < 0, -1.0, 1.0).double(),
                    "pair": start + torch.arange(n).repeat(p),
                    "pair_source": child.parents,
                    "pair_target": torch.full((n,), child.node),
                }
            )
            start += n
        return cls(
            ranks=index.ranks,
            **{name: torch.cat([column[name] for column in columns]) for name in columns[0]},
            port_cost=torch.cat([child.cost for child in found], dim=1),
            port_effect=None if found[0].effect is None else torch.cat([child.effect for child in found], dim=1),
            cost=torch.cat([child.merged for child in found], dim=1),
            judged=torch.cat([child.judged for child in found], dim=1),
            squares=squares,
        )

    def bounded(self, cost: Float[Tensor, " pair"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " node"]]:
        """Pairs' costs, bounded by what their children pass on where estimates run away; and what every node passes on.

        In a deep network straight lines can extrapolate to many times what the target's own edges cost.
        """
        if float(cost.max()) <= RUNAWAY * self.costliest(cost):
            return cost, torch.full((len(self.ranks),), torch.inf, dtype=cost.dtype)
        root = torch.tensor([len(self.ranks) - 1])
        return bound(self.pair_source, self.pair_target, cost, ranks=self.ranks, roots=root)

    def costliest(self, cost: Float[Tensor, " pair"]) -> float:
        """What the target's own costliest edge costs: the unit of the choice, since nothing in between runs away."""
        return float(cost[self.pair_target == len(self.ranks) - 1].max())

    def of_pairs(self, values: Tensor) -> Tensor:
        """A value per pair as a value per edge."""
        return values[self.pair]

    def port_scores(self, cost: Float[Tensor, " pair"], port_cost: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
        """The pair's cost shared out: its costliest port carries it whole, the others in proportion to theirs."""
        largest = torch.zeros_like(cost).scatter_reduce(0, self.pair, port_cost, "amax")
        return self.of_pairs(cost) * port_cost / self.of_pairs(largest).clamp_min(1e-300)

    def ports_above(self, bar: float, pairs: Float[Tensor, " fold"]) -> Bool[Tensor, " edge"]:
        """Which ports carry enough of their pair's cost; squares where edges are judged by squares."""
        judged = self.bounded(_mean(self.judged, pairs))[0]
        share = self.port_scores(torch.ones_like(judged), _mean(self.port_cost, pairs))
        return self.of_pairs(judged) * (share.square() if self.squares else share) > bar

    def choose(
        self, cost: Float[Tensor, " pair"], node_cost: Float[Tensor, " node"]
    ) -> tuple[Bool[Tensor, " pair"], float]:
        """Which pairs are costly enough, between nodes that are; and the cost that is enough."""
        cost, passed = self.bounded(cost)
        node_cost, largest = torch.minimum(node_cost, passed[:-1]), self.costliest(cost)
        matters = torch.ones(len(node_cost) + 1, dtype=torch.bool)
        matters[1:-1] = node_cost[1:] > widest_gap(node_cost[1:])  # input and target always do
        inside = matters[self.pair_source] & matters[self.pair_target]
        way = self._narrowest(torch.where(inside, cost, 0.0))
        if not way > 0:  # the nodes that matter are on no path: leave the choice to the edges
            inside, way = torch.ones_like(inside), self._narrowest(cost)
        bar = min(widest_gap(cost[inside], largest=largest), way * (1 - 1e-9))
        return inside & (cost > bar), bar

    def _narrowest(self, cost: Float[Tensor, " pair"]) -> float:
        return narrowest(self.pair_source, self.pair_target, cost, ranks=self.ranks, start=0, end=len(self.ranks) - 1)

    def stability(
        self, pairs: Float[Tensor, " fold"], node_cost: Float[Tensor, "fold node"], generator: torch.Generator
    ) -> Float[Tensor, " pair"]:
        """The share of bootstrap resamples of the folds in which a pair is chosen."""
        chosen = torch.zeros(self.judged.shape[1], dtype=torch.float64)
        for _ in range(RESAMPLES):
            draw = torch.randint(len(pairs), (len(pairs),), generator=generator)
            draw = draw[pairs[draw] > 0]
            if draw.numel():
                chosen += self.choose(_mean(self.judged[draw], pairs[draw]), _mean(node_cost[draw], pairs[draw]))[0]
        return chosen / RESAMPLES
