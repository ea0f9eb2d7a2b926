"""Which edges of design `read` are costly enough: the candidates with their costs, and the rule that chooses."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.discover.garrote import RESAMPLES, Child
from tl_circuitlasso.discover.stopping import lowered, widest_gaps
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.graph.relevance import bound, narrowest

ROOM = 1 << 18  # costs that are resampled at once
RUNAWAY = 10.0  # times the target's costliest edge: estimates beyond are bounded by what is passed on


def mean_of(total: Float[Tensor, "fold *edges"], pairs: Float[Tensor, " fold"]) -> Float[Tensor, "*edges"]:
    """The mean over all folds, each with as many pairs as it has."""
    return total.sum(0) / pairs.sum()


def between_counterparts(effect: Float[Tensor, " edge"], size: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """The score from the mean effect and the mean size of the effect: sign(E d) sqrt(|E d| E|d|), at least |E d|.

    Effects that cancel between prompts are needed on each of them: by the mean alone they would rank below edges that
    do little anywhere, and a circuit of the highest scores would lack them.

    >>> between_counterparts(torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 2.0])).tolist()
    [-1.0, 1.0]
    """
    return effect.sign() * (effect.abs() * size).sqrt()


@dataclass(frozen=True, eq=False)
class Edges:
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
    def of(cls, index: NodeIndex, found: list[Child], squares: bool) -> "Edges":
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
        effects = [child.effect for child in found if child.effect is not None]
        return cls(
            ranks=index.ranks,
            **{name: torch.cat([column[name] for column in columns]) for name in columns[0]},
            port_cost=torch.cat([child.cost for child in found], dim=1),
            port_effect=torch.cat(effects, dim=1) if effects else None,
            cost=torch.cat([child.merged for child in found], dim=1),
            judged=torch.cat([child.judged for child in found], dim=1),
            squares=squares,
        )

    def bounded(
        self, cost: Float[Tensor, "*draw pair"]
    ) -> tuple[Float[Tensor, "*draw pair"], Float[Tensor, "*draw node"]]:
        """Pairs' costs, bounded by what their children pass on where estimates run away; and what every node passes on.

        In a deep network straight lines can extrapolate to many times what the target's own edges cost.
        """
        free = torch.full((*cost.shape[:-1], len(self.ranks)), torch.inf, dtype=cost.dtype)
        away = (cost.amax(-1) > RUNAWAY * self.costliest(cost))[..., None]
        if not bool(away.any()):
            return cost, free
        root = torch.tensor([len(self.ranks) - 1])
        most, passed = bound(self.pair_source, self.pair_target, cost, ranks=self.ranks, roots=root)
        return torch.where(away, most, cost), torch.where(away, passed, free)

    def costliest(self, cost: Float[Tensor, "*draw pair"]) -> Float[Tensor, "*draw"]:
        """What the target's own costliest edge costs: the unit of the choice, since nothing in between runs away."""
        return cost[..., self.pair_target == len(self.ranks) - 1].amax(-1)

    def of_pairs(self, values: Tensor) -> Tensor:
        """A value per pair as a value per edge."""
        return values[self.pair]

    def port_scores(self, cost: Float[Tensor, " pair"], port_cost: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
        """The pair's cost shared out: its costliest port carries it whole, the others in proportion to theirs."""
        largest = torch.zeros_like(cost).scatter_reduce(0, self.pair, port_cost, "amax")
        return self.of_pairs(cost) * port_cost / self.of_pairs(largest).clamp_min(1e-300)

    def ports_above(self, bar: float, pairs: Float[Tensor, " fold"]) -> Bool[Tensor, " edge"]:
        """Which ports carry enough of their pair's cost; squares where edges are judged by squares."""
        judged = self.bounded(mean_of(self.judged, pairs))[0]
        share = self.port_scores(torch.ones_like(judged), mean_of(self.port_cost, pairs))
        return self.of_pairs(judged) * (share.square() if self.squares else share) > bar

    def shares(self, found: list[Child]) -> Float[Tensor, " edge"]:
        """Each edge's share of what its child contributes, E(g[u -> v] y_v) / E(y_v^2): a child's add up to 1."""
        parts = []
        for child in found:
            rows = child.rows.double()
            total = rows.sum(1)
            square = total.square().sum()
            parts.append(rows.T @ total / square if float(square) > 0 else rows.new_zeros(rows.shape[1]))
        return torch.cat(parts)

    def carried(self, found: list[Child], shares: Float[Tensor, " edge"], kept: Bool[Tensor, " edge"]) -> float:
        """The share of the target's difference that the kept edges are expected to carry, from 0 to 1; all carry 1.

        r(v) = sum over kept u -> v of share(u -> v) r(u), r(input) = 1, within [0, 1].
        """
        through = torch.zeros(len(self.ranks), dtype=torch.float64)
        through[0], start = 1.0, 0
        counted = shares * kept
        for child in found:
            here = slice(start, start := start + child.rows.shape[1])
            through[child.node] = (counted[here] * through[self.source[here]]).sum().clamp(0, 1)
        return float(through[-1])

    def choose(
        self, cost: Float[Tensor, "*draw pair"], node_cost: Float[Tensor, "*draw node"]
    ) -> tuple[Bool[Tensor, "*draw pair"], Float[Tensor, "*draw"]]:
        """Which pairs are costly enough, between nodes that are; and the cost that is enough. For several draws of the
        costs at once, if there are several."""
        cost, passed = self.bounded(cost)
        node_cost, largest = torch.minimum(node_cost, passed[..., :-1]), self.costliest(cost)
        matters = torch.ones_like(passed, dtype=torch.bool)  # input and target always do
        matters[..., 1:-1] = node_cost[..., 1:] > widest_gaps(node_cost[..., 1:])[..., None]
        inside = matters[..., self.pair_source] & matters[..., self.pair_target]
        way = self._narrowest(torch.where(inside, cost, 0.0))
        cut = ~(way > 0)  # the nodes that matter are on no path: leave the choice to the edges
        if bool(cut.any()):
            inside, way = inside | cut[..., None], torch.where(cut, self._narrowest(cost), way)
        bar = lowered(widest_gaps(torch.where(inside, cost, 0.0), largest=largest), way)
        return inside & (cost > bar[..., None]), bar

    def _narrowest(self, cost: Float[Tensor, "*draw pair"]) -> Float[Tensor, "*draw"]:
        return narrowest(self.pair_source, self.pair_target, cost, ranks=self.ranks, start=0, end=len(self.ranks) - 1)

    def stability(
        self, pairs: Float[Tensor, " fold"], node_cost: Float[Tensor, "fold node"], generator: torch.Generator
    ) -> Float[Tensor, " pair"]:
        """The share of bootstrap resamples of the folds in which a pair is chosen; all at once, a few where edges are
        many."""
        draws = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=generator)
        times = torch.zeros(RESAMPLES, len(pairs), dtype=torch.float64)
        times.scatter_add_(1, draws, torch.ones_like(times))
        times = times[times @ pairs.double() > 0]
        chosen = torch.zeros(self.judged.shape[1], dtype=torch.float64)
        for some in times.split(max(1, ROOM // max(self.judged.shape[1], 1))):
            seen = (some @ pairs.double())[:, None]
            costs = (some @ self.judged.double() / seen, some @ node_cost.double() / seen)
            chosen += self.choose(*costs)[0].double().sum(0)
        return chosen / RESAMPLES
