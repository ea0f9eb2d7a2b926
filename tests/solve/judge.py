"""Problems and penalties as plain numpy arrays, with an objective, a duality gap and an optimum that owe the library
nothing: the gap is written down again from the data, the optimum comes from a conic solver.

    P(A) = f(A) + sum_h lambda_h Omega_h(A),    D(theta) = -f*(..) - Omega*(s * negative gradient),   0 <= s <= 1

Dual points are scaled residuals, s chosen by a search rather than by the library's formula.
"""

import warnings
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax, xlogy


@dataclass(frozen=True, eq=False)
class Terms:
    """A penalty: entrywise (weights, bounds, squares) or by blocks (`rows` and `columns` hold group numbers)."""

    weights: np.ndarray
    non_negative: bool = False
    upper: float = np.inf
    squared: float = 0.0
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def problems(self, targets: int) -> list[np.ndarray]:
        """The columns of each independent problem."""
        columns = np.arange(targets) if self.columns is None else self.columns
        return [np.flatnonzero(columns == number) for number in np.unique(columns)]

    def value(self, coef: np.ndarray, columns: np.ndarray) -> float:
        """Omega over some columns, the strength aside."""
        if self.rows is not None:
            norms = self.norms(coef)
            weights = self.weights[:, self.columns[columns[0]]]
            return float((norms * np.where(norms > 0, weights, 0)).sum())
        weights = self.weights[:, columns]
        return float((np.where(coef != 0, weights, 0) * np.abs(coef)).sum() + 0.5 * self.squared * (coef**2).sum())

    def conjugate(self, pull: np.ndarray, columns: np.ndarray, strength: float) -> float:
        """sup_A <pull, A> - strength * Omega(A)."""
        if self.rows is not None:
            norms = self.norms(np.maximum(pull, 0) if self.non_negative else pull)
            limits = self.weights[:, self.columns[columns[0]]]
            fits = norms <= strength * np.where(np.isinf(limits), 1, limits) * (1 + 1e-12)
            return 0.0 if (fits | np.isinf(limits)).all() else np.inf
        limits = self.weights[:, columns]
        over = (pull if self.non_negative else np.abs(pull)) - strength * np.where(np.isinf(limits), 0, limits)
        over = np.where((over <= 1e-12 * strength) | np.isinf(limits), 0, over)
        if self.squared and strength > 0:
            best = np.minimum(over / (strength * self.squared), self.upper)
            return float((over * best - 0.5 * strength * self.squared * best**2).sum())
        if np.isinf(self.upper):
            return np.inf if (over > 0).any() else 0.0
        return float(over.sum() * self.upper)

    def feasible(self, coef: np.ndarray) -> bool:
        """Whether bounds hold and nothing forbidden is used."""
        weights = self.weights if self.rows is None else self.weights[self.rows][:, self.columns]
        inside = not self.non_negative or (coef.min(initial=0) >= 0 and coef.max(initial=0) <= self.upper)
        return bool(inside and (coef[np.broadcast_to(np.isinf(weights), coef.shape)] == 0).all())

    def norms(self, coef: np.ndarray) -> np.ndarray:
        """The Frobenius norm of each group of rows."""
        return np.array([np.linalg.norm(coef[self.rows == group]) for group in range(len(self.weights))])


