"""Corners that random search has found: each was a wrong answer, a wrong certificate or a crash once."""

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.solve.judge import Data, Terms
from tests.solve.problems import Planted, numpy_gap, planted
from tl_circuitlasso.solve import (
    L1,
    ElasticNet,
    Group,
    Moments,
    RowSet,
    Solution,
    Status,
    code_sums,
    cross_validate,
    ebic,
    lasso,
    moments_of,
    path,
    refit_support,
    select,
)
from tl_circuitlasso.solve.pairs import PairSums, refit_entries

SOLVERS = ("working_set", "torch", "fista")


def solved(problem: Planted, **options: Any) -> Solution:
    """A solution whose own certificate and the one from the data both hold."""
    solution = lasso(**problem.matrices, **options)
    tol = options.get("tol", 1e-4)
    assert solution.status is Status.SOLVED and float(solution.gap.max()) <= tol
    assert numpy_gap(problem, solution.value, solution.stats["strength"]).max() <= 1.05 * tol
    return solution


# ---- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_out_of_bounds_is_no_solution(solver: str) -> None:
    gram, cross = torch.full((3, 3), 1e-3, dtype=torch.float64), -torch.ones(3, 1, dtype=torch.float64)
    start = torch.tensor([[-1.2], [1.0], [0.0]])  # nothing pulls upwards, and the negative entry hides that
    for penalty in (L1(non_negative=True), L1(non_negative=True, upper=10.0), L1(torch.full((3,), torch.inf))):
        options = {"strength": 0.1, "penalty": penalty, "tol": 1e-6, "init": start, "solver": solver}
        solution = lasso(gram, cross, target_sq_norm=torch.full((1,), 1e4, dtype=torch.float64), **options)
        assert not bool(solution.value.any()) and solution.status is Status.SOLVED


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [1e3, 1e8])
def test_a_start_far_off_costs_nothing(solver: str, size: float) -> None:
    problem = planted(samples=10, sources=25, targets=3)
    start = size * torch.randn(25, 3, generator=torch.Generator().manual_seed(0))
    solved(problem, strength=0.2, tol=1e-6, init=start, solver=solver)


