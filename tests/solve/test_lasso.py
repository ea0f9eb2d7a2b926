"""Every solver crossed with every elementwise and group penalty against independent oracles."""

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from sklearn.linear_model import ElasticNet as SklearnElasticNet
from sklearn.linear_model import Lasso as SklearnLasso
from sklearn.linear_model import MultiTaskLasso
from torch import Tensor

from tests.solve.problems import Planted, numpy_gap, planted
from tests.solve.residual_loss import QuadraticResidual
from tl_circuitlasso.solve import (
    L1,
    ElasticNet,
    Fista,
    Group,
    Moments,
    QuadraticGram,
    RowSet,
    Status,
    ebic,
    lasso,
    prepare,
    regress,
    row_group,
)

SOLVERS = ["working_set", "torch", "fista"]
STRENGTHS = [0.5, 0.1, 0.01]


def sklearn_fit(problem: Planted, strength: Tensor, l1_ratio: float = 1.0, positive: bool = False) -> np.ndarray:
    columns = []
    for y, level in zip(problem.targets.T.numpy(), strength.numpy()):
        options = {"fit_intercept": False, "tol": 1e-12, "max_iter": 100_000, "positive": positive}
        if l1_ratio == 1:
            model = SklearnLasso(level, **options)
        else:
            model = SklearnElasticNet(level, l1_ratio=l1_ratio, **options)
        columns.append(model.fit(problem.features.numpy(), y).coef_)
    return np.stack(columns, 1)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_l1_is_scikit_learns_lasso(solver: str, strength: float) -> None:
    problem = planted()
    solution = lasso(**problem.matrices, strength=strength, tol=1e-9, solver=solver)
    assert solution.status is Status.SOLVED
    expected = sklearn_fit(problem, solution.stats["strength"])
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_non_negative_and_elastic_net_are_scikit_learns(solver: str) -> None:
    problem = planted(seed=1)
    for penalty, options in (
        (L1(non_negative=True), {"positive": True}),
        (ElasticNet(0.6), {"l1_ratio": 0.6}),
        (ElasticNet(0.6, non_negative=True), {"l1_ratio": 0.6, "positive": True}),
    ):
        solution = lasso(**problem.matrices, strength=0.05, penalty=penalty, tol=1e-9, solver=solver)
        expected = sklearn_fit(problem, solution.stats["strength"], **options)
        np.testing.assert_allclose(solution.value.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_and_box_agree_with_bounded_quasi_newton(solver: str) -> None:
    problem = planted(seed=2, targets=3)
    weights = torch.rand(30, 3, dtype=torch.float64) + 0.5
    weights[::7] = torch.inf
    penalty = L1(weights, non_negative=True, upper=0.3)
    solution = lasso(**problem.matrices, strength=0.05, penalty=penalty, tol=1e-9, solver=solver)
    gram, cross = problem.gram.numpy(), problem.cross.numpy()
    for j, level in enumerate(solution.stats["strength"].tolist()):
        free = np.isfinite(weights[:, j].numpy())
        cost = level * weights[:, j].numpy()[free] - cross[free, j]
        g = gram[np.ix_(free, free)]
        best = minimize(
            lambda a, g=g, cost=cost: (0.5 * a @ g @ a + cost @ a, g @ a + cost),
            np.zeros(free.sum()), jac=True, bounds=[(0, 0.3)] * int(free.sum()), method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 10_000},
        ).x  # fmt: skip
        np.testing.assert_allclose(solution.value[:, j].numpy()[free], best, atol=3e-4)
    assert bool((solution.value[::7] == 0).all())
    assert float(solution.value.max()) == pytest.approx(0.3)


