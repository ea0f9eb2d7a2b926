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
