"""Other Lasso solvers behind one call each: (family, strengths of the first targets, tolerance of its own) -> values.

Every library stops by a rule of its own, so the benchmark hands each the loosest of its tolerances that reaches the
required gap. What a library needs once for all targets (Fortran order, a Gram) is made before the clock starts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from benchmarks.families import Family

Fit = Callable[[Family, np.ndarray, float], np.ndarray]
LOOSE_TO_TIGHT = tuple(10.0**-k for k in range(2, 13))
FINER = tuple(10.0 ** (-k / 2) for k in range(4, 25))


@dataclass(frozen=True)
class Library:
    """A solver, the form of the problem it takes, and how many targets it is run on before scaling up."""

    name: str
    fit: Fit
    tolerances: tuple[float, ...] = FINER
    targets: int = 64


def scikit_learn(family: Family, strength: np.ndarray, tol: float) -> np.ndarray:
    """The loop behind sklearn.linear_model.Lasso(precompute=gram), without its checks."""
    from sklearn.linear_model import _cd_fast

    cross, square = family.moments.cross.numpy(), family.moments.target_sq_norm.numpy()
    out = np.zeros((len(family.gram), len(strength)))
    for j, level in enumerate(strength):
        out[:, j] = _cd_fast.enet_coordinate_descent_gram(
            np.zeros(len(family.gram)), level, 0.0, family.gram.T, np.ascontiguousarray(cross[:, j]),
            np.sqrt(square[j : j + 1]), 100_000, tol, np.random.RandomState(0), False, False,
        )[0]  # fmt: skip
    return out


def celer(family: Family, strength: np.ndarray, tol: float) -> np.ndarray:
    """celer.Lasso on the samples, sparse where they are."""
    from celer import Lasso

    fits = [
        Lasso(alpha=level, fit_intercept=False, tol=tol).fit(family.by_column, family.y[:, j]).coef_
        for j, level in enumerate(strength)
    ]
    return np.stack(fits, 1)


def skglm_gram(family: Family, strength: np.ndarray, tol: float) -> np.ndarray:
    """skglm's AndersonCD over the Gram."""
    from skglm.datafits import QuadraticHessian

    cross = family.moments.cross.numpy()
    return _skglm(QuadraticHessian(), family.gram, lambda j: -cross[:, j], strength, tol)


def skglm_samples(family: Family, strength: np.ndarray, tol: float) -> np.ndarray:
    """skglm's AndersonCD over the samples, sparse where they are."""
    from skglm.datafits import Quadratic

    return _skglm(Quadratic(), family.by_column, lambda j: np.ascontiguousarray(family.y[:, j]), strength, tol)


def _skglm(
    datafit: object,
    design: np.ndarray | scipy.sparse.csc_matrix,
    observed: Callable[[int], np.ndarray],
    strength: np.ndarray,
    tol: float,
) -> np.ndarray:
    from skglm.penalties import L1
    from skglm.solvers import AndersonCD
    from skglm.utils.jit_compilation import compiled_clone

    fit, solver = compiled_clone(datafit), AndersonCD(tol=tol, fit_intercept=False, max_iter=200)
    values = []
    for j, level in enumerate(strength):
        y = observed(j)
        if scipy.sparse.issparse(design):
            fit.initialize_sparse(design.data, design.indptr, design.indices, y)
        else:
            fit.initialize(design, y)
        values.append(solver.solve(design, y, fit, compiled_clone(L1(level)))[0])
    return np.stack(values, 1)


def adelie(family: Family, strength: np.ndarray, tol: float) -> np.ndarray:
    """adelie.gaussian_cov, one strength a target."""
    import adelie as ad

    cross, out = family.moments.cross.numpy(), np.zeros((len(family.gram), len(strength)))
    for j, level in enumerate(strength):
        state = ad.gaussian_cov(
            A=family.gram, v=np.ascontiguousarray(cross[:, j]), lmda_path=np.array([level]), tol=tol,
            progress_bar=False, early_exit=False,
        )  # fmt: skip
        out[:, j] = state.betas.toarray()[0]
    return out


def adelie_block(family: Family, strength: float, width: int, tol: float, steps: int) -> np.ndarray:
    """adelie.grpnet on the first block of targets, one norm per (source block, target block).

    A multi-response fit of adelie groups the responses of one source; blocks need its Kronecker form, where column
    `source * width + response` belongs to the block of `source`. `steps` strengths lead to the last one.
    """
    import adelie as ad

    y = np.ascontiguousarray(family.y[:, :width].ravel())
    kronecker = ad.matrix.kronecker_eye(family.by_column, width, n_threads=1)
    blocks = family.x.shape[1] // width
    top = np.sqrt((family.moments.cross.numpy()[:, :width].reshape(blocks, -1) ** 2).sum(1)).max()
    levels = np.geomspace(max(0.95 * top, strength), strength, steps) if steps > 1 else np.array([strength])
    state = ad.grpnet(
        kronecker,
        ad.glm.gaussian(y),
        groups=np.arange(blocks) * width * width,
        penalty=np.ones(blocks),
        lmda_path=levels / width,
        intercept=False,
        tol=tol,
        progress_bar=False,
        n_threads=1,
        early_exit=False,
    )  # fmt: skip  - adelie divides the squared error by samples times responses
    return state.betas.toarray()[-1].reshape(-1, width)


def dense_libraries(sample: int) -> list[Library]:
    return [
        Library("scikit-learn, Gram", scikit_learn, targets=sample),
        Library("skglm AndersonCD, Gram", skglm_gram, targets=sample),
        Library("celer, samples", celer, targets=min(sample, 16)),
        Library("adelie, Gram", adelie, targets=min(sample, 16)),
    ]


def sparse_libraries(sample: int) -> list[Library]:
    return [
        Library("scikit-learn, Gram", scikit_learn, targets=sample),
        Library("celer, CSC samples", celer, targets=sample),
        Library("skglm AndersonCD, Gram", skglm_gram, targets=sample),
        Library("skglm AndersonCD, CSC samples", skglm_samples, targets=min(sample, 8)),
        Library("adelie, Gram", adelie, targets=min(sample, 4)),
    ]
