"""Planted problems, and a duality gap written a second time in plain numpy from the data, as an independent judge."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Planted:
    """Data with known coefficients and the matrices a solver sees."""

    features: Tensor
    targets: Tensor
    truth: Tensor

    @property
    def gram(self) -> Tensor:
        return self.features.T @ self.features / len(self.features)

    @property
    def cross(self) -> Tensor:
        return self.features.T @ self.targets / len(self.features)

    @property
    def square(self) -> Tensor:
        return self.targets.square().mean(0)

    @property
    def matrices(self) -> dict[str, Tensor]:
        return {"gram": self.gram, "cross": self.cross, "target_sq_norm": self.square}


def planted(
    samples: int = 120, sources: int = 30, targets: int = 6, seed: int = 0, correlation: float = 0.5
) -> Planted:
    """Centred data of an AR(1) design with a tenth of the coefficients nonzero and noise of half the signal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, sources, generator=generator, dtype=torch.float64)
    for j in range(1, sources):
        x[:, j] = correlation * x[:, j - 1] + (1 - correlation**2) ** 0.5 * x[:, j]
    chosen = torch.rand(sources, targets, generator=generator) < max(0.1, 1 / sources)
    truth = torch.where(chosen, torch.randn(sources, targets, generator=generator, dtype=torch.float64), 0)
    y = x @ truth
    y = y + 0.5 * (y.std(0, correction=0) + 0.1) * torch.randn(
        samples, targets, generator=generator, dtype=torch.float64
    )
    return Planted(x - x.mean(0), y - y.mean(0), truth)


def numpy_gap(problem: Planted, value: Tensor, strength: Tensor, weights: float | np.ndarray = 1.0) -> np.ndarray:
    """Relative gap of the weighted Lasso from X and Y: P - D at the best scaled residual."""
    x, y, a = problem.features.numpy(), problem.targets.numpy(), value.numpy()
    residual, lam, samples = y - x @ a, strength.numpy(), len(x)
    weights = np.broadcast_to(np.asarray(weights, dtype=float), a.shape)
    finite = np.isfinite(weights)
    pull = np.abs(x.T @ residual) / samples
    worst = np.where(finite, pull / np.where(finite, weights, 1), 0).max(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.where(worst > 0, lam / worst, np.inf)
        natural = np.where((residual**2).sum(0) > 0, (residual * y).sum(0) / (residual**2).sum(0), 1.0)
    scale = np.clip(natural, 0, bound)
    primal = 0.5 * (residual**2).mean(0) + lam * (np.where(finite, weights, 0) * np.abs(a)).sum(0)
    dual = scale * (residual * y).mean(0) - 0.5 * scale**2 * (residual**2).mean(0)
    null = 0.5 * (y**2).mean(0)
    return np.where(null > 0, (primal - dual) / np.where(null > 0, null, 1), 0)
