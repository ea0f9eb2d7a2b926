"""From scores to a circuit of k edges, all of them on a path from a root to the target.

Three ways to choose, all on plain tensors. `ranked` and `grown` put the edges in an order, by score, or as the circuit
grows back from the target; `first` takes the k that come first without leaving one hanging; `optimum` asks an integer
programme for the best k. Roots are nodes that no edge feeds (`input`), sinks nodes that feed no edge (`logits`).

>>> import torch
>>> edges = Edges(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 3, 3]), torch.tensor([0, 1, 1, 2]))
>>> score = torch.tensor([.9, .5, .1, .6])             # 0 -> 1 -> 3 has the strongest edge, but 0 -> 2 -> 3 is the way
>>> for how in HOW:
...     print(how, choose(edges, score, 2, how).tolist())
top [False, True, False, True]
greedy [False, True, False, True]
milp [False, True, False, True]
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack
from torch import Tensor

from tl_circuitlasso.errors import InputError, SolveError

HOW = ("top", "greedy", "milp")
MOST_FOR_MILP = 20_000  # edges: beyond, the integer programme takes minutes and greedy is as good
SECONDS = 120.0  # that the integer programme may take


@dataclass(frozen=True, eq=False)
class Edges:
    """The ends of candidate edges, as positions, and each node's rank in the order of computation."""

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    ranks: Int[Tensor, " node"]

    def __len__(self) -> int:
        return self.source.numel()

    @cached_property
    def roots(self) -> Bool[Tensor, " node"]:
        """Nodes that no edge feeds."""
        return ~self._touched(self.target)

    @cached_property
    def sinks(self) -> Bool[Tensor, " node"]:
        """Nodes that feed no edge."""
        return ~self._touched(self.source)

    @cached_property
    def pairs(self) -> Int[Tensor, " edge"]:
        """A number for each pair of ends: the ports of an edge share it."""
        return self.source * self.ranks.numel() + self.target

    def _touched(self, ends: Int[Tensor, " edge"]) -> Bool[Tensor, " node"]:
        return torch.zeros(self.ranks.numel(), dtype=torch.bool).index_fill(0, ends, True)

    @cached_property
    def by_source(self) -> tuple[Int[Tensor, " some"], ...]:
        """The edges in groups of equal rank of their source, ascending."""
        return self._by_rank(self.source)

    @cached_property
    def by_target(self) -> tuple[Int[Tensor, " some"], ...]:
        """The edges in groups of equal rank of their target, ascending."""
        return self._by_rank(self.target)

    def _by_rank(self, ends: Int[Tensor, " edge"]) -> tuple[Int[Tensor, " some"], ...]:
        rank = self.ranks[ends]
        _, counts = rank.unique(return_counts=True)
        return rank.argsort(stable=True).split(counts.tolist())


# ---- orders ---------------------------------------------------------------------------------------------------------


def ranked(score: Num[Tensor, " edge"]) -> Int[Tensor, " edge"]:
    """The edges by falling score; ties go to the earlier edge."""
    return score.argsort(descending=True, stable=True)


def grown(edges: Edges, score: Num[Tensor, " edge"]) -> Int[Tensor, " some"]:
    """The edges in the order in which a circuit grows back from the sinks; those that lead to none are left out.

    Each step takes the edge of highest score among those whose target is already inside, and with it its source: so an
    edge counts only once what it feeds is known to matter. Ties go to the earlier edge.

    >>> edges = Edges(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([0, 1, 2]))
    >>> grown(edges, torch.tensor([9., 1., 3.])).tolist()             # 0 -> 1 is strongest, but 1 isn't inside at first
    [2, 0, 1]
    """
    place = torch.empty(len(edges), dtype=torch.long)
    place[ranked(score)] = torch.arange(len(edges))  # without ties, and the lower the better
    entry, bars = _entries(edges, place)
    rows = (entry[edges.target] >= 0).nonzero().flatten()
    # An edge is taken once its target is inside, before the next node that comes in by an edge of a later place.
    turn = _next_at_least(bars, entry[edges.target[rows]], place[rows])
    return rows[torch.from_numpy(np.lexsort((place[rows].numpy(), turn.numpy())))]


def _entries(edges: Edges, place: Int[Tensor, " edge"]) -> tuple[Int[Tensor, " node"], Int[Tensor, " entry"]]:
    """When each node comes in (sinks are 0, -1 is never), and the place of the edge by which nodes 1, 2, ... do."""
    rows = edges.target.argsort(stable=True)
    counts = torch.bincount(edges.target, minlength=edges.ranks.numel())
    starts, stops = (counts.cumsum(0) - counts).tolist(), counts.cumsum(0).tolist()
    source, places = edges.source[rows].numpy(), place[rows].numpy()
    entry, best = np.where(edges.sinks.numpy(), 0, -1), np.full(edges.ranks.numel(), len(edges))
    waiting: list[tuple[int, int]] = []

    def offer(node: int) -> None:
        some = slice(starts[node], stops[node])
        parents = source[some]
        before = best[parents]
        np.minimum.at(best, parents, places[some])
        better = (places[some] == best[parents]) & (best[parents] < before) & (entry[parents] < 0)
        for item in zip(places[some][better].tolist(), parents[better].tolist()):
            heapq.heappush(waiting, item)

    for sink in np.flatnonzero(entry == 0).tolist():
        offer(sink)
    bars = []
    while waiting:
        bar, node = heapq.heappop(waiting)
        if entry[node] < 0:
            bars.append(bar)
            entry[node] = len(bars)
            offer(node)
    return torch.from_numpy(entry), torch.tensor(bars, dtype=torch.long)


