"""Where costs have no gap: a circuit of as many edges as the regression weighs, or as many more as carry enough."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.discover.choice import Edges
from tl_circuitlasso.discover.garrote import Child, aligned
from tl_circuitlasso.graph import selection

ENOUGH = 0.8  # of the target's difference: what a circuit is to carry
# Of its size, what an edge is worth that works as much against its child as for it: less, where circuits of the
# regression's size don't carry enough. The more edges that work against each other are left out, the more a circuit
# carries, beyond what the model does at last; so no less than it takes.
UNALIGNED = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.0)
AT_RANDOM = UNALIGNED[:3]  # alignments between prompts that differ in much that is idle are told less well
FEWEST_ROWS = 4  # below, rows aren't halved


@dataclass(frozen=True, eq=False)
class Grown:
    """A circuit; which share of its size each edge is worth; and the share of the target's difference that the circuit
    is expected to carry, between counterparts on prompts that it wasn't chosen by."""

    kept: Bool[Tensor, " edge"]
    worth: Float[Tensor, " edge"]
    carried: float


def grown(
    edges: Edges, found: list[Child], size: Float[Tensor, " edge"], count: int, *, contrast: bool = True
) -> Grown:
    """`count` pairs of components, grown back from the target by value = size (w + (1 - w) alignment).

    w is the largest of `UNALIGNED` by which they are expected to carry `ENOUGH`; where none does, as few more pairs as
    do, to within a twentieth. What is expected of counterparts (`contrast`) is cross-fitted: edges are chosen by the
    alignment in one half of the rows and their shares taken from the other, since the best alignments are partly luck.
    Half of the rows say too little between random partners; there w stays high instead.

    Sizes and alignments hardly change with the prompts, weights of parents that work alike do: so the regression says
    how many edges make the circuit, and which ones is said by how much they do and how far they do it for their child.
    By size alone as many edges that work against each other would come in, and the circuit would carry less.
    """
    ends = selection.Edges(edges.source, edges.target, edges.ranks)
    weights, splits = (UNALIGNED, _splits(found)) if contrast else (AT_RANDOM, [(found, found)])
    judged = [(aligned(one), other, edges.shares(other)) for one, other in splits]
    whole = aligned(found)

    def worth(unaligned: float, alignment: Tensor) -> Tensor:
        return unaligned + (1 - unaligned) * alignment

    def circuits(unaligned: float, alignment: Tensor) -> Callable[[int], Tensor]:
        order = selection.grown(ends, size * worth(unaligned, alignment))
        return selection.circuits(ends, order, edges.pair)

    @cache
    def of_split(unaligned: float, number: int) -> Callable[[int], Tensor]:
        return circuits(unaligned, judged[number][0])

    @cache
    def carried(unaligned: float, pairs: int) -> float:
        parts = [
            edges.carried(other, shares, of_split(unaligned, number)(pairs))
            for number, (_, other, shares) in enumerate(judged)
        ]
        return sum(parts) / len(parts)

    least = max(count, 1)
    unaligned = weights[_first(len(weights) - 1, lambda number: carried(weights[number], least) >= ENOUGH)]
    most = int(edges.pair.max()) + 1  # all carry everything
    pairs = _fewest(least, most, lambda some: carried(unaligned, some) >= ENOUGH)
    return Grown(circuits(unaligned, whole)(pairs), worth(unaligned, whole), carried(unaligned, pairs))


def _splits(found: list[Child]) -> list[tuple[list[Child], list[Child]]]:
    """Rows to choose by and rows to judge by: either half of all by the other."""
    rows = len(found[0].rows)
    if rows < FEWEST_ROWS:
        return [(found, found)]
    middle = rows // 2
    parts = slice(middle), slice(middle, None)
    first, second = ([replace(one, rows=one.rows[part]) for one in found] for part in parts)
    return [(first, second), (second, first)]


def _first(last: int, enough: Callable[[int], bool]) -> int:
    """The first number from 0 on that is enough, where all after it are, too; `last` where none is."""
    if enough(0):
        return 0
    if not enough(last):
        return last
    return bisect_left(range(last), True, lo=1, key=enough)


def _fewest(least: int, most: int, enough: Callable[[int], bool]) -> int:
    """The smallest number from `least` on that is enough, to within a twentieth; `most` is."""
    if enough(least):
        return least
    low, high = least, most  # low isn't enough, high is
    while high - low > max(1, low // 20):
        middle = (low + high) // 2 if high < 4 * low else 2 * low
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
