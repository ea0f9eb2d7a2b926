"""Many processes: Grams add up over ranks, targets are split over ranks, and the answer is that of one process.

Collection is data-parallel: every rank adds up the moments of its own samples and `all_reduce_moments` sums them. The
solve shares nothing but the Gram: each rank takes every world-th target and the columns are gathered. Works with gloo
and nccl under torchrun; without an initialised process group everything is local.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.solve.base import Solution, Status
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.lasso import Strength, lasso
from tl_circuitlasso.solve.path import Moments
from tl_circuitlasso.solve.penalties import L1


def all_reduce_moments(data: Moments) -> Moments:
    """The moments of the samples of all ranks, on every rank (each rank's must be centred by one common mean)."""
    if not _distributed():
        return data
    count = torch.tensor([float(data.count)], dtype=torch.float64, device=data.gram.device)
    sums = [matrix.double() * count for matrix in (data.gram, data.cross, data.target_sq_norm)]
    for tensor in (*sums, count):
        dist.all_reduce(tensor)
    gram, cross, square = (tensor / count for tensor in sums)
    return Moments(gram, cross, square, float(count))


def lasso_sharded(
    gram: Float[Tensor, "source source"],
    cross: Float[Tensor, "source target"],
    *,
    target_sq_norm: Float[Tensor, " target"],
    strength: Strength,
    penalty: L1 | Group | None = None,
    init: Float[Tensor, "source target"] | None = None,
    **options: Any,
) -> Solution:
    """`lasso` with its targets split over the ranks of the default process group; every rank gets the whole answer.

    Target groups of a group penalty stay together. All ranks must call it with the same matrices.
    """
    if not _distributed():
        return lasso(
            gram, cross, target_sq_norm=target_sq_norm, strength=strength, penalty=penalty, init=init, **options
        )
    columns = my_targets(cross.shape[1], penalty)
    level = torch.as_tensor(strength)
    mine = lasso(
        gram,
        cross[:, columns],
        target_sq_norm=target_sq_norm[columns],
        strength=level if level.ndim == 0 else level[columns],
        penalty=None if penalty is None else penalty.restrict(None, columns),
        init=None if init is None else init[:, columns],
        **options,
    )
    return _gathered(mine, columns, cross.shape[1])


def my_targets(targets: int, penalty: L1 | Group | None = None) -> Tensor:
    """The targets of this rank: every world-th target, or target group."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    groups = penalty.target_groups if isinstance(penalty, Group) else torch.arange(targets)
    return (groups % world == rank).nonzero()[:, 0]


def _gathered(mine: Solution, columns: Tensor, targets: int) -> Solution:
    """Sum of zero-padded parts: every column is written by exactly one rank."""
    per_target = {name: mine.stats[name] for name in ("strength", "strength_max", "iterations", "dead_targets")}
    parts = {"gap": mine.gap, "converged": mine.converged, **per_target}
    value = mine.value.new_zeros(mine.value.shape[0], targets)
    value[:, columns] = mine.value
    dist.all_reduce(value)
    whole: dict[str, Tensor] = {}
    for name, part in parts.items():
        spread = torch.zeros(targets, dtype=torch.float64, device=part.device)
        spread[columns] = part.double()
        dist.all_reduce(spread)
        whole[name] = spread.to(part.dtype)
    codes = list(Status)
    worst = torch.tensor([codes.index(mine.status)], device=value.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    stats = {**mine.stats, **{name: whole[name] for name in per_target}}
    return replace(
        mine,
        value=value,
        gap=whole["gap"],
        converged=whole["converged"],
        status=codes[int(worst)],
        stats=stats,
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
