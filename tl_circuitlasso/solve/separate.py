"""Many small regressions, each on a design of its own, side by side: `lasso` shares one design among all targets.

A child in a graph is regressed on contributions that are its own, so its Gram is, too. One after the other a few dozen
such problems of a few dozen columns cost mostly overhead; padded to one width they are one batched matrix product.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import Solution, Status
from tl_circuitlasso.solve.fista import Fista
from tl_circuitlasso.solve.lasso import TOLERANCE, report
from tl_circuitlasso.solve.losses import ROUNDING, Quadratic
from tl_circuitlasso.solve.path import Moments
from tl_circuitlasso.solve.penalties import L1
from tl_circuitlasso.solve.problem import DEAD


@dataclass(frozen=True, eq=False)
class Separate(Quadratic):
    """f_j(a) = 1/2 a'G_j a - c_j'a + yy_j/2, a Gram per target, each with a largest eigenvalue of at most 1.

    >>> loss = Separate(torch.eye(2)[None] * 0.5, torch.tensor([[1.0], [0.0]]), torch.tensor([1.0]))
    >>> loss.negative_gradient(torch.ones(2, 1)).flatten().tolist(), loss.curvature()
    ([0.5, -0.5], 1.0)
    """

    gram: Float[Tensor, "target _source _source"]
    cross: Float[Tensor, "source target"]
    target_sq_norm: Float[Tensor, " target"]

    def negative_gradient(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        return self.cross - torch.matmul(self.gram, value.T[:, :, None])[:, :, 0].T

    def curvature(self) -> float:
        return 1.0

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "Separate":
        gram, cross, square = self.gram, self.cross, self.target_sq_norm
        if sources is not None:
            gram, cross = gram[:, sources][:, :, sources], cross[sources]
        if targets is not None:
            gram, cross, square = gram[targets], cross[:, targets], square[targets]
        return Separate(gram, cross, square)


def lassos(
    problems: Sequence[Moments],
    *,
    strength: Float[Tensor, " problem"],
    upper: float | None = None,
    tol: float = TOLERANCE,
    init: float = 0.0,
    max_iter: int = 20_000,
) -> list[Solution]:
    """Non-negative Lassos over designs of their own, one target each, every one with its proof of optimality:

        min_a  1/2 a'G_j a - c_j'a + yy_j/2 + lambda_j sum_u a_u,      0 <= a_u <= upper

    problems: moments of one target each, with any number of sources; `strength` is lambda itself. All start at `init`.
    What it returns is what `lasso(..., penalty=L1(non_negative=True, upper=upper), strength_is="absolute")` returns
    for each, but for the path to it; it pays where there are many problems of up to a few hundred sources.

    Raises InputError for a problem with several targets, and for strengths that are no number per problem or not > 0.

    >>> problem = Moments(torch.eye(2), torch.tensor([[2.0], [0.5]]), torch.tensor([5.0]), 10.0)
    >>> [s.value.flatten().tolist() for s in lassos([problem] * 2, strength=torch.tensor([1.0, 0.25]), upper=1.5)]
    [[1.0, 0.0], [1.5, 0.25]]
    """
    clock = time.perf_counter()
    _check(problems, strength)
    if not problems:
        return []
    gram, cross, square = _side_by_side(problems)
    strength = strength.to(gram)
    variance = gram.diagonal(dim1=1, dim2=2).T
    dead = variance <= DEAD * variance.amax(0)
    size = torch.where(dead, 1.0, variance).sqrt()
    gram = gram / size.T[:, :, None] / size.T[:, None, :]
    largest = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(torch.finfo(gram.dtype).tiny) * (1 + ROUNDING)
    loss = Separate(gram / largest[:, None, None], cross / size / largest, square / largest)
    bound = None if upper is None else torch.where(dead, 0.0, upper * size)
    penalty = L1(1 / size, non_negative=True, upper=bound)
    start = torch.where(dead, 0.0, init * size)
    answer = Fista(max_iter).solve(loss, penalty, strength / largest, tol=tol, init=start)
    value = (answer.value / size).clamp(min=0, max=upper)
    converged = answer.gap <= tol
    limit = L1(non_negative=True).strength_max(cross)
    stats = {"strength": strength, "strength_max": limit, "iterations": answer.iterations, "solver": "Fista"}
    stats["seconds"] = (time.perf_counter() - clock) / len(problems)
    status = Status.SOLVED if bool(converged.all()) else Status.MAX_ITERATIONS
    whole = Solution(value, answer.gap, converged, status, stats)
    report(whole, tol, strict=False)
    return [_own(whole, j, len(problem.gram)) for j, problem in enumerate(problems)]


def _own(whole: Solution, j: int, sources: int) -> Solution:
    """One problem's part of all solutions."""
    own = slice(j, j + 1)
    converged = whole.converged[own]
    status = Status.SOLVED if bool(converged) else whole.status
    stats = {name: x[own] if isinstance(x, Tensor) else x for name, x in whole.stats.items()}
    return Solution(whole.value[:sources, own], whole.gap[own], converged, status, stats)


def _side_by_side(
    problems: Sequence[Moments],
) -> tuple[Float[Tensor, "problem source source"], Float[Tensor, "source problem"], Float[Tensor, " problem"]]:
    """Gram, cross and target norms, filled up with sources that don't vary."""
    wide = max(len(problem.gram) for problem in problems)
    options = {"dtype": torch.float64, "device": problems[0].gram.device}
    gram = torch.zeros(len(problems), wide, wide, **options)
    cross = torch.zeros(wide, len(problems), **options)
    for j, problem in enumerate(problems):
        own = len(problem.gram)
        gram[j, :own, :own], cross[:own, j] = problem.gram, problem.cross[:, 0]
    return gram, cross, torch.cat([problem.target_sq_norm for problem in problems]).double()


def _check(problems: Sequence[Moments], strength: Tensor) -> None:
    for j, problem in enumerate(problems):
        if problem.cross.shape[1] != 1:
            raise InputError(f"`problems` take one target each: number {j} has {problem.cross.shape[1]}; use `lasso`")
    if strength.shape != (len(problems),) or not bool((strength > 0).all()):
        raise InputError(
            f"`strength` must be > 0, one per problem ({len(problems)},), got {tuple(strength.shape)}"
            f" and a least of {float(strength.min()) if strength.numel() else 'none'}"
        )
