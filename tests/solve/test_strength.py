"""Choices of strength recover planted supports; paths and moments add up."""

from functools import partial

import pytest
import torch

from tests.solve.problems import planted
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import (
    Moments,
    cross_validate,
    ebic,
    fit_dictionary,
    geometric_strengths,
    lasso,
    moments_of,
    path,
    refit_support,
    select,
    stability,
    total,
)

PROBLEM = planted(samples=500, sources=40, targets=8)
PARTS = [moments_of(PROBLEM.features[k::10], PROBLEM.targets[k::10]) for k in range(10)]


def f1(value: torch.Tensor) -> float:
    found, true = value != 0, PROBLEM.truth != 0
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def test_moments_of_parts_add_up_and_subtract() -> None:
    whole = moments_of(PROBLEM.features, PROBLEM.targets)
    added = total(PARTS)
    torch.testing.assert_close(added.gram, whole.gram)
    back = added - PARTS[0]
    rest = total(PARTS[1:])
    torch.testing.assert_close(back.cross, rest.cross)
    assert back.count == rest.count == 450
    with pytest.raises(InputError, match="no samples are left"):
        PARTS[0] - PARTS[0]


def test_a_path_equals_cold_solves() -> None:
    verb = partial(lasso, **PROBLEM.matrices, tol=1e-9)
    strengths = geometric_strengths(4, 0.05)
    for strength, solution in zip(strengths, path(verb, strengths)):
        torch.testing.assert_close(solution.value, verb(strength=strength).value, atol=1e-4, rtol=0)


def test_refits_are_least_squares_on_the_support() -> None:
    data = total(PARTS)
    value = lasso(**PROBLEM.matrices, strength=0.2).value
    fitted = refit_support(data, value)
    for j in range(8):
        rows = (value[:, j] != 0).nonzero()[:, 0]
        expected = torch.linalg.lstsq(PROBLEM.features[:, rows], PROBLEM.targets[:, j]).solution
        torch.testing.assert_close(fitted[rows, j], expected, atol=1e-6, rtol=0)
    assert bool((fitted[value == 0] == 0).all())


def test_rules_for_edges_recover_the_planted_support() -> None:
    data = total(PARTS)
    scores = {rule: f1(select(data, rule=rule).solution.value) for rule in ("fixed", "ebic", "adaptive", "auto")}
    assert scores["ebic"] > max(0.8, scores["fixed"]) and scores["auto"] == scores["adaptive"] >= scores["ebic"]
    assert f1((stability(PARTS) >= 0.8).double()) > 0.7


def test_the_chosen_solution_is_certified_and_stands_on_the_path() -> None:
    choice = ebic(total(PARTS), tol=1e-6)
    assert bool(choice.solution.converged.all())
    again = lasso(**PROBLEM.matrices, strength=choice.strength, tol=1e-6)
    torch.testing.assert_close(choice.solution.value, again.value, atol=1e-3, rtol=0)


def test_cross_validation_predicts_and_one_standard_error_is_stronger() -> None:
    strengths = geometric_strengths(8, 0.02)
    least = cross_validate(PARTS[:5], strengths=strengths)
    one_se = cross_validate(PARTS[:5], strengths=strengths, one_se=True)
    assert bool((one_se.strength >= least.strength).all())
    held_out = PARTS[7]
    value = least.solution.value
    error = held_out.target_sq_norm - (value * (2 * held_out.cross - held_out.gram @ value)).sum(0)
    explained = error < 0.5 * held_out.target_sq_norm
    assert bool(explained[(PROBLEM.truth != 0).any(0)].all())


def test_stability_is_a_share_and_repeats_with_its_seed() -> None:
    share = stability(PARTS, draws=4, seed=3)
    assert float(share.min()) >= 0 and float(share.max()) <= 1
    assert torch.equal(share, stability(PARTS, draws=4, seed=3))


def test_bad_choices() -> None:
    with pytest.raises(InputError, match="`rule` must be"):
        select(PARTS[0], rule="guess")
    with pytest.raises(InputError, match="`folds`"):
        select(PARTS[0], rule="cv")
    with pytest.raises(InputError, match="at least 2"):
        stability(PARTS[:1])
    with pytest.raises(InputError, match="smallest"):
        geometric_strengths(3, 2.0, 1.0)
    with pytest.raises(InputError, match="same samples"):
        moments_of(torch.ones(0, 1), torch.ones(0, 1))


@pytest.mark.parametrize("kind", ["hinge", "spline", "fourier"])
def test_nonlinear_parents_that_no_line_can_see_are_found(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 12, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0].abs() + x[:, 1], x[:, 2] ** 2], 1)
    y = y - y.mean(0) + 0.3 * torch.randn(600, 2, generator=generator, dtype=torch.float64)
    dictionary = fit_dictionary(x, kind=kind, size=4)
    features = dictionary.transform(x)
    data = Moments(features.T @ features / 600, features.T @ y / 600, y.square().mean(0), 600)
    solution = lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.3, penalty=dictionary.groups(2)
    )
    scores = solution.value.view(len(dictionary.spread), dictionary.size, -1).norm(dim=1)
    assert bool(solution.converged.all())
    assert {tuple(edge) for edge in scores.nonzero().tolist()} == {(0, 0), (1, 0), (2, 1)}


@pytest.mark.parametrize("constant", [5.0, 0.1, 1e6 / 3, 0.0])  # the mean of some is off by rounding
def test_dictionary_is_white_and_survives_constant_parents(constant: float) -> None:
    x = torch.randn(300, 3, dtype=torch.float64)
    x[:, 1] = constant
    features = fit_dictionary(x, size=3).transform(x)
    gram = features.T @ features / 300
    torch.testing.assert_close(gram[:3, :3], torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not bool(features[:, 3:6].abs().max() > 1e-6)
    with pytest.raises(InputError, match="`kind`"):
        fit_dictionary(x, kind="wavelet")
