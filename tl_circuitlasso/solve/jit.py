"""How kernels are compiled: once per machine where a cache can be written, else once per process.

A kernel is a plain loop over arrays. Slices, fancy indexing and array constructors other than `np.empty` are kept out:
each adds tenths of a second to the first call, and `larger[:n] = rows` alone four seconds.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

FAST = {"reassoc", "contract", "nsz", "arcp"}  # not nnan or ninf: infinite weights forbid entries


def kernel(function: Callable[..., Any]) -> Any:
    """A compiled function that Python calls; it runs outside the GIL.

    `no_type_check` below it keeps a run-time type checker from wrapping what numba has to see.
    """
    return _compiled(function)


def inner(function: Callable[..., Any]) -> Any:
    """A compiled function that only kernels call: the wrapper that Python would need is left out."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _compiled(function: Callable[..., Any], **options: bool) -> Any:
    settings: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy", **options}
    try:
        return njit(cache=True, **settings)(function)
    except RuntimeError:  # neither the package nor the user's folder can be written
        return njit(**settings)(function)
