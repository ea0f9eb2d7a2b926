"""Checks of single arguments, the same words everywhere: each names the argument, what was given and what to give."""

import operator
from collections.abc import Callable
from typing import Any

from tl_circuitlasso.errors import InputError


def whole_number(name: str, given: Any, *, least: int = 1, most: int | None = None, what: str = "") -> int:
    """`given` as an int: Python's and NumPy's whole numbers, no bool, no float.

    Raises
    ------
    InputError: something else, or a number outside [least, most].
    """
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"`{name}` is {shortened(given)}: give a whole number{what and ' ' + what}, {bounds}")
    return number


def one_of(name: str, given: Any, known: tuple[str, ...]) -> str:
    """`given`, if it's one of the known words.

    Raises
    ------
    InputError: it isn't; the message lists them.
    """
    if not isinstance(given, str) or given not in known:
        raise InputError(f"`{name}` is {shortened(given)}: write one of {', '.join(map(repr, known))}")
    return given


def function(name: str, given: Any, form: str) -> Callable[..., Any]:
    """`given`, if it can be called.

    Raises
    ------
    InputError: it can't; `form` shows how it will be.
    """
    if not callable(given):
        raise InputError(f"`{name}` is a {type(given).__name__}: give a function {form}")
    return given


def shortened(given: Any, width: int = 60) -> str:
    """How a value looks, on one line of a message.

    >>> shortened("first"), shortened([1] * 100, 12)
    ("'first'", '[1, 1, 1, ...')
    """
    text = " ".join(repr(given).split())
    return text if len(text) <= width else text[: width - 2].rstrip(", ") + ", ..."
