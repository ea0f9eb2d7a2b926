"""Targets check what they are given, and say which argument is wrong."""

from typing import Any

import numpy
import pytest
import torch

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.targets import Labels, LogitDiff, Values, check_length


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, numpy.array])
def test_sequences_tensors_and_arrays_are_taken(make: Any) -> None:
    pair = LogitDiff(make([3, 5]), make([4, 6]))
    assert torch.equal(pair.correct, torch.tensor([3, 5])) and torch.equal(pair.incorrect, torch.tensor([4, 6]))
    assert torch.equal(Labels(make([0, 2])).y, torch.tensor([0, 2]))
    assert torch.equal(Values(make([0.5, 2])).y, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert len(pair) == len(Labels([0, 1])) == len(Values([1.0, 2.0])) == 2


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LogitDiff([1.0, 2.0], [1, 2]), "`correct`"),
        (lambda: LogitDiff([1, 2], [True, False]), "`incorrect`"),
        (lambda: LogitDiff([1, 2], [[1, 2]]), "`incorrect`"),
        (lambda: LogitDiff([1, 2], [1]), "`correct`"),
        (lambda: LogitDiff(["a", "b"], [1, 2]), "`correct`"),
        (lambda: Labels([0.5, 1.0]), "`y`"),
        (lambda: Labels([0, -1]), "`y`"),
        (lambda: Labels([1, 1, 1]), "`y`"),
        (lambda: Labels([[0, 1]]), "`y`"),
        (lambda: Values([0.0, float("nan")]), "`y` .* prompt 1"),
        (lambda: Values([float("inf"), 1.0]), "`y` .* prompt 0"),
        (lambda: Values(["a"]), "`y`"),
        (lambda: Values([[1.0]]), "`y`"),
        (lambda: Values(3.0), "`y`"),
    ],
)
def test_wrong_values_are_named(make: Any, name: str) -> None:
    with pytest.raises(InputError, match=name):
        make()


@pytest.mark.parametrize("target", [LogitDiff([1, 2], [3, 4]), Labels([0, 1]), Values([0.0, 1.0])])
def test_a_target_has_one_entry_per_prompt(target: Any) -> None:
    check_length(target, 2)
    check_length(None, 7)
    for prompts in (1, 3):
        with pytest.raises(InputError, match=f"`target` {type(target).__name__} has 2 entries for {prompts} prompts"):
            check_length(target, prompts)


def test_targets_cannot_be_changed_by_accident() -> None:
    with pytest.raises(AttributeError):
        Values([1.0]).y = torch.zeros(1)  # type: ignore[misc]
