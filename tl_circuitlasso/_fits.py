"""What doesn't fit an argument's annotation is named, where a public function stumbles over it.

Functions check what they are given themselves, and say what to do. Where one meets what none of its checks foresaw, as
a text in place of a graph, Python's own error speaks of the inside; then the annotations are asked.
"""

import inspect
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Real
from pathlib import PurePath
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin
from weakref import WeakSet

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.errors import CircuitLassoError, InputError

P = ParamSpec("P")
R = TypeVar("R")
RAW = (TypeError, AttributeError, ValueError, RuntimeError, LookupError)
WORDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None",
    PurePath: "a path", Callable: "a function", Mapping: "a mapping such as a dict", Iterable: "a sequence",
}  # fmt: skip


_TOLD: "WeakSet[Callable[..., Any]]" = WeakSet()


def told(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose raw errors become an InputError where an argument doesn't fit its annotation.

    >>> def shout(word: str) -> str:
    ...     return word.upper()
    >>> told(shout)(3)
    Traceback (most recent call last):
    ...
    tl_circuitlasso.errors.InputError: `word` is 3: give a text
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RAW as error:
            if not isinstance(error, CircuitLassoError) and "unexpected keyword argument" not in str(error):
                _refuse_misfit(function, args, kwargs, error)
            raise

    _TOLD.add(call)
    return call


def guard(room: str, names: Iterable[str]) -> None:
    """Let the public functions of a room be `told`, there and in the module where each stands."""
    held = vars(sys.modules[room])
    for name in names:
        if inspect.isfunction(found := held[name]) and found not in _TOLD:
            made = told(found)
            for home in (held, vars(sys.modules[found.__module__])):
                home.update({key: made for key, value in home.items() if value is found})


def _refuse_misfit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> None:
    parameters = inspect.signature(function).parameters
    for name, given in (*zip(parameters, args), *kwargs.items()):
        kind = parameters[name].annotation if name in parameters else Any
        if not fits(given, kind):
            raise InputError(f"`{name}` is {shortened(given)}: give {described(kind)}") from error


def fits(given: Any, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation says; True where nobody can tell.

    >>> fits(3, int | None), fits("m0", int | None), fits([1.0], Mapping[str, float]), fits("own", Any)
    (True, False, False, True)
    """
    if kind is Any:
        return True
    kind = type(None) if kind is None else kind
    origin = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        return any(fits(given, part) for part in get_args(kind))
    if isinstance(kind, type) and hasattr(kind, "dim_str"):
        return _has_axes(given, kind)
    known = _PLAIN.get(origin)
    if known is not None:
        return known(given)
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False) or origin is inspect.Parameter.empty:
        return True
    if issubclass(origin, PurePath):
        return isinstance(given, os.PathLike)
    if issubclass(origin, Mapping):
        return isinstance(given, Mapping)
    if origin is not object and issubclass(origin, Iterable) and origin.__module__ in ("builtins", "collections.abc"):
        return isinstance(given, Iterable)
    return isinstance(given, origin)


def described(kind: Any) -> str:
    """An annotation in words.

    >>> described(int | float | None), described(Mapping[str, int])
    ('a number or None', 'a mapping such as a dict')
    """
    kind = type(None) if kind is None else kind
    origin = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        parts = get_args(kind)
        words = [described(part) for part in parts if not (part is int and float in parts)]
        return " or ".join(dict.fromkeys(words))
    if hasattr(kind, "dim_str"):
        return f"a {kind.array_type.__name__} of the axes ({kind.dim_str.replace('_', '')})"
    if not isinstance(origin, type):
        return WORDS.get(origin, "something else")
    near = [word for base, word in WORDS.items() if origin is base or (base in _WIDE and issubclass(origin, base))]
    return near[0] if near else f"an object of the kind {origin.__name__}"


def _is_whole(given: Any) -> bool:
    try:
        operator.index(given)
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(given, bool)


def _is_number(given: Any) -> bool:
    alone = getattr(given, "ndim", None) == 0
    return (isinstance(given, Real) and not isinstance(given, bool)) or alone


def _has_axes(given: Any, kind: Any) -> bool:
    if not isinstance(given, kind.array_type):
        return False
    axes = len(kind.dims)
    return given.ndim == axes if kind.index_variadic is None else given.ndim >= axes - 1


_PLAIN: Mapping[Any, Callable[[Any], bool]] = {
    int: _is_whole,
    float: _is_number,
    bool: lambda given: isinstance(given, bool),
    str: lambda given: isinstance(given, str),
    type(None): lambda given: given is None,
    Callable: callable,
}
_WIDE = (PurePath, Mapping, Iterable)
