"""The compiled group solver against FISTA, and the moments of a dictionary against its features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import (
    Fista,
    Group,
    GroupSet,
    QuadraticGram,
    fit_dictionary,
    group_set,
    lasso,
    moments_of,
    relative_gap,
    row_group,
)
from tl_circuitlasso.solve.base import Solution


def total_objective(loss: QuadraticGram, penalty: Group, solution: Solution) -> float:
    fit = loss.objective(solution.value, loss.negative_gradient(solution.value)).sum()
    sizes = penalty.value(solution.value, solution.stats["strength"])
    groups = penalty.target_groups
    return float(fit + sum(sizes[groups == k][0] for k in groups.unique()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.7, 0.2, 0.03]), alone=st.booleans())
def test_group_set_is_fista_on_uneven_weighted_groups(seed: int, strength: float, alone: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sources, targets, samples = number(1, 25), number(1, 10), number(2, 50)
    x, y = draw(samples, sources) * draw(sources).exp(), draw(samples, targets)
    if seed % 3 == 0:
        x[:, 0] = 0
    if seed % 4 == 0 and sources > 2:
        x[:, 1] = x[:, 2]
    x, y = x - x.mean(0), y - y.mean(0)
    rows = torch.randint(0, max(1, sources // 3), (sources,), generator=generator)
    columns = torch.randint(0, max(1, targets // 2), (targets,), generator=generator)
    weights = torch.rand(int(rows.max()) + 1, int(columns.max()) + 1, generator=generator, dtype=torch.float64) + 0.5
    if seed % 5 == 0:
        weights[0, 0] = torch.inf
    penalty, data = Group(rows, columns, weights), moments_of(x, y)
    loss = QuadraticGram(data.gram, data.cross, data.target_sq_norm)
    problem = {"target_sq_norm": data.target_sq_norm, "strength": strength, "penalty": penalty, "tol": 1e-8}
    with pytest.MonkeyPatch.context() as patch:
        if not alone:  # the products of many target groups taken together, as for a large Gram
            patch.setattr(group_set, "ALONE_UP_TO", 0)
        fast = lasso(data.gram, data.cross, solver=GroupSet(), **problem)
    slow = lasso(data.gram, data.cross, solver=Fista(), **problem)
    assert bool(fast.converged.all())
    assert total_objective(loss, penalty, fast) <= total_objective(loss, penalty, slow) * (1 + 1e-6) + 1e-12
    assert float(relative_gap(loss, penalty, fast.value, fast.stats["strength"]).max()) <= 1.05e-8
    if seed % 5 == 0:
        assert bool((fast.value[rows == 0][:, columns == 0] == 0).all())


def test_a_warm_start_at_the_answer_moves_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(60, k, generator=generator, dtype=torch.float64) for k in (12, 6))
    data = moments_of(x, y)
    penalty = Group(torch.arange(12) // 3, torch.arange(6) // 2)
    problem = {"target_sq_norm": data.target_sq_norm, "strength": 0.2, "penalty": penalty, "solver": GroupSet()}
    first = lasso(data.gram, data.cross, tol=1e-9, **problem)
    again = lasso(data.gram, data.cross, tol=1e-6, init=first.value, **problem)
    assert int(again.stats["iterations"].max()) == 0
    torch.testing.assert_close(again.value, first.value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("off", [0.0, 0.1, 0.3, 0.9])
def test_groups_that_are_nearly_white_need_no_turning(off: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(400, k, generator=generator, dtype=torch.float64) for k in (20, 6))
    x[:, 1::2] += off * x[:, ::2]
    y = y + x[:, :6] - x[:, 1:7]
    data, penalty = moments_of(x, y), Group(torch.arange(20) // 2, torch.arange(6))
    loss = QuadraticGram(data.gram, data.cross, data.target_sq_norm)
    problem = {"target_sq_norm": data.target_sq_norm, "strength": 0.1, "penalty": penalty, "tol": 1e-10}
    fast = lasso(data.gram, data.cross, solver=GroupSet(), **problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_set, "WHITE", 0.0)
        turned = lasso(data.gram, data.cross, solver=GroupSet(), **problem)
    assert bool(fast.converged.all())
    assert float(relative_gap(loss, penalty, fast.value, fast.stats["strength"]).max()) <= 1.05e-10
    torch.testing.assert_close(fast.value, turned.value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_rounds_are_bounded_and_counted(rounds: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(60, k, generator=generator, dtype=torch.float64) for k in (50, 4))
    data, penalty = moments_of(x, y), Group(torch.arange(50) // 2, torch.arange(4))
    problem = {"target_sq_norm": data.target_sq_norm, "strength": 0.05, "penalty": penalty, "tol": 1e-12}
    with pytest.warns(RuntimeWarning, match="missed"):
        solution = lasso(data.gram, data.cross, solver=GroupSet(max_iter=rounds, least=1), **problem)
    used = int(solution.stats["iterations"].max())
    assert used == rounds
    assert int(lasso(data.gram, data.cross, solver=GroupSet(least=1), **problem).stats["iterations"].max()) > used


@pytest.mark.parametrize("alone_up_to", [0, 1 << 20])
def test_a_gap_is_that_of_the_coefficients_beside_it(alone_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_set, "ALONE_UP_TO", alone_up_to)
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (60, 6))
    x[:, 1:] += 3 * x[:, :-1]
    data, penalty = moments_of(x, x[:, :6] + y), row_group(60, 6)
    loss = QuadraticGram(data.gram, data.cross, data.target_sq_norm)
    strength = 0.01 * penalty.strength_max(data.cross)
    answer = GroupSet(max_iter=1, least=2).solve(loss, penalty, strength, tol=1e-9)
    assert float(answer.gap.max()) > 1e-9
    torch.testing.assert_close(answer.gap, relative_gap(loss, penalty, answer.value, strength), rtol=1e-6, atol=1e-12)


def test_group_set_refuses_bounds() -> None:
    gram, cross = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(InputError, match="RowSet"):
        lasso(
            gram, cross, target_sq_norm=torch.full((1,), 4.0), strength=0.1, solver=GroupSet(),
            penalty=row_group(2, 1, non_negative=True),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["hinge", "spline", "fourier"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_slabs_of_single_precision_give_the_moments_of_the_features(kind: str, size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = 5 + 3 * torch.randn(5000, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(5000, 3, generator=generator, dtype=torch.float64) + x[:, :3].abs() + 100
    dictionary = fit_dictionary(x, kind=kind, size=size)
    features = dictionary.transform(x)
    exact = moments_of(features - features.mean(0), y - y.mean(0))
    found = dictionary.moments(x, y)
    assert found.count == 5000
    torch.testing.assert_close(found.gram.double(), exact.gram, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.cross.double(), exact.cross, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.target_sq_norm.double(), exact.target_sq_norm, rtol=1e-6, atol=0)


def test_copies_and_constants_in_a_dictionary_leave_a_definite_gram() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100, 30, generator=generator, dtype=torch.float64)
    x[:, 1], x[:, 2], x[:, 3] = x[:, 0], 7.0, (x[:, 3] > 1).double()
    y = torch.randn(100, 5, generator=generator, dtype=torch.float64)
    dictionary = fit_dictionary(x, kind="spline", size=5)
    data = dictionary.moments(x, y)
    solution = lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.1, penalty=dictionary.groups(5)
    )
    assert bool(solution.converged.all())
    assert bool((solution.value.view(30, dictionary.size, -1)[2] == 0).all())


def test_moments_of_nothing_say_so() -> None:
    dictionary = fit_dictionary(torch.linspace(-1, 1, 20)[:, None])
    with pytest.raises(InputError, match="same samples"):
        dictionary.moments(torch.zeros(0, 1), torch.zeros(0, 2))
