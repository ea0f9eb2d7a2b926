"""SAEs of random directions: what functions over SAE features take, made in an instant, for examples and tests."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso._checks import as_seed, whole_number


class RandomSAE(torch.nn.Module):
    """code = relu(W_dec x - bias), x ~ code W_dec, with random rows of length 1; nothing is learned.

    It has what every SAE needs here: `encode`, `decode` and `W_dec`.
    """

    def __init__(self, directions: Float[Tensor, "feature width"], bias: int | float) -> None:
        super().__init__()
        self.W_dec = torch.nn.Parameter(directions, requires_grad=False)
        self.bias = float(bias)

    def encode(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... feature"]:
        """How far x reaches along each direction, beyond the bias."""
        return torch.relu(x @ self.W_dec.T - self.bias)

    def decode(self, codes: Float[Tensor, "... feature"]) -> Float[Tensor, "... width"]:
        """The sum of the directions, each times its code."""
        return codes @ self.W_dec


def random_sae(width: int, features: int, *, bias: int | float = 0.5, seed: int = 0) -> RandomSAE:
    """An SAE of so many random directions for activations `width` wide. The same seed, the same SAE.

    Raises
    ------
    InputError: a size below 1.

    >>> sae = random_sae(8, 3)
    >>> sae.encode(torch.ones(2, 8)).shape
    torch.Size([2, 3])
    """
    width, features = whole_number("width", width), whole_number("features", features)
    drawn = torch.randn(features, width, generator=torch.Generator().manual_seed(as_seed(seed)))
    return RandomSAE(torch.nn.functional.normalize(drawn, dim=1), bias)
