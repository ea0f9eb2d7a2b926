"""The solver for small problems with elementwise penalties: plain coordinate descent, and the same certificates.

Where coefficients are few, working sets and Newton steps save milliseconds, and compiling them takes seconds. Here the
one kernel is small, so that the first call on a machine answers soon; what it doesn't finish goes on in `WorkingSet`.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import fair_start, relative_gap
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like
from tl_circuitlasso.solve.working_set import WorkingSet

FIRST = 32  # sweeps before the first certificate; each of the next has twice as many before it
ROUNDS = 5  # certificates before the targets that are left go on with Newton steps: a thousand sweeps
STILL = 1e-14  # a step, in units in which sources and targets have size 1, that is rounding


@dataclass(frozen=True)
class Sweeps(AbstractSolver):
    """Coordinate descent over all sources of each target (numba); `beyond` takes those that sweeps don't finish.

    Sources that are nearly copies of each other need more sweeps than are worth while: they are solved by `beyond`.
    """

    beyond: WorkingSet = field(default_factory=WorkingSet)

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(loss, QuadraticGram) or not isinstance(penalty, L1):
            raise InputError("`Sweeps` needs a Gram and an elementwise penalty: use solver='auto' or 'fista'")
        value = torch.zeros_like(loss.cross) if init is None else fair_start(loss, penalty, init, strength)
        rounds = torch.zeros(len(strength), dtype=torch.long)
        pull = loss.negative_gradient(value)
        gap = relative_gap(loss, penalty, value, strength, pull)
        for number in range(min(ROUNDS, self.beyond.max_iter)):
            todo = (gap > tol).nonzero()[:, 0]
            if not len(todo):
                return Answer(value, gap, rounds, False)
            part, shape, level = loss.restrict(None, todo), penalty.restrict(None, todo), strength[todo]
            value[:, todo] = _swept(part, shape, level, value[:, todo], pull[:, todo], FIRST << number)
            pull[:, todo] = part.negative_gradient(value[:, todo])
            gap[todo] = relative_gap(part, shape, value[:, todo], level, pull[:, todo])
            rounds[todo] += 1
        return self._beyond(loss, penalty, strength, tol, Answer(value, gap, rounds, False))

    def _beyond(
        self, loss: QuadraticGram, penalty: L1, strength: Float[Tensor, " target"], tol: float, so_far: Answer
    ) -> Answer:
        """The answer with the targets above the tolerance improved by `beyond`."""
        todo = (so_far.gap > tol).nonzero()[:, 0]
        left = self.beyond.max_iter - int(so_far.iterations.max())
        if not len(todo) or left <= 0:
            return so_far
        value, gap, rounds = so_far.value, so_far.gap, so_far.iterations
        part, shape, start = loss.restrict(None, todo), penalty.restrict(None, todo), value[:, todo]
        more = replace(self.beyond, max_iter=left).solve(part, shape, strength[todo], tol=tol, init=start)
        value[:, todo], gap[todo] = more.value, more.gap
        rounds[todo] += more.iterations
        return Answer(value, gap, rounds, more.stalled)


def _swept(
    loss: QuadraticGram,
    penalty: L1,
    strength: Float[Tensor, " target"],
    value: Float[Tensor, "source target"],
    pull: Float[Tensor, "source target"],
    sweeps: int,
) -> Float[Tensor, "source target"]:
    """The coefficients after some sweeps."""
    from tl_circuitlasso.solve.sweep_kernels import sweep_whole

    weight, ridge = penalty.weight(value), penalty.ridge(strength)
    cut = torch.where(torch.isinf(weight), torch.inf, strength * weight)
    upper = entries_like(torch.inf if penalty.upper is None else penalty.upper, value)
    entries = (value, pull, cut, torch.zeros_like(value) if ridge is None else ridge, upper)
    coef, *others = (entry.expand_as(value).T.clone(memory_format=torch.contiguous_format).numpy() for entry in entries)
    sweep_whole(loss.gram.contiguous().numpy(), coef, *others, penalty.non_negative, STILL, sweeps)
    return torch.from_numpy(coef).T
