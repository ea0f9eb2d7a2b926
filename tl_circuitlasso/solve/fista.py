"""Accelerated proximal gradient with restart and column compaction: any loss, any penalty, anywhere torch runs.

Beck & Teboulle 2009; the restart test is O'Donoghue & Candes 2015 (section 3.2, gradient scheme), applied to each
problem by itself. Targets that reach the tolerance leave the iteration, so the last few don't pay for all the others.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import fair_start, relative_gap

CHECK_EVERY = 10  # steps between two certificates: a certificate costs about as much as a step


@dataclass(frozen=True)
class Fista(AbstractSolver):
    """FISTA with a restart per problem; `max_iter` bounds the steps."""

    max_iter: int = 20_000

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if loss.intercepted:
            raise InputError("`solver` Fista doesn't move an intercept: use `ProxNewton`, or pass intercept=False")
        nothing = torch.zeros(loss.shape, dtype=strength.dtype, device=strength.device)
        value = nothing if init is None else fair_start(loss, penalty, init, strength)
        gap = relative_gap(loss, penalty, value, strength)
        iterations = torch.zeros(loss.shape[1], dtype=torch.long, device=strength.device)
        bound, spent = loss.curvature(), 0
        todo = (~(gap <= tol)).nonzero()[:, 0]
        while len(todo) and spent < self.max_iter:
            whole = len(todo) == loss.shape[1]
            part = (loss, penalty) if whole else (loss.restrict(None, todo), penalty.restrict(None, todo))
            state, best = _start(value[:, todo]), gap[todo]
            steps = 0
            while spent + steps < self.max_iter:
                for _ in range(CHECK_EVERY):
                    state = _step(*part, strength[todo], 1 / bound, state)
                steps += CHECK_EVERY
                current = relative_gap(*part, state[0], strength[todo])
                if bool((current > 1e3 * best.clamp(min=tol)).any()) or not bool(torch.isfinite(current).all()):
                    bound, state = 2 * bound, _start(value[:, todo])  # the curvature bound was too low: start again
                    continue
                best = torch.minimum(best, current)
                if bool((current <= tol).sum() * 4 >= len(todo)) or bool((current <= tol).all()):
                    break  # worth the copy: compact
            spent += steps
            value[:, todo], gap[todo] = state[0], current
            iterations[todo] += steps
            todo = todo[~(current <= tol)]
        return Answer(value, gap, iterations)


_State = tuple[Tensor, Tensor, Tensor]  # current point, previous point, momentum counter of each target


def _start(value: Float[Tensor, "source target"]) -> _State:
    return value, value, torch.ones(value.shape[1], dtype=value.dtype, device=value.device)


def _step(
    loss: AbstractLoss,
    penalty: AbstractPenalty,
    strength: Float[Tensor, " target"],
    step: float,
    state: _State,
) -> _State:
    value, previous, momentum = state
    grown = 0.5 * (1 + (1 + 4 * momentum.square()).sqrt())
    ahead = value + (momentum - 1) / grown * (value - previous)
    moved = penalty.prox(ahead + step * loss.negative_gradient(ahead), step, strength)
    uphill = _summed(((ahead - moved) * (moved - value)).sum(0), penalty) > 0
    return moved, value, torch.where(uphill, 1.0, grown)


def _summed(figures: Float[Tensor, " target"], penalty: AbstractPenalty) -> Float[Tensor, " target"]:
    coupled = penalty.coupled()
    if coupled is None:
        return figures
    return figures.new_zeros(int(coupled.max()) + 1).index_add_(0, coupled, figures)[coupled]
