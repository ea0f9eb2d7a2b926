"""Paths of strengths with warm starts, and the moments that all choices of strength are made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import Solution


@dataclass(frozen=True, eq=False)
class Moments:
    """X'X/M, X'Y/M and diag(Y'Y)/M of `count` samples, centred by one common mean."""

    gram: Float[Tensor, "source source"]
    cross: Float[Tensor, "source target"]
    target_sq_norm: Float[Tensor, " target"]
    count: int | float

    def __add__(self, other: "Moments") -> "Moments":
        return _combined(self, other, 1.0)

    def __sub__(self, other: "Moments") -> "Moments":
        return _combined(self, other, -1.0)


def moments_of(features: Float[Tensor, "sample source"], targets: Float[Tensor, "sample target"]) -> Moments:
    """The moments of samples that are already centred.

    >>> moments_of(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]])).cross.item()
    2.0
    """
    if not len(features) or len(features) != len(targets):
        raise InputError(f"`features` and `targets` need the same samples, at least 1: {len(features)}, {len(targets)}")
    x, y, count = features.detach().double(), targets.detach().double(), len(features)
    return Moments(x.T @ x / count, x.T @ y / count, y.square().mean(0), count)


def total(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together.

    >>> half = Moments(torch.eye(2), torch.zeros(2, 1), torch.ones(1), 50.0)
    >>> total([half, half]).count
    100.0
    """
    if not parts:
        raise InputError("no moments to add: pass at least one")
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def path(verb: Callable[..., Solution], strengths: Sequence[int | float | Tensor]) -> list[Solution]:
    """One solution per strength, each started from the one before it.

    `verb` is any solving function with its data filled in; give strengths from large to small.

    >>> from functools import partial
    >>> from tl_circuitlasso.solve.lasso import lasso
    >>> data = partial(lasso, torch.eye(1), torch.ones(1, 1), target_sq_norm=torch.ones(1))
    >>> [float(solution.value) for solution in path(data, [0.75, 0.5, 0.25])]
    [0.25, 0.5, 0.75]
    """
    solutions: list[Solution] = []
    for strength in strengths:
        warm = {"init": solutions[-1].value} if solutions else {}
        solutions.append(verb(strength=strength, **warm))
    return solutions


def geometric_strengths(count: int = 20, smallest: float = 0.02, largest: float = 0.9) -> list[float]:
    """`count` strengths from `largest` down to `smallest`, evenly spaced in the logarithm.

    >>> [round(strength, 3) for strength in geometric_strengths(3, 0.01, 1.0)]
    [1.0, 0.1, 0.01]
    """
    if not (count >= 1 and 0 < smallest <= largest):
        raise InputError(f"need count >= 1 and 0 < smallest <= largest, got {count}, {smallest}, {largest}")
    steps = torch.linspace(0, 1, count, dtype=torch.float64)
    return (largest * (smallest / largest) ** steps).tolist()


def _combined(one: Moments, other: Moments, sign: float) -> Moments:
    count = one.count + sign * other.count
    if count <= 0:
        raise InputError(f"no samples are left: {one.count} minus {other.count}")
    mine, theirs = one.count / count, sign * other.count / count
    return Moments(
        mine * one.gram + theirs * other.gram,
        mine * one.cross + theirs * other.cross,
        (mine * one.target_sq_norm + theirs * other.target_sq_norm).clamp(min=0),
        count,
    )
