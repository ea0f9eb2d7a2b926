"""Properties over random problems: the certificate is true, KKT holds, and units don't matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.solve.judge import Data, Terms, conic_optimum
from tests.solve.problems import Planted, numpy_gap, planted
from tl_circuitlasso.errors import SolveError
from tl_circuitlasso.solve import L1, ElasticNet, Fista, Group, QuadraticGram, Status, lasso, relative_gap

BUSY = st.tuples(st.integers(3, 40), st.integers(1, 25), st.integers(1, 4), st.integers(0, 10_000))
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 25), st.integers(1, 4), st.integers(0, 10_000))


def awkward(shape: tuple[int, int, int, int], flaws: tuple[str, ...]) -> Planted:
    """A planted problem with duplicates, dead columns, low rank, zero targets or wild units."""
    samples, sources, targets, seed = shape
    problem = planted(samples, sources, targets, seed)
    x, y, truth = problem.features.clone(), problem.targets.clone(), problem.truth
    generator = torch.Generator().manual_seed(seed)
    if "duplicate" in flaws:
        x[:, -1] = x[:, 0]
    if "low rank" in flaws:
        x = x[:, :2] @ torch.randn(min(2, sources), sources, generator=generator, dtype=torch.float64)
    if "dead source" in flaws:
        x[:, sources // 2] = 0
    if "units" in flaws:
        x = x * 10.0 ** torch.randint(-6, 7, (sources,), generator=generator)
        y = y * 10.0 ** torch.randint(-6, 7, (targets,), generator=generator)
    if "dead target" in flaws:
        y[:, 0] = 0
    return Planted(x, y, truth)


FLAWS = st.lists(st.sampled_from(["duplicate", "low rank", "dead source", "units", "dead target"]), unique=True)


@settings(max_examples=60)
@given(
    SHAPES,
    FLAWS.map(tuple),
    st.sampled_from([0.9, 0.3, 0.05]),
    st.booleans(),
    st.sampled_from(["auto", "working_set"]),  # what small problems get, and what large ones do
)
def test_kkt_and_an_independent_gap_hold_on_any_problem(shape, flaws, strength, standardise, solver) -> None:
    problem = awkward(shape, flaws)
    solution = lasso(**problem.matrices, strength=strength, tol=1e-6, standardise=standardise, solver=solver)
    assert solution.status is Status.SOLVED
    spread = problem.gram.diagonal().sqrt().numpy()[:, None]
    weights = np.where(spread > 0, spread, np.inf) if standardise else 1.0
    judged = numpy_gap(problem, solution.value, solution.stats["strength"], weights)
    assert judged.max(initial=0) <= 1.05e-6
    assert bool((solution.value[solution.stats["dead_sources"]] == 0).all())
    assert bool((solution.value[:, solution.stats["dead_targets"]] == 0).all())


@given(SHAPES, st.sampled_from(["float16", "bfloat16", "float32"]))
def test_low_precision_input_is_accepted_and_solved(shape, dtype) -> None:
    problem = planted(*shape)
    gram = problem.gram / problem.gram.diagonal().max().clamp(min=1e-9)
    scale = problem.square.max().clamp(min=1e-9)
    low = {
        "gram": gram.to(getattr(torch, dtype)),
        "cross": (problem.cross / (problem.gram.diagonal().max() * scale).clamp(min=1e-9).sqrt()).to(
            getattr(torch, dtype)
        ),
        "target_sq_norm": (problem.square / scale).to(getattr(torch, dtype)),
    }
    solution = lasso(**low, strength=0.3, tol=1e-4)
    assert solution.value.dtype == torch.float64
    assert bool(solution.converged.all())


@settings(max_examples=15)
@given(BUSY, st.sampled_from([L1(), L1(non_negative=True), L1(2.0, squared=0.3), L1(non_negative=True, upper=0.2)]))
def test_the_gap_bounds_the_suboptimality_of_any_point(shape, penalty) -> None:
    problem = planted(*shape)
    loss = QuadraticGram(problem.gram, problem.cross, problem.square)
    strength = 0.2 * penalty.strength_max(problem.cross) + 1e-9
    best = Fista().solve(loss, penalty, strength, tol=1e-9).value
    point = torch.randn(best.shape, dtype=torch.float64) * 0.3 + best
    point = penalty.prox(point, 0.01, strength)

    def objective(value: torch.Tensor) -> torch.Tensor:
        assert penalty.value(value, strength).isfinite().all()
        return loss.objective(value, loss.negative_gradient(value)) + penalty.value(value, strength)

    excess = objective(point) - objective(best)
    gap = relative_gap(loss, penalty, point, strength) * loss.null_objective()
    assert bool((gap.nan_to_num(0) >= excess - 1e-7).all())


@pytest.mark.parametrize("l1_ratio", [0.9, 0.3])
@pytest.mark.parametrize("non_negative", [False, True])
def test_the_gap_of_an_elastic_net_shrinks_with_the_suboptimality(l1_ratio: float, non_negative: bool) -> None:
    problem = planted(samples=100, targets=3)
    loss, penalty = (
        QuadraticGram(problem.gram, problem.cross, problem.square),
        ElasticNet(l1_ratio, non_negative=non_negative),
    )
    strength = 0.1 * penalty.strength_max(problem.cross)
    terms = Terms(np.full((30, 3), l1_ratio), non_negative, squared=1 - l1_ratio)
    data = Data("quadratic", problem.features.numpy(), problem.targets.numpy())
    best = conic_optimum(data, terms, strength.numpy())
    answer = Fista().solve(loss, penalty, strength, tol=1e-10).value
    shares = []
    for size in (1e-1, 1e-2, 1e-3):
        near = answer * (1 + size * torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None])
        gap = (relative_gap(loss, penalty, near, strength) * loss.null_objective()).sum()
        excess = data.objective(near.numpy(), terms, strength.numpy()) - best
        assert float(gap) >= excess - 1e-9
        shares.append(float(gap) / excess)
    # both fall with the square of the distance; scaled into the dual ball alone, the gap fell with the distance
    assert shares[2] <= 3 * shares[1]


@settings(max_examples=12)
@given(BUSY, st.booleans())
def test_group_gap_bounds_the_suboptimality_of_any_point(shape, non_negative) -> None:
    _samples, sources, targets, _seed = shape
    problem = planted(*shape)
    penalty = Group(torch.arange(sources) // 2, torch.arange(targets) // 2, non_negative=non_negative)
    loss = QuadraticGram(problem.gram, problem.cross, problem.square)
    strength = 0.2 * penalty.strength_max(problem.cross) + 1e-9
    best = Fista().solve(loss, penalty, strength, tol=1e-8).value
    point = penalty.prox(best + 0.3 * torch.randn(best.shape, dtype=torch.float64), 0.01, strength)

    def objective(value: torch.Tensor) -> torch.Tensor:
        fit = loss.objective(value, loss.negative_gradient(value)).sum()
        per_group = [
            penalty.value(value, strength)[penalty.target_groups == g][0] for g in penalty.target_groups.unique()
        ]
        return fit + sum(per_group)

    gap = relative_gap(loss, penalty, point, strength).nan_to_num(0, posinf=0)
    total = sum(
        gap[penalty.target_groups == g][0] * loss.null_objective()[penalty.target_groups == g].sum()
        for g in penalty.target_groups.unique()
    )
    assert float(total) >= float(objective(point) - objective(best)) - 1e-7


@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3, 1e-2])
def test_without_a_compiler_near_copies_are_solved(apart: float) -> None:
    problem = planted(samples=200, sources=20, targets=3, correlation=0.9)
    noise = torch.randn(200, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([problem.features, problem.features + apart * noise], 1)
    twice = Planted(x - x.mean(0), problem.targets, torch.cat([problem.truth] * 2))
    solution = lasso(**twice.matrices, strength=0.02, tol=1e-6, solver="torch")
    assert solution.status is Status.SOLVED and int(solution.stats["iterations"].max()) < 30
    assert numpy_gap(twice, solution.value, solution.stats["strength"], 1.0).max() <= 1.05e-6


def test_rescaling_one_column_a_millionfold_keeps_solution_and_certificate() -> None:
    problem = planted(seed=3)
    scale = torch.ones(30, dtype=torch.float64)
    scale[4], scale[9] = 1e6, 1e-6
    scaled = Planted(problem.features * scale, problem.targets, problem.truth)
    plain = lasso(**problem.matrices, strength=0.1, standardise=True, tol=1e-8)
    wild = lasso(**scaled.matrices, strength=0.1, standardise=True, tol=1e-8)
    torch.testing.assert_close(plain.value, wild.value * scale[:, None], atol=1e-6, rtol=0)


def test_zero_targets_and_zero_sources_are_answered() -> None:
    problem = planted()
    none = lasso(problem.gram, problem.cross[:, :0], target_sq_norm=problem.square[:0], strength=0.1)
    assert none.value.shape == (30, 0) and none.status is Status.SOLVED
    empty = lasso(problem.gram[:0, :0], problem.cross[:0], target_sq_norm=problem.square, strength=0.1)
    assert empty.value.shape == (0, 6) and bool(empty.converged.all())


@pytest.mark.parametrize("solver", ["working_set", "torch", "fista"])
def test_running_out_of_iterations_warns_with_the_worst_target_and_strict_raises(solver: str) -> None:
    problem = planted(samples=300, sources=150, correlation=0.95)  # more parents than a first working set holds
    options = {**problem.matrices, "strength": 0.001, "tol": 1e-10, "solver": solver, "max_iter": 1}
    with pytest.warns(RuntimeWarning, match=r"targets missed tol=1e-10; the worst is target \d") as caught:
        solution = lasso(**options)
    assert len(caught) == 1
    assert solution.status is Status.MAX_ITERATIONS and not bool(solution.converged.all())
    with pytest.raises(SolveError, match="raise `max_iter`"):
        lasso(**options, strict=True)


def test_a_tolerance_below_rounding_is_reported_as_stalled() -> None:
    problem = planted(correlation=0.95)
    with pytest.warns(RuntimeWarning, match="no more progress at this precision"):
        solution = lasso(**problem.matrices, strength=0.05, tol=1e-30)
    assert solution.status is Status.STALLED
