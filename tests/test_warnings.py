"""Warnings point at the user's own line, however deep inside they arise."""

import inspect
import warnings

from tl_circuitlasso._checks import warn as annotated

warn = inspect.unwrap(annotated)  # what checks shapes in the tests would stand between

INSIDE = """
def deep(count):
    return deep(count - 1) if count else warn("something", RuntimeWarning)
"""


def test_a_warning_points_at_the_first_line_outside_the_package() -> None:
    room = {"__name__": "tl_circuitlasso.somewhere.deep", "warn": warn}
    exec(INSIDE, room)
    for depth in (0, 4):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            room["deep"](depth)
        assert [(one.filename, one.category) for one in heard] == [(__file__, RuntimeWarning)]


def test_a_caller_outside_is_pointed_at_itself() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warn("something")
    assert [one.filename for one in heard] == [__file__]