def _next_at_least(
    values: Int[Tensor, " value"], begin: Int[Tensor, " edge"], least: Int[Tensor, " edge"]
) -> Int[Tensor, " edge"]:
    """The first place from `begin` on whose value is at least `least`; len(values) where there is none.

    By leaps of halving length over a table of the largest value in each window of 1, 2, 4, ... places.
    """
    windows = [values]
    while (length := 2 ** len(windows)) <= values.numel():
        windows.append(torch.maximum(windows[-1][: -length // 2], windows[-1][length // 2 :]))
    at = begin.clone()
    for power, largest in reversed(list(enumerate(windows))):
        fits = (at + 2**power <= values.numel()).nonzero().flatten()
        at[fits] += (largest[at[fits]] < least[fits]) * 2**power
    return at


# ---- paths ----------------------------------------------------------------------------------------------------------


def on_path(edges: Edges, kept: Bool[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
    """The kept edges that are on a path of kept edges from a root to a sink.

    >>> edges = Edges(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    >>> on_path(edges, torch.tensor([True, False])).tolist()
    [False, False]
    """
    return levels(edges, kept.nonzero().flatten()) < len(edges)


def levels(edges: Edges, order: Int[Tensor, " some"]) -> Int[Tensor, " edge"]:
    """When each edge gets on a path: the place in `order` whose edge completes its first one.

        level(u -> v) = max(place(u -> v), F(u), B(v)),    F(v) = min over u -> v of max(place(u -> v), F(u)),

    F(root) = -1, and B likewise from the sinks up. Edges outside `order`, and those on no path, get len(edges). So the
    edges of level < n are what pruning leaves of the first n, for every n at once.
    """
    never = len(edges)
    place = torch.full((never,), never, dtype=torch.long)
    place[order] = torch.arange(order.numel())
    ahead = torch.where(edges.roots, -1, never)
    for rows in edges.by_target:
        reached = torch.maximum(place[rows], ahead[edges.source[rows]])
        ahead.scatter_reduce_(0, edges.target[rows], reached, reduce="amin")
    behind = torch.where(edges.sinks, -1, never)
    for rows in reversed(edges.by_source):
        reached = torch.maximum(place[rows], behind[edges.target[rows]])
        behind.scatter_reduce_(0, edges.source[rows], reached, reduce="amin")
    return torch.maximum(place, torch.maximum(ahead[edges.source], behind[edges.target]))


def first(
    edges: Edges, order: Int[Tensor, " some"], k: int, pairs: Int[Tensor, " edge"] | None = None
) -> Bool[Tensor, " edge"]:
    """The circuit of the first edges of `order`: at most k of them, each on a path; `circuits` tells of several k.

    Edges come in as soon as they are on a path, so one alone or several together. Where those that come next together
    are too many, the next ones between nodes that are inside fill up. With `pairs`, edges of the same number count as
    one.
    """
    return circuits(edges, order, pairs)(k)


def circuits(
    edges: Edges, order: Int[Tensor, " some"], pairs: Int[Tensor, " edge"] | None = None
) -> Callable[[int], Bool[Tensor, " edge"]]:
    """What `first` says of any k: when each edge gets on a path is found once."""
    group = torch.arange(len(edges)) if pairs is None else pairs
    level = levels(edges, order)
    by_level = level[order].argsort(stable=True)
    entering = order[by_level[level[order][by_level] < len(edges)]]
    count = _distinct_so_far(group[entering])
    together = level[entering]
    last = torch.ones_like(together, dtype=torch.bool)
    last[:-1] = together[1:] != together[:-1]  # a whole group fits if the count at its last edge does

    def circuit(k: int) -> Bool[Tensor, " edge"]:
        fits = (last & (count <= k)).nonzero().flatten()
        chosen = entering[: int(fits[-1]) + 1 if fits.numel() else 0]
        kept = torch.zeros(len(edges), dtype=torch.bool).index_fill(0, chosen, True)
        return _filled_up(edges, order, k, group, kept)

    return circuit


def _filled_up(
    edges: Edges, order: Int[Tensor, " some"], k: int, group: Int[Tensor, " edge"], kept: Bool[Tensor, " edge"]
) -> Bool[Tensor, " edge"]:
    """`kept` and the first edges of `order` between nodes that are inside, up to k groups."""
    heads = edges.roots.index_fill(0, edges.target[kept], True)
    tails = edges.sinks.index_fill(0, edges.source[kept], True)
    rows = order[(heads[edges.source] & tails[edges.target])[order]]
    rows = torch.cat([rows[kept[rows]], rows[~kept[rows]]])
    return kept.index_fill(0, rows[_distinct_so_far(group[rows]) <= k], True)


def _distinct_so_far(group: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """How many different numbers there are up to each place."""
    _, inverse = group.unique(return_inverse=True)
    place = torch.arange(group.numel())
    earliest = torch.full((group.numel(),), group.numel()).scatter_reduce(0, inverse, place, reduce="amin")
    return (earliest[inverse] == place).cumsum(0)


# ---- the optimum ----------------------------------------------------------------------------------------------------


def optimum(
    edges: Edges,
    score: Num[Tensor, " edge"],
    k: int,
    pairs: Int[Tensor, " edge"] | None = None,
    *,
    seconds: float = SECONDS,
) -> Bool[Tensor, " edge"]:
    """The circuit of at most k edges with the largest sum of scores, each edge on a path: an integer programme.

        max sum_e score_e x_e,   sum_e x_e <= k,   x_(u -> v) <= sum of x over the edges into u (but for roots),
        x_(u -> v) <= sum of x over the edges out of v (but for sinks),   x_e in {0, 1}.

    Edges only go up the ranks, so what has a kept edge before and behind it, edge by edge, is on a path. Edges of one
    number in `pairs` count as one, by the largest score of them; of a chosen one, those as strong as the weakest choice
    are kept. Solved to optimality by HiGHS (scipy's `milp`).

    Raises
    ------
    InputError: more than 20,000 edges, or negative scores.
    SolveError: no proof of optimality after `seconds`.
    """
    if bool((score < 0).any()):
        raise InputError("`score` has negative values: the optimum is one of sizes, give |score|")
    group = torch.arange(len(edges)) if pairs is None else pairs
    _, number = group.unique(return_inverse=True)
    count = int(number.max()) + 1 if len(edges) else 0
    if count > MOST_FOR_MILP:
        raise InputError(f"`how` is 'milp' for {count:,} edges: up to {MOST_FOR_MILP:,} it is quick; use 'greedy'")
    if not count or not k:
        return torch.zeros(len(edges), dtype=torch.bool)
    best = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, number, score.double(), reduce="amax")
    row = torch.zeros(count, dtype=torch.long).scatter_(0, number, torch.arange(len(edges)))
    chosen = _solved(Edges(edges.source[row], edges.target[row], edges.ranks), best, k, seconds)
    if not bool(chosen.any()):
        return torch.zeros(len(edges), dtype=torch.bool)
    kept = chosen[number] & (score.double() >= best[chosen].min())
    return _filled_up(edges, ranked(score), k, group, kept)  # edges of score 0 are all the same to the programme


def _solved(edges: Edges, score: Float[Tensor, " edge"], k: int, seconds: float) -> Bool[Tensor, " edge"]:
    n = edges.ranks.numel()
    most = csr_array(np.r_[np.ones(len(edges)), np.zeros(n)][None])
    links = _links(edges)
    gain = (score / (float(score.max()) or 1.0)).numpy()
    found = milp(
        -np.r_[gain, np.zeros(n)],
        integrality=np.r_[np.ones(len(edges)), np.zeros(n)],
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(most, -np.inf, k), LinearConstraint(links, -np.inf, 0)],
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.status or found.x is None:
        raise SolveError(f"the integer programme of {len(edges)} edges wasn't solved ({found.message}): use 'greedy'")
    return torch.from_numpy(found.x[: len(edges)] > 0.5)


def _links(edges: Edges) -> csr_array:
    """Rows that must be at most 0, with one helper y per node: x_e <= y of its ends, y <= sum of x on either side.

    As tight as a row per edge over all edges at its ends, with far fewer entries.
    """
    n, size = edges.ranks.numel(), len(edges)
    rows = []
    for ends, other, free in ((edges.source, edges.target, edges.roots), (edges.target, edges.source, edges.sinks)):
        at = csr_array((np.ones(size), (np.arange(size), ends.numpy())), shape=(size, n))
        across = csr_array((np.ones(size), (other.numpy(), np.arange(size))), shape=(n, size))
        bound = np.flatnonzero(~free[ends].numpy())
        inner = np.flatnonzero(~free.numpy())
        rows += [
            hstack([_rows_of_identity(bound, size), -at[bound]]),
            hstack([-across[inner], _rows_of_identity(inner, n)]),
        ]
    return csr_array(vstack(rows))


def _rows_of_identity(rows: np.ndarray, size: int) -> csr_array:
    return csr_array((np.ones(len(rows)), (np.arange(len(rows)), rows)), shape=(len(rows), size))


def choose(
    edges: Edges,
    score: Num[Tensor, " edge"],
    k: int,
    how: str = "top",
    pairs: Int[Tensor, " edge"] | None = None,
) -> Bool[Tensor, " edge"]:
    """The circuit of at most k edges, one of `HOW`; `score` ranks them, higher is better.

    Raises
    ------
    InputError: an unknown `how`, and as in `optimum`.
    """
    if how not in HOW:
        raise InputError(f"`how` is {how!r}: choose among {', '.join(HOW)}")
    if how == "milp":
        return optimum(edges, score, k, pairs)
    return first(edges, ranked(score) if how == "top" else grown(edges, score), k, pairs)
