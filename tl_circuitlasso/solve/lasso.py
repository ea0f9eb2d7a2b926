"""The verb over a Gram matrix: `lasso` for many targets of one design; `prepare` for many strengths of one problem."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso._checks import warn
from tl_circuitlasso.errors import InputError, SolveError
from tl_circuitlasso.solve.base import AbstractPenalty, AbstractSolver, Answer, Solution, Status
from tl_circuitlasso.solve.checkpoint import Parts, parts_of
from tl_circuitlasso.solve.fista import Fista
from tl_circuitlasso.solve.group_set import GroupSet
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.penalties import L1
from tl_circuitlasso.solve.problem import Scaled, check_matrices, explain_failure, scale
from tl_circuitlasso.solve.row_set import RowSet
from tl_circuitlasso.solve.sweeps import Sweeps
from tl_circuitlasso.solve.torch_set import TorchSet
from tl_circuitlasso.solve.unpenalised import solve_unpenalised
from tl_circuitlasso.solve.working_set import WorkingSet

log = logging.getLogger(__name__)

Strength = int | float | Tensor
StrengthIs = str  # "relative" or "absolute"; checked where it is used
ONCE = ("standardise", "names", "check")  # options that `prepare` takes
TOLERANCE = 1e-4  # of the duality gap, relative to the empty solution's objective
GROUP_SET_FROM = 1 << 13  # entries of the answer from which compiled block descent pays for its compilation
ROW_SET_FROM = 512  # sources from which a working set of rows beats plain FISTA
SWEEPS_UP_TO = 1 << 13  # entries of the answer up to which plain sweeps are as quick, and soon compiled
SWEPT_SOURCES = 1024  # at most: every sweep of `Sweeps` walks all of them


def lasso(
    gram: Float[Tensor, "source source"],
    cross: Float[Tensor, "source target"],
    *,
    target_sq_norm: Float[Tensor, " target"],
    strength: Strength,
    penalty: AbstractPenalty | None = None,
    tol: float = TOLERANCE,
    solver: str | AbstractSolver = "auto",
    max_iter: int | None = None,
    init: Float[Tensor, "source target"] | None = None,
    strict: bool = False,
    dtype: torch.dtype | None = None,
    strength_is: StrengthIs = "relative",
    standardise: bool = False,
    names: Sequence[str] | None = None,
    check: bool = True,
    checkpoint: str | Path | None = None,
) -> Solution:
    """Many regressions on one design, each with a proof of optimality:

        min_A  sum_j  1/2 a_j'G a_j - c_j'a_j + yy_j/2 + lambda_j * penalty(a_j)

    gram: X'X/M; cross: X'Y/M; target_sq_norm: the diagonal of Y'Y/M, all of centred samples. `strength` is a number or
    (target,), as a fraction of lambda_max, the smallest lambda with an empty solution (`strength_is="absolute"` gives
    lambda itself). `penalty` defaults to `L1()`. A target is done when its duality gap is at most `tol` times the
    objective of the empty solution. `standardise` penalises every source as if it had unit variance; `names` are used
    in error messages; `dtype=torch.float32` accepts single precision throughout; `check=False` skips the validation.
    `solver` is "auto", "working_set", "fista", "torch" or a solver object. The value is float64 in the caller's units.
    `checkpoint` names a folder for long solves: every thousand finished targets are stored there, and the same call,
    killed and made again, goes on behind them.

    Raises InputError for matrices that are not what they should be, SolveError with `strict` if a target missed `tol`.
    Tibshirani 1996; the solver is described in `working_set`, the certificate in `certificate`.

    >>> solution = lasso(torch.eye(2), torch.tensor([[2.0], [0.5]]), target_sq_norm=torch.tensor([5.0]), strength=0.5)
    >>> solution.value.flatten().tolist(), bool(solution.converged)
    ([1.0, 0.0], True)
    """
    problem = prepare(
        gram,
        cross,
        target_sq_norm=target_sq_norm,
        penalty=penalty,
        standardise=standardise,
        names=names,
        check=check,
    )
    solution = problem.at(
        strength,
        tol=tol,
        solver=solver,
        max_iter=max_iter,
        init=init,
        dtype=dtype,
        strength_is=strength_is,
        checkpoint=checkpoint,
    )
    report(solution, tol, strict)
    return solution


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem that is checked and scaled, once for all strengths that it will be solved at.

    penalty: as it was given; limit: lambda_max of every target in scaled units; precision: the rounding unit of the
    caller's matrices; check: whether a failure is to be explained.
    """

    scaled: Scaled
    penalty: AbstractPenalty
    limit: Float[Tensor, " target"]
    precision: float
    check: bool
    standardise: bool

    def weighed(self, penalty: L1) -> "Prepared":
        """The same matrices under another elementwise penalty; only the penalty is checked."""
        scaled, gram = self.scaled, self.scaled.loss.gram
        penalty.check(*scaled.loss.shape)
        penalty = penalty.to(gram.dtype, gram.device)
        unit = torch.ones_like(scaled.source_scale) if self.standardise else scaled.source_scale
        scaled = replace(scaled, penalty=penalty.rescale(unit, scaled.target_scale))
        limit = scaled.penalty.strength_max(scaled.loss.cross)
        return replace(self, scaled=scaled, penalty=penalty, limit=limit)

    def at(
        self,
        strength: Strength,
        *,
        tol: float = TOLERANCE,
        solver: str | AbstractSolver = "auto",
        max_iter: int | None = None,
        init: Float[Tensor, "_source _target"] | None = None,
        dtype: torch.dtype | None = None,
        strength_is: StrengthIs = "relative",
        checkpoint: str | Path | None = None,
    ) -> Solution:
        """The solution at a strength; arguments as in `lasso`."""
        clock, scaled, limit = time.perf_counter(), self.scaled, self.limit
        if not tol > 0:
            raise InputError(f"`tol` must be > 0, got {tol}")
        cross = scaled.loss.cross
        absolute = absolute_strength(strength, limit, scaled.target_scale, strength_is)
        start = None if init is None else scaled.enter(check_init(init, cross))
        chosen = choose_solver(solver, scaled.penalty, cross.shape, max_iter, dtype, tol, cross.device)
        answer = _solve_scaled(scaled, absolute, limit, chosen, tol, start, checkpoint)
        value = scaled.leave(answer.value)
        if isinstance(self.penalty, L1) and self.penalty.upper is not None:
            value = self.penalty.prox(value, 0.0, absolute)  # back into bounds that rescaling may have rounded over
        converged = answer.gap <= tol
        if self.check and not bool(converged.all()):
            explain_failure(scaled.loss, answer.value, self.precision)
        stats = {
            "strength": absolute * scaled.target_scale,
            "strength_max": limit * scaled.target_scale,
            "iterations": answer.iterations,
            "dead_sources": scaled.dead_sources,
            "dead_targets": scaled.dead_targets,
            "solver": type(chosen).__name__,
            "seconds": time.perf_counter() - clock,
        }
        return Solution(value, answer.gap, converged, _status(converged, absolute, answer), stats)


