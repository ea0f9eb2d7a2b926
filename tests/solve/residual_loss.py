"""Squared error on the data themselves, for solvers that run on gradients: it shares no formula with the Gram's."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.solve.base import AbstractLoss
from tl_circuitlasso.solve.losses import largest_singular_sq, quadratic_scale, quadratic_share


@dataclass(frozen=True, eq=False)
class QuadraticResidual(AbstractLoss):
    """f(A) = 1/(2M) ||Y - XA||_F^2 on the data themselves, for any solver that runs on gradients."""

    features: Float[Tensor, "sample source"]
    observed: Float[Tensor, "sample target"]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.features.shape[1]), int(self.observed.shape[1])

    def negative_gradient(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        return self.features.t() @ self._residual(value) / self.observed.shape[0]

    def objective(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        del negative_gradient
        return 0.5 * self._residual(value).square().mean(0)

    def fenchel(
        self,
        value: Float[Tensor, "source target"],
        negative_gradient: Float[Tensor, "source target"],
        scale: Float[Tensor, " target"],
    ) -> Float[Tensor, " target"]:
        return quadratic_share(self._residual(value).square().mean(0), (value * negative_gradient).sum(0), scale)

    def natural_scale(
        self, value: Float[Tensor, "source target"], negative_gradient: Float[Tensor, "source target"]
    ) -> Float[Tensor, " target"]:
        return quadratic_scale(self._residual(value).square().mean(0), (value * negative_gradient).sum(0))

    def curvature(self) -> float:
        return largest_singular_sq(self.features) / self.observed.shape[0]

    def null_objective(self) -> Float[Tensor, " target"]:
        return 0.5 * self.observed.square().mean(0)

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "QuadraticResidual":
        features = self.features if sources is None else self.features.index_select(1, sources)
        return QuadraticResidual(features, self.observed if targets is None else self.observed[:, targets])

    def _residual(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "sample target"]:
        return self.observed - self.features @ value
