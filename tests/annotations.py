"""Shape annotations are checked at the first calls of every function in every test.

Binding, unpacking and comparing at each call costs more than the work on tensors as small as the tests': two thirds of
a solve. A loop calls a function with the same shapes over and over, so its first `CALLS` calls in each test are
checked and the rest run as they do for a user. The environment variable CHECKED_CALLS=1000000 has every one checked.
"""

import os
from collections.abc import Callable
from functools import wraps
from inspect import isclass
from typing import Any

import jaxtyping

CALLS = int(os.environ.get("CHECKED_CALLS", "10"))

_whole = jaxtyping.jaxtyped
_calls: dict[int, int] = {}  # by the identity of the code: equal code of two classes is counted apart


def forget() -> None:
    """Begin a new test: every function is checked again."""
    _calls.clear()


def install(package: str) -> None:
    """Check what is imported of a package from now on, functions and dataclasses."""
    jaxtyping.jaxtyped = _sparing  # what the import hook writes above every function and class
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _sparing(*, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(thing: Any) -> Any:
        if not isclass(thing):
            return _first_calls(thing, lambda: _whole(thing, typechecker=typechecker))
        plain = thing.__init__
        if hasattr(plain, "__wrapped__"):
            return thing  # its own decorator is there already
        made = _whole(thing, typechecker=typechecker)
        if made.__init__ is not plain:
            checked = made.__init__
            made.__init__ = _first_calls(plain, lambda: checked)
        return made

    return decorate


def _first_calls(plain: Any, make: Callable[[], Any]) -> Any:
    """`plain`, checked while its code has been called rarely in this test; the check is made when first needed.

    Counting by code serves functions inside functions too, which are new objects each time.
    """
    if not hasattr(plain, "__code__"):
        return make()
    code = id(plain.__code__)
    if "<locals>" in plain.__qualname__ and _calls.get(code, 0) >= CALLS:
        return plain
    checked: Any = None

    @wraps(plain)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal checked
        count = _calls.get(code, 0)
        if count >= CALLS:
            return plain(*arguments, **options)
        _calls[code] = count + 1
        if checked is None:
            checked = make()
        return checked(*arguments, **options)

    return call
