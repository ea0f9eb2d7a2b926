"""Classification targets: agreement with scikit-learn and with first-order solves, and true certificates."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from tests.solve.problems import planted
from tl_circuitlasso.solve import (
    L1,
    Fista,
    ProxNewton,
    Status,
    cross_entropy_garrote,
    logistic_lasso,
    multinomial_lasso,
    newton,
    path,
)


def contributions(
    samples: int = 80, outcomes: int = 4, sources: int = 12, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit contributions and the prediction that five of them make, plus a source that moves all logits alike."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(samples, outcomes, sources, generator=generator, dtype=torch.float64)
    parts[:, :, -1] = 3 * parts[:, :1, -1]
    truth = torch.zeros(sources, dtype=torch.float64)
    truth[:5] = 1
    noise = 0.3 * torch.randn(samples, outcomes, generator=generator, dtype=torch.float64)
    return parts, torch.softmax(parts @ truth + noise, 1)


@pytest.mark.parametrize("strength", [0.5, 0.05])
def test_logistic_is_scikit_learns(strength: float) -> None:
    problem = planted(samples=150, sources=40, targets=1)
    labels = (problem.targets[:, 0] > 0.2).long()
    solution = logistic_lasso(problem.features, labels, strength=strength, tol=1e-9)
    level = float(solution.stats["strength"]) * len(labels)
    options = {"solver": "saga", "C": 1 / level, "tol": 1e-9, "max_iter": 20_000, "l1_ratio": 1.0}
    model = LogisticRegression(**options).fit(problem.features.numpy(), labels.numpy())
    np.testing.assert_allclose(solution.value[:, 0].numpy(), model.coef_[0], atol=1e-4)
    assert float(solution.stats["intercept"]) == pytest.approx(model.intercept_[0], abs=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
def test_multinomial_with_two_classes_is_a_split_logistic(intercept: bool) -> None:
    problem = planted(samples=100, sources=15, targets=1)
    labels = (problem.targets[:, 0] > 0.1).long()
    two = multinomial_lasso(problem.features, labels, strength=0.1, tol=1e-9, intercept=intercept)
    strength = two.stats["strength"]
    one = logistic_lasso(
        problem.features, labels, strength=float(strength), strength_is="absolute", tol=1e-9, intercept=intercept
    )
    difference = two.value[:, 1] - two.value[:, 0]
    torch.testing.assert_close(difference, one.value[:, 0], atol=1e-3, rtol=0)


def test_multinomial_newton_equals_fista() -> None:
    problem = planted(samples=100, sources=15, targets=3)
    labels = problem.targets.argmax(1)
    newton, fista = (
        multinomial_lasso(problem.features, labels, strength=0.1, tol=1e-8, intercept=False, solver=solver)
        for solver in (ProxNewton(), Fista())
    )
    torch.testing.assert_close(newton.value, fista.value, atol=1e-3, rtol=0)
    assert newton.value.shape == (15, 3) and newton.gap.shape == (3,)


@pytest.mark.parametrize("upper", [None, 0.6])
@pytest.mark.parametrize("strength", [0.4, 0.05])
def test_garrote_agrees_with_bounded_quasi_newton(strength: float, upper: float | None) -> None:
    parts, prediction = contributions()
    offset = 0.2 * torch.randn(4, dtype=torch.float64)[None]
    solution = cross_entropy_garrote(parts, prediction, strength=strength, offset=offset, upper=upper, tol=1e-9)
    level, p = float(solution.stats["strength"]), prediction.numpy()

    def objective(a: np.ndarray) -> tuple[float, np.ndarray]:
        logits = parts.numpy() @ a + offset.numpy()
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = np.einsum("mcu,mc->u", parts.numpy(), np.exp(logs) - p) / len(p)
        return (p * (np.log(p) - logs)).sum(1).mean() + level * a.sum(), slope + level

    bounds, options = [(0, upper)] * 12, {"ftol": 1e-15, "gtol": 1e-10}
    best = minimize(objective, np.zeros(12), jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    np.testing.assert_allclose(solution.value[:, 0].numpy(), best.x, atol=2e-4)
    excess = objective(solution.value[:, 0].numpy())[0] - best.fun
    null = objective(np.zeros(12))[0]
    assert excess / null <= float(solution.gap) + 1e-9 <= 2e-9


def test_garrote_gives_nothing_to_a_source_that_moves_all_logits_alike() -> None:
    parts, prediction = contributions()
    solution = cross_entropy_garrote(parts, prediction, strength=0.02)
    assert float(solution.value[-1]) == 0
    assert bool((solution.value[:5] > 0.3).all())


def test_garrote_strength_one_is_empty_and_a_path_warms_up() -> None:
    parts, prediction = contributions()
    assert not bool(cross_entropy_garrote(parts, prediction, strength=1).value.any())
    assert bool(cross_entropy_garrote(parts, prediction, strength=0.98).value.any())

    def verb(**options):
        return cross_entropy_garrote(parts, prediction, tol=1e-6, **options)

    warm = path(verb, [0.5, 0.2, 0.05])
    torch.testing.assert_close(warm[-1].value, verb(strength=0.05).value, atol=1e-3, rtol=0)
    assert all(solution.status is Status.SOLVED for solution in warm)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_hessians_in_single_precision_lead_to_the_same_place(monkeypatch, scale: float) -> None:
    problem = planted(samples=60, sources=90, targets=1)
    features, labels = scale * problem.features, problem.targets[:, 0] > 0
    features[:, 1], features[:, 2] = features[:, 0], features[:, 3] * (1 + 1e-7)
    rough = logistic_lasso(features, labels, strength=0.05, tol=1e-10)
    monkeypatch.setattr(newton, "ROUGH_STEPS", 0)
    exact = logistic_lasso(features, labels, strength=0.05, tol=1e-10)
    assert bool(rough.converged) and bool(exact.converged)
    assert int(rough.stats["iterations"]) <= int(exact.stats["iterations"]) + 2
    assert float(rough.stats["objective"]) == pytest.approx(float(exact.stats["objective"]), rel=1e-6)


def test_weights_forbid_and_scale() -> None:
    parts, prediction = contributions()
    weights = torch.ones(12, dtype=torch.float64)
    weights[0] = torch.inf
    solution = cross_entropy_garrote(parts, prediction, strength=0.05, weights=weights)
    assert float(solution.value[0]) == 0 and bool(solution.converged.all())


def test_a_confident_prediction_keeps_a_finite_certificate() -> None:
    parts, _ = contributions()
    solution = cross_entropy_garrote(40 * parts, torch.eye(4, dtype=torch.float64)[torch.arange(80) % 4], strength=0.3)
    assert bool(solution.converged.all()) and solution.value.isfinite().all()


def test_labels_with_one_class_only_give_an_empty_model() -> None:
    solution = logistic_lasso(torch.randn(20, 3), torch.ones(20), strength=0.5)
    assert not bool(solution.value.any())


def test_penalties_of_matrix_shape_follow_the_classes() -> None:
    problem = planted(samples=60, sources=5, targets=3)
    weights = torch.ones(5, 3, dtype=torch.float64)
    weights[2, 1] = torch.inf
    solution = multinomial_lasso(problem.features, problem.targets.argmax(1), strength=0.05, penalty=L1(weights))
    assert float(solution.value[2, 1]) == 0 and int((solution.value != 0).sum()) > 2
