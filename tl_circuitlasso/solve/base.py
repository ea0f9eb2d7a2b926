"""The values and the three contracts of the solver: loss x penalty x solver.

A **loss** is smooth and knows its gradient, a curvature bound and its dual. A **penalty** is what makes the answer
sparse and knows its proximal step, its dual ball and the strength at which the answer is empty. A **solver** lowers
`loss + strength * penalty` until the certificate, which belongs to neither, says that it is low enough.

Columns of the coefficient matrix are targets. Some problems couple columns (a group penalty over a target block,
the classes of a multinomial target): every figure "per target" is then the figure of the coupled problem, repeated
for each of its columns.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Status(enum.Enum):
    """How a solve ended; the value of a member says what to try next."""

    SOLVED = "every target reached the tolerance"
    MAX_ITERATIONS = (
        "the iterations ran out first: raise `max_iter`, loosen `tol`, raise `strength`,"
        " or pass the value back as `init`"
    )
    STALLED = (
        "no more progress at this precision: pass the matrices in float64, loosen `tol`, or look for columns that are"
        " copies of one another"
    )
    UNCERTIFIED = (
        "a strength of 0 has no usable certificate here (bounded coefficients over a singular Gram, or a likelihood):"
        " use a small positive `strength` instead"
    )

    def __str__(self) -> str:
        return f"{self.name.lower()}: {self.value}"


@dataclass(frozen=True, eq=False)
class Solution:
    """The coefficients of many regressions and the proof of how close to optimal each one is.

    value: (source, target) coefficients in the caller's units; gap: (target,) duality gap over the objective of the
    empty solution, in float64; converged: gap <= tol; status: the worst status over targets; stats: `strength`
    (absolute lambda), `strength_max`, `iterations`, `dead_sources`, `dead_targets`, `solver`, `seconds`, ...
    """

    value: Float[Tensor, "source target"]
    gap: Float[Tensor, " target"]
    converged: Bool[Tensor, " target"]
    status: Status
    stats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a solver hands back before the verb puts it into the caller's units.

    `stalled`: it stopped because nothing moved any more at its precision, not because its iterations ran out.
    """

    value: Float[Tensor, "source target"]
    gap: Float[Tensor, " target"]
    iterations: Int[Tensor, " target"]
    stalled: bool = False


class AbstractLoss(ABC):
    """A smooth convex function f(A) of the coefficients, a sum over targets (or coupled problems)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(sources, targets)."""

    @property
    def intercepted(self) -> bool:
        """Whether an unpenalised intercept has to be moved along with the coefficients."""
        return False

    @abstractmethod
    def negative_gradient(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        """-df/dA; for a quadratic loss the covariance of each source with the residual."""

    @abstractmethod
    def objective(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        """f(A) per target."""

    @abstractmethod
    def fenchel(
        self,
        value: Float[Tensor, "source target"],
        negative_gradient: Float[Tensor, "source target"],
        scale: Float[Tensor, " target"],
    ) -> Float[Tensor, " target"]:
        """f(A) + f*(s grad f) with the gradient taken at the predictions: the loss's share of the duality gap."""

    @abstractmethod
    def natural_scale(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        """The dual scale s that is best where no constraint binds."""

    @abstractmethod
    def curvature(self) -> float:
        """An upper bound of the largest eigenvalue of the Hessian of any target."""

    @abstractmethod
    def null_objective(self) -> Float[Tensor, " target"]:
        """f(0): what the relative gap is relative to."""

    @abstractmethod
    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "AbstractLoss":
        """The same loss over fewer sources (the others at 0) and fewer targets; None keeps all."""


class AbstractPenalty(ABC):
    """A convex function of the coefficients, multiplied by the strength lambda of each target."""

    @abstractmethod
    def check(self, sources: int, targets: int) -> None:
        """InputError unless the penalty fits a (sources, targets) problem and its weights make sense."""

    @abstractmethod
    def value(
        self, coef: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """lambda * penalty(A) per target."""

    @abstractmethod
    def prox(
        self,
        coef: Float[Tensor, "source target"],
        step: float,
        strength: Float[Tensor, " target"],
    ) -> Float[Tensor, "source target"]:
        """argmin_Z 1/2 ||Z - A||^2 + step * lambda * penalty(Z)."""

    @abstractmethod
    def strength_max(self, negative_gradient: Float[Tensor, "source target"]) -> Float[Tensor, " target"]:
        """The smallest lambda whose solution is empty, from the negative gradient at 0."""

    @abstractmethod
    def dual_scale(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """The largest s for which s * negative_gradient lies in the dual ball (inf where nothing binds)."""

    @abstractmethod
    def conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """The convex conjugate inside the dual ball: 0 unless coefficients are bounded above."""

    @abstractmethod
    def whole_conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """The convex conjugate of lambda * penalty with its squared part, which makes it finite everywhere."""

    @abstractmethod
    def ridge(self, strength: Float[Tensor, " target"]) -> Float[Tensor, "#source #target"] | None:
        """mu_ij of the squared part 1/2 sum_ij mu_ij a_ij^2, or None."""

    @abstractmethod
    def coupled(self) -> Int[Tensor, " target"] | None:
        """For each target the number of the problem it belongs to, or None where targets are independent."""

    @abstractmethod
    def rescale(
        self, source_scale: Float[Tensor, " source"], target_scale: Float[Tensor, " target"]
    ) -> "AbstractPenalty":
        """The same penalty for b = source_scale * a / target_scale at strength lambda / target_scale."""

    @abstractmethod
    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "AbstractPenalty":
        """The same penalty over fewer sources and targets; None keeps all."""

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device) -> "AbstractPenalty":
        """The same penalty with its tensors of another type or on another device."""


class AbstractSolver(ABC):
    """Lowers loss + lambda * penalty until the relative duality gap of every target is at most `tol`."""

    @abstractmethod
    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        """The coefficients, their certified relative gap and the iterations spent on each target."""