@dataclass(frozen=True, eq=False)
class Data:
    """Samples of one loss: "quadratic" (many targets), "logistic", "contributions" or "multinomial" (one each).

    x: (sample, source), or (sample, outcome, source) for contributions; y: targets, probabilities of the label 1, or
    of every outcome; offset: fixed logits.
    """

    loss: str
    x: np.ndarray
    y: np.ndarray
    offset: np.ndarray = field(default_factory=lambda: np.zeros(1))

    @cached_property
    def shape(self) -> tuple[int, int]:
        sources = self.x.shape[-1]
        if self.loss == "quadratic":
            return sources, self.y.shape[1]
        return (sources * self.y.shape[1], 1) if self.loss == "multinomial" else (sources, 1)

    def predict(self, coef: np.ndarray) -> np.ndarray:
        if self.loss == "multinomial":
            return self.x @ coef.reshape(-1, self.y.shape[1]) + self.offset
        return (self.x @ coef[:, 0] if self.loss == "contributions" else self.x @ coef) + self.offset

    def fit(self, coef: np.ndarray, columns: np.ndarray) -> float:
        z = self.predict(coef)
        if self.loss == "quadratic":
            return float(((self.y - z)[:, columns] ** 2).sum() / (2 * len(z)))
        if self.loss == "logistic":
            return float((np.logaddexp(0, z) - self.y * z + binary(self.y)).mean())
        return float((xlogy(self.y, self.y) - self.y * log_softmax(z, axis=1)).sum(1).mean())

    def gap(self, coef: np.ndarray, terms: Terms, strength: np.ndarray) -> float:
        """The largest relative gap over the independent problems."""
        return max(
            self._gap(coef, terms, columns, float(strength[columns[0]])) for columns in terms.problems(self.shape[1])
        )

    def objective(self, coef: np.ndarray, terms: Terms, strength: np.ndarray) -> float:
        """P(A) over all problems."""
        parts = terms.problems(self.shape[1])
        return sum(self.fit(coef, own) + strength[own[0]] * terms.value(coef[:, own], own) for own in parts)

    def null(self) -> float:
        """P(0)."""
        return self.fit(np.zeros(self.shape), np.arange(self.shape[1]))

    def _gap(self, coef: np.ndarray, terms: Terms, columns: np.ndarray, strength: float) -> float:
        primal = self.fit(coef, columns) + strength * terms.value(coef[:, columns], columns)
        pull = self._pull(coef)[:, columns]

        def negative_dual(s: float | np.ndarray) -> float:
            return terms.conjugate(s * pull, columns, strength) - self._dual_fit(coef, columns, s)

        worst = pull if not terms.non_negative else np.maximum(pull, 0)
        limit = np.inf  # a penalty with a squared part or a bound has a finite conjugate everywhere
        if terms.rows is not None:
            size = (terms.norms(worst) / terms.weights[:, terms.columns[columns[0]]]).max()
            limit = strength / size if size > 0 else np.inf
        elif not terms.squared and np.isinf(terms.upper):
            size = (np.abs(worst) / terms.weights[:, columns]).max()
            limit = strength / size if size > 0 else np.inf
        top = min(limit, 2.0 if self.loss == "quadratic" else 1.0)
        tried: list[float | np.ndarray] = [top, min(1.0, top)]
        if terms.rows is not None and self.loss == "quadratic":  # coupled columns needn't share their scale
            rest, y = (self.y - self.predict(coef))[:, columns], self.y[:, columns]
            square = (rest**2).sum(0)
            tried.append(np.clip((rest * y).sum(0) / np.where(square > 0, square, 1), 0, top))
        tried.append(minimize_scalar(negative_dual, bounds=(0, top), method="bounded", options={"xatol": 1e-12}).x)
        null = self.fit(np.zeros_like(coef), columns)
        if null == 0:
            return np.inf if coef[:, columns].any() else 0.0
        return (primal + min(negative_dual(s) for s in tried)) / null

    def _pull(self, coef: np.ndarray) -> np.ndarray:
        """The negative gradient of the loss."""
        z, m = self.predict(coef), len(self.y)
        if self.loss == "quadratic":
            return self.x.T @ (self.y - z) / m
        if self.loss == "logistic":
            return self.x.T @ (self.y - 1 / (1 + np.exp(-z))) / m
        rest = self.y - softmax(z, axis=1)
        if self.loss == "contributions":
            return np.einsum("mcu,mc->u", self.x, rest)[:, None] / m
        return (self.x.T @ rest).reshape(-1, 1) / m

    def _dual_fit(self, coef: np.ndarray, columns: np.ndarray, s: float | np.ndarray) -> float:
        """-f* at s times the residuals."""
        z, m = self.predict(coef), len(self.y)
        if self.loss == "quadratic":
            rest, y = (self.y - z)[:, columns], self.y[:, columns]
            return float((s * rest * y - 0.5 * s**2 * rest**2).sum() / m)
        if self.loss == "logistic":
            q = 1 / (1 + np.exp(-z))
            mixed = (1 - s) * self.y + s * q
            return float((binary(self.y) - binary(mixed) + s * (q - self.y) * self.offset).mean())
        q = softmax(z, axis=1)
        mixed = (1 - s) * self.y + s * q
        entropy = xlogy(self.y, self.y) - xlogy(mixed, mixed) + s * (q - self.y) * self.offset
        return float(entropy.sum(1).mean())


def binary(p: np.ndarray) -> np.ndarray:
    """Minus the entropy of a coin."""
    return xlogy(p, p) + xlogy(1 - p, 1 - p)


def conic_optimum(data: Data, terms: Terms, strength: np.ndarray) -> float:
    """min P by an interior-point solver (Clarabel, through cvxpy); skips where that isn't installed."""
    cp = pytest.importorskip("cvxpy", reason="the conic oracle needs cvxpy (pip install cvxpy)")
    coef = cp.Variable(data.shape)
    total, m = 0, len(data.y)
    if data.loss == "quadratic":
        total = cp.sum_squares(data.x @ coef - data.y) / (2 * m)
    elif data.loss == "logistic":
        z = data.x @ coef + data.offset
        total = (cp.sum(cp.logistic(z)) - cp.sum(cp.multiply(data.y, z))) / m + binary(data.y).mean()
    else:
        outcomes = data.y.shape[1]
        if data.loss == "contributions":
            z = cp.hstack([data.x[:, c] @ coef for c in range(outcomes)]) + np.broadcast_to(data.offset, data.y.shape)
        else:
            z = data.x @ cp.reshape(coef, (data.x.shape[1], outcomes), order="C") + data.offset
        likelihood = cp.sum(cp.log_sum_exp(z, axis=1)) - cp.sum(cp.multiply(data.y, z))
        total = likelihood / m + xlogy(data.y, data.y).sum(1).mean()
    bounds = []
    if terms.rows is None:
        free = np.isfinite(terms.weights)
        total += cp.sum(cp.multiply(np.where(free, terms.weights, 0) * strength, cp.abs(coef)))
        total += 0.5 * terms.squared * cp.sum(cp.multiply(strength[None], cp.square(coef)))
        bounds.append(cp.multiply(~free, coef) == 0)
    for own in terms.problems(data.shape[1]) if terms.rows is not None else ():
        for group in range(len(terms.weights)):
            block = coef[np.flatnonzero(terms.rows == group).tolist()][:, own.tolist()]
            weight = terms.weights[group, terms.columns[own[0]]]
            if np.isinf(weight):
                bounds.append(block == 0)
            else:
                total += float(strength[own[0]] * weight) * cp.norm(cp.vec(block, order="F"), 2)
    if terms.non_negative:
        bounds.append(coef >= 0)
    if np.isfinite(terms.upper):
        bounds.append(coef <= terms.upper)
    exact = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    problem = cp.Problem(cp.Minimize(total), bounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate" is said where the last digit of these isn't reached
        problem.solve(solver=cp.CLARABEL, **exact)
    assert problem.status in ("optimal", "optimal_inaccurate")
    return float(problem.value)
