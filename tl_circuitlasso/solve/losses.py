"""Squared error over a Gram matrix. Classification is in `likelihoods`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.solve.base import AbstractLoss
from tl_circuitlasso.solve.tiles import Tiled

SMALL = 128  # sources up to which eigenvalues cost less than the steps of a power iteration
ROUNDING = 1e-5  # of an eigenvalue in single precision


class Quadratic(AbstractLoss):
    """Squared error by its moments, f(a) = 1/2 a'Ga - c'a + yy/2, wherever the Gram comes from."""

    cross: Float[Tensor, "source target"]
    target_sq_norm: Float[Tensor, " target"]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.cross.shape[0]), int(self.cross.shape[1])

    def objective(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        return 0.5 * self._residual(value, negative_gradient)

    def fenchel(
        self,
        value: Float[Tensor, "source target"],
        negative_gradient: Float[Tensor, "source target"],
        scale: Float[Tensor, " target"],
    ) -> Float[Tensor, " target"]:
        residual = self._residual(value, negative_gradient)
        return quadratic_share(residual, (value * negative_gradient).sum(0), scale)

    def natural_scale(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        return quadratic_scale(self._residual(value, negative_gradient), (value * negative_gradient).sum(0))

    def null_objective(self) -> Float[Tensor, " target"]:
        return 0.5 * self.target_sq_norm

    def _residual(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        """||y - Xa||^2 / M."""
        return (self.target_sq_norm - (value * (self.cross + negative_gradient)).sum(0)).clamp(min=0)


@dataclass(frozen=True, eq=False)
class QuadraticGram(Quadratic):
    """f(a) = 1/2 a'Ga - c'a + yy/2 with G = X'X/M, c = X'y/M, yy = y'y/M: the data are no longer needed.

    >>> loss = QuadraticGram(torch.eye(2), torch.tensor([[1.0], [0.0]]), torch.tensor([1.0]))
    >>> loss.negative_gradient(torch.zeros(2, 1)).flatten().tolist()
    [1.0, 0.0]
    """

    gram: Float[Tensor, "_source _source"]  # (0, 0) where only gradients that are known already will be asked about
    cross: Float[Tensor, "source target"]
    target_sq_norm: Float[Tensor, " target"]

    @cached_property
    def _tiles(self) -> dict[type, Tiled]:
        """By NumPy type, the Gram as compiled products read it; the same loss for fewer targets shares it."""
        return {}

    def tiled(self, dtype: type) -> Tiled:
        """The Gram in a NumPy type, made once for all strengths and targets."""
        if dtype not in self._tiles:
            self._tiles[dtype] = Tiled(self.gram.contiguous().numpy().astype(dtype, copy=False))
        return self._tiles[dtype]

    def negative_gradient(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        return self.cross - self.gram @ value

    def curvature(self) -> float:
        return largest_eigenvalue(self.gram)

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "QuadraticGram":
        gram, cross, target_sq_norm = self.gram, self.cross, self.target_sq_norm
        if sources is not None:
            gram, cross = gram[sources][:, sources], cross[sources]
        if targets is not None:
            cross, target_sq_norm = cross[:, targets], target_sq_norm[targets]
        fewer = QuadraticGram(gram, cross, target_sq_norm)
        if sources is None:
            vars(fewer)["_tiles"] = self._tiles  # no field: what a problem's checkpoint is known by are its numbers
        return fewer


def quadratic_share(
    residual: Float[Tensor, " target"], fitted: Float[Tensor, " target"], scale: Float[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """(1 - s)^2 rr / 2 - s ag: the share of a squared error in the duality gap."""
    return 0.5 * (1 - scale).square() * residual - scale * fitted


def quadratic_scale(residual: Float[Tensor, " target"], fitted: Float[Tensor, " target"]) -> Float[Tensor, " target"]:
    """(rr + ag) / rr, the s that minimises `quadratic_share`."""
    return torch.where(residual > 0, (residual + fitted) / residual, 1.0)


def largest_eigenvalue(gram: Float[Tensor, "source source"], steps: int = 40) -> float:
    """The largest eigenvalue of a small matrix; else an upper estimate: power iteration, capped by the largest absolute
    row sum."""
    if 0 < gram.shape[0] <= SMALL:
        return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(torch.finfo(gram.dtype).tiny)) * (1 + ROUNDING)
    vector = 1 + 0.1 * torch.sin(torch.arange(gram.shape[0], dtype=gram.dtype, device=gram.device))[:, None]
    cap = float(gram.abs().sum(0).amax()) if gram.numel() else 1.0
    return min(_power(lambda v: gram @ v, vector, steps), cap)


def largest_singular_sq(features: Float[Tensor, "sample source"], steps: int = 40) -> float:
    """An upper estimate of the largest squared singular value, by power iteration on X'X."""
    vector = features.t() @ torch.ones(features.shape[0], 1, dtype=features.dtype, device=features.device)
    vector = vector + 1e-3 * vector.abs().amax() + torch.finfo(features.dtype).tiny
    return _power(lambda v: features.t() @ (features @ v), vector, steps)


def _power(apply: Callable[[Tensor], Tensor], vector: Float[Tensor, "source 1"], steps: int) -> float:
    """Power iteration approaches from below, so its figure is raised by 5 % (solvers also guard against divergence)."""
    size, tiny = 0.0, torch.finfo(vector.dtype).tiny
    for _ in range(steps):
        vector = apply(vector / vector.norm().clamp(min=tiny))
        size = float(vector.norm())
    return max(1.05 * size, tiny)
