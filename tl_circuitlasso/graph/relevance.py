"""From local edges to a circuit for the target: relevance flows backwards from it.

A regression says what feeds what; whether that matters for the behaviour is another question. With share(u -> v) the
part of v that u explains, and rel(target) = 1,

    score(u -> v) = share(u -> v) rel(v),      rel(u) = max over children v of score(u -> v).

>>> import torch
>>> source, target = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
>>> propagate(source, target, torch.tensor([.5, .2, .8]), ranks=torch.tensor([0, 1, 2]), roots=torch.tensor([2]))
tensor([0.4000, 0.2000, 0.8000], dtype=torch.float64)
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bound(
    source: Int[Tensor, " edge"],
    target: Int[Tensor, " edge"],
    cost: Float[Tensor, "*draw edge"],
    *,
    ranks: Int[Tensor, " node"],
    roots: Int[Tensor, " root"],
) -> tuple[Float[Tensor, "*draw edge"], Float[Tensor, "*draw node"]]:
    """No edge can cost more than all that its child passes on:

        c(u -> v) = min(cost(u -> v), r(v)),    r(v) = sum over children w of c(v -> w),    r(target) = infinity.

    What straight lines extrapolate grows with depth; this is what keeps a deep edge from looking costlier than the
    narrow way through which it acts. Returns c and r, for each of several draws of the costs if there are several.

    >>> source, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    >>> bound(source, target, torch.tensor([9.0, 2.0]), ranks=torch.tensor([0, 1, 2]), roots=torch.tensor([2]))[0]
    tensor([2., 2.], dtype=torch.float64)
    """
    passed = torch.zeros(*cost.shape[:-1], ranks.numel(), dtype=torch.float64)
    passed[..., roots] = torch.inf
    bounded = cost.double().clone()
    for rows in _backwards(target, ranks):
        some = torch.minimum(bounded[..., rows], passed[..., target[rows]])
        bounded[..., rows] = some
        passed.index_add_(-1, source[rows], some)
    return bounded, passed


def narrowest(
    source: Int[Tensor, " edge"],
    target: Int[Tensor, " edge"],
    cost: Float[Tensor, "*draw edge"],
    *,
    ranks: Int[Tensor, " node"],
    start: int,
    end: int,
) -> Float[Tensor, "*draw"]:
    """The cost of the cheapest edge on the best path from `start` to `end`: any higher bar would cut every path.

    >>> source, target = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    >>> float(narrowest(source, target, torch.tensor([5., 1., 3.]), ranks=torch.tensor([0, 1, 2]), start=0, end=2))
    3.0
    """
    best = torch.zeros(*cost.shape[:-1], ranks.numel(), dtype=torch.float64)
    best[..., end] = torch.inf
    for rows in _backwards(target, ranks):
        through = torch.minimum(cost[..., rows].double(), best[..., target[rows]])
        best.scatter_reduce_(-1, source[rows].expand_as(through), through, reduce="amax")
    return best[..., start]


def propagate(
    source: Int[Tensor, " edge"],
    target: Int[Tensor, " edge"],
    share: Float[Tensor, " edge"],
    *,
    ranks: Int[Tensor, " node"],
    roots: Int[Tensor, " root"],
) -> Float[Tensor, " edge"]:
    """score(u -> v) = share(u -> v) rel(v) for every edge; `roots` are the nodes of relevance 1 (the target's)."""
    relevance = torch.zeros(ranks.numel(), dtype=torch.float64)
    relevance[roots] = 1.0
    score = torch.zeros(share.numel(), dtype=torch.float64)
    for rows in _backwards(target, ranks):
        score[rows] = share[rows].abs().double() * relevance[target[rows]]
        relevance.scatter_reduce_(0, source[rows], score[rows], reduce="amax")
    return score


def _backwards(target: Int[Tensor, " edge"], ranks: Int[Tensor, " node"]) -> Iterator[Int[Tensor, " some"]]:
    """The edges by rank of what they feed, the last first."""
    rank = ranks[target]
    _, counts = rank.unique(return_counts=True)
    yield from reversed(rank.argsort(stable=True).split(counts.tolist()))
