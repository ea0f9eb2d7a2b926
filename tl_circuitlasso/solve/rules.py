"""A strength as users ask for it: a number, or a rule's name; and what to do with what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractPenalty, Solution
from tl_circuitlasso.solve.lasso import lasso
from tl_circuitlasso.solve.path import Moments
from tl_circuitlasso.solve.strength import select, stability

STABLE = 0.8  # share of half-samples that must have an edge: Meinshausen & Buehlmann's usual bar
COLLINEAR = 10.0  # standardised least-squares values beyond this come from sources that are all but copies
CLASS_STRENGTH = 0.05  # of lambda_max, for class labels where no strength is given
RESAMPLED = ("cv", "stability")  # rules that need the moments of parts of the data


@dataclass(frozen=True, eq=False)
class Found:
    """A solution at a strength that was asked for, by number or by rule.

    refit: least squares on its support, where a rule chose that; stability: the share of half-samples that have each
    coefficient, where that was asked for.
    """

    solution: Solution
    refit: Float[Tensor, "source target"] | None = None
    stability: Float[Tensor, "source target"] | None = None

    def unshrunk(self) -> Float[Tensor, "source target"]:
        """The refit, where there is one and it is sound; else the solution's own values.

        A rule chooses a support, at a strength that shrinks what is on it; but sources that are all but copies of one
        another have refits beyond all measure, in columns of unit variance.
        """
        if self.refit is None:
            return self.solution.value
        return torch.where(self.refit.abs().amax(0) <= COLLINEAR, self.refit, self.solution.value)


def at_strength(
    data: Moments,
    strength: float | str | Tensor,
    *,
    auto: float | str = "auto",
    parts: Sequence[Moments] = (),
    penalty: AbstractPenalty | None = None,
    draws: int = 20,
    seed: int = 0,
    **options: Any,
) -> Found:
    """The solution at a fraction of lambda_max, or where a rule says: one of `select`'s, "auto" (what `auto` says, a
    fraction or a rule) or "stability" (at 0.2, what at least `STABLE` of `draws` half-samples of the `parts` have).

    `options` go to `lasso`. InputError for a rule that needs `parts` and has fewer than two.

    >>> data = Moments(torch.eye(2), torch.tensor([[0.9], [0.01]]), torch.ones(1), 100.0)
    >>> at_strength(data, "auto", auto=0.5).solution.value.flatten().tolist()
    [0.4499..., 0.0]
    """
    if isinstance(strength, str) and strength == "auto":
        strength = auto
    if not isinstance(strength, str):
        fixed: dict[str, Any] = {"target_sq_norm": data.target_sq_norm, "strength": strength, "penalty": penalty}
        return Found(lasso(data.gram, data.cross, **fixed, **options))
    if strength in RESAMPLED and len(parts) < 2:
        raise InputError(f"`strength` {strength!r} needs statistics in folds: collect them with that strength")
    if strength == "stability":
        found = stability(parts, draws=draws, penalty=penalty, seed=seed, **options)
        return Found(if_stable(select(data, rule="fixed", penalty=penalty, **options).solution, found), stability=found)
    choice = select(data, rule=strength, folds=parts or None, penalty=penalty, **options)
    return Found(choice.solution, choice.refit)


def if_stable(solution: Solution, stability: Float[Tensor, "source target"]) -> Solution:
    """The solution without coefficients that too few half-samples have.

    >>> from tl_circuitlasso.solve import lasso
    >>> found = lasso(torch.eye(2), torch.ones(2, 1), target_sq_norm=torch.ones(1), strength=0.5)
    >>> if_stable(found, torch.tensor([[0.9], [0.3]])).value.flatten().tolist()
    [0.5, 0.0]
    """
    return replace(solution, value=solution.value * (stability >= STABLE))
