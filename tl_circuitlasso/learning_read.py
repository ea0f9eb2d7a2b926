"""From the statistics of design `read` to a graph: a certified garrote per child, costs in nats, and where to stop."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import schema, solve
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.nodes import NodeIndex
from tl_circuitlasso.relevance import bound, narrowest
from tl_circuitlasso.sharing import ALONE, Ranks
from tl_circuitlasso.sites import PORTS
from tl_circuitlasso.solve.distributed import gather_solutions
from tl_circuitlasso.statistics import Statistics
from tl_circuitlasso.stopping import widest_gap

AUTO_STRENGTH = 0.01  # of lambda_max: enough to empty what contributes nothing, too little to bend what does
RUNAWAY = 10.0  # times the target's costliest edge: estimates beyond are bounded by what is passed on
SMALL = 128  # columns up to which FISTA is done before a compiled solver has been loaded
STABLE = 0.8  # share of resamples that strength "stability" asks of an edge
RESAMPLES = 100  # bootstrap resamples of the folds behind an edge's stability


@dataclass(frozen=True, eq=False)
class Child:
    """One child's regression and costs; columns are the parents in the order of computation, ports q, k, v in turn.

    gram: sums of products of what the parents contribute, by part; cost: by fold and column; merged: by fold and
    parent.
    """

    node: int
    ports: tuple[int, ...]
    parents: Int[Tensor, " parent"]
    gram: Float[Tensor, "part column column"]
    cost: Float[Tensor, "fold column"]
    merged: Float[Tensor, "fold parent"]


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
    weight a_u; score = expected cost to the target of the edge's contribution (nats, or units of the target), negative
    where it works against the child's whole contribution. Kept: both ends matter, and the score lies above the widest
    gap near 1 % of the largest, and never so high that no path is left. With a `strength` of your own, "ebic", "mcp"
    or "cv" also weight > 0, which makes the graph sparser where parents stand in for one another; with "stability" also
    a stability of 0.8. Then pruned to paths from input to target.

    Raises
    ------
    InputError: no prompt had a partner to be paired with.
    """
    index = NodeIndex.from_json(statistics.meta["index"])
    pairs = statistics.sums[schema.PAIRS].cpu()
    if not float(pairs.sum()):
        raise InputError("`tokens` gave no pairs of prompts: design 'read' needs two or more prompts in each batch")
    found = children(statistics, index)
    if strength == "cv" and statistics.folds < 2:
        raise InputError("`strength` 'cv' needs statistics in folds: collect them with that strength")
    with ranks.together():
        own = {n: _garrote(child, float(pairs.sum()), strength, tol) for n, child in enumerate(found) if ranks.mine(n)}
    solutions = gather_solutions(own, ranks)
    edges = _Edges.of(index, found, solutions)
    node_cost = statistics.sums[schema.NODE_COSTS].cpu()
    kept, bar = edges.choose(_mean(edges.cost, pairs), _mean(node_cost, pairs))
    generator = torch.Generator().manual_seed(seed)
    score = edges.port_scores(edges.bounded(_mean(edges.cost, pairs))[0], _mean(edges.port_cost, pairs))
    stability = edges.of_pairs(edges.stability(pairs, node_cost, generator))
    allowed = {"auto": torch.ones_like(stability, dtype=torch.bool), "stability": stability >= STABLE}
    graph = AttributionGraph(
        index=index,
        source=edges.source,
        target=edges.target,
        port=edges.port,
        score=score * edges.sign,
        weight=edges.weight,
        kept=edges.of_pairs(kept) & (score > bar) & allowed.get(str(strength), edges.weight > 0),
        extras={"stability": stability},
        certificates=tuple(_certificate(index.names[c.node], s) for c, s in zip(found, solutions)),
    )
    return graph.prune()


def children(statistics: Statistics, index: NodeIndex) -> list[Child]:
    """Every child's regression and costs, in the order of computation."""
    numbers: dict[str, int] = {}
    found = []
    for block, where in zip(index.blocks[1:], index.slices[1:]):
        site = block.site
        key = schema.group(site)
        number = numbers[key] = numbers.get(key, -1) + 1
        merged = statistics.sums[schema.cost(key)].cpu()[:, number]
        ports = (1, 2, 3) if site.kind == "head" else (0,)
        columns = [statistics.sums[schema.cost(key, PORTS[port])].cpu()[:, number] for port in ports]
        gram = statistics.sums[schema.gram(key)].cpu()[:, number]
        found.append(Child(where.start, ports, torch.arange(merged.shape[1]), gram, torch.cat(columns, dim=1), merged))
    return found


