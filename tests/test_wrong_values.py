"""Every wrong value of the table is answered by an error that names the argument."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import tl_circuitlasso as tcl
from tests import wrong_values
from tests.apart import apart
from tl_circuitlasso._checks import shortened, whole_number
from tl_circuitlasso._fits import fits, told
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import component_index


def test_wrong_values_are_named() -> None:
    """In a process of its own: here, the checks of annotations would answer first."""
    answers = apart(wrong_values.answers)
    assert len(answers) > 150
    wrong = [
        answer for answer in answers if answer[2] not in ("InputError", "ModelError") or answer[1] not in answer[3]
    ]
    assert not wrong, "\n".join(": ".join(answer) for answer in wrong)


NAMED_OTHERWISE = {
    "baselines.method": "`method`",
    "evaluate.metric_by_name": "`metric`",
    "testing.check_basis": "`hook`",
}
PASSED_ON = ("None.load_sae", "solve.all_reduce_moments")  # give back what they needn't load, or share with nobody
ABOUT_DATA = ("FormatError", "CheckFailure")  # what a file holds, or a method does, is at fault


def test_every_public_function_names_what_it_cannot_use() -> None:
    answers = [answer for answer in apart(wrong_values.nonsense) if answer[0] not in PASSED_ON]
    assert len(answers) > 120
    wrong = []
    for name, kind, text, asked in answers:
        words = [*(f"`{one}`" for one in asked), NAMED_OTHERWISE.get(name, "can't be imported")]
        said = kind in ("InputError", "ModelError") and any(word in text for word in words)
        wrong += [] if said or kind in ABOUT_DATA else [f"{name}: {kind}: {text}"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [3, np.int16(3)], [True, 3.0, "3", None]),
        (int | float, [3, 0.5, np.float32(2), torch.tensor(1.0)], ["3", None, [3]]),
        (str | Path, ["a", Path("a")], [3, None]),
        (Mapping[str, float] | None, [{}, None], [[], "a"]),
        (Sequence[int], [[1], (1,), np.array([1])], [3, None]),
        (Callable[[int], int], [len, lambda: 1], [3, "len"]),
        (Float[Tensor, "source *target"], [torch.ones(2), torch.ones(2, 3)], [torch.tensor(1.0), [1.0]]),
        (Float[Tensor, "source target"], [torch.ones(2, 3)], [torch.ones(2), np.ones((2, 2))]),
        (Any, [3, None, object()], []),
    ],
    ids=lambda part: "" if isinstance(part, list) else str(part),  # addresses of objects differ in every process
)
def test_values_fit_what_annotations_say(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    assert all(fits(value, kind) for value in right) and not any(fits(value, kind) for value in wrong)


def test_errors_of_arguments_that_fit_stay_as_they_are() -> None:
    @told
    def halved(numbers: list[int]) -> int:
        return numbers[0] // 2

    with pytest.raises(IndexError):
        halved([])
    with pytest.raises(InputError, match=r"`numbers` is 3: give a sequence"):
        halved(3)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    graph = tcl.AttributionGraph.from_edges(
        component_index(n_layers=2, n_heads=4), {("input", "m0"): 1.0, ("m0", "logits"): 0.5}
    )
    assert graph.top_k(np.int64(2)).kept_edges() == {("input", "m0"), ("m0", "logits")}
    assert graph.threshold(np.float32(0.6)).kept_edges() == {("input", "m0")}
    assert graph.keep([True, False]).kept_edges() == graph.keep(np.array([True, False])).kept_edges()
    assert tcl.evaluate.structure(graph, [("input", "m0")]).shd == 1


@pytest.mark.parametrize("given", [True, 1.0, "1", None, 0, 11, [3]])
def test_whole_numbers(given: object) -> None:
    assert whole_number("n", np.int16(10), most=10) == 10
    with pytest.raises(InputError, match=r"`n` is .*: give a whole number of things, 1 to 10"):
        whole_number("n", given, most=10, what="of things")


def test_long_values_are_shortened() -> None:
    assert len(shortened(list(range(10_000)))) <= 62
