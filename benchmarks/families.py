"""Planted regressions for the solver's benchmarks, and duality gaps measured from the data by code of its own.

Nothing here is shared with the library but the data type that it takes: the gaps are the referee of every table.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
import torch

from tl_circuitlasso import solve


@dataclass(frozen=True, eq=False)
class Family:
    """Samples (dense, or sparse by columns), targets of unit size, and the coefficients that made them."""

    name: str
    x: np.ndarray | scipy.sparse.csc_matrix
    y: np.ndarray
    truth: np.ndarray

    @cached_property
    def moments(self) -> solve.Moments:
        y = torch.from_numpy(self.y)
        if isinstance(self.x, np.ndarray):
            return solve.moments_of(torch.from_numpy(self.x), y)
        rows, count = self.x.tocsr(), len(self.y)
        parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
        sums = solve.code_sums(torch.sparse_csr_tensor(*parts, rows.shape), y)
        return solve.Moments(sums.scatter / count, sums.cross / count, sums.target_squares / count, count)

    @cached_property
    def by_column(self) -> np.ndarray | scipy.sparse.csc_matrix:
        """The samples as libraries want them: Fortran order, or CSC."""
        return np.asfortranarray(self.x) if isinstance(self.x, np.ndarray) else self.x

    @cached_property
    def gram(self) -> np.ndarray:
        """Row and column order are the same thing for a symmetric matrix."""
        return self.moments.gram.numpy().T

    def strength_max(self) -> np.ndarray:
        return np.abs(self.moments.cross.numpy()).max(0)

    def standard(self) -> "Family":
        """The same, dense, with centred and standardised sources and targets: what choosing a strength presumes."""
        x = self.x if isinstance(self.x, np.ndarray) else self.x.toarray()
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
        y = self.y - self.y.mean(0)
        return Family(self.name, x, y / np.maximum(y.std(0), 1e-12), self.truth)


def correlated(samples: int, sources: int, correlation: float = 0.9, seed: int = 0) -> Family:
    """Family A: an AR(1) design, ten parents a target."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, sources))
    for j in range(1, sources):
        x[:, j] = correlation * x[:, j - 1] + np.sqrt(1 - correlation**2) * x[:, j]
    x = (x - x.mean(0)) / x.std(0)
    return _with_targets(f"A: AR({correlation}) n={samples} p=T={sources}", x, sources, rng)


def codes(samples: int, sources: int, active: int = 40, seed: int = 0) -> Family:
    """Family B: SAE-like codes of unit size, not centred and so still sparse; some sources fire far more often."""
    rng = np.random.default_rng(seed)
    often = rng.uniform(0.2, 1, sources) ** 2
    # the `active` largest of perturbed logs are a weighted draw without replacement
    perturbed = (np.log(often) - np.log(rng.exponential(size=(len(part), sources))) for part in _slabs(samples))
    where = np.concatenate([np.argpartition(part, -active, axis=1)[:, -active:] for part in perturbed])
    at = (np.repeat(np.arange(samples), active), where.ravel())
    x = scipy.sparse.csr_matrix((rng.exponential(size=samples * active), at), (samples, sources))
    size = np.sqrt(np.asarray(x.multiply(x).mean(0)).ravel())
    x = (x @ scipy.sparse.diags(1 / np.maximum(size, 1e-12))).tocsc()
    x.sort_indices()
    return _with_targets(f"B: codes n={samples} p=T={sources} L0={active}", x, sources, rng)


