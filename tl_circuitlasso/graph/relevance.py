"""From local edges to a circuit for the target: relevance flows backwards from it.

A regression says what feeds what; whether that matters for the behaviour is another question. With share(u -> v) the
part of v that u explains, and rel(target) = 1,

    score(u -> v) = share(u -> v) rel(v),      rel(u) = max over children v of score(u -> v).

>>> import torch
>>> source, target = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
>>> propagate(source, target, torch.tensor([.5, .2, .8]), ranks=torch.tensor([0, 1, 2]), roots=torch.tensor([2]))
tensor([0.4000, 0.2000, 0.8000], dtype=torch.float64)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bound(
    source: Int[Tensor, " edge"],
    target: Int[Tensor, " edge"],
    cost: Float[Tensor, " edge"],
    *,
    ranks: Int[Tensor, " node"],
    roots: Int[Tensor, " root"],
) -> tuple[Float[Tensor, " edge"], Float[Tensor, " node"]]:
    """No edge can cost more than all that its child passes on:

        c(u -> v) = min(cost(u -> v), r(v)),    r(v) = sum over children w of c(v -> w),    r(target) = infinity.

    What straight lines extrapolate grows with depth; this is what keeps a deep edge from looking costlier than the
    narrow way through which it acts. Returns c and r.

    >>> source, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    >>> bound(source, target, torch.tensor([9.0, 2.0]), ranks=torch.tensor([0, 1, 2]), roots=torch.tensor([2]))[0]
    tensor([2., 2.], dtype=torch.float64)
    """
    passed = torch.zeros(ranks.numel(), dtype=torch.float64)
    passed[roots] = torch.inf
    bounded = cost.double().clone()
    for rank in ranks.unique().flip(0):
        rows = (ranks[target] == rank).nonzero().flatten()
        bounded[rows] = torch.minimum(bounded[rows], passed[target[rows]])
        passed.index_add_(0, source[rows], bounded[rows])
    return bounded, passed


def narrowest(
    source: Int[Tensor, " edge"],
    target: Int[Tensor, " edge"],
    cost: Float[Tensor, " edge"],
    *,
    ranks: Int[Tensor, " node"],
    start: int,
    end: int,
) -> float:
    """The cost of the cheapest edge on the best path from `start` to `end`: any higher bar would cut every path.

    >>> source, target = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    >>> narrowest(source, target, torch.tensor([5.0, 1.0, 3.0]), ranks=torch.tensor([0, 1, 2]), start=0, end=2)
    3.0
    """
    best = torch.zeros(ranks.numel(), dtype=torch.float64)
    best[end] = torch.inf
    for rank in ranks.unique().flip(0):
        rows = (ranks[target] == rank).nonzero().flatten()
        through = torch.minimum(cost[rows].double(), best[target[rows]])
        best.scatter_reduce_(0, source[rows], through, reduce="amax")
    return float(best[start])


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
    for rank in ranks.unique().flip(0):
        rows = (ranks[target] == rank).nonzero().flatten()
        score[rows] = share[rows].abs().double() * relevance[target[rows]]
        relevance.scatter_reduce_(0, source[rows], score[rows], reduce="amax")
    return score
