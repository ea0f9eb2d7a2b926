"""Planted problems the size of SAEs: sparse codes, and children that a few of them make.

Sources fire with very unequal frequencies, as SAE features do. A child is a sum of a few sources and noise wherever one
of its parents fires, and 0 elsewhere:

    y_j = sum_i A_ij z_i + e_j,   or with `rectified` relu of that.

Rectified children have positive parents only: a source that pushes a code of 0 further down leaves no trace.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from tl_circuitlasso.errors import InputError

LEAST, MOST = 0.5, 1.5  # size of a planted coefficient, in units of the child per unit of the source


@dataclass(frozen=True, eq=False)
class PlantedCodes:
    """Codes of sources and children (CSR, float32), and the coefficients that made them (source, child)."""

    sources: scipy.sparse.csr_matrix
    children: scipy.sparse.csr_matrix
    truth: scipy.sparse.csc_matrix


def planted_codes(
    samples: int,
    features: int,
    *,
    children: int | None = None,
    active: int = 40,
    parents: tuple[int, int] = (2, 6),
    rectified: bool = False,
    noise: float = 0.3,
    seed: int = 0,
) -> PlantedCodes:
    """`samples` of `features` codes, about `active` at once, and as many children (or `children`) with known parents.

    parents: the fewest and the most of a child; rectified: see above; noise: its standard deviation, relative to that
    of the sum where a parent fires.

    Raises
    ------
    InputError: more active features than there are, or numbers below 1.

    >>> problem = planted_codes(100, 20, active=4)
    >>> problem.sources.shape, problem.truth.shape
    ((100, 20), (20, 20))
    """
    if min(samples, features, active, parents[0]) < 1 or active > features or parents[1] > features:
        raise InputError(
            f"`samples` {samples}, `features` {features}, `active` {active}, `parents` {parents}: give at least 1 of "
            "each, and no more active features or parents than features"
        )
    rng = np.random.default_rng(seed)
    sources = sparse_codes(samples, features, active, rng)
    truth = _coefficients(features, features if children is None else children, parents, signed=not rectified, rng=rng)
    summed = scipy.sparse.csr_matrix(sources @ truth)
    spread = np.sqrt(summed.multiply(summed).sum(0) / np.maximum(summed.getnnz(0), 1))
    scale = np.asarray(spread).ravel()[summed.indices]
    summed.data = summed.data + noise * scale * rng.standard_normal(summed.nnz)
    if rectified:
        summed.data = np.maximum(summed.data, 0)
        summed.eliminate_zeros()
    return PlantedCodes(sources, scipy.sparse.csr_matrix(summed, dtype=np.float32), truth)


def sparse_codes(samples: int, features: int, active: int, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
    """Codes with exponential values, about `active` in a sample: draws of the same feature twice count once.

    >>> sparse_codes(10, 5, 2, np.random.default_rng(0)).shape
    (10, 5)
    """
    often = rng.uniform(0.2, 1, features) ** 2
    ends = np.cumsum(often / often.sum())
    drawn = np.searchsorted(ends, rng.random((samples, active))).clip(max=features - 1)
    drawn.sort(axis=1)
    new = np.ones_like(drawn, dtype=bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    starts = np.concatenate([[0], np.cumsum(new.sum(1))])
    values = rng.exponential(size=int(starts[-1])).astype(np.float32)
    return scipy.sparse.csr_matrix((values, drawn[new].astype(np.int32), starts), (samples, features))


def _coefficients(
    features: int, children: int, parents: tuple[int, int], *, signed: bool, rng: np.random.Generator
) -> scipy.sparse.csc_matrix:
    counts = rng.integers(parents[0], parents[1] + 1, children)
    rows = np.concatenate([rng.choice(features, count, replace=False) for count in counts])
    values = rng.uniform(LEAST, MOST, len(rows)) * (rng.choice([-1.0, 1.0], len(rows)) if signed else 1.0)
    starts = np.concatenate([[0], np.cumsum(counts)])
    matrix = scipy.sparse.csc_matrix((values, rows, starts), (features, children))
    matrix.sort_indices()
    return matrix
