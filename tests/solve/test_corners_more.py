"""More corners that random search has found: likelihoods, residuals, groups and dictionaries."""

import warnings

import pytest
import torch

from tests.solve.problems import planted
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import (
    L1,
    Group,
    Status,
    cross_entropy_garrote,
    fit_dictionary,
    lasso,
    logistic_lasso,
    multinomial_lasso,
    regress,
)
from tl_circuitlasso.solve.group_set import GroupSet


@pytest.mark.parametrize("size", [-1.0, 1e3, 1e6])
def test_likelihoods_start_within_bounds_and_no_worse_than_empty(size: float) -> None:
    problem = planted(samples=40, sources=12, targets=1)
    labels, start = problem.targets[:, 0] > 0, torch.full((12, 1), size)
    for penalty in (L1(), L1(non_negative=True), L1(non_negative=True, upper=0.1)):
        solution = logistic_lasso(problem.features, labels, strength=0.3, penalty=penalty, tol=1e-6, init=start)
        plain = logistic_lasso(problem.features, labels, strength=0.3, penalty=penalty, tol=1e-6)
        assert solution.status is Status.SOLVED
        torch.testing.assert_close(solution.value, plain.value, atol=1e-2, rtol=0)
        assert not penalty.non_negative or float(solution.value.min()) >= 0


def test_separable_classes_of_two_outcomes_are_solved_at_small_strengths() -> None:
    problem = planted(samples=54, sources=21, targets=1, seed=254)
    x = torch.cat([problem.features, problem.features[:, :4] + 1e-4 * problem.features[:, 4:8]], 1)
    labels = (problem.features[:, 0] > 0).long()
    solution = multinomial_lasso(x, labels, strength=0.001, tol=1e-6)
    assert solution.status is Status.SOLVED and int(solution.stats["iterations"].max()) < 50


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_alike_leave_nothing_to_explain(label: int) -> None:
    x = planted(samples=30, sources=8).features
    solution = logistic_lasso(x, torch.full((30,), label), strength=0.1)
    assert solution.status is Status.SOLVED and not bool(solution.value.any())


def test_regressing_through_residuals_takes_the_options_that_it_can() -> None:
    problem = planted(samples=12, sources=60, targets=3)
    data = (problem.features, problem.targets)
    plain = regress(*data, strength=0.1, tol=1e-8)
    warm = regress(*data, strength=0.1, tol=1e-8, init=plain.value, check=False, names=[f"n{i}" for i in range(60)])
    torch.testing.assert_close(warm.value, plain.value, atol=1e-6, rtol=0)
    assert warm.stats["rounds"] == 0
    for option in ({"standardise": True}, {"checkpoint": "somewhere"}):
        with pytest.raises(InputError, match="pass form='gram'"):
            regress(*data, strength=0.1, **option)


def test_one_warning_at_most_comes_from_residuals() -> None:
    problem = planted(samples=40, sources=30, targets=3)
    for strength in (0.0, 1e-3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = regress(problem.features, problem.targets, strength=strength, form="residual", max_iter=1)
        assert len(caught) == (solution.status is not Status.SOLVED)
        assert strength > 0 or solution.status in (Status.SOLVED, Status.UNCERTIFIED)


def test_compiled_groups_start_allowed_and_no_worse_than_empty() -> None:
    problem = planted(samples=10, sources=25, targets=4)
    weights = torch.ones(5, 2, dtype=torch.float64)
    weights[1, 0] = torch.inf
    penalty = Group(torch.arange(25) // 5, torch.arange(4) // 2, weights)
    start = 1e6 * torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    options = {"strength": 0.3, "penalty": penalty, "tol": 1e-6, "solver": GroupSet()}
    solution = lasso(**problem.matrices, init=start, **options)
    assert solution.status is Status.SOLVED and not bool(solution.value[5:10, :2].any())


def test_samples_that_require_gradients_are_data() -> None:
    problem = planted(samples=20, sources=5, targets=2)
    x, y = problem.features.clone().requires_grad_(), problem.targets.clone().requires_grad_()
    parts = torch.randn(20, 2, 5, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        codes = problem.features.to_sparse_csr().requires_grad_()
    found = [
        regress(x, y, strength=0.2).value,
        regress(x, y, strength=0.2, form="residual").value,
        regress(codes, y, strength=0.2).value,
        logistic_lasso(x, torch.sigmoid(y[:, 0]), strength=0.2).value,
        multinomial_lasso(x, torch.softmax(y, 1), strength=0.2).value,
        cross_entropy_garrote(parts, torch.softmax(y, 1), strength=0.2).value,
        fit_dictionary(x).moments(x, y).gram,
    ]
    assert not any(tensor.requires_grad for tensor in found)
