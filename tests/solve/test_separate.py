"""Small regressions on designs of their own, solved side by side: what `lasso` gives for each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_circuitlasso import solve
from tl_circuitlasso.errors import InputError

BOX = solve.L1(non_negative=True, upper=1.0)


def problems(seed: int, count: int) -> list[solve.Moments]:
    """Contributions that add up to their target, of sizes over three decades; one source is dead."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        width = int(torch.randint(1, 30, (1,), generator=generator))
        rows = torch.randn(40, width, generator=generator, dtype=torch.float64) * torch.logspace(-3, 0, width).double()
        rows[:, :: max(width - 1, 2)] *= 0.0 if width > 5 else 1.0
        made.append(solve.moments_of(rows, rows.sum(1, keepdim=True)))
    return made


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([1e-3, 0.1, 1.5]), st.sampled_from([0.0, 1.0]))
def test_each_solution_is_the_one_that_lasso_gives_alone(seed: int, count: int, share: float, init: float) -> None:
    given_ones = problems(seed, count)
    strength = torch.stack([share * one.cross.amax().clamp_min(1e-12) for one in given_ones])
    for one, level, found in zip(
        given_ones, strength, solve.lassos(given_ones, strength=strength, upper=1.0, tol=1e-9, init=init)
    ):
        alone = solve.lasso(
            one.gram,
            one.cross,
            target_sq_norm=one.target_sq_norm,
            strength=float(level),
            strength_is="absolute",
            penalty=BOX,
            tol=1e-10,
        )
        fit = [float(0.5 * v.T @ one.gram @ v - one.cross.T @ v + level * v.sum()) for v in (found.value, alone.value)]
        assert fit[0] <= fit[1] + 1e-9 * float(one.target_sq_norm)
        assert bool(found.converged) and found.value.shape == one.cross.shape
        assert float(found.value.min()) >= 0 and float(found.value.max()) <= 1
        assert float(found.stats["strength"]) == float(level)


def test_a_regression_that_misses_its_tolerance_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="missed tol"):
        (solution,) = solve.lassos(problems(3, 1), strength=torch.tensor([1e-9]), max_iter=10, tol=1e-12)
    assert solution.status is solve.Status.MAX_ITERATIONS


def test_what_is_given_is_checked() -> None:
    one = problems(0, 1)[0]
    two = solve.Moments(one.gram, one.cross.repeat(1, 2), one.target_sq_norm.repeat(2), one.count)
    with pytest.raises(InputError, match="one target each: number 1 has 2"):
        solve.lassos([one, two], strength=torch.ones(2))
    for strength in (torch.ones(2), torch.zeros(1), torch.tensor([-1.0]), torch.tensor([torch.nan])):
        with pytest.raises(InputError, match="`strength` must be > 0"):
            solve.lassos([one], strength=strength)
    assert solve.lassos([], strength=torch.ones(0)) == []
