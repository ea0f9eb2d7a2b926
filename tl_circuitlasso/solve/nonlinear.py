"""Nonlinear parents, still convex: group Lasso over a fixed dictionary of functions of each parent.

Every parent x becomes (x, f_2(x), ..., f_k(x)), whitened within the parent, and one norm decides whether the parent is
in. Groups that are whitened make a block step a plain shrinkage, and the certificate is that of the group Lasso.

The time goes into moments, not into the solve: k functions a parent have k (k + 1) / 2 times the products of a linear
fit. `Dictionary.moments` takes them in single precision (functions of standardised activations are of unit size, and
slabs are summed in double) and whitens the Gram instead of the samples. The `--nonlinear` section of
benchmarks/solvers.py compares the dictionaries by what they find in a second.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.path import Moments

KINDS = ("hinge", "spline", "fourier")
SLAB = 2048  # samples whose functions are in memory at once; products are single precision inside a slab
STRIP = 256  # columns of the Gram that are computed together


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
        scaled = (features.double() - self.location) / self.spread
        raw = torch.stack(_functions(self.kind, scaled, self.knots), 2) - self.mean
        return torch.einsum("mpk,pkl->mpl", raw, self.mixing).flatten(1)

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
        y = targets.double() - targets.double().mean(0)
        sums = self.mean.new_zeros(self.mean.numel())
        total = sums.new_zeros(len(sums), len(sums) + y.shape[1])
        shift = -self.location / self.spread
        for slab, observed in zip(features.split(SLAB), y.split(SLAB)):
            scaled = torch.addcmul(shift, slab.double(), 1 / self.spread).float()
            block = torch.cat([*_functions(self.kind, scaled, self.knots.float()), observed.float()], 1)
            sums += block[:, : len(sums)].sum(0, dtype=torch.float64)
            _products(block, len(sums), total)
        gram, cross = _whitened(total, sums, self.mixing, len(y))
        # their type tells `lasso` how far to trust the last digits
        return Moments(gram.float(), cross.float(), y.square().mean(0).float(), len(y))

    def groups(self, targets: int) -> Group:
        """The penalty: one norm per (parent, target)."""
        rows = torch.arange(len(self.spread)).repeat_interleave(self.size)
        return Group(rows, torch.arange(targets))

    def parent_scores(self, value: Float[Tensor, "feature target"]) -> Float[Tensor, "source target"]:
        """The norm of each parent's coefficients: how much of the target's standard deviation it moves."""
        return value.view(len(self.spread), self.size, -1).norm(dim=1)


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
    location, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    scaled = (x - location) / spread
    knots = _knots(kind, scaled, size - 1, seed)
    raw = torch.stack(_functions(kind, scaled, knots), 2)
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
    kind: str, scaled: Float[Tensor, "sample source"], knots: Float[Tensor, "inner source"]
) -> list[Float[Tensor, "sample source"]]:
    """The linear function and the others, one matrix each."""
    if kind == "fourier":
        return [scaled, *(torch.cos(scaled * knot + (n % 2) * torch.pi / 2) for n, knot in enumerate(knots))]
    bent = [(scaled - knot).clamp(min=0) for knot in knots]
    return [scaled, *(bent if kind == "hinge" else (part * part * part for part in bent))]


def _products(block: Float[Tensor, "slab column"], functions: int, total: Float[Tensor, "function column"]) -> None:
    """Adds the upper triangle of F'(F, Y) in float64, block = (F, Y): strips of columns leave out most of the rest."""
    for left in range(0, functions, STRIP):
        strip = slice(left, min(left + STRIP, functions))
        total[strip, left:] += block[:, strip].T @ block[:, left:]


def _whitened(
    total: Float[Tensor, "function column"], sums: Float[Tensor, " function"], mixing: Tensor, count: int
) -> tuple[Float[Tensor, "feature feature"], Float[Tensor, "feature target"]]:
    """Gram and cross-Gram of the centred, whitened functions, parent by parent, from sums function by function."""
    sources, size, _ = mixing.shape
    mean, functions = sums / count, len(sums)
    gram = torch.triu(total[:, :functions]) / count
    gram = gram + torch.triu(gram, 1).T - mean[:, None] * mean
    cross = (total[:, functions:] / count).view(size, sources, -1)
    half = torch.einsum("aif,iac->icf", gram.view(size, sources, functions), mixing).flatten(0, 1)
    whole = torch.einsum("fbj,jbd->fjd", half.view(-1, size, sources), mixing).flatten(1)
    return (whole + whole.T) / 2, torch.einsum("ait,iac->ict", cross, mixing).flatten(0, 1)


def _whitening(raw: Float[Tensor, "sample source size"]) -> Float[Tensor, "source size size"]:
    """V e^-1/2 per parent; directions of next to no variance are dropped rather than blown up."""
    covariance = torch.einsum("mpk,mpl->pkl", raw, raw) / len(raw)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    kept = eigenvalues > 1e-4 * eigenvalues.amax(1, keepdim=True).clamp(min=1e-12)
    return vectors * torch.where(kept, eigenvalues.clamp(min=1e-30).rsqrt(), 0)[:, None]
