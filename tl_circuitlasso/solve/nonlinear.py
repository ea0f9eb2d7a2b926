"""Nonlinear parents, still convex: group Lasso over a fixed dictionary of functions of each parent.

Every parent x becomes (x, f_2(x), ..., f_k(x)), whitened within the parent, and one norm decides whether the parent is
in. Whitened groups make the block step exact and the Gram of a group the identity, so a nonlinear parent costs what k
linear ones cost and the certificate is that of the group Lasso.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.groups import Group

KINDS = ("hinge", "spline", "fourier")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Functions of each parent, fitted once on a sample of activations: `transform` maps (sample, source) to features.

    kind "hinge": max(x - knot, 0) at inner quantiles; "spline": cubic truncated powers there; "fourier": cosines and
    sines of random frequencies. `mixing` whitens the `size` functions of a parent (near-copies are dropped to 0).
    """

    kind: str
    knots: Float[Tensor, "inner source"]
    location: Float[Tensor, " source"]
    spread: Float[Tensor, " source"]
    mean: Float[Tensor, "source size"]
    mixing: Float[Tensor, "source size size"]

    @property
    def size(self) -> int:
        """Functions per parent, the linear one included."""
        return int(self.mean.shape[1])

    def transform(self, features: Float[Tensor, "sample source"]) -> Float[Tensor, "sample feature"]:
        """Whitened functions; those of parent i are columns i * size to (i + 1) * size."""
        raw = _functions(self.kind, features.double(), self.knots, self.location, self.spread) - self.mean
        return torch.einsum("mpk,pkl->mpl", raw, self.mixing).flatten(1)

    def groups(self, targets: int) -> Group:
        """The penalty: one norm per (parent, target)."""
        rows = torch.arange(len(self.spread)).repeat_interleave(self.size)
        return Group(rows, torch.arange(targets))

    def parent_scores(self, value: Float[Tensor, "feature target"]) -> Float[Tensor, "source target"]:
        """The norm of each parent's coefficients: how much of the target's standard deviation it moves."""
        return value.view(len(self.spread), self.size, -1).norm(dim=1)


def fit_dictionary(
    features: Float[Tensor, "sample source"], *, kind: str = "hinge", size: int = 3, seed: int = 0
) -> Dictionary:
    """A dictionary of `size` functions per parent (the linear one and size - 1 more), fitted on `features`.

    >>> dictionary = fit_dictionary(torch.linspace(-1, 1, 50)[:, None], size=3)
    >>> dictionary.transform(torch.zeros(2, 1)).shape
    torch.Size([2, 3])
    """
    if kind not in KINDS or size < 1:
        raise InputError(f"`kind` must be one of {KINDS} and `size` at least 1, got {kind!r} and {size}")
    x = features.double()
    location, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    knots = _knots(kind, (x - location) / spread, size - 1, seed)
    raw = _functions(kind, x, knots, location, spread)
    mean = raw.mean(0)
    return Dictionary(kind, knots, location, spread, mean, _whitening(raw - mean))


def _knots(kind: str, scaled: Float[Tensor, "sample source"], count: int, seed: int) -> Float[Tensor, "inner source"]:
    if kind == "fourier":
        generator = torch.Generator().manual_seed(seed)
        frequency = 1.5 * torch.randn(count, scaled.shape[1], generator=generator, dtype=scaled.dtype)
        return frequency.to(scaled.device)
    level = torch.arange(1, count + 1, dtype=scaled.dtype, device=scaled.device) / (count + 1)
    return torch.quantile(scaled, level, dim=0)


def _functions(
    kind: str,
    features: Float[Tensor, "sample source"],
    knots: Float[Tensor, "inner source"],
    location: Float[Tensor, " source"],
    spread: Float[Tensor, " source"],
) -> Float[Tensor, "sample source size"]:
    x = (features - location) / spread
    if kind == "fourier":
        turn = knots.new_tensor([k % 2 for k in range(len(knots))]) * torch.pi / 2
        rest = torch.cos(x[:, None] * knots + turn[:, None])
    else:
        rest = (x[:, None] - knots).clamp(min=0) ** (1 if kind == "hinge" else 3)
    return torch.cat([x[:, None], rest], 1).transpose(1, 2)


def _whitening(raw: Float[Tensor, "sample source size"]) -> Float[Tensor, "source size size"]:
    """V e^-1/2 per parent; directions of next to no variance are dropped rather than blown up."""
    covariance = torch.einsum("mpk,mpl->pkl", raw, raw) / len(raw)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    kept = eigenvalues > 1e-6 * eigenvalues.amax(1, keepdim=True).clamp(min=1e-12)
    return vectors * torch.where(kept, eigenvalues.clamp(min=1e-30).rsqrt(), 0)[:, None]
