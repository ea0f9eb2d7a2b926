"""What comes out of one pair's regression: nonzero coefficients in the caller's units, and R^2 on held-out prompts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.features.samples import PairData, Part

LEAST = 1e-12  # of the largest: a column of less variance is constant


@dataclass(frozen=True, eq=False)
class Regressed:
    """A pair's nonzero coefficients, and the figures of each child.

    Attributes
    ----------
    source: the column of [copies x feature, error directions]; target: the child's kept feature (or target column).
    weight: unshrunk, in units of child code per parent code; lasso: the certified value; score: weight in standard
        deviations of both; stability: the share of half-samples with the edge, NaN where nobody asked.
    strength, gap, iterations, converged: by child; strength as a fraction of lambda_max.
    spread: each child's standard deviation. r2: by child, on held-out prompts, NaN where none are held out or the child
        doesn't vary there; overall: over the held-out variance of all children together.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    lasso: Float[Tensor, " edge"]
    score: Float[Tensor, " edge"]
    stability: Float[Tensor, " edge"]
    strength: Float[Tensor, " target"]
    gap: Float[Tensor, " target"]
    iterations: Int[Tensor, " target"]
    converged: Bool[Tensor, " target"]
    spread: Float[Tensor, " target"]
    r2: Float[Tensor, " target"]
    overall: float
    samples: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Units:
    """Standard deviations (inf for columns that don't vary, so that dividing by them gives 0) and means, on the CPU."""

    source: Float[Tensor, " source"]
    target: Float[Tensor, " target"]
    source_mean: Float[Tensor, " source"]
    target_mean: Float[Tensor, " target"]


@dataclass(frozen=True, eq=False)
class Entries:
    """Nonzero coefficients in standard units, ordered by target, on the CPU: the Lasso's, and refitted."""

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    lasso: Float[Tensor, " edge"]
    refit: Float[Tensor, " edge"]

    def weight(self, units: Units) -> Float[Tensor, " edge"]:
        """The refitted coefficients in the caller's units."""
        return in_units(self.refit, self, units)

    def matrix(self, units: Units) -> scipy.sparse.csr_matrix:
        """The refitted coefficients in the caller's units, (source, target)."""
        shape = (len(units.source), len(units.target))
        places = (self.source.numpy(), self.target.numpy())
        return scipy.sparse.csr_matrix((self.weight(units).numpy(), places), shape)


def in_units(value: Float[Tensor, " edge"], entries: Entries, units: Units) -> Float[Tensor, " edge"]:
    """Standard units to units of child code per parent code."""
    spread = torch.where(units.target.isfinite(), units.target, 0.0)
    return value / units.source[entries.source] * spread[entries.target]


def deviation(variance: Float[Tensor, " column"]) -> Float[Tensor, " column"]:
    """Standard deviations, inf for columns that don't vary."""
    floor = LEAST * float(variance.max()) if len(variance) else 0.0
    return torch.where(variance > floor, variance.clamp(min=1e-300).sqrt(), torch.inf)


def nonzeros(value: Float[Tensor, "source target"]) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """The places of nonzero coefficients, ordered by target."""
    target, source = (value != 0).T.nonzero(as_tuple=True)
    return source, target


def regressed(
    entries: Entries,
    units: Units,
    solution: solve.Solution,
    held_out: tuple[Float[Tensor, " target"], float],
    *,
    stability: Float[Tensor, "source target"] | None,
    samples: int,
    seconds: Mapping[str, float],
) -> Regressed:
    """Everything in its place."""
    nothing = torch.full((len(entries.source),), math.nan, dtype=torch.float64)
    targets = len(solution.gap)
    return Regressed(
        source=entries.source,
        target=entries.target,
        weight=entries.weight(units),
        lasso=in_units(entries.lasso, entries, units),
        score=entries.refit,
        stability=nothing if stability is None else stability.cpu().double()[entries.source, entries.target],
        strength=_fraction(solution).expand(targets),
        gap=solution.gap.cpu(),
        iterations=torch.as_tensor(solution.stats["iterations"]).cpu().expand(targets),
        converged=solution.converged.cpu(),
        spread=torch.where(units.target.isfinite(), units.target, 0.0),
        r2=held_out[0],
        overall=held_out[1],
        samples=samples,
        seconds=seconds,
    )


