"""What comes out of one pair's regression: nonzero coefficients in the caller's units, and R^2 on held-out prompts."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.features.samples import PairData, Part

PER_EDGE = ("source", "target", "weight", "effect", "q", "lasso", "score", "stability")
PER_TARGET = ("strength", "gap", "iterations", "converged", "spread", "r2")
LEAST = 1e-12  # of the largest: a column of less variance is constant


@dataclass(frozen=True, eq=False)
class Regressed:
    """A pair's nonzero coefficients, and the figures of each child.

    Attributes
    ----------
    source: the column of [copies x feature, error directions]; target: the child's kept feature (or target column).
    weight: unshrunk, in units of child code per parent code; lasso: the certified value; both 0 for pairs that are here
        for their effect alone. effect: what the child's code does per unit of the parent's, q: its adjusted p-value,
        NaN where it isn't known; score: the effect (else the weight) in standard deviations of both; stability: the
        share of half-samples with the coefficient, NaN where nobody asked.
    strength, gap, iterations, converged: by child; strength as a fraction of lambda_max.
    bars: by copy (own position, through attention) the least |score| and the least |effect| of an edge; None where
    effects aren't known (`features.effects`). sure: how many effects aren't chance, and the largest |score| of them;
    None likewise.
    spread: each child's standard deviation. r2: by child, on held-out prompts, NaN where none are held out or the child
        doesn't vary there; overall: over the held-out variance of all children together.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    effect: Float[Tensor, " edge"]
    q: Float[Tensor, " edge"]
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
    bars: tuple[tuple[float, float], ...] | None = None
    sure: tuple[int, float] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is of edges and of children."""
        return {name: getattr(self, name) for name in (*PER_EDGE, *PER_TARGET)}

    def plain(self) -> dict[str, Any]:
        """The rest, as plain data."""
        overall = None if math.isnan(self.overall) else self.overall
        bars = None if self.bars is None else [list(bar) for bar in self.bars]
        sure = None if self.sure is None else list(self.sure)
        plain = {"overall": overall, "samples": self.samples, "seconds": dict(self.seconds)}
        return plain | {"bars": bars, "sure": sure}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> "Regressed":
        """From `tensors()` and `plain()`."""
        overall = math.nan if plain["overall"] is None else plain["overall"]
        bars = None if plain["bars"] is None else tuple((bar[0], bar[1]) for bar in plain["bars"])
        sure = None if plain["sure"] is None else (plain["sure"][0], plain["sure"][1])
        figures = {"samples": plain["samples"], "seconds": plain["seconds"]}
        return cls(**tensors, **figures, overall=overall, bars=bars, sure=sure)

    def matrix(self, units: "Units") -> scipy.sparse.csr_matrix:
        """The weights (source, target)."""
        places = (self.source.numpy(), self.target.numpy())
        return scipy.sparse.csr_matrix((self.weight.numpy(), places), (len(units.source), len(units.target)))


@dataclass(frozen=True, eq=False)
class Units:
    """Standard deviations (inf for columns that don't vary, so that dividing by them gives 0) and means, on the CPU."""

    source: Float[Tensor, " source"]
    target: Float[Tensor, " target"]
    source_mean: Float[Tensor, " source"]
    target_mean: Float[Tensor, " target"]

    def of(self, mine: Int[Tensor, " mine"]) -> "Units":
        """Those of some targets."""
        return Units(self.source, self.target[mine], self.source_mean, self.target_mean[mine])


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
    *,
    stability: Float[Tensor, "source target"] | None,
    samples: int,
    seconds: Mapping[str, float],
) -> Regressed:
    """Everything in its place, but for R^2, which is NaN yet."""
    nothing = torch.full((len(entries.source),), math.nan, dtype=torch.float64)
    targets = len(solution.gap)
    return Regressed(
        source=entries.source,
        target=entries.target,
        weight=entries.weight(units),
        effect=nothing,
        q=nothing,
        lasso=in_units(entries.lasso, entries, units),
        score=entries.refit,
        stability=nothing if stability is None else stability.cpu().double()[entries.source, entries.target],
        strength=_fraction(solution).expand(targets),
        gap=solution.gap.cpu(),
        iterations=torch.as_tensor(solution.stats["iterations"]).cpu().expand(targets),
        converged=solution.converged.cpu(),
        spread=torch.where(units.target.isfinite(), units.target, 0.0),
        r2=torch.full((targets,), math.nan, dtype=torch.float64),
        overall=math.nan,
        samples=samples,
        seconds=seconds,
    )


def _fraction(solution: solve.Solution) -> Float[Tensor, " target"]:
    """The strength as a fraction of lambda_max."""
    limit = torch.as_tensor(solution.stats["strength_max"]).double().cpu()
    level = torch.as_tensor(solution.stats["strength"]).double().cpu()
    return torch.where(limit > 0, level / limit.clamp(min=1e-300), 1.0)


def with_held_out(found: Regressed, pair: PairData, units: Units, ranks: Ranks = ALONE) -> Regressed:
    """With its R^2 on the held-out prompts, those of all processes, and the time that they took."""
    clock = time.perf_counter()
    wrong, total = held_out_errors(pair, found.matrix(units), units)
    wrong, total = ranks.sum(torch.from_numpy(np.stack([wrong, total]))).numpy()
    varies = np.isfinite(units.target.numpy()) & (total > 0)
    r2 = torch.from_numpy(np.where(varies, 1 - wrong / np.where(total > 0, total, 1), np.nan))
    overall = float(1 - wrong[varies].sum() / total[varies].sum()) if varies.any() else math.nan
    return replace(found, r2=r2, overall=overall, seconds={**found.seconds, "held out": time.perf_counter() - clock})


def held_out_errors(pair: PairData, weight: scipy.sparse.csr_matrix, units: Units) -> tuple[np.ndarray, np.ndarray]:
    """Each child's squared error and squared distance from the training mean, over the held-out prompts.

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
    return wrong, total


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
