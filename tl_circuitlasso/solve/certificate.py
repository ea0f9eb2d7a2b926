"""The duality gap: a bound, computed from a candidate alone, on how far it is from the optimum.

For f(A) + lambda * penalty(A) and any dual point theta in the dual ball, P(A) - P* <= P(A) - D(theta). The point used
is the gradient of f at the predictions, shrunk by s until it fits the ball; at the optimum s = 1 and the gap is 0.
For the quadratic loss with residual sum of squares rr and ag = <A, -grad f> this reads

    gap(s) = (1 - s)^2 rr / 2 + lambda * penalty(A) - s * ag,      s = clip((rr + ag) / rr, 0, dual_scale)

(Massias, Gramfort & Salmon 2018, section 2; Ndiaye et al. 2017 for groups). A squared part mu of the penalty is a
quadratic loss of its own and joins f: the Lasso on the Gram G + mu I. Its conjugate is finite everywhere, so the
gradient is a dual point as it is, too, and near the optimum, where a shrunken one is off by its worst entry, a far
better one: with q = |grad f| the gap is then f + f* + lambda * penalty(A) + sum max(q - lambda w, 0)^2 / 2 mu. The
smaller gap counts. It is a statement about the matrices that it is given.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty

NEGATIVE = 1e-4  # relative; rounding in float32 stays far below


def duality_gap(
    loss: AbstractLoss,
    penalty: AbstractPenalty,
    value: Float[Tensor, "source target"],
    strength: Float[Tensor, " target"],
    negative_gradient: Float[Tensor, "source target"] | None = None,
) -> Float[Tensor, " target"]:
    """P(A) - D(theta) per target, in the units of the objective; never below the true suboptimality.

    >>> from tl_circuitlasso.solve import L1, QuadraticGram
    >>> loss = QuadraticGram(torch.eye(2), torch.tensor([[0.9], [0.1]]), torch.ones(1))
    >>> best = torch.tensor([[0.8], [0.0]])  # soft thresholding of 0.9 and 0.1 at 0.1
    >>> round(float(duality_gap(loss, L1(), best, torch.tensor([0.1]))), 6)
    0.0
    """
    return _signed_gap(loss, penalty, value, strength, negative_gradient).clamp(min=0)


def _signed_gap(
    loss: AbstractLoss,
    penalty: AbstractPenalty,
    value: Float[Tensor, "source target"],
    strength: Float[Tensor, " target"],
    negative_gradient: Float[Tensor, "source target"] | None,
) -> Float[Tensor, " target"]:
    if negative_gradient is None:
        negative_gradient = loss.negative_gradient(value)
    ridge, pull, energy = penalty.ridge(strength), negative_gradient, torch.zeros_like(strength)
    if ridge is not None:
        pull, energy = negative_gradient - ridge * value, (ridge * value.square()).sum(0)
    sizes = penalty.value(value, strength) - 0.5 * energy
    bound = penalty.dual_scale(pull, strength)
    best = torch.full_like(strength, torch.inf)
    natural, one = loss.natural_scale(value, negative_gradient), torch.ones_like(strength)
    for candidate in (one,) if torch.equal(natural, one) else (natural, one):
        scale = torch.minimum(candidate, bound).clamp(min=0)
        share = loss.fenchel(value, negative_gradient, scale) + 0.5 * (1 + scale.square()) * energy
        share = per_problem(share, penalty.coupled())
        total = share + sizes + penalty.conjugate(scale * pull, strength)
        best = torch.minimum(best, torch.where(torch.isnan(total), torch.inf, total))
    if ridge is not None:
        whole = penalty.value(value, strength) + penalty.whole_conjugate(negative_gradient, strength)
        whole = whole + loss.fenchel(value, negative_gradient, one)
        best = torch.minimum(best, torch.where(torch.isnan(whole), torch.inf, whole))
    return best


def relative_gap(
    loss: AbstractLoss,
    penalty: AbstractPenalty,
    value: Float[Tensor, "source target"],
    strength: Float[Tensor, " target"],
    negative_gradient: Float[Tensor, "source target"] | None = None,
) -> Float[Tensor, " target"]:
    """The duality gap over the objective of the empty solution; 0 where that objective is 0 and A is empty.

    >>> from tl_circuitlasso.solve import L1, QuadraticGram
    >>> loss = QuadraticGram(torch.eye(2), torch.tensor([[0.9], [0.1]]), torch.ones(1))
    >>> bool(relative_gap(loss, L1(), torch.zeros(2, 1), torch.tensor([0.1])) > 0.1)
    True
    """
    gap = _signed_gap(loss, penalty, value, strength, negative_gradient)
    null = per_problem(loss.null_objective(), penalty.coupled())
    # no convex problem has a negative gap: the Gram is indefinite, or a coefficient has overflowed
    gap = torch.where(gap < -NEGATIVE * null, torch.inf, gap.clamp(min=0))
    return torch.where(null > 0, gap / null.clamp(min=torch.finfo(gap.dtype).tiny), torch.where(gap > 0, torch.inf, 0))


def fair_start(
    loss: AbstractLoss,
    penalty: AbstractPenalty,
    init: Float[Tensor, "source target"],
    strength: Float[Tensor, " target"],
) -> Float[Tensor, "source target"]:
    """A starting point within the bounds of the penalty; problems that it makes worse than empty ones start empty.

    A gap says nothing about coefficients that break a bound, and from far outside descent takes for ever.
    """
    value = penalty.prox(init, 0.0, strength)
    fit, null = loss.objective(value, loss.negative_gradient(value)), loss.null_objective()
    groups = penalty.coupled()
    fair = per_problem(fit, groups) + penalty.value(value, strength) <= per_problem(null, groups)
    return torch.where(fair, value, 0)


def least_squares_gap(
    gram: Float[Tensor, "source source"],
    negative_gradient: Float[Tensor, "source target"],
) -> Float[Tensor, " target"]:
    """The exact suboptimality 1/2 g' G^+ g of a least-squares fit (strength 0), from its negative gradient g."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > rank_tolerance(eigenvalues)
    rotated = vectors[:, kept].T @ negative_gradient
    return 0.5 * (rotated.square() / eigenvalues[kept, None]).sum(0)


def rank_tolerance(eigenvalues: Float[Tensor, " source"]) -> Float[Tensor, ""]:
    """Eigenvalues of a unit-diagonal Gram up to this are rounding, not directions of the data."""
    top = eigenvalues.abs().amax() if eigenvalues.numel() else eigenvalues.new_zeros(())
    return top * eigenvalues.numel() * torch.finfo(eigenvalues.dtype).eps


def per_problem(figures: Float[Tensor, " target"], coupled: Int[Tensor, " target"] | None) -> Float[Tensor, " target"]:
    """Sums over coupled targets, repeated for each of them."""
    if coupled is None or not coupled.numel():
        return figures
    return figures.new_zeros(int(coupled.max()) + 1).index_add_(0, coupled, figures)[coupled]
