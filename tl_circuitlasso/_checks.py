"""Checks of single arguments, the same words everywhere: each names the argument, what was given and what to give.

What isn't wrong but should be known is a warning, at the line of the user that led to it.
"""

import operator
import sys
import warnings
from collections.abc import Callable
from numbers import Real
from os import PathLike
from pathlib import Path
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


def whole_or_none(name: str, given: Any, *, least: int = 1, what: str = "") -> int | None:
    """`given` as by `whole_number`; None stays None.

    Raises
    ------
    InputError: something else.
    """
    return None if given is None else whole_number(name, given, least=least, what=f"{what} (or None)".strip())


def part(name: str, given: Any) -> float:
    """`given` as a share from 0 to 1, both included.

    Raises
    ------
    InputError: something else.
    """
    share = float(given) if isinstance(given, Real) and not isinstance(given, bool) else -1.0
    if not 0 <= share <= 1:
        raise InputError(f"`{name}` is {shortened(given)}: give a share from 0 to 1")
    return share


def fraction(name: str, given: Any, of: str = "", *, whole: bool = True) -> float:
    """`given` as a share above 0 and at most 1; without the `whole` below 1.

    >>> fraction("share", 1), fraction("level", 0.95, whole=False)
    (1.0, 0.95)

    Raises
    ------
    InputError: something else.
    """
    share = float(given) if isinstance(given, Real) and not isinstance(given, bool) else -1.0
    if not 0 < share <= 1 or (share == 1 and not whole):
        bounds = "above 0 and at most 1" if whole else "above 0 and below 1"
        raise InputError(f"`{name}` is {shortened(given)}: give a share{of and ' ' + of}, {bounds}")
    return share


def truth(name: str, given: Any) -> bool:
    """`given`, if it's True or False.

    Raises
    ------
    InputError: it isn't.
    """
    if not isinstance(given, bool):
        raise InputError(f"`{name}` is {shortened(given)}: write True or False")
    return given


def file_name(name: str, given: Any) -> Path | None:
    """`given` as a path; None stays None.

    Raises
    ------
    InputError: it is no path.
    """
    if given is not None and not isinstance(given, str | PathLike):
        raise InputError(f"`{name}` is {shortened(given)}: give the path of a file")
    return None if given is None else Path(given)


def as_seed(given: Any) -> int:
    """A seed that every generator takes."""
    return whole_number("seed", given, least=0, most=2**62)


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


def instance(name: str, given: Any, kind: Any, make: str) -> Any:
    """`given`, if it's of a kind; `make` says where such things come from.

    Raises
    ------
    InputError: it isn't.
    """
    if not isinstance(given, kind):
        raise InputError(f"`{name}` is of the kind {type(given).__name__}: give {make}")
    return given


def shortened(given: Any, width: int = 60) -> str:
    """How a value looks, on one line of a message.

    >>> shortened("first"), shortened([1] * 100, 12)
    ("'first'", '[1, 1, 1, ...')
    """
    text = " ".join(repr(given).split())
    return text if len(text) <= width else text[: width - 2].rstrip(", ") + ", ..."


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn, and point at the line outside this package that led here: the user's own."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, kind, stacklevel=depth + 1)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in (__name__.partition(".")[0], "contextlib", "functools")
