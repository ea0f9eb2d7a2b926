"""Elementwise penalties: weighted L1, elastic net, their non-negative and boxed versions, adaptive weights.

Block norms are in `groups`. The strength lambda is never part of a penalty: it is per target and comes with the call.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractPenalty
from tl_circuitlasso.solve.prox import threshold

Entries = int | float | Tensor | None


@dataclass(frozen=True, eq=False)
class L1(AbstractPenalty):
    """lambda * sum_ij w_ij |a_ij|, optionally with a_ij >= 0, a_ij <= upper, and a squared part (see `ElasticNet`).

    `weights`: a number, (source,) or (source, target); > 0, and inf forbids an entry. `upper` (same shapes) needs
    `non_negative=True` and gives the box 0 <= a <= upper. `squared` weighs an added lambda/2 * sum_ij q_ij a_ij^2.

    >>> L1().strength_max(torch.tensor([[3.0], [-4.0]])).item()
    4.0
    >>> L1(non_negative=True).strength_max(torch.tensor([[3.0], [-4.0]])).item()
    3.0
    """

    weights: Entries = None
    non_negative: bool = False
    upper: Entries = None
    squared: Entries = None

    def check(self, sources: int, targets: int) -> None:
        for name in ("weights", "upper", "squared"):
            _check_entries(name, getattr(self, name), sources, targets)
        if self.upper is not None and not self.non_negative:
            raise InputError("`upper` bounds non-negative coefficients only: pass non_negative=True as well")

    def weight(self, like: Float[Tensor, "source _any"]) -> Float[Tensor, "source _some"]:
        """w_ij as a tensor that broadcasts against the coefficients."""
        return entries_like(1.0 if self.weights is None else self.weights, like)

    def value(
        self, coef: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        weight = self.weight(coef)
        total = torch.where(coef == 0, 0, weight * coef.abs()).sum(0)  # where: inf * 0 is nan
        if self.squared is not None:
            total = total + 0.5 * (entries_like(self.squared, coef) * coef.square()).sum(0)
        return strength * total

    def prox(
        self, coef: Float[Tensor, "source target"], step: float, strength: Float[Tensor, " target"]
    ) -> Float[Tensor, "source target"]:
        bar = _times(step * strength, self.weight(coef))
        ridge = None if self.squared is None else step * strength * entries_like(self.squared, coef)
        upper = None if self.upper is None else entries_like(self.upper, coef)
        return threshold(coef, bar, ridge, upper, one_sided=self.non_negative)

    def strength_max(self, negative_gradient: Float[Tensor, "source target"]) -> Float[Tensor, " target"]:
        if not negative_gradient.shape[0]:
            return negative_gradient.new_zeros(negative_gradient.shape[1])
        if self.weights is None and self.upper is None:  # one pass, no copy
            high = negative_gradient.amax(0)  # aminmax along this dimension takes several times as long as both
            return high.clamp(min=0) if self.non_negative else torch.maximum(-negative_gradient.amin(0), high)
        pull = self._pull(negative_gradient)
        if self.upper is not None:  # an entry that may not leave 0 pulls at nothing
            pull = torch.where(entries_like(self.upper, pull) > 0, pull, 0)
        return (pull / self.weight(pull)).amax(0)

    def dual_scale(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        pull = self._pull(negative_gradient)
        if self.upper is not None:  # a bounded coefficient has a finite conjugate everywhere
            pull = torch.where(torch.isinf(entries_like(self.upper, pull)), pull, 0)
        worst = (pull / self.weight(pull)).amax(0) if pull.shape[0] else pull.new_zeros(pull.shape[1])
        return torch.where(worst > 0, strength / worst, torch.inf)

    def conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        if self.upper is None:
            return torch.zeros_like(strength)
        upper = entries_like(self.upper, negative_gradient)
        excess = torch.clamp(negative_gradient - _times(strength, self.weight(negative_gradient)), min=0)
        return torch.where((upper > 0) & torch.isfinite(upper), excess * upper, 0).sum(0)

    def whole_conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        pull = self._pull(negative_gradient)
        over = torch.clamp(pull - _times(strength, self.weight(pull)), min=0)
        ridge = self.ridge(strength)
        best = over / (torch.zeros_like(over) if ridge is None else ridge)  # where the supremum is attained
        if self.upper is not None:
            best = torch.minimum(best, entries_like(self.upper, over))
        bent = 0.0 if ridge is None else 0.5 * ridge * torch.where(torch.isinf(best), 0, best)
        return torch.where(over > 0, best * (over - bent), 0).sum(0)

    def ridge(self, strength: Float[Tensor, " target"]) -> Float[Tensor, "#source #target"] | None:
        if self.squared is None:
            return None
        return strength * entries_like(self.squared, strength[None])

    def coupled(self) -> None:
        return None

    def rescale(self, source_scale: Float[Tensor, " source"], target_scale: Float[Tensor, " target"]) -> "L1":
        like = source_scale[:, None].expand(len(source_scale), len(target_scale))
        upper, squared = self.upper, self.squared
        if upper is not None:
            upper = entries_like(upper, like) * source_scale[:, None] / target_scale
        if squared is not None:
            squared = entries_like(squared, like) * target_scale / source_scale.square()[:, None]
        plain = self.weights is None and bool((source_scale == 1).all())
        weights = None if plain else self.weight(like) / source_scale[:, None]
        return L1(weights, self.non_negative, upper, squared)

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "L1":
        return replace(
            self, **{name: _slice(getattr(self, name), sources, targets) for name in ("weights", "upper", "squared")}
        )

    def to(self, dtype: torch.dtype, device: torch.device) -> "L1":
        moved = {
            name: entry.detach().to(dtype=dtype, device=device)
            for name in ("weights", "upper", "squared")
            if isinstance(entry := getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def _pull(self, negative_gradient: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        return negative_gradient.clamp(min=0) if self.non_negative else negative_gradient.abs()


def ElasticNet(l1_ratio: float = 0.5, weights: Entries = None, non_negative: bool = False, upper: Entries = None) -> L1:
    """lambda * sum_ij (rho w_ij |a_ij| + (1 - rho)/2 a_ij^2), rho = `l1_ratio` in (0, 1] (Zou & Hastie 2005).

    It shares the coefficient among near-copies of one source, where the Lasso's choice between them is arbitrary.

    >>> float(ElasticNet(l1_ratio=0.5).value(torch.full((1, 1), 2.0), torch.ones(1)))
    2.0
    """
    if not 0 < l1_ratio <= 1:
        raise InputError(f"`l1_ratio` must lie in (0, 1], got {l1_ratio}")
    scaled = l1_ratio if weights is None else torch.as_tensor(weights) * l1_ratio
    return L1(scaled, non_negative, upper, None if l1_ratio == 1 else 1.0 - l1_ratio)


def adaptive_weights(
    pilot: Float[Tensor, "source target"], *, gamma: float = 1.0, floor: float = 1e-3
) -> Float[Tensor, "source target"]:
    """w_ij = (|pilot_ij| / max_i |pilot_ij| + floor)^-gamma: weights for a second, less biased fit (Zou 2006).

    `pilot` are coefficients in comparable units (a ridge or Lasso fit of standardised data). A column of zeros, where
    the pilot knows nothing, gets weights of 1.

    >>> adaptive_weights(torch.tensor([[1.0], [0.0]]), floor=0.5).flatten().tolist()
    [0.66..., 2.0]
    """
    size = pilot.abs()
    top = size.amax(0, keepdim=True)
    weights = (size / top.clamp(min=torch.finfo(pilot.dtype).tiny) + floor) ** -gamma
    return torch.where(top > 0, weights, 1.0)


def entries_like(entry: int | float | Tensor, like: Tensor) -> Tensor:
    """A number, (source,) or (source, target) entry as something 2-D that broadcasts against `like`."""
    tensor = torch.as_tensor(entry, dtype=like.dtype, device=like.device)
    if tensor.ndim == 0:
        return tensor.expand(like.shape[0], 1)
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _times(strength: Float[Tensor, " target"], weight: Float[Tensor, "source #target"]) -> Float[Tensor, "a b"]:
    """lambda_j w_ij, where a forbidden entry stays forbidden at lambda = 0."""
    return torch.where(torch.isinf(weight), torch.inf, strength * weight)


def _slice(entry: Entries, sources: Tensor | None, targets: Tensor | None) -> Entries:
    if not isinstance(entry, Tensor) or entry.ndim == 0:
        return entry
    if sources is not None:
        entry = entry[sources]
    return entry[:, targets] if targets is not None and entry.ndim == 2 and entry.shape[1] > 1 else entry


def _check_entries(name: str, entry: Entries, sources: int, targets: int) -> None:
    if entry is None:
        return
    tensor = torch.as_tensor(entry)
    if tuple(tensor.shape) not in {(), (sources,), (sources, targets), (sources, 1)}:
        raise InputError(
            f"`{name}` must be a number, ({sources},) or ({sources}, {targets}), got {tuple(tensor.shape)}"
        )
    bad = torch.isnan(tensor) | ((tensor <= 0) if name == "weights" else (tensor < 0))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        rule = "> 0 (inf forbids an entry)" if name == "weights" else ">= 0"
        raise InputError(f"`{name}` must be {rule}; entry {where} is {float(tensor[tuple(where)])}")
