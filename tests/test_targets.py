"""Targets check what they are given, and say which argument is wrong."""

from typing import Any

import numpy
import pandas
import pytest
import torch

from tl_circuitlasso.data.targets import Labels, LogitDiff, Values, answers_mean, check_length, take
from tl_circuitlasso.errors import InputError


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
        (lambda: LogitDiff([1, 2], [[1, 2]]), "`incorrect` 1: give one of each per prompt"),
        (lambda: LogitDiff([-1], [3]), "`correct` holds -1"),
        (lambda: LogitDiff([3], [[4, -1]]), "`incorrect` holds -1"),
        (lambda: LogitDiff([[3], []], [4, 5]), "`correct` has no answer for prompt 1"),
        (lambda: LogitDiff(["a", 3], [1, 2]), "`correct` holds .*ids only, or words only"),
        (lambda: LogitDiff(None, 3), "`correct` is None"),
        (lambda: LogitDiff(3.5, 3), "`correct` is 3.5"),
        (lambda: Labels([0, 10**9]), "`y` holds the label 1000000000 for 2 prompts"),
        (lambda: Labels(["yes", "no"]), "`y`"),
        (lambda: LogitDiff([1, 2], [1]), "`correct`"),
        (lambda: Labels([0.5, 1.0]), "`y`"),
        (lambda: Labels([0, -1]), "`y`"),
        (lambda: Labels([1, 1, 1]), "`y`"),
        (lambda: Labels([[0, 1]]), "`y`"),
        (lambda: Values([0.0, float("nan")]), "`y` .* prompt 1"),
        (lambda: Values([float("inf"), 1.0]), "`y` .* prompt 0"),
        (lambda: Values(["a"]), "`y`"),
        (lambda: Values([[1.0, 2.0]]), "`y`"),
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


# ---- what people hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.tensor, numpy.array, pandas.DataFrame, list], ids=lambda make: make.__name__)
def test_columns_count_as_lists(make: Any) -> None:
    assert Labels(make([[0], [2]])).y.tolist() == [0, 2] and Values(make([[0.5], [2.0]])).y.tolist() == [0.5, 2.0]
    assert LogitDiff(make([[3], [5]]), make([[4], [6]])).correct.tolist() == [3, 5]


def test_columns_of_a_table_are_taken() -> None:
    table = pandas.DataFrame({"y": [0, 2], "x": [0.5, 2.0], "right": ["a", "b"], "wrong": ["c", "d"]}, index=[7, 3])
    assert Labels(table.y).y.tolist() == [0, 2] and Values(table.x).y.tolist() == [0.5, 2.0]
    assert LogitDiff(table.right, table.wrong).looked_up(lambda word, _: ord(word)).correct.tolist() == [97, 98]


def test_one_answer_serves_all_prompts() -> None:
    both = LogitDiff(3, "x")
    assert both.everyone and both.words
    check_length(both, 17)
    right, wrong = both.looked_up(lambda word, _: 9).ids(torch.tensor([0, 5, 16]))
    assert right.tolist() == [[3]] * 3 and wrong.tolist() == [[9]] * 3
    spread = LogitDiff(" a", [" b", " c", " d"])
    assert not spread.everyone and spread.correct == ((" a",),) * 3
    assert take(spread, torch.tensor([2, 0])).incorrect == ((" d",), (" b",))
    assert take(both, torch.tensor([2])) is both


def test_several_answers_count_by_their_mean() -> None:
    target = LogitDiff([[3, 4], [5]], numpy.array([[0, 1], [1, 2]]))
    right, wrong = target.ids(torch.tensor([1, 0]))
    assert right.tolist() == [[5, -1], [3, 4]] and wrong.tolist() == [[1, 2], [0, 1]]
    values = torch.arange(6.0).expand(2, 6)
    assert answers_mean(values.gather(1, right.clamp_min(0)), right).tolist() == [5.0, 3.5]
    assert take(target, torch.tensor([1])).correct.tolist() == [[5, -1]]


def test_words_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="words, which need a tokenizer"):
        LogitDiff(["a"], ["b"]).ids(torch.tensor([0]))
