"""Every solver x every penalty x every loss: against a conic solver, against a second certificate, or a clear refusal.

| solver       | losses                       | penalties                     |
|--------------|------------------------------|-------------------------------|
| `WorkingSet` | Gram                         | entrywise                     |
| `Sweeps`     | Gram                         | entrywise                     |
| `TorchSet`   | Gram                         | entrywise                     |
| `Fista`      | all (likelihoods: no intercept) | all                        |
| `RowSet`     | as its inner solver's        | all                           |
| `GroupSet`   | Gram                         | groups without sign bounds    |
| `ProxNewton` | likelihoods                  | entrywise                     |
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.solve.judge import Data, Terms, conic_optimum
from tests.solve.problems import planted
from tests.solve.residual_loss import QuadraticResidual
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import (
    L1,
    Fista,
    Group,
    Logistic,
    ProxNewton,
    QuadraticGram,
    RowSet,
    Softmax,
    Sweeps,
    TorchSet,
    WorkingSet,
    relative_gap,
)
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver
from tl_circuitlasso.solve.group_set import GroupSet

TOL, LEVEL = 1e-6, 0.2
SOLVERS: dict[str, AbstractSolver] = {
    "WorkingSet": WorkingSet(),
    "WorkingSet, single": WorkingSet(single=True),
    "Sweeps": Sweeps(),
    "TorchSet": TorchSet(),
    "Fista": Fista(),
    "RowSet": RowSet(),
    "GroupSet": GroupSet(),
    "ProxNewton": ProxNewton(),
}
ENTRYWISE = ("l1", "weighted", "non-negative", "box", "elastic net", "elastic net in a box", "all at once")
GROUPED = ("group", "group weighted", "group non-negative", "rows")
QUADRATIC = ("gram", "residual")
LIKELIHOODS = ("logistic", "contributions", "multinomial")


def supported(solver: str, penalty: str, loss: str) -> bool:
    """The table above."""
    if solver in ("Fista", "RowSet"):
        return not (solver == "RowSet" and loss == "multinomial" and penalty in GROUPED)
    if solver == "ProxNewton":
        return loss in LIKELIHOODS and penalty in ENTRYWISE
    if solver == "GroupSet":
        return loss == "gram" and penalty in GROUPED and penalty != "group non-negative"
    return loss == "gram" and penalty in ENTRYWISE


@cache
def data_of(loss: str) -> Data:
    """Samples in the units that solvers work in: sources of unit variance, targets of unit size."""
    if loss in QUADRATIC:
        problem = planted(samples=60, sources=12, targets=4, seed=3)
        x, y = problem.features, problem.targets
        return Data("quadratic", (x / x.square().mean(0).sqrt()).numpy(), (y / y.square().mean(0).sqrt()).numpy())
    problem = planted(samples=70, sources=9, targets=3, seed=4)
    x, y = problem.features.numpy(), problem.targets
    offset = 0.3 * np.array([[1.0, -1.0, 0.0]])
    if loss == "logistic":
        return Data(loss, x, torch.sigmoid(2 * y[:, :1]).numpy(), np.full((1, 1), 0.2))
    if loss == "multinomial":
        return Data(loss, x, torch.softmax(2 * y, 1).numpy(), offset)
    parts = x.reshape(70, 3, 3)[:, :, :, None] * np.linspace(1, 2, 4)
    parts = parts.reshape(70, 3, 12)[:, :, [0, 5, 10, 3, 8, 1, 6, 11, 4]]
    return Data(loss, parts, torch.softmax(torch.from_numpy(parts[:, :, :3].sum(2)), 1).numpy(), offset)


def loss_of(loss: str) -> AbstractLoss:
    data = data_of(loss)
    x, y, offset = (torch.from_numpy(array) for array in (data.x, data.y, data.offset))
    if loss == "gram":
        return QuadraticGram(x.T @ x / len(x), x.T @ y / len(x), y.square().mean(0))
    if loss == "residual":
        return QuadraticResidual(x, y)
    return Logistic(x, y, offset, intercept=False) if loss == "logistic" else Softmax(x, y, offset)


@cache
def terms_of(penalty: str, shape: tuple[int, int]) -> Terms:
    sources, targets = shape
    weights = np.random.default_rng(0).uniform(0.5, 1.5, shape)
    weights[::5] = np.inf
    ones = np.ones(shape)
    if penalty in GROUPED:
        rows = np.arange(sources) if penalty == "rows" else np.arange(sources) // 3
        columns = np.zeros(targets, dtype=int) if penalty == "rows" else np.arange(targets) // 2
        weights = np.ones((rows.max() + 1, columns.max() + 1))
        if penalty == "group weighted":
            weights = np.random.default_rng(1).uniform(0.5, 1.5, weights.shape)
            weights[1:2, 0] = np.inf
        return Terms(weights, penalty == "group non-negative", rows=rows, columns=columns)
    return {
        "l1": Terms(ones),
        "weighted": Terms(weights),
        "non-negative": Terms(ones, non_negative=True),
        "box": Terms(ones, non_negative=True, upper=0.1),
        "elastic net": Terms(0.6 * ones, squared=0.4),
        "elastic net in a box": Terms(0.6 * ones, non_negative=True, upper=0.1, squared=0.4),
        "all at once": Terms(0.6 * weights, non_negative=True, upper=0.1, squared=0.4),
    }[penalty]


def penalty_of(terms: Terms) -> AbstractPenalty:
    weights = torch.from_numpy(terms.weights)
    if terms.rows is not None and terms.columns is not None:
        return Group(torch.from_numpy(terms.rows), torch.from_numpy(terms.columns), weights, terms.non_negative)
    upper = None if np.isinf(terms.upper) else terms.upper
    return L1(weights, terms.non_negative, upper, terms.squared or None)


def strength_of(penalty: str, loss: str) -> torch.Tensor:
    """A fifth of the strengths with an empty solution."""
    smooth, shape = loss_of(loss), penalty_of(terms_of(penalty, data_of(loss).shape))
    return LEVEL * shape.strength_max(smooth.negative_gradient(torch.zeros(smooth.shape, dtype=torch.float64)))


@cache
def optimum(penalty: str, loss: str) -> float:
    """What the conic solver finds."""
    terms = terms_of(penalty, data_of(loss).shape)
    return conic_optimum(data_of(loss), terms, strength_of(penalty, loss).numpy())


COMBINATIONS = [
    (solver, penalty, loss)
    for solver in SOLVERS
    for penalty in (*ENTRYWISE, *GROUPED)
    for loss in (*QUADRATIC, *LIKELIHOODS)
]


@pytest.mark.parametrize(("solver", "penalty", "loss"), [c for c in COMBINATIONS if supported(*c)])
def test_supported_combinations_reach_the_optimum_and_prove_it(solver: str, penalty: str, loss: str) -> None:
    data, smooth = data_of(loss), loss_of(loss)
    terms = terms_of(penalty, data.shape)
    shape = penalty_of(terms)
    shape.check(*data.shape)
    strength = strength_of(penalty, loss)
    answer = SOLVERS[solver].solve(smooth, shape, strength, tol=TOL)
    coef = answer.value.numpy()
    assert bool((answer.gap <= TOL).all()) and coef.any() and terms.feasible(coef)
    assert data.gap(coef, terms, strength.numpy()) <= 1.05 * TOL
    again = relative_gap(smooth, shape, answer.value, strength)
    assert bool((again <= 1.05 * TOL).all())
    excess = (data.objective(coef, terms, strength.numpy()) - optimum(penalty, loss)) / data.null()
    assert -1e-7 <= excess <= 1.05 * TOL + 1e-7


@pytest.mark.parametrize(("solver", "penalty", "loss"), [c for c in COMBINATIONS if not supported(*c)])
def test_other_combinations_are_refused_with_advice(solver: str, penalty: str, loss: str) -> None:
    shape = penalty_of(terms_of(penalty, data_of(loss).shape))
    with pytest.raises(InputError, match=r"`\w+` .*use "):
        SOLVERS[solver].solve(loss_of(loss), shape, strength_of(penalty, loss), tol=TOL)


@pytest.mark.parametrize("solver", ["Fista", "RowSet"])
@pytest.mark.parametrize("loss", ["logistic", "multinomial"])
def test_first_order_solvers_refuse_a_free_intercept(solver: str, loss: str) -> None:
    data = data_of(loss)
    x, y, offset = (torch.from_numpy(array) for array in (data.x, data.y, data.offset))
    smooth: Any = Logistic(x, y, offset) if loss == "logistic" else Softmax(x, y, offset, intercept=True)
    with pytest.raises(InputError, match=r"intercept.*use `ProxNewton`"):
        SOLVERS[solver].solve(smooth, L1(), torch.ones(1, dtype=torch.float64), tol=TOL)


def test_the_judge_knows_a_bad_answer() -> None:
    data, terms = data_of("gram"), terms_of("l1", data_of("gram").shape)
    strength, nothing = strength_of("l1", "gram").numpy(), np.zeros(data.shape)
    assert data.gap(nothing, terms, strength) > 0.01
    assert data.objective(nothing, terms, strength) > optimum("l1", "gram") + 0.01
