"""The solver of small problems: which problems it gets, what it compiles, and what it hands on."""

import pytest
import torch

from tests.apart import apart
from tests.solve.problems import Planted, numpy_gap, planted
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import L1, Fista, Group, Logistic, QuadraticGram, Sweeps, WorkingSet, lasso
from tl_circuitlasso.solve.lasso import SWEEPS_UP_TO, SWEPT_SOURCES, choose_solver
from tl_circuitlasso.solve.sweeps import ROUNDS


def chosen(sources: int, targets: int, solver: str = "auto", dtype: torch.dtype | None = None) -> str:
    found = choose_solver(solver, L1(), (sources, targets), 7, dtype, 1e-4, torch.device("cpu"))
    assert (found.beyond if isinstance(found, Sweeps) else found).max_iter == 7
    return type(found).__name__


def test_small_problems_are_swept_and_others_get_working_sets() -> None:
    assert chosen(40, 8) == chosen(SWEPT_SOURCES, 8) == chosen(1, SWEEPS_UP_TO) == "Sweeps"
    assert chosen(SWEPT_SOURCES + 1, 1) == chosen(128, SWEEPS_UP_TO // 128 + 1) == "WorkingSet"
    assert chosen(40, 8, "working_set") == chosen(40, 8, dtype=torch.float32) == "WorkingSet"


def compiled_by_a_small_problem() -> list[str]:
    """The kernels that a first call compiles, or loads from numba's cache."""
    from tl_circuitlasso.solve import kernels, sweep_kernels

    lasso(**planted().matrices, strength=0.1)
    found = {**vars(kernels), **vars(sweep_kernels)}
    return [name for name, thing in found.items() if getattr(thing, "signatures", None)]


def test_a_small_problem_compiles_one_small_kernel() -> None:
    """All others together take ten times as long to compile, on the first call that anyone makes."""
    assert apart(compiled_by_a_small_problem) == ["sweep_whole"]


def test_near_copies_go_on_beyond_the_sweeps_and_only_they(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = planted(samples=60, sources=12, seed=3)
    x = problem.features.clone()
    x[:, 1] = x[:, 0] + 0.01 * torch.randn(60, dtype=torch.float64)
    problem = Planted(x, torch.stack([x[:, 0] - x[:, 1], x[:, 5]], 1), problem.truth)
    ordinary, handed = WorkingSet.solve, []

    def seen(self: WorkingSet, loss: QuadraticGram, *arguments: object, **options: object) -> object:
        handed.append(loss.shape[1])
        return ordinary(self, loss, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkingSet, "solve", seen)
    solution = lasso(**problem.matrices, strength=0.01, tol=1e-8)
    assert handed == [1] and bool(solution.converged.all())
    assert int(solution.stats["iterations"][0]) > ROUNDS > int(solution.stats["iterations"][1])
    assert numpy_gap(problem, solution.value, solution.stats["strength"]).max() <= 1.05e-8


def test_rounds_are_bounded_and_a_miss_is_told() -> None:
    problem = planted(correlation=0.99)
    with pytest.warns(RuntimeWarning, match="missed tol"):
        solution = lasso(**problem.matrices, strength=1e-4, tol=1e-14, max_iter=1)
    assert int(solution.stats["iterations"].max()) == 1 and solution.stats["solver"] == "Sweeps"
    again = lasso(**problem.matrices, strength=0.1, tol=1e-10, init=solution.value)
    cold = Fista().solve(QuadraticGram(*problem.matrices.values()), L1(), again.stats["strength"], tol=1e-10)
    torch.testing.assert_close(again.value, cold.value, atol=1e-5, rtol=0)


def test_what_it_can_not_sweep_is_refused() -> None:
    problem = planted(targets=1)
    loss, level = QuadraticGram(*problem.matrices.values()), torch.ones(1, dtype=torch.float64)
    groups = Group(torch.arange(30) // 3, torch.zeros(1, dtype=torch.long))
    labels = (problem.targets > 0).double()
    likelihood = Logistic(problem.features, labels, torch.zeros(1, 1, dtype=torch.float64))
    for what, penalty in ((loss, groups), (likelihood, L1())):
        with pytest.raises(InputError, match="`Sweeps` needs a Gram"):
            Sweeps().solve(what, penalty, level, tol=1e-4)
