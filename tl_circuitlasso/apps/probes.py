"""Linear probes: logistic regressions of a label on activations averaged over a text's tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class Probe:
    """Logistic regression on standardised activations."""

    mean: Float[Tensor, " width"]
    spread: Float[Tensor, " width"]
    weight: Float[Tensor, " width"]
    bias: Float[Tensor, ""]

    @property
    def direction(self) -> Float[Tensor, " width"]:
        """Its weights in the activations' own units."""
        return self.weight / self.spread

    def says(self, x: Float[Tensor, "text width"]) -> Bool[Tensor, " text"]:
        """Whether it says 1."""
        return ((x - self.mean) / self.spread) @ self.weight + self.bias > 0


def train_probe(x: Float[Tensor, "text width"], y: Int[Tensor, " text"]) -> Probe:
    """min over w, b of the mean cross-entropy + RIDGE / 2 |w|^2, by L-BFGS, x in standard deviations."""
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6 * float(x.std()) + 1e-30)
    ready, wanted = (x - mean) / spread, y.to(x)
    with torch.enable_grad():
        weight, bias = (torch.zeros(size, dtype=x.dtype, requires_grad=True) for size in (x.shape[1], ()))
        search = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(ready @ weight + bias, wanted)
            loss = loss + RIDGE / 2 * weight.square().sum()
            loss.backward()
            return loss

        search.step(closure)  # type: ignore[arg-type]
    return Probe(mean, spread, weight.detach(), bias.detach())
