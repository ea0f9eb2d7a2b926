"""Nonlinear parents, still convex: group Lasso over a fixed dictionary of functions of each parent.

Every parent x becomes (x, f_2(x), ..., f_k(x)), whitened within the parent, and one norm decides whether the parent is
in. Groups that are whitened make a block step a plain shrinkage, and the certificate is that of the group Lasso.

The time goes into moments, not into the solve: k functions a parent have about k^2 times the products of a linear
fit. `Dictionary.moments` takes half of them, the other half being their mirror, in single precision (functions of
standardised activations are of unit size, and slabs are summed in double). The `--nonlinear` section of
benchmarks/solvers.py compares the dictionaries by what they find in a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.path import Moments

KINDS = ("hinge", "spline", "fourier")
SLAB = 2048  # samples whose functions are in memory at once; products are single precision inside a slab
KEPT = 1e-4  # share of a function's variance that must be new for it to count
STRIP = 256  # rows of the Gram that are computed together


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Functions of each parent, fitted once on a sample of activations: `transform` maps (sample, source) to features.

    kind "hinge": max(x - knot, 0) at inner quantiles; "spline": cubic truncated powers there; "fourier": cosines and
    sines of random frequencies. The first of the `size` functions of a parent is the linear one; each other is freed of
    those before it by `mixing`, upper triangular, and scaled to unit variance (near-copies of them become 0).
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
        return torch.stack(self._white(features, torch.float64), 1).flatten(0, 1).T

    def moments(self, features: Float[Tensor, "sample source"], targets: Float[Tensor, "sample target"]) -> Moments:
        """The centred moments of `transform(features)` and `targets`, in single precision, by slabs of samples.

        >>> x = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
        >>> data = fit_dictionary(x, size=2).moments(x, x.abs())
        >>> bool(torch.allclose(data.gram, torch.eye(2), atol=1e-5))
        True
        """
        if not len(features) or len(features) != len(targets):
            raise InputError(
                f"`features` and `targets` need the same samples, at least 1: {len(features)}, {len(targets)}"
            )
        count, mean = len(targets), targets.mean(0, dtype=torch.float64)
        functions, square = self.mean.numel(), torch.zeros_like(mean)
        total = self.mean.new_zeros(functions, functions + len(mean) + 1)
        for slab, observed in zip(features.split(SLAB), targets.split(SLAB)):
            rest = (observed - mean).T.contiguous()
            square += rest.square().sum(1)
            others = torch.cat([rest.float(), torch.ones(1, len(slab), device=mean.device)])
            _add_products(self._white(slab, torch.float32), others, total)
        gram, cross = _centred(total, self.size, count)
        # their type tells `lasso` how far to trust the last digits
        return Moments(gram, cross, (square / count).float(), count)

    def groups(self, targets: int) -> Group:
        """The penalty: one norm per (parent, target)."""
        rows = torch.arange(len(self.spread)).repeat_interleave(self.size)
        return Group(rows, torch.arange(targets))

    def parent_scores(self, value: Float[Tensor, "feature target"]) -> Float[Tensor, "source target"]:
        """The norm of each parent's coefficients: how much of the target's standard deviation it moves."""
        return value.view(len(self.spread), self.size, -1).norm(dim=1)

    def _white(
        self, features: Float[Tensor, "sample source"], dtype: torch.dtype
    ) -> list[Float[Tensor, "source sample"]]:
        """The whitened functions, one matrix each; activations are standardised in double first."""
        scaled = torch.addcmul(-self.location / self.spread, features.double(), 1 / self.spread)
        white = _functions(self.kind, scaled.to(dtype).T.contiguous(), self.knots.to(dtype))
        mixing, shift = self.mixing.to(dtype), -(self.mean[:, None] @ self.mixing)[:, 0].to(dtype)
        for n in reversed(range(self.size)):  # in place: a function is made of itself and of those before it
            torch.addcmul(shift[:, n, None], white[n], mixing[:, n, n, None], out=white[n])
            for before in range(n):
                white[n].addcmul_(white[before], mixing[:, before, n, None])
        return white


def fit_dictionary(
    features: Float[Tensor, "sample source"], *, kind: str = "hinge", size: int = 2, seed: int = 0
) -> Dictionary:
    """A dictionary of `size` functions per parent (the linear one and size - 1 more), fitted on `features`.

    A few thousand samples are plenty: they place the knots and whiten.

    >>> dictionary = fit_dictionary(torch.linspace(-1, 1, 50)[:, None], size=3)
    >>> dictionary.transform(torch.zeros(2, 1)).shape
    torch.Size([2, 3])
    """
    if kind not in KINDS or size < 1:
        raise InputError(f"`kind` must be one of {KINDS} and `size` at least 1, got {kind!r} and {size}")
    x = features.double()
    location = x.mean(0)
    spread = (x - location).square().mean(0).sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    scaled = ((x - location) / spread).T.contiguous()
    knots = _knots(kind, scaled, size - 1, seed)
    raw = torch.stack(_functions(kind, scaled, knots), 1)
    mean = raw.mean(2)
    return Dictionary(kind, knots, location, spread, mean, _whitening(raw - mean[:, :, None]))


def _knots(kind: str, scaled: Float[Tensor, "source sample"], count: int, seed: int) -> Float[Tensor, "inner source"]:
    """Frequencies, or the order statistics next to inner quantiles: a partial sort is all that they need."""
    sources, samples = scaled.shape
    if kind == "fourier":
        generator = torch.Generator().manual_seed(seed)
        frequency = 1.5 * torch.randn(count, sources, generator=generator, dtype=scaled.dtype)
        return frequency.to(scaled.device)
    places = [(samples - 1) * n // (count + 1) for n in range(1, count + 1)]
    if not places:
        return scaled.new_zeros(0, sources)
    parted = np.partition(scaled.cpu().numpy(), places, axis=1)[:, places]
    return torch.from_numpy(np.ascontiguousarray(parted.T)).to(scaled.device)


def _functions(
    kind: str, scaled: Float[Tensor, "source sample"], knots: Float[Tensor, "inner source"]
) -> list[Float[Tensor, "source sample"]]:
    """The linear function and the others, one matrix each."""
    if kind == "fourier":
        phases = enumerate(knots[:, :, None])
        return [scaled, *(torch.cos(scaled * knot + (n % 2) * torch.pi / 2) for n, knot in phases)]
    bent = [(scaled - knot).clamp_(min=0) for knot in knots[:, :, None]]
    return [scaled, *(bent if kind == "hinge" else (part * part * part for part in bent))]


def _add_products(
    functions: Sequence[Float[Tensor, "source slab"]],
    others: Float[Tensor, "other slab"],
    total: Float[Tensor, "function column"],
) -> None:
    """Adds F (F, others)' to `total`, strip by strip; of F F' the strips on and right of the diagonal."""
    strips = [strip for part in functions for strip in part.split(STRIP)]
    count, parts = len(strips), [*strips, *others.split(STRIP)]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    if others.device.type == "cpu" and torch.backends.mkldnn.is_available():
        parts = [part.to_mkldnn() for part in parts]  # the vector width of the machine, where BLAS may use half of it
    for i in range(count):
        for j in range(i, len(parts)):
            block = torch.nn.functional.linear(parts[i], parts[j])
            block = block.to_dense() if block.is_mkldnn else block
            total[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] += block


def _centred(
    total: Float[Tensor, "function column"], size: int, count: int
) -> tuple[Float[Tensor, "feature feature"], Float[Tensor, "feature target"]]:
    """Gram and cross-Gram about the means, the functions of each parent side by side, from sums function by function.

    The last column holds the sums of the functions; of the Gram the lower triangle is still to be mirrored.
    """
    functions, mean = len(total), total[:, -1] / count
    means = torch.cat([mean, mean.new_zeros(total.shape[1] - functions - 1)])  # targets are centred already
    centred = torch.addr(total[:, :-1], mean, means, beta=1 / count, alpha=-1).float()
    upper = torch.triu(centred[:, :functions])
    upper.diagonal().mul_(0.5)
    gram = (upper + upper.T).view(size, -1, size, functions // size)
    cross = centred[:, functions:].unflatten(0, (size, -1))
    return gram.permute(1, 0, 3, 2).reshape(functions, functions), cross.transpose(0, 1).flatten(0, 1)


def _whitening(raw: Float[Tensor, "source size sample"]) -> Float[Tensor, "source size size"]:
    """Gram-Schmidt per parent; what a function adds to those before it is dropped where it is next to nothing."""
    covariance = raw @ raw.mT / raw.shape[2]
    mixing = torch.zeros_like(covariance)
    for n in range(raw.shape[1]):
        shared = mixing.mT @ covariance[:, :, n, None]
        new, own = -(mixing @ shared)[:, :, 0], covariance[:, n, n]
        new[:, n] += 1
        left = own - shared.square().sum((1, 2))
        kept = left > KEPT * own.clamp(min=1e-12)
        mixing[:, :, n] = torch.where(kept[:, None], new * left.clamp(min=1e-30).rsqrt()[:, None], 0)
    return mixing