def prepare(
    gram: Float[Tensor, "_source _source"],
    cross: Float[Tensor, "_source _target"],
    *,
    target_sq_norm: Float[Tensor, " _target"],
    penalty: AbstractPenalty | None = None,
    standardise: bool = False,
    names: Sequence[str] | None = None,
    check: bool = True,
) -> Prepared:
    """What all strengths have in common: matrices checked, shapes too, and scaled; arguments as in `lasso`.

    >>> problem = prepare(torch.eye(1), torch.ones(1, 1), target_sq_norm=torch.ones(1))
    >>> [float(problem.at(strength).value) for strength in (0.75, 0.5)]
    [0.25, 0.5]
    """
    penalty = L1() if penalty is None else penalty
    precision = max(torch.finfo(t.dtype).eps for t in (gram, cross, target_sq_norm))
    _check_arguments(gram, cross, target_sq_norm)
    gram, cross, square = (matrix.detach().double() for matrix in (gram, cross, target_sq_norm))
    penalty.check(*cross.shape)
    penalty = penalty.to(torch.float64, gram.device)
    if check:
        check_matrices(gram, cross, square, names)
    scaled = scale(gram, cross, square, penalty, precision=precision, standardise=standardise, check=check)
    limit = scaled.penalty.strength_max(scaled.loss.cross)
    return Prepared(scaled, penalty, limit, precision, check, standardise)


def absolute_strength(
    strength: Strength,
    limit: Float[Tensor, " target"],
    target_scale: Float[Tensor, " target"],
    strength_is: StrengthIs,
) -> Float[Tensor, " target"]:
    """lambda of each target in scaled units."""
    level = torch.as_tensor(strength, dtype=limit.dtype, device=limit.device).detach()
    if level.shape not in {(), limit.shape}:
        raise InputError(
            f"`strength` must be a number or one per target {tuple(limit.shape)}, got {tuple(level.shape)}"
        )
    if not bool((level >= 0).all()):
        raise InputError(f"`strength` must be >= 0, got {float(level.min())}")
    if strength_is not in ("relative", "absolute"):
        raise InputError(f"`strength_is` must be 'relative' or 'absolute', got {strength_is!r}")
    return level * limit if strength_is == "relative" else level / target_scale


