"""The minimax concave rule: finds planted parents, shrinks large coefficients less, is certified, wants entries."""

import pytest
import torch

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import L1, Group, moments_of, select


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 40, generator=generator, dtype=torch.float64)
    x[:, 1:] = 0.8 * x[:, :-1] + 0.6 * x[:, 1:]
    x = x - x.mean(0)
    truth = torch.zeros(40, 6, dtype=torch.float64)
    for column in range(6):
        truth[torch.randperm(40, generator=generator)[:4], column] = 1.0
    truth = truth / x.std(0)[:, None]
    y = x @ truth + 0.3 * torch.randn(800, 6, generator=generator, dtype=torch.float64)
    return x, y - y.mean(0), truth


def test_it_shrinks_large_coefficients_less_than_the_lasso(planted: tuple[torch.Tensor, ...]) -> None:
    x, y, _ = planted
    data = moments_of(x, y)
    concave, plain = (select(data, rule=rule, strengths=[0.1]) for rule in ("mcp", "ebic"))
    bias = [float((choice.solution.value - choice.refit).norm()) for choice in (concave, plain)]
    assert bias[0] < 0.7 * bias[1]


def test_it_finds_the_parents_and_is_certified(planted: tuple[torch.Tensor, ...]) -> None:
    x, y, truth = planted
    choice = select(moments_of(x, y), rule="mcp", penalty=L1())
    assert choice.rule == "mcp"
    assert bool(choice.solution.converged.all())
    assert torch.equal(choice.solution.value != 0, truth != 0)
    assert bool(((choice.strength > 0) & (choice.strength < 1)).all())


def test_bounds_and_forbidden_entries_hold(planted: tuple[torch.Tensor, ...]) -> None:
    x, y, _ = planted
    weights = torch.ones(40, 6, dtype=torch.float64)
    weights[:20] = torch.inf
    choice = select(moments_of(x, y), rule="mcp", penalty=L1(weights, non_negative=True))
    assert bool((choice.solution.value[:20] == 0).all()) and bool((choice.solution.value >= 0).all())


def test_groups_are_refused(planted: tuple[torch.Tensor, ...]) -> None:
    x, y, _ = planted
    with pytest.raises(InputError, match="elementwise"):
        select(moments_of(x, y), rule="mcp", penalty=Group(torch.arange(40), torch.arange(6)))