def _fraction(solution: solve.Solution) -> Float[Tensor, " target"]:
    """The strength as a fraction of lambda_max."""
    limit = torch.as_tensor(solution.stats["strength_max"]).double().cpu()
    level = torch.as_tensor(solution.stats["strength"]).double().cpu()
    return torch.where(limit > 0, level / limit.clamp(min=1e-300), 1.0)


def held_out_r2(
    pair: PairData, weight: scipy.sparse.csr_matrix, units: Units
) -> tuple[Float[Tensor, " target"], float]:
    """1 - squared error / squared distance from the training mean, by child and over all, on the held-out prompts.

    With d = y - z A sparse and c = [e, 1] B what the error directions and the intercept add,
    |d - c|^2 = |d|^2 - 2 <d, c> + |c|^2, and none of the three needs anything dense of (sample, target).
    """
    mean = units.target_mean.numpy()
    intercept = mean - weight.T @ units.source_mean.numpy()
    codes = len(units.source) - pair.errors
    rest = np.concatenate([weight[codes:].toarray(), intercept[None]])
    wrong, total = np.zeros(len(mean)), np.zeros(len(mean))
    for part in pair.parts(held=True):
        child = scipy.sparse.csr_matrix(part.child)
        missed = (child - part.codes @ weight[:codes]).tocsr()
        aside = np.concatenate([part.extra.numpy().astype(np.float64), np.ones((len(part.prompt), 1))], 1)
        wrong += (
            _squares(missed, len(mean))
            - 2 * (rest * (missed.T @ aside).T).sum(0)
            + (rest * (aside.T @ aside @ rest)).sum(0)
        )
        total += _squares(child, len(mean)) - 2 * mean * _sums(child, len(mean)) + len(part.prompt) * mean**2
    varies = np.isfinite(units.target.numpy()) & (total > 0)
    r2 = np.where(varies, 1 - wrong / np.where(total > 0, total, 1), np.nan)
    overall = 1 - wrong[varies].sum() / total[varies].sum() if varies.any() else math.nan
    return torch.from_numpy(r2), float(overall)


def held_out_deviance(
    pair: PairData,
    value: Float[Tensor, "source outcome"],
    mean: Tensor,
    intercept: Tensor,
    seen: Int[Tensor, " sample"],
) -> float:
    """The share of the cross-entropy of guessing class frequencies that the features remove, on held-out prompts."""
    parts = list(pair.parts(held=True))
    if not parts:
        return math.nan
    x, labels = dense_samples(parts)
    margins = (x - mean) @ value + intercept
    if margins.shape[1] == 1:
        margins = torch.cat([torch.zeros_like(margins), margins], 1)
    counts = torch.bincount(seen, minlength=margins.shape[1]).double()
    guess = -(counts.clamp(min=0.5) / counts.sum()).log()[labels[:, 0].long()].mean()
    lost = torch.nn.functional.cross_entropy(margins, labels[:, 0].long())
    return float(1 - lost / guess) if float(guess) > 0 else math.nan


def dense_samples(parts: list[Part]) -> tuple[Float[Tensor, "sample source"], Float[Tensor, "sample target"]]:
    """Samples with all their columns, dense: for few samples, or few columns."""
    codes = scipy.sparse.vstack([part.codes for part in parts]).toarray()
    x = torch.cat([torch.from_numpy(codes).double(), torch.cat([part.extra for part in parts]).double()], 1)
    child = scipy.sparse.vstack([scipy.sparse.csr_matrix(part.child) for part in parts]).toarray()
    return x, torch.from_numpy(child).double()


def _squares(matrix: scipy.sparse.csr_matrix, width: int) -> np.ndarray:
    return np.bincount(matrix.indices, np.square(matrix.data, dtype=np.float64), width)


def _sums(matrix: scipy.sparse.csr_matrix, width: int) -> np.ndarray:
    return np.bincount(matrix.indices, matrix.data, width)
