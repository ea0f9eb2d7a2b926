"""The tests' own check of shapes: at the first calls of every function in every test, also inside functions."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import annotations
from tl_circuitlasso.data.statistics import Moments
from tl_circuitlasso.solve.prox import group_shrink, threshold

MATRIX, ROW = torch.ones(3, 2), torch.ones(2)


def test_wrong_shapes_are_refused_at_the_first_calls() -> None:
    for _ in range(annotations.CALLS):
        with pytest.raises(TypeCheckError, match="x"):
            threshold(ROW, MATRIX)
    threshold(ROW, MATRIX)  # no longer looked at


def test_every_test_begins_afresh_and_functions_are_counted_apart() -> None:
    with pytest.raises(TypeCheckError):
        threshold(ROW, MATRIX)
    for _ in range(annotations.CALLS):
        threshold(MATRIX, MATRIX)
    with pytest.raises(TypeCheckError):
        group_shrink(MATRIX, torch.ones(1, 1), ROW.long(), torch.zeros(3, 1).long())


def test_axes_of_one_name_agree_and_dataclasses_are_looked_at() -> None:
    with pytest.raises(TypeCheckError):
        group_shrink(MATRIX, torch.ones(1, 1), torch.zeros(2).long(), torch.zeros(2).long())
    empty = Moments.empty(coords=1, nodes=2)
    with pytest.raises(TypeCheckError):
        Moments(empty.count, empty.shift, empty.total[None, None, None], empty.scatter)
