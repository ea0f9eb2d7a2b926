"""Many processes: Grams add up over ranks, targets are split over ranks, and the answer is that of one process.

Collection is data-parallel: every rank adds up the moments of its own samples and `all_reduce_moments` sums them. The
solve shares nothing but the Gram: each rank takes every world-th target and the columns are gathered. Works with gloo
and nccl under torchrun; without an initialised process group everything is local.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.sharing import ALONE, Ranks, as_ranks
from tl_circuitlasso.solve.base import Solution, Status
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.lasso import Strength, lasso
from tl_circuitlasso.solve.pairs import PairSums
from tl_circuitlasso.solve.path import Moments
from tl_circuitlasso.solve.penalties import L1

ROWS = 1024  # of the Gram that travel at once


def all_reduce_moments(data: Moments) -> Moments:
    """The moments of the samples of all ranks, on every rank (each rank's must be centred by one common mean).

    >>> own = Moments(torch.eye(2), torch.ones(2, 1), torch.ones(1), 10.0)
    >>> all_reduce_moments(own).count  # in a process group the samples of all; here there is one process
    10.0
    """
    ranks = _ranks()
    if ranks.size == 1:
        return data
    count = float(ranks.sum(torch.tensor(float(data.count), dtype=torch.float64)))
    parts = (data.gram, data.cross, data.target_sq_norm)
    gram, cross, square = (ranks.sum(matrix.double() * data.count) / count for matrix in parts)
    return Moments(gram, cross, square, count)


def scatter_sums(sums: PairSums, ranks: Ranks) -> PairSums:
    """The sums over the samples of all processes: X'X on each, what is of a target on the process to which it falls
    (`Ranks.dealt`), so that X'Y takes p T / N numbers each. Consumes `sums`; who drops them has their X'Y back.

    Of X'X only the upper triangle travels, in strips, so that no second matrix of its size is needed.

    >>> own = PairSums.empty(2, 3).add(torch.eye(2), torch.ones(2, 3))
    >>> scatter_sums(own, Ranks()).cross.shape  # a process of one has every target; each of N has a share of them
    torch.Size([2, 3])
    """
    if ranks.size == 1:
        return sums
    for tensor in (sums.sums, sums.target_sums, sums.target_squares):
        ranks.add_up(tensor)
    mine = ranks.dealt(sums.cross.shape[1]).to(sums.cross.device)
    cross = _scattered(sums.cross, ranks)
    for start in range(0, len(sums.upper), ROWS):
        block = sums.upper[start : start + ROWS, start:]
        total = block.contiguous()
        ranks.add_up(total)
        block.copy_(total)
    own = {"target_sums": sums.target_sums[mine], "target_squares": sums.target_squares[mine]}
    return replace(sums, count=ranks.count(sums.count), cross=cross, **own)


def _scattered(cross: Float[Tensor, "source target"], ranks: Ranks) -> Float[Tensor, "source mine"]:
    """The sum over processes of the targets that fall to this one; those of the others travel one by one."""
    own = cross[:, :0]
    for owner in range(ranks.size):
        columns = replace(ranks, rank=owner).dealt(cross.shape[1]).to(cross.device)
        part = cross[:, columns]
        ranks.sum_to(owner, part)
        own = part if owner == ranks.rank else own
    return own


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

    Raises
    ------
    InputError, SolveError: as `lasso` does. CircuitLassoError: another rank failed.

    >>> cross = torch.tensor([[0.8], [0.1]])
    >>> lasso_sharded(torch.eye(2), cross, target_sq_norm=torch.ones(1), strength=0.5).value.flatten().tolist()
    [0.4..., 0.0]
    """
    ranks = _ranks()
    if ranks.size == 1:
        return lasso(
            gram, cross, target_sq_norm=target_sq_norm, strength=strength, penalty=penalty, init=init, **options
        )
    columns = my_targets(cross.shape[1], penalty)
    level = torch.as_tensor(strength)
    with ranks.together():
        if penalty is not None:
            penalty.check(*cross.shape)  # before it is taken apart
        mine = lasso(
            gram,
            cross[:, columns],
            target_sq_norm=target_sq_norm[columns],
            strength=level if level.ndim == 0 else level[columns],
            penalty=None if penalty is None else penalty.restrict(None, columns),
            init=None if init is None else init[:, columns],
            **options,
        )
        return _side_by_side(mine, columns, ranks)


def my_targets(targets: int, penalty: L1 | Group | None = None) -> Int[Tensor, " mine"]:
    """The targets of this rank: every world-th target, or target group."""
    ranks = _ranks()
    groups = penalty.target_groups if isinstance(penalty, Group) else torch.arange(targets)
    return (groups % ranks.size == ranks.rank).nonzero()[:, 0]


def packed(solution: Solution) -> dict[str, Tensor]:
    """A solution as tensors by name; of its stats, tensors only."""
    status = torch.tensor(list(Status).index(solution.status))
    plain = {"value": solution.value, "gap": solution.gap, "converged": solution.converged, "status": status}
    return plain | {f"stats.{name}": x for name, x in solution.stats.items() if isinstance(x, Tensor)}


def unpacked(tensors: Mapping[str, Tensor]) -> Solution:
    """What `packed` was given."""
    stats = {name.removeprefix("stats."): x for name, x in tensors.items() if name.startswith("stats.")}
    status = list(Status)[int(tensors["status"])]
    return Solution(tensors["value"], tensors["gap"], tensors["converged"], status, stats)


def _side_by_side(mine: Solution, columns: Int[Tensor, " mine"], ranks: Ranks) -> Solution:
    """One solution from the columns that every process has solved."""
    parts = [(part.pop("columns"), unpacked(part)) for part in ranks.gather(packed(mine) | {"columns": columns})]
    order = torch.cat([own for own, _ in parts]).argsort()
    solutions = [solution for _, solution in parts]
    per_target = ("strength", "strength_max", "iterations", "dead_targets")
    device = mine.value.device
    whole = {name: torch.cat([one.stats[name] for one in solutions])[order].to(device) for name in per_target}
    return replace(
        mine,
        value=torch.cat([one.value for one in solutions], dim=1)[:, order].to(device),
        gap=torch.cat([one.gap for one in solutions])[order].to(device),
        converged=torch.cat([one.converged for one in solutions])[order].to(device),
        status=max((one.status for one in solutions), key=list(Status).index),
        stats={**mine.stats, **whole},
    )


def _ranks() -> Ranks:
    """The default process group where there is one."""
    return as_ranks("world") if dist.is_available() and dist.is_initialized() else ALONE
