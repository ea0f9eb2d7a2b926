"""Proximal Newton with a working set: the solver of classification targets.

    repeat:  certify;  working set = support + worst violators;  H = Hessian on it
             coordinate descent on  1/2 d'Hd - pull'd + lambda * penalty(a + d);  backtracking on the true objective

The inner problem is the Lasso of `kernels.descend`. Lee, Sun & Saunders 2014; Yuan, Ho & Lin 2012 (newGLMNET).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import duality_gap, fair_start
from tl_circuitlasso.solve.likelihoods import AbstractLikelihood
from tl_circuitlasso.solve.penalties import L1, entries_like
from tl_circuitlasso.solve.torch_set import sweep_torch
from tl_circuitlasso.solve.working_set import compiled

SWEEPS = 1000
NOTHING = 1e-12  # nats: labels that are all alike leave nothing to explain
INNER = 1e-3  # share of the gap asked of the model: its own gap, without data, is far too kind to a poor fit
ROUGH_STEPS = 10  # the first ones, with a Hessian in single precision: what it is off by, the next step makes good
ROUGH_DOWN_TO = 1e-6  # relative gap from which the Hessian is in double precision


@dataclass(frozen=True)
class ProxNewton(AbstractSolver):
    """Second-order steps on a working set, for likelihoods with an elementwise penalty; `max_iter` bounds the steps."""

    max_iter: int = 100
    least: int = 32

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(loss, AbstractLikelihood) or not isinstance(penalty, L1):
            raise InputError("`ProxNewton` needs a likelihood and an elementwise penalty: use `Fista` for others")
        value = torch.zeros(loss.shape, dtype=strength.dtype, device=strength.device)
        if init is not None:
            value = fair_start(loss.centre(loss.margins(init)), penalty, init, strength)
        margins, null = loss.margins(value), float(loss.null_objective())
        if null <= NOTHING:
            nothing = torch.zeros_like(value)
            return Answer(nothing, torch.zeros_like(strength), torch.zeros(1, dtype=torch.long, device=value.device))
        step, stalled, rough = 0, False, True
        for step in range(self.max_iter + 1):
            loss = loss.centre(margins).knowing(value, margins)
            pull = loss.negative_gradient(value)
            gap = float(duality_gap(loss, penalty, value, strength, pull))
            if gap <= tol * null or step == self.max_iter or (stalled and not rough):
                break
            rough = rough and step < ROUGH_STEPS and gap > ROUGH_DOWN_TO * null and not stalled
            rows = self._choose(penalty, value, pull, strength)
            moved = _newton_point(loss, penalty, value, pull, margins, strength, rows, INNER * min(gap, null), rough)
            value, margins, stalled = _backtrack(loss, penalty, value, moved, pull, margins, strength)
        relative = torch.full_like(strength, gap / null if null > 0 else 0.0)
        return Answer(value, relative, torch.full((1,), step, device=value.device), stalled)

    def _choose(
        self,
        penalty: L1,
        value: Float[Tensor, "source 1"],
        pull: Float[Tensor, "source 1"],
        strength: Float[Tensor, " 1"],
    ) -> Int[Tensor, " kept"]:
        weight = penalty.weight(value)
        over = (pull if penalty.non_negative else pull.abs()) / weight - strength
        if penalty.upper is not None:
            over = torch.where(entries_like(penalty.upper, value) > 0, over, -torch.inf)
        rank = torch.where(value != 0, torch.inf, over)[:, 0]
        support = int((value != 0).sum())
        room = min(max(self.least, 4 * support + 16), int((rank > 0).sum()))
        return rank.topk(max(room, 1)).indices.sort().values


def _newton_point(
    loss: AbstractLikelihood,
    penalty: L1,
    value: Float[Tensor, "source 1"],
    pull: Float[Tensor, "source 1"],
    margins: Tensor,
    strength: Float[Tensor, " 1"],
    rows: Int[Tensor, " kept"],
    goal: float,
    rough: bool,
) -> Float[Tensor, "source 1"]:
    """The minimiser of the quadratic model plus penalty over `rows`."""
    hessian = loss.hessian(margins, rows, torch.float32 if rough else torch.float64)
    size = hessian.diagonal().clamp(min=0).sqrt()
    flat = size <= 1e-12 * size.max()  # no curvature: nothing to learn about it here
    size = torch.where(flat, 1.0, size)
    hessian = hessian / size[:, None] / size
    hessian.diagonal().add_(1e-6 if rough else 1e-10)  # above rounding: copies of one source stay well-posed
    mine, like = penalty.restrict(rows, None), value[rows]
    weight = mine.weight(like) / size[:, None]
    weight = torch.where(flat[:, None], torch.inf, weight)
    ridge = mine.ridge(strength)
    ridge = torch.zeros_like(like) if ridge is None else ridge.expand_as(like) / size.square()[:, None]
    upper = entries_like(torch.inf if mine.upper is None else mine.upper, like) * size[:, None]
    coef, residual = like * size[:, None], pull[rows] / size[:, None]
    fit = _descend(hessian, coef, residual, weight, ridge, upper.expand_as(like), strength, penalty.non_negative, goal)
    moved = fit / size[:, None]
    if mine.upper is not None:
        moved = mine.prox(moved, 0.0, strength)  # back into bounds that rescaling may have rounded over
    return value.index_copy(0, rows, torch.where(flat[:, None], like, moved))


def _descend(
    gram: Float[Tensor, "kept kept"],
    coef: Float[Tensor, "kept 1"],
    pull: Float[Tensor, "kept 1"],
    weight: Float[Tensor, "kept 1"],
    ridge: Float[Tensor, "kept 1"],
    upper: Float[Tensor, "kept 1"],
    strength: Float[Tensor, " 1"],
    non_negative: bool,
    goal: float,
) -> Float[Tensor, "kept 1"]:
    """Coordinate descent on one small unit-diagonal problem, compiled on a CPU."""
    if gram.device.type != "cpu":
        cut = torch.where(torch.isinf(weight), torch.inf, strength * weight)
        coef, pull, cut, ridge, upper = (entry.T.contiguous() for entry in (coef, pull, cut, ridge, upper))
        return sweep_torch(gram[None], coef, pull, cut, ridge, upper, non_negative, SWEEPS).T
    cross, fixed = pull + gram @ coef, torch.isinf(weight[:, 0])
    work = (~fixed).nonzero()[:, 0].numpy()
    arrays = [np.ascontiguousarray(entry[:, 0].numpy()) for entry in (cross, coef, pull, weight, ridge, upper)]
    arrays[1] = arrays[1].copy()
    # a square of 0 turns the gap into the complementarity gap: the model has no data of its own
    compiled().descend(
        gram.contiguous().numpy(), work, len(work), *arrays, 0.0, float(strength), non_negative, goal, SWEEPS
    )
    return torch.from_numpy(arrays[1])[:, None]


def _backtrack(
    loss: AbstractLikelihood,
    penalty: L1,
    value: Float[Tensor, "source 1"],
    moved: Float[Tensor, "source 1"],
    pull: Float[Tensor, "source 1"],
    margins: Tensor,
    strength: Float[Tensor, " 1"],
) -> tuple[Float[Tensor, "source 1"], Tensor, bool]:
    """The longest of 1, 1/2, 1/4, ... that lowers the objective by a share of what the model promises."""
    change, ahead = moved - value, moved
    shift = loss.margins(change)
    size, ahead_size = float(penalty.value(value, strength)), float(penalty.value(moved, strength))
    promised = ahead_size - size - float((pull * change).sum())
    now, share = float(loss.at(margins)) + size, 1.0
    for _ in range(30):
        if share < 1:
            ahead = value + share * change
            ahead_size = float(penalty.value(ahead, strength))
        reached = margins + share * shift
        total = float(loss.centre(reached).at(reached)) + ahead_size
        if total <= now + 0.01 * share * promised:
            return ahead, reached, False
        share /= 2
    return value, margins, True