@pytest.mark.parametrize("solver", ["auto", RowSet()])
def test_rows_over_all_targets_are_scikit_learns_multitask_lasso(solver: str | RowSet) -> None:
    problem = planted(seed=3)
    solution = lasso(**problem.matrices, strength=0.1, penalty=row_group(30, 6), tol=1e-9, solver=solver)
    level = float(solution.stats["strength"][0])
    model = MultiTaskLasso(level, fit_intercept=False, tol=1e-12, max_iter=100_000)
    expected = model.fit(problem.features.numpy(), problem.targets.numpy()).coef_.T
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("strength", [0.4, 0.05])
def test_block_norms_working_rows_equal_plain_fista_and_kkt(strength: float, non_negative: bool) -> None:
    problem = planted(seed=4)
    weights = torch.ones(10, 2, dtype=torch.float64)
    weights[1, 0] = torch.inf
    penalty = Group(torch.arange(30) // 3, torch.arange(6) // 3, weights, non_negative)
    rows = lasso(**problem.matrices, strength=strength, penalty=penalty, tol=1e-10, solver=RowSet())
    plain = lasso(**problem.matrices, strength=strength, penalty=penalty, tol=1e-10, solver="fista")
    torch.testing.assert_close(rows.value, plain.value, atol=3e-4, rtol=0)
    assert bool((rows.value[3:6, :3] == 0).all())
    pull = problem.cross - problem.gram @ rows.value
    level = float(rows.stats["strength"].max())
    for g in range(10):
        for h in range(2):
            block, force = (part[penalty.row_groups == g][:, penalty.target_groups == h] for part in (rows.value, pull))
            if torch.isinf(weights[g, h]):
                continue
            bar = float(rows.stats["strength"][3 * h]) * float(weights[g, h])
            rest = force if not block.any() else force - bar * block / block.norm()
            rest = torch.where((block == 0) & torch.tensor(non_negative), rest.clamp(min=0), rest)
            assert float(rest.norm()) <= (1e-3 * level if block.any() else bar + 1e-3 * level)


def test_a_group_of_one_entry_is_the_lasso() -> None:
    problem = planted(seed=5)
    single = Group(torch.arange(30), torch.arange(6))
    grouped = lasso(**problem.matrices, strength=0.1, penalty=single, tol=1e-10)
    torch.testing.assert_close(
        grouped.value, lasso(**problem.matrices, strength=0.1, tol=1e-10).value, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("penalty", [L1(), L1(non_negative=True), Group(torch.arange(30) // 3, torch.arange(6) // 2)])
def test_strength_one_is_exactly_empty_and_just_below_is_not(penalty: L1 | Group) -> None:
    problem = planted(seed=6)
    empty = lasso(**problem.matrices, strength=1.0, penalty=penalty, tol=1e-8)
    assert not bool(empty.value.any()) and float(empty.gap.max()) < 1e-12
    assert bool(lasso(**problem.matrices, strength=0.99, penalty=penalty, tol=1e-8).value.any(0).all())


def test_strength_zero_is_least_squares() -> None:
    problem = planted(seed=7)
    solution = lasso(**problem.matrices, strength=0)
    expected = np.linalg.lstsq(problem.features.numpy(), problem.targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=1e-9)
    assert solution.status is Status.SOLVED
    bounded = lasso(**problem.matrices, strength=0, penalty=L1(non_negative=True))
    for j in range(6):
        fit = nnls(problem.features.numpy(), problem.targets[:, j].numpy())[0]
        np.testing.assert_allclose(bounded.value[:, j].numpy(), fit, atol=1e-7)
    assert bool(bounded.converged.all())


def test_strength_zero_with_fewer_samples_than_sources_has_minimal_scaled_norm() -> None:
    problem = planted(samples=10, sources=20, targets=2)
    solution = lasso(**problem.matrices, strength=0, tol=1e-12)
    np.testing.assert_allclose((problem.features @ solution.value).numpy(), problem.targets.numpy(), atol=1e-7)
    assert solution.status is Status.SOLVED
    scale = problem.gram.diagonal().sqrt()[:, None]
    expected = np.linalg.lstsq((problem.features / scale.T).numpy(), problem.targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose((solution.value * scale).numpy(), expected, atol=1e-7)


def test_strengths_per_target_mix_zero_one_and_between() -> None:
    problem = planted(targets=3)
    level = torch.tensor([0.0, 0.1, 1.0])
    mixed = lasso(**problem.matrices, strength=level, tol=1e-9)
    for j, strength in enumerate(level.tolist()):
        alone = lasso(**problem.matrices, strength=strength, tol=1e-9)
        torch.testing.assert_close(mixed.value[:, j], alone.value[:, j], atol=1e-6, rtol=0)


def test_absolute_strength_is_the_relative_one_times_its_maximum() -> None:
    problem = planted()
    relative = lasso(**problem.matrices, strength=0.2, tol=1e-9)
    absolute = lasso(**problem.matrices, strength=relative.stats["strength"], strength_is="absolute", tol=1e-9)
    torch.testing.assert_close(relative.value, absolute.value)


def test_single_precision_rounds_are_polished_to_the_same_certificate() -> None:
    problem = planted(samples=400, sources=80, targets=40)
    solution = lasso(**problem.matrices, strength=0.02, tol=1e-7, dtype=torch.float32)
    assert numpy_gap(problem, solution.value, solution.stats["strength"]).max() <= 1.05e-7


def test_a_warm_start_from_the_solution_ends_at_once() -> None:
    problem = planted()
    first = lasso(**problem.matrices, strength=0.1, tol=1e-6)
    again = lasso(**problem.matrices, strength=0.1, tol=1e-6, init=first.value)
    assert int(again.stats["iterations"].max()) == 0
    torch.testing.assert_close(again.value, first.value)


class Counted(L1):
    """Counts how often a problem with this penalty is prepared."""

    def check(self, sources: int, targets: int) -> None:
        PREPARED.append((sources, targets))
        super().check(sources, targets)


PREPARED: list[tuple[int, int]] = []


def test_a_problem_is_prepared_once_for_all_strengths() -> None:
    problem = planted(sources=30, targets=3)
    once = prepare(**problem.matrices)
    for strength in (0.5, 0.1, 0.02):
        alone = lasso(**problem.matrices, strength=strength, tol=1e-6)
        assert torch.equal(once.at(strength, tol=1e-6).value, alone.value)
    PREPARED.clear()
    data = Moments(problem.gram, problem.cross, problem.square, len(problem.features))
    plain = ebic(data)
    assert torch.equal(ebic(data, penalty=Counted()).solution.value, plain.solution.value)
    assert PREPARED == [(30, 3)]  # and not once for each of the twenty strengths


@pytest.mark.parametrize("form", ["gram", "residual"])
def test_data_forms_agree_with_each_other_and_with_fista_on_residuals(form: str) -> None:
    problem = planted(samples=40, sources=150, targets=4)
    solution = regress(problem.features, problem.targets, strength=0.1, tol=1e-9, form=form)
    strength = solution.stats["strength"]
    reference = Fista().solve(QuadraticResidual(problem.features, problem.targets), L1(), strength, tol=1e-9)
    torch.testing.assert_close(solution.value, reference.value, atol=5e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        sparse = problem.features.to_sparse_csr()
    again = regress(sparse, problem.targets, strength=0.1, tol=1e-9, form=form)
    torch.testing.assert_close(again.value, solution.value, atol=1e-6, rtol=0)


def test_rows_set_hands_elementwise_penalties_to_its_inner_solver() -> None:
    problem = planted()
    loss = QuadraticGram(problem.gram, problem.cross, problem.square)
    strength = L1().strength_max(problem.cross) * 0.1
    one, two = (solver.solve(loss, L1(), strength, tol=1e-8) for solver in (RowSet(), Fista()))
    assert torch.equal(one.value, two.value)


def test_threads_and_chunks_change_nothing() -> None:
    problem = planted(samples=300, sources=60, targets=50)
    one = lasso(**problem.matrices, strength=0.05)
    torch.set_num_threads(2)
    try:
        two = lasso(**problem.matrices, strength=0.05)
    finally:
        torch.set_num_threads(1)
    assert float((one.value - two.value).abs().max()) < 1e-10
    assert torch.equal(one.value, lasso(**problem.matrices, strength=0.05).value)