def blocks(samples: int, count: int, width: int, seed: int = 0) -> Family:
    """Family C: blocks of sources, two parent blocks per target block."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, count * width))
    x = (x - x.mean(0)) / x.std(0)
    parents = np.zeros((count, count))
    for column in parents.T:
        column[rng.choice(count, 2, replace=False)] = 1
    truth = np.kron(parents, np.ones((width, width))) * rng.standard_normal((count * width, count * width))
    y = x @ truth
    y += 0.5 * y.std(0) * rng.standard_normal(y.shape)
    name = f"C: {count} blocks x {width}, n={samples}"
    return Family(name, x, (y - y.mean(0)) / np.maximum(y.std(0), 1e-12), truth)


def bent(samples: int, sources: int, targets: int, parents: int = 3, seed: int = 0) -> Family:
    """Targets that are sums of |x|, x^2, relu(x), tanh(x) and x of independent parents."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, sources))
    truth = rng.random((sources, targets)) < parents / sources
    shapes = (np.abs, np.square, lambda v: np.maximum(v, 0), np.tanh, lambda v: v)
    y = np.zeros((samples, targets))
    for i, j in zip(*np.nonzero(truth)):
        part = shapes[(i + j) % 5](x[:, i])
        y[:, j] += (part - part.mean()) / part.std()
    y += 0.5 * rng.standard_normal(y.shape)
    return Family(f"bent parents, n={samples} p={sources} T={targets}", x, y - y.mean(0), truth.astype(float))


def _slabs(samples: int, size: int = 2000) -> list[range]:
    return [range(start, min(start + size, samples)) for start in range(0, samples, size)]


def _with_targets(name: str, x: np.ndarray | scipy.sparse.csc_matrix, sources: int, rng: np.random.Generator) -> Family:
    truth = np.where(rng.random((sources, sources)) < 10 / sources, rng.standard_normal((sources, sources)), 0)
    y = x @ (truth if isinstance(x, np.ndarray) else scipy.sparse.csc_matrix(truth))
    y = y if isinstance(y, np.ndarray) else y.toarray()
    y += 0.5 * y.std(0) * rng.standard_normal(y.shape)
    y = y - y.mean(0)
    return Family(name, x, y / np.maximum(y.std(0), 1e-12), truth)


def lasso_gap(family: Family, value: np.ndarray, strength: np.ndarray) -> float:
    """The worst relative gap of the first targets: primal minus dual at the best feasible multiple of the residual."""
    y = family.y[:, : value.shape[1]]
    fitted = family.x @ (value if isinstance(family.x, np.ndarray) else scipy.sparse.csc_matrix(value))
    residual = y - (fitted if isinstance(fitted, np.ndarray) else fitted.toarray())
    pull = np.abs(family.x.T @ residual).max(0) / len(y)
    return _worst(y, residual, pull, strength, np.abs(value).sum(0))


def block_gap(family: Family, value: np.ndarray, strength: np.ndarray, width: int) -> float:
    """The same for one Frobenius norm per block of `width` sources and `width` targets."""
    y = family.y[:, : value.shape[1]]
    residual = y - family.x @ value
    pull = np.sqrt((_blocks(family.x.T @ residual / len(y), width) ** 2).sum((1, 3))).max(0)
    size = np.sqrt((_blocks(value, width) ** 2).sum((1, 3))).sum(0)
    count = y.shape[1] // width
    joined = (part.reshape(len(y), count, width).transpose(0, 2, 1).reshape(-1, count) for part in (y, residual))
    return _worst(*joined, pull, strength, size, per=len(y))


def _blocks(matrix: np.ndarray, width: int) -> np.ndarray:
    return matrix.reshape(matrix.shape[0] // width, width, matrix.shape[1] // width, width)


def _worst(
    y: np.ndarray,
    residual: np.ndarray,
    pull: np.ndarray,
    strength: np.ndarray,
    size: np.ndarray,
    per: int | None = None,
) -> float:
    count = per or len(y)
    square, dot = (residual**2).sum(0) / count, (residual * y).sum(0) / count
    scale = np.clip(dot / np.maximum(square, 1e-300), 0, strength / np.maximum(pull, 1e-300))
    primal = square / 2 + strength * size
    dual = scale * dot - scale**2 * square / 2
    null = (y**2).sum(0) / count / 2
    return float(((primal - dual) / np.where(null > 0, null, 1)).max())  # a target without parents is all 0