def choose_solver(
    solver: str | AbstractSolver,
    penalty: AbstractPenalty,
    shape: tuple[int, ...],
    max_iter: int | None,
    dtype: torch.dtype | None,
    tol: float,
    device: torch.device,
) -> AbstractSolver:
    """The solver object behind a name."""
    if isinstance(solver, AbstractSolver):
        return solver
    limit: dict[str, int] = {} if max_iter is None else {"max_iter": max_iter}
    small = solver == "auto" and shape[0] <= SWEPT_SOURCES and shape[0] * shape[1] <= SWEEPS_UP_TO
    if solver == "auto":
        solver = "working_set"
    if solver == "fista":
        return Fista(**limit)
    if solver not in ("working_set", "torch"):
        raise InputError(f"`solver` must be 'auto', 'working_set', 'fista' or 'torch', got {solver!r}")
    if isinstance(penalty, Group):
        # blocks of few columns are too small for a loop over them: all at once, the last ones compacted
        compiled = solver == "working_set" and device.type == "cpu"
        if compiled and not penalty.non_negative and shape[0] * shape[1] >= GROUP_SET_FROM:
            return GroupSet(**limit)
        wide = shape[0] >= ROW_SET_FROM and shape[1] >= 8 * (int(penalty.target_groups.max()) + 1)
        return RowSet(Fista(**limit)) if wide else Fista(**limit)
    if solver == "working_set" and device.type == "cpu":
        whole = WorkingSet(**limit, single=dtype == torch.float32)
        return Sweeps(whole) if small and not whole.single else whole
    return TorchSet(**limit)


def report(solution: Solution, tol: float, strict: bool) -> None:
    """Never a silent failure: one warning with the worst target, or SolveError."""
    if bool(solution.converged.all()):
        return
    worst = int(torch.nan_to_num(solution.gap, nan=torch.inf).argmax())
    message = (
        f"{int((~solution.converged).sum())} of {len(solution.gap)} targets missed tol={tol:g}; the worst is target"
        f" {worst} with a relative gap of {float(solution.gap[worst]):.2e} ({solution.status})"
    )
    if strict:
        raise SolveError(message)
    warn(message, RuntimeWarning)


def _solve_scaled(
    scaled: Scaled,
    strength: Float[Tensor, " target"],
    limit: Float[Tensor, " target"],
    solver: AbstractSolver,
    tol: float,
    init: Float[Tensor, "source target"] | None,
    checkpoint: str | Path | None = None,
) -> Answer:
    """Targets with lambda = 0 < lambda_max go to least squares, the others to the solver; part by part if stored."""
    if checkpoint is not None:

        def solve_part(columns: Int[Tensor, " some"]) -> Answer:
            some = replace(
                scaled, loss=scaled.loss.restrict(None, columns), penalty=scaled.penalty.restrict(None, columns)
            )
            start = None if init is None else init[:, columns]
            return _solve_scaled(some, strength[columns], limit[columns], solver, tol, start)

        parts = parts_of(len(strength), scaled.penalty.coupled())
        return Parts.of(Path(checkpoint), scaled, strength, solver, tol).answer(solve_part, parts, strength.device)
    free = (strength == 0) & (limit > 0)
    if not bool(free.any()):
        return solver.solve(scaled.loss, scaled.penalty, strength, tol=tol, init=init)
    value, stalled = torch.zeros_like(scaled.loss.cross), False
    gap, iterations = torch.zeros_like(strength), torch.zeros(len(strength), dtype=torch.long, device=strength.device)
    for part, routine in ((free, None), (~free, solver)):
        columns = part.nonzero()[:, 0]
        if not len(columns):
            continue
        loss, penalty = scaled.loss.restrict(None, columns), scaled.penalty.restrict(None, columns)
        if routine is None:
            answer = solve_unpenalised(loss, penalty)
        else:
            start = None if init is None else init[:, columns]
            answer = routine.solve(loss, penalty, strength[columns], tol=tol, init=start)
        value[:, columns], gap[columns], iterations[columns] = answer.value, answer.gap, answer.iterations
        stalled = stalled or answer.stalled
    return Answer(value, gap, iterations, stalled)


def _status(converged: Bool[Tensor, " target"], strength: Float[Tensor, " target"], answer: Answer) -> Status:
    if bool(converged.all()):
        return Status.SOLVED
    if bool((~converged & (strength == 0)).any()):
        return Status.UNCERTIFIED
    return Status.STALLED if answer.stalled else Status.MAX_ITERATIONS


def _check_arguments(gram: Tensor, cross: Tensor, target_sq_norm: Tensor) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"`gram` must be square (source, source), got {tuple(gram.shape)}")
    if cross.ndim != 2 or cross.shape[0] != gram.shape[0]:
        raise InputError(f"`cross` must be ({gram.shape[0]}, target) beside this `gram`, got {tuple(cross.shape)}")
    if target_sq_norm.shape != (cross.shape[1],):
        raise InputError(f"`target_sq_norm` must be ({cross.shape[1]},), got {tuple(target_sq_norm.shape)}")


def check_init(init: Tensor, cross: Tensor) -> Tensor:
    """The start of a solve, or InputError naming `init`."""
    if init.shape != cross.shape:
        raise InputError(f"`init` must be {tuple(cross.shape)} (source, target), got {tuple(init.shape)}")
    if not bool(torch.isfinite(init).all()):
        raise InputError("`init` holds NaN or infinite entries: leave it out to start from zero")
    return init.detach()
