"""Nonlinear parents, still convex: group Lasso over a fixed dictionary of functions of each parent.

Every parent x becomes (x, f_2(x), ..., f_k(x)), whitened within the parent, and one norm decides whether the parent is
in. Groups that are whitened make a block step a plain shrinkage, and the certificate is that of the group Lasso.

The time goes into moments, not into the solve: k functions a parent have about k^2 times the products of a linear
fit. `Dictionary.moments` takes half of them, the other half being their mirror, in single precision (functions of
standardised activations are of unit size, and slabs are summed in double). The `--nonlinear` section of
benchmarks/solvers.py compares the dictionaries by what they find in a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.path import Moments

KINDS = ("hinge", "spline", "fourier")
SLAB = 1008  # samples whose functions are in memory at once; a power of two would put all rows into few cache sets
KEPT = 1e-4  # share of a function's variance that must be new for it to count
STILL = 1e-12  # deviation relative to the mean that is rounding
STRIP = 256  # rows of the Gram that are computed together


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Functions of each parent, fitted once on a sample of activations: `transform` maps (sample, source) to features.

    kind "hinge": max(x - knot, 0) at inner quantiles; "spline": cubic truncated powers there; "fourier": cosines and
    sines of random frequencies. The first of the `size` functions of a parent is the linear one; each other is freed of
    those before it by `mixing`, upper triangular, and scaled to unit variance (near-copies of them become 0); `shift`
    centres them.
    """

    kind: str
    knots: Float[Tensor, "inner source"]
    location: Float[Tensor, " source"]
    spread: Float[Tensor, " source"]
    mixing: Float[Tensor, "source size size"]
    shift: Float[Tensor, "source size"]

    @property
    def size(self) -> int:
        """Functions per parent, the linear one included."""
        return int(self.shift.shape[1])

    def transform(self, features: Float[Tensor, "sample source"]) -> Float[Tensor, "sample feature"]:
        """Whitened functions; those of parent i are columns i * size to (i + 1) * size."""
        white = self.shift.new_empty(*self.shift.shape, len(features))
        self._write(features, white.unbind(1))
        return white.flatten(0, 1).T

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
        features, targets = features.detach(), targets.detach()
        count, mean = len(targets), targets.mean(0, dtype=torch.float64)
        functions, square = self.shift.numel(), torch.zeros_like(mean)
        total = self.shift.new_zeros(functions, functions + len(mean) + 1)
        room = torch.empty(total.shape[1] * min(SLAB, count), device=mean.device)
        single = replace(self, **{name: getattr(self, name).float() for name in ("knots", "mixing", "shift")})
        for slab, observed in zip(features.split(SLAB), targets.split(SLAB)):
            rows = room[: total.shape[1] * len(slab)].view(-1, len(slab))
            single._write(slab, rows[:functions].chunk(self.size))
            rows[functions:-1].copy_((observed - mean).T)
            rows[-1] = 1  # for the sums of the others
            square += rows[functions:-1].square().sum(1)
            _add_products(rows, total)
        gram, cross = _centred(total, self.size, count)
        # their type tells `lasso` how far to trust the last digits
        return Moments(gram, cross, (square / count).float(), count)

    def groups(self, targets: int) -> Group:
        """The penalty: one norm per (parent, target)."""
        rows = torch.arange(len(self.spread)).repeat_interleave(self.size)
        return Group(rows, torch.arange(targets))

    def _write(self, features: Float[Tensor, "sample source"], white: Sequence[Float[Tensor, "source sample"]]) -> None:
        """Writes the whitened functions, one matrix each; activations are standardised in double first."""
        white[0].copy_(torch.addcmul(-self.location / self.spread, features.double(), 1 / self.spread).T)
        _bend(self.kind, self.knots, white)
        for n in reversed(range(1, self.size)):  # in place: a function is made of itself and of those before it
            white[n].mul_(self.mixing[:, n, n, None]).add_(self.shift[:, n, None])
            for before in range(n):
                white[n].addcmul_(white[before], self.mixing[:, before, n, None])


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
    x = features.detach().double()
    location = x.mean(0)
    centred = x - location
    spread = centred.square().mean(0).sqrt()
    spread = torch.where(spread > STILL * location.abs(), spread, torch.inf)  # what doesn't vary is 0
    raw = x.new_empty(len(location), size, len(x))
    raw[:, 0] = (centred / spread).T
    knots = _knots(kind, raw[:, 0], size - 1, seed)
    _bend(kind, knots, raw.unbind(1))
    mean = raw.mean(2, keepdim=True)
    mixing = _whitening(raw - mean)
    return Dictionary(kind, knots, location, spread, mixing, -(mean.mT @ mixing)[:, 0])


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


def _bend(kind: str, knots: Float[Tensor, "inner source"], parts: Sequence[Float[Tensor, "source sample"]]) -> None:
    """Writes the functions of the first part, the linear one, into the others."""
    for n, (knot, part) in enumerate(zip(knots[:, :, None], parts[1:])):
        if kind == "fourier":
            torch.mul(parts[0], knot, out=part).add_((n % 2) * torch.pi / 2).cos_()
        else:
            torch.sub(parts[0], knot, out=part).clamp_(min=0)
        if kind == "spline":
            part.pow_(3)


def _add_products(rows: Float[Tensor, "column slab"], total: Float[Tensor, "function column"]) -> None:
    """Adds F (F, others)' to `total`, F the first of the rows; of F F' the strips on and right of the diagonal."""
    wide = rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    for left in range(0, len(total), STRIP):
        right = min(left + STRIP, len(total))
        strip = rows[left:right].to_mkldnn() if wide else rows[left:right]  # MKL may use half a machine's vector width
        product = torch.nn.functional.linear(strip, rows[left:])
        total[left:right, left:] += product.to_dense() if wide else product


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
    mixing[:, 0, 0] = (covariance[:, 0, 0] > 0).double()  # the linear function is standardised already
    for n in range(1, raw.shape[1]):
        shared = mixing.mT @ covariance[:, :, n, None]
        new, own = -(mixing @ shared)[:, :, 0], covariance[:, n, n]
        new[:, n] += 1
        left = own - shared.square().sum((1, 2))
        kept = left > KEPT * own.clamp(min=1e-12)
        mixing[:, :, n] = torch.where(kept[:, None], new * left.clamp(min=1e-30).rsqrt()[:, None], 0)
    return mixing