def test_a_start_far_off_costs_groups_nothing() -> None:
    problem = planted(samples=10, sources=25, targets=4)
    start = 1e6 * torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    penalty = Group(torch.arange(25) // 5, torch.arange(4) // 2)
    for solver in ("fista", RowSet()):
        solution = lasso(**problem.matrices, strength=0.3, penalty=penalty, init=start, solver=solver)
        assert solution.status is Status.SOLVED


# ---- certificates are about the value that comes with them ----------------------------------------------------------


@pytest.mark.parametrize("solver", ["working_set", "torch"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_gap_is_that_of_the_value(solver: str, rounds: int) -> None:
    problem = planted(samples=300, sources=150, correlation=0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = lasso(**problem.matrices, strength=0.001, tol=1e-10, solver=solver, max_iter=rounds)
    judged = numpy_gap(problem, solution.value, solution.stats["strength"])
    np.testing.assert_allclose(solution.gap.numpy(), judged, rtol=1e-6, atol=1e-12)


def test_the_gap_of_rows_is_that_of_the_value() -> None:
    problem = planted(samples=300, sources=60, correlation=0.95)
    penalty = Group(torch.arange(60), torch.zeros(6, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"strength": 0.05, "tol": 1e-10, "penalty": penalty, "solver": RowSet(max_iter=1)}
        solution = lasso(**problem.matrices, **options)
    data = Data("quadratic", problem.features.numpy(), problem.targets.numpy())
    terms = Terms(np.ones((60, 1)), rows=np.arange(60), columns=np.zeros(6, dtype=int))
    judged = data.gap(solution.value.numpy(), terms, solution.stats["strength"].numpy())
    assert float(solution.gap[0]) == pytest.approx(judged, rel=1e-6)


# ---- hard supports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("solver", ["working_set", "torch"])
def test_copies_are_solved_at_any_strength(solver: str, strength: float, apart: float) -> None:
    problem = planted(samples=80, sources=20, targets=3, correlation=0.9)
    noise = torch.randn(80, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([problem.features, problem.features + apart * noise], 1)
    twice = Planted(x - x.mean(0), problem.targets, torch.cat([problem.truth] * 2))
    solved(twice, strength=strength, tol=1e-6, solver=solver)


@pytest.mark.parametrize("samples", [2, 10, 30])
@pytest.mark.parametrize("strength", [1e-3, 1e-6])
@pytest.mark.parametrize("solver", ["working_set", "torch"])
def test_more_sources_than_samples_are_solved_at_small_strengths(solver: str, samples: int, strength: float) -> None:
    solved(planted(samples=samples, sources=40, targets=4, seed=5), strength=strength, tol=1e-8, solver=solver)


@pytest.mark.parametrize("strength", [1e-2, 1e-6])
def test_an_elastic_net_of_low_rank_is_solved_at_small_strengths(strength: float) -> None:
    problem = planted(samples=60, sources=30, targets=3)
    mixed = torch.randn(3, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = Planted(problem.features[:, :3] @ mixed, problem.targets, problem.truth)
    solution = lasso(**low.matrices, strength=strength, penalty=ElasticNet(0.5), tol=1e-6)
    data = Data("quadratic", low.features.numpy(), low.targets.numpy())
    terms = Terms(np.full((30, 3), 0.5), squared=0.5)
    assert solution.status is Status.SOLVED
    assert data.gap(solution.value.numpy(), terms, solution.stats["strength"].numpy()) <= 1.05e-6


def test_a_dead_member_does_not_change_the_scale_of_its_group() -> None:
    problem = planted(samples=60, sources=9, targets=2)
    x = 1e-6 * problem.features
    x[:, [1, 5]] = 0
    dead = Planted(x, problem.targets, problem.truth)
    penalty = Group(torch.arange(9) // 3, torch.zeros(2, dtype=torch.long))
    solution = lasso(**dead.matrices, strength=0.2, penalty=penalty, tol=1e-6)
    assert solution.status is Status.SOLVED and int(solution.stats["iterations"].max()) < 1000
    alive = [0, 2, 3, 4, 6, 7, 8]
    rows = torch.arange(9)[alive] // 3
    part = Planted(x[:, alive], problem.targets, problem.truth[alive])
    same = lasso(**part.matrices, strength=0.2, penalty=Group(rows, torch.zeros(2, dtype=torch.long)), tol=1e-8)
    torch.testing.assert_close(solution.value[alive] * 1e-6, same.value * 1e-6, atol=1e-2, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_non_negative_least_squares_are_not_negative(seed: int) -> None:
    problem = planted(samples=40, sources=15, targets=4, seed=seed)
    for penalty in (
        L1(non_negative=True),
        L1(non_negative=True, upper=0.3),
        Group(torch.arange(15), torch.arange(4), non_negative=True),
    ):
        value = lasso(**problem.matrices, strength=0.0, penalty=penalty, tol=1e-6).value
        assert float(value.min()) >= 0


# ---- refits and choices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_share_their_refit(copies: int, dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ torch.tensor([[2.0], [-1.0], [0.0]], dtype=torch.float64)
    wide = torch.cat([x[:, :1]] * copies + [x[:, 1:]], 1)
    data = moments_of(wide, y)
    single = Moments(data.gram.to(dtype), data.cross.to(dtype), data.target_sq_norm.to(dtype), 50)
    everything = torch.ones(copies + 2, 1)
    fit = refit_support(single, everything)[:, 0]
    assert float(fit[:copies].sum()) == pytest.approx(2.0, abs=1e-3)
    assert fit[copies:].tolist() == pytest.approx([-1.0, 0.0], abs=1e-3)
    if dtype is torch.float64:
        assert fit[:copies].tolist() == pytest.approx([2 / copies] * copies, abs=1e-3)
    entries = refit_entries(single, torch.arange(copies + 2), torch.zeros(copies + 2, dtype=torch.long))
    assert float(entries[:copies].sum()) == pytest.approx(2.0, abs=1e-3)
    assert entries[copies:].tolist() == pytest.approx([-1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("rule", ["ebic", "adaptive", "mcp"])
def test_a_strength_can_be_chosen_beside_copies(rule: str) -> None:
    problem = planted(samples=60, sources=8, targets=4, seed=3)
    x = torch.cat([problem.features] * 3, 1)
    choice = select(moments_of(x, problem.targets), rule=rule)
    assert bool(choice.refit.isfinite().all()) and not bool(choice.scores.isnan().any())
    assert choice.solution.status is Status.SOLVED


def test_coupled_targets_share_the_chosen_strength() -> None:
    problem = planted(samples=100, sources=12, targets=4, seed=7)
    loud = Planted(problem.features, problem.targets * torch.tensor([1.0, 0.01, 1.0, 0.01]), problem.truth)
    penalty = Group(torch.arange(12) // 2, torch.tensor([0, 0, 1, 1]))
    folds = [moments_of(loud.features[k::4], loud.targets[k::4]) for k in range(4)]
    data = moments_of(loud.features, loud.targets)
    whole = Data("quadratic", loud.features.numpy(), loud.targets.numpy())
    terms = Terms(np.ones((6, 2)), rows=np.arange(12) // 2, columns=np.array([0, 0, 1, 1]))
    choose = {
        "ebic": partial(ebic, data, penalty=penalty),
        "cv": partial(cross_validate, folds, penalty=penalty),
        "cv-1se": partial(cross_validate, folds, penalty=penalty, one_se=True),
    }
    for name, verb in choose.items():
        choice = verb()
        assert choice.strength[0] == choice.strength[1] and choice.strength[2] == choice.strength[3], name
        value, level = choice.solution.value.numpy(), choice.solution.stats["strength"].numpy()
        assert whole.gap(value, terms, level) <= 1.05e-4, name


# ---- tensors that carry gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_tensors_that_require_gradients_are_data(solver: str, tmp_path) -> None:
    problem = planted(targets=3)
    plain = solved(problem, strength=0.2, penalty=L1(torch.ones(30)), init=torch.ones(30, 3), solver=solver)
    matrices = {name: matrix.clone().requires_grad_() for name, matrix in problem.matrices.items()}
    weights, init = torch.ones(30, requires_grad=True), torch.ones(30, 3, requires_grad=True)
    level = torch.tensor(0.2, requires_grad=True)
    again = lasso(**matrices, strength=level, penalty=L1(weights), init=init, solver=solver)
    torch.testing.assert_close(again.value, plain.value)
    assert not again.value.requires_grad and all(matrix.grad is None for matrix in matrices.values())
    chosen = path(partial(lasso, **matrices, solver=solver), [0.5, 0.2])
    assert not chosen[-1].value.requires_grad
    weights = torch.ones(1, requires_grad=True).expand(30)  # one number for all, as a checkpoint's fingerprint sees it
    stored = lasso(**matrices, strength=0.2, penalty=L1(weights), solver=solver, checkpoint=tmp_path / "solve")
    torch.testing.assert_close(stored.value, plain.value, atol=1e-3, rtol=0)


def test_sums_of_samples_that_require_gradients_do_not() -> None:
    x, y = (matrix.clone().requires_grad_() for matrix in (planted(targets=3).features, planted(targets=3).targets))
    assert not moments_of(x, y).gram.requires_grad
    assert not code_sums(x, y).centred().cross.requires_grad
    assert not PairSums.empty(32, 3).add(x, y, x[:, :2]).centred().cross.requires_grad


def test_a_solve_of_one_expanded_number_can_be_stored(tmp_path) -> None:
    one = torch.ones((), dtype=torch.float64)
    problem = {"gram": one.expand(1, 1), "cross": 0.5 * one.expand(1, 1), "target_sq_norm": one.expand(1)}
    group = Group(torch.zeros((), dtype=torch.long).expand(1), torch.zeros((), dtype=torch.long).expand(1))
    for _ in range(2):
        stored = lasso(**problem, strength=0.5, penalty=group, checkpoint=tmp_path / "solve")
    assert stored.value.item() == pytest.approx(0.25)
