"""Strength 0: least squares, by one factorisation, with the exact suboptimality as its certificate."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import lsq_linear
from torch import Tensor

from tl_circuitlasso.solve.base import AbstractPenalty, Answer
from tl_circuitlasso.solve.certificate import least_squares_gap, rank_tolerance
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like


def solve_unpenalised(loss: QuadraticGram, penalty: AbstractPenalty) -> Answer:
    """min_a 1/2 a'Ga - c'a over the entries that `penalty` allows and within its bounds.

    Where G is singular the answer is the one of minimal norm in scaled units.
    """
    allowed, upper = _constraints(loss, penalty)
    value, gap = torch.zeros_like(loss.cross), torch.zeros_like(loss.target_sq_norm)
    bounded = upper is not None
    for columns in _same_pattern(allowed):
        rows = allowed[:, columns[0]].nonzero()[:, 0]
        if not len(rows):
            continue
        part = loss.restrict(rows, columns)
        if bounded:
            fit, excess = _bounded(part, upper[rows][:, columns])
        else:
            fit = _minimal_norm(part.gram, part.cross)
            excess = least_squares_gap(part.gram, part.negative_gradient(fit))
        value[rows[:, None], columns], gap[columns] = fit, excess
    null = loss.null_objective()
    relative = torch.where(null > 0, gap / null.clamp(min=torch.finfo(gap.dtype).tiny), 0)
    ones = torch.ones(len(null), dtype=torch.long, device=null.device)
    return Answer(value, relative, ones)


def _constraints(loss: QuadraticGram, penalty: AbstractPenalty) -> tuple[Bool[Tensor, "source target"], Tensor | None]:
    """Entries that may be nonzero, and upper bounds (inf for none) where coefficients are bounded below by 0."""
    shape = loss.cross.shape
    if isinstance(penalty, L1):
        allowed = torch.isfinite(penalty.weight(loss.cross)).expand(shape)
        limit = entries_like(torch.inf if penalty.upper is None else penalty.upper, loss.cross).expand(shape)
        return allowed, limit if penalty.non_negative else None
    if isinstance(penalty, Group):
        weights = penalty.weights
        ones = torch.ones(shape, dtype=torch.bool, device=loss.cross.device)
        allowed = ones if weights is None else torch.isfinite(weights)[penalty.row_groups][:, penalty.target_groups]
        return allowed, torch.full_like(loss.cross, torch.inf) if penalty.non_negative else None
    raise NotImplementedError(type(penalty).__name__)


def _same_pattern(allowed: Bool[Tensor, "source target"]) -> list[Tensor]:
    """Columns grouped by their set of allowed rows: one factorisation serves a whole group."""
    _, member = torch.unique(allowed.T, dim=0, return_inverse=True)
    return [(member == k).nonzero()[:, 0] for k in range(int(member.max()) + 1)] if len(member) else []


def _minimal_norm(
    gram: Float[Tensor, "source source"], cross: Float[Tensor, "source target"]
) -> Float[Tensor, "source target"]:
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > rank_tolerance(eigenvalues)
    return vectors[:, kept] @ ((vectors[:, kept].T @ cross) / eigenvalues[kept, None])


def _bounded(
    loss: QuadraticGram, upper: Float[Tensor, "source target"]
) -> tuple[Float[Tensor, "source target"], Float[Tensor, " target"]]:
    """Box-constrained least squares by active sets; strong convexity certifies: gap <= sum_i sup_d g_i d - mu d^2/2."""
    eigenvalues, vectors = torch.linalg.eigh(loss.gram)
    kept = eigenvalues > rank_tolerance(eigenvalues)
    root = eigenvalues[kept].sqrt()[:, None] * vectors[:, kept].T  # root'root = G
    right = (vectors[:, kept].T @ loss.cross) / eigenvalues[kept].sqrt()[:, None]
    fits = [
        lsq_linear(root.cpu().numpy(), y.cpu().numpy(), (0, np.maximum(u.cpu().numpy(), 1e-300)), method="bvls").x
        for y, u in zip(right.T, upper.T)
    ]
    value = torch.from_numpy(np.stack(fits, 1)).to(loss.cross)
    value = torch.minimum(value.clamp(min=0), upper)  # the active sets hold their bounds but for rounding
    pull = loss.negative_gradient(value)
    convexity = eigenvalues[0] if bool(kept.all()) else torch.zeros_like(eigenvalues[0])
    step = torch.where(pull == 0, 0, pull / convexity)  # inf where nothing bounds the step from below
    step = torch.maximum(torch.minimum(step, upper - value), -value)
    gain = pull * step - torch.where(torch.isinf(step), 0, 0.5 * convexity * step.square())
    return value, gain.clamp(min=0).sum(0)
