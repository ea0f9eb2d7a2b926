"""What a newcomer types is done, or refused by an error that says why."""

from benchmarks.natural_calls import CALLS, answer, names
from tests.apart import apart


def answers() -> list[tuple[str, bool, str]]:
    """Every call with what came of it, and whether that was to be expected."""
    with names(8) as known:
        found = [answer(call, known) for call in CALLS]
    return [(one.call.code, one.as_expected, one.told) for one in found]


def test_forty_natural_calls_are_answered() -> None:
    """In a process of its own: here, the checks of annotations would answer first."""
    found = apart(answers)
    assert len({code for code, _, _ in found}) == len(found) == 40
    wrong = [f"{code}: {told}" for code, as_expected, told in found if not as_expected]
    assert not wrong, "\n".join(wrong)
