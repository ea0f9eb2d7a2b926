"""What a newcomer types is done, or refused by an error that says why."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.natural_calls import CALLS, answer, names


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, Any]]:
    with names(8) as found:
        yield found


def test_there_are_forty_different_ones() -> None:
    assert len({call.code for call in CALLS}) == len(CALLS) == 40


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.code)
def test_a_natural_call_is_answered(call: Any, known: dict[str, Any]) -> None:
    found = answer(call, known)
    assert found.as_expected, found.told
