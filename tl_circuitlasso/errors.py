"""Every error this library raises on purpose.

Two kinds are kept apart. Wrong input raises at once, from the verb that the user called, and its message names the
argument, says what was given and what to do. Numerical trouble (a solve that ran out of iterations) is a status on
the result; it becomes a `SolveError` only where the caller asked for `strict=True`.
"""


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