def _garrote(child: Child, pairs: float, strength: float | str, tol: float) -> solve.Solution:
    parts = [_moments(gram, pairs / len(child.gram)) for gram in child.gram]
    data, penalty = solve.total(parts), solve.L1(non_negative=True)
    if strength in ("cv", "ebic", "mcp"):
        return solve.select(data, rule=str(strength), folds=parts, penalty=penalty, tol=tol).solution
    return solve.lasso(
        data.gram,
        data.cross,
        target_sq_norm=data.target_sq_norm,
        strength=AUTO_STRENGTH if isinstance(strength, str) else strength,
        penalty=penalty,
        tol=tol,
        solver="fista" if len(data.cross) <= SMALL else "auto",
    )


def _moments(products: Float[Tensor, "column column"], pairs: float) -> solve.Moments:
    """What regresses on what: the child's own contribution is the sum of its parents', so one Gram says it all."""
    gram = products / pairs
    cross = gram.sum(1, keepdim=True)
    return solve.Moments(gram, cross, cross.sum().clamp_min(0)[None], pairs)


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
    weight: Float[Tensor, " edge"]
    sign: Float[Tensor, " edge"]
    port_cost: Float[Tensor, "fold edge"]
    pair: Int[Tensor, " edge"]
    pair_source: Int[Tensor, " pair"]
    pair_target: Int[Tensor, " pair"]
    cost: Float[Tensor, "fold pair"]

    @classmethod
    def of(cls, index: NodeIndex, found: list[Child], solutions: list[solve.Solution]) -> "_Edges":
        start, columns = 0, []
        for child, solution in zip(found, solutions):
            n, p = len(child.parents), len(child.ports)
            columns.append(
                {
                    "source": child.parents.repeat(p),
                    "target": torch.full((n * p,), child.node),
                    "port": torch.tensor(child.ports).repeat_interleave(n),
                    "weight": solution.value.flatten(),
                    "sign": torch.where(child.gram.sum((0, 2)) < 0, -1.0, 1.0),
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
            cost=torch.cat([child.merged for child in found], dim=1),
        )

    def bounded(self, cost: Float[Tensor, " pair"]) -> tuple[Float[Tensor, " pair"], Float[Tensor, " node"]]:
        """Pairs' costs, bounded by what their children pass on where estimates run away; and what every node passes on.

        In a deep network straight lines can extrapolate to many times what the target's own edges cost.
        """
        root = torch.tensor([len(self.ranks) - 1])
        if float(cost.max()) <= RUNAWAY * float(cost[self.pair_target == root].max()):
            return cost, torch.full((len(self.ranks),), torch.inf, dtype=cost.dtype)
        return bound(self.pair_source, self.pair_target, cost, ranks=self.ranks, roots=root)

    def of_pairs(self, values: Tensor) -> Tensor:
        """A value per pair as a value per edge."""
        return values[self.pair]

    def port_scores(self, cost: Float[Tensor, " pair"], port_cost: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
        """The pair's cost shared out: its costliest port carries it whole, the others in proportion to theirs."""
        largest = torch.zeros_like(cost).scatter_reduce(0, self.pair, port_cost, "amax")
        return self.of_pairs(cost) * port_cost / self.of_pairs(largest).clamp_min(1e-300)

    def choose(
        self, cost: Float[Tensor, " pair"], node_cost: Float[Tensor, " node"]
    ) -> tuple[Bool[Tensor, " pair"], float]:
        """Which pairs are costly enough, between nodes that are; and the cost that is enough."""
        cost, passed = self.bounded(cost)
        node_cost = torch.minimum(node_cost, passed[:-1])
        matters = torch.ones(len(node_cost) + 1, dtype=torch.bool)
        matters[1:-1] = node_cost[1:] > widest_gap(node_cost[1:])  # input and target always do
        inside = matters[self.pair_source] & matters[self.pair_target]
        way = self._narrowest(torch.where(inside, cost, 0.0))
        if not way > 0:  # the nodes that matter are on no path: leave the choice to the edges
            inside, way = torch.ones_like(inside), self._narrowest(cost)
        bar = min(widest_gap(cost[inside]), way * (1 - 1e-9))
        return inside & (cost > bar), bar

    def _narrowest(self, cost: Float[Tensor, " pair"]) -> float:
        return narrowest(self.pair_source, self.pair_target, cost, ranks=self.ranks, start=0, end=len(self.ranks) - 1)

    def stability(
        self, pairs: Float[Tensor, " fold"], node_cost: Float[Tensor, "fold node"], generator: torch.Generator
    ) -> Float[Tensor, " pair"]:
        """The share of bootstrap resamples of the folds in which a pair is chosen."""
        chosen = torch.zeros(self.cost.shape[1], dtype=torch.float64)
        for _ in range(RESAMPLES):
            draw = torch.randint(len(pairs), (len(pairs),), generator=generator)
            draw = draw[pairs[draw] > 0]
            if draw.numel():
                chosen += self.choose(_mean(self.cost[draw], pairs[draw]), _mean(node_cost[draw], pairs[draw]))[0]
        return chosen / RESAMPLES
