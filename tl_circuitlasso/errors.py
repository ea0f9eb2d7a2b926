"""Every error this library raises on purpose, and how it warns.

Two kinds are kept apart. Wrong input raises at once, from the verb that the user called, and its message names the
argument, says what was given and what to do. Numerical trouble (a solve that ran out of iterations) is a status on
the result; it becomes a `SolveError` only where the caller asked for `strict=True`.
"""

import sys
import warnings


class CircuitLassoError(Exception):
    """Base of all errors of tl_circuitlasso: `except CircuitLassoError` catches them and nothing else."""


class InputError(CircuitLassoError, ValueError):
    """An argument has the wrong type, shape or value."""


class ModelError(CircuitLassoError):
    """A model that this library can't read truthfully: unsupported architecture, NaN weights, a failed closure."""


class FormatError(CircuitLassoError, ValueError):
    """A file that isn't what it claims to be: foreign, truncated, of another version, or inconsistent."""


class StaleCheckpoint(InputError, FormatError):
    """A checkpoint of other work: other data, another model or other options than the call that names it."""


class SolveError(CircuitLassoError, RuntimeError):
    """A solve that didn't reach its tolerance (raised only with `strict=True`)."""


def warn(message: str, kind: type[Warning] = UserWarning) -> None:
    """Warn, and point at the line outside this package that led here: the user's own."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, kind, stacklevel=depth + 1)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in (__name__.partition(".")[0], "contextlib", "functools")
