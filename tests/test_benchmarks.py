"""The benchmarks' own code: parts are put back, and thresholds are chosen as they say."""

import pytest
import torch

from benchmarks import planted
from benchmarks.ablation import PARTS, one_percent
from tl_circuitlasso.synthetic import planted as problem_of


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part_is_away_only_while_it_is_measured(name: str) -> None:
    part = PARTS[name]
    before = [getattr(owner, attribute) for owner, attribute, _ in part.changes]
    with part.taken_away():
        assert all(getattr(owner, attribute) is value for owner, attribute, value in part.changes)
    assert all(getattr(owner, attribute) is old for (owner, attribute, _), old in zip(part.changes, before))


def test_the_plain_threshold_is_one_percent_of_the_largest() -> None:
    assert float(one_percent(torch.tensor([2.0, 0.1]))) == pytest.approx(0.02)
    assert float(one_percent(torch.tensor([]))) == float("inf")


def test_correlation_gets_the_threshold_that_suits_it_best() -> None:
    problems = [problem_of(seed=seed, layers=1, heads=2, mixing=False, copies=0.0, cancelling=0.0) for seed in (0, 1)]
    scores = [{edge: 0.5 if edge in one.circuit else 0.2 for edge in one.candidates} for one in problems]
    kept = planted.best_choice(scores, problems)
    assert planted.figures(kept, problems) == {"SHD": 0.0, "F1": 1.0}
    assert planted.correlations(problems[0]).keys() == problems[0].candidates
