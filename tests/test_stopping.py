"""The rule that says how many edges: the widest gap near one percent."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.discover.stopping import CENTRE, WIDTH, widest_gap

SCORES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=20)


def kept(scores: list[float]) -> list[float]:
    values = torch.tensor(scores, dtype=torch.float64)
    return values[values > widest_gap(values)].tolist()


@given(scores=SCORES)
def test_what_is_far_above_stays_and_what_is_far_below_goes(scores: list[float]) -> None:
    largest, survivors = max(scores), kept(scores)
    assert largest in survivors
    assert all(score in survivors for score in scores if score > CENTRE * WIDTH * largest * 1.0001)
    assert not any(score in survivors for score in scores if score < CENTRE / WIDTH * largest * 0.9999)


@given(scores=SCORES, unit=st.sampled_from([1e-6, 0.1, 7.0, 1e6]))
def test_units_do_not_matter(scores: list[float], unit: float) -> None:
    assert len(kept([unit * score for score in scores])) == len(kept(scores))


@given(scores=SCORES, seed=st.integers(0, 99))
def test_order_does_not_matter(scores: list[float], seed: int) -> None:
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed)).tolist()
    assert widest_gap(torch.tensor(scores)) == widest_gap(torch.tensor([scores[i] for i in order]))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.5, 0.012, 0.011, 0.009, 0.008, 0.002], 2),  # a cluster around one percent stays together: here out
        ([1.0, 0.2, 0.1, 0.02, 0.011, 0.009, 0.0001], 6),  # and here in
        ([1.0, 0.5, 0.004, 0.0], 2),  # of a gap only the part near one percent counts
        ([1.0, 0.255, 0.015], 3),  # so one that begins far above it cuts no deeper than the window allows
        ([1.0, 0.255, 0.015, 0.0], 3),
        ([1.0, 0.5, 0.0, 0.0], 2),
        ([1.0], 1),
        ([3.0, 3.0, 3.0], 3),
    ],
)
def test_the_cut_is_made_where_nothing_lies(scores: list[float], expected: int) -> None:
    assert len(kept(scores)) == expected


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [-1.0, 0.0]])
def test_nothing_positive_keeps_nothing(scores: list[float]) -> None:
    assert widest_gap(torch.tensor(scores)) == math.inf


def test_negative_scores_are_never_above() -> None:
    assert kept([1.0, -5.0, 0.3]) == [1.0, 0.3]
