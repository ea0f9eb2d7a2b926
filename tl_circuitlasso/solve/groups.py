"""Group penalties: one Frobenius norm per (row group, target group) block, or per row over many targets."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractPenalty
from tl_circuitlasso.solve.prox import block_norms, group_shrink


@dataclass(frozen=True, eq=False)
class Group(AbstractPenalty):
    """lambda * sum_gh w_gh ||A_gh||_F over blocks (row group g, target group h), optionally with A >= 0.

    `row_groups` (source,) and `target_groups` (target,) hold the group number, from 0, of every row and column;
    `weights` (row group, target group) are > 0 and inf forbids a block. Columns of one target group share a strength.
    Yuan & Lin 2006; with one target group over all targets and one row per group it is the multitask Lasso.

    >>> rows, columns = torch.tensor([0, 0]), torch.tensor([0])
    >>> Group(rows, columns).strength_max(torch.tensor([[3.0], [4.0]])).item()
    5.0
    """

    row_groups: Int[Tensor, " source"]
    target_groups: Int[Tensor, " target"]
    weights: Float[Tensor, "row_group target_group"] | None = None
    non_negative: bool = False

    def check(self, sources: int, targets: int) -> None:
        for name, groups, size in (("row", self.row_groups, sources), ("target", self.target_groups, targets)):
            if groups.shape != (size,) or (size and int(groups.min()) < 0):
                raise InputError(
                    f"`{name}_groups` must hold {size} group numbers from 0, got shape {tuple(groups.shape)}"
                )
        if self.weights is None:
            return
        if self.weights.shape != self._shape:
            raise InputError(f"`weights` must be {self._shape} (row group, target group), got {self.weights.shape}")
        bad = torch.isnan(self.weights) | (self.weights <= 0)
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise InputError(
                f"`weights` must be > 0 (inf forbids a block); block {where} is {float(self.weights[tuple(where)])}"
            )

    def value(
        self, coef: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        norm = self._norms(coef)
        weighted = torch.where(norm == 0, 0, norm * self.table(coef))
        return strength * weighted.sum(0)[self.target_groups]

    def prox(
        self, coef: Float[Tensor, "source target"], step: float, strength: Float[Tensor, " target"]
    ) -> Float[Tensor, "source target"]:
        coef = coef.clamp(min=0) if self.non_negative else coef
        weight = self.table(coef)
        threshold = torch.where(torch.isinf(weight), torch.inf, step * self._by_group(strength) * weight)
        return group_shrink(coef, threshold, self.row_groups, self.target_groups)

    def strength_max(self, negative_gradient: Float[Tensor, "source target"]) -> Float[Tensor, " target"]:
        if not negative_gradient.shape[0]:
            return negative_gradient.new_zeros(negative_gradient.shape[1])
        norm = self._norms(self._pull(negative_gradient))
        return (norm / self.table(norm)).amax(0)[self.target_groups]

    def dual_scale(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        worst = self.strength_max(negative_gradient)
        return torch.where(worst > 0, strength / worst, torch.inf)

    def conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        del negative_gradient
        return torch.zeros_like(strength)

    def whole_conjugate(
        self, negative_gradient: Float[Tensor, "source target"], strength: Float[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        return torch.where(self.dual_scale(negative_gradient, strength) >= 1, 0.0, torch.inf).to(strength)

    def ridge(self, strength: Float[Tensor, " target"]) -> None:
        del strength

    def coupled(self) -> Int[Tensor, " target"]:
        return self.target_groups

    def rescale(self, source_scale: Float[Tensor, " source"], target_scale: Float[Tensor, " target"]) -> "Group":
        """Scales must be equal within a group: a Frobenius norm has no other rescaling."""
        del target_scale
        by_group = source_scale.new_ones(self._shape[0]).scatter_(0, self.row_groups, source_scale)
        return replace(self, weights=self.table(source_scale) / by_group[:, None])

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "Group":
        rows = self.row_groups if sources is None else self.row_groups[sources]
        columns = self.target_groups if targets is None else self.target_groups[targets]
        weights = self.table(torch.ones((), dtype=torch.float64, device=rows.device))
        kept_rows, rows = torch.unique(rows, return_inverse=True)
        kept_columns, columns = torch.unique(columns, return_inverse=True)
        return replace(
            self, row_groups=rows, target_groups=columns, weights=weights[kept_rows][:, kept_columns].contiguous()
        )

    def to(self, dtype: torch.dtype, device: torch.device) -> "Group":
        weights = None if self.weights is None else self.weights.detach().to(dtype=dtype, device=device)
        return replace(
            self,
            row_groups=self.row_groups.to(device),
            target_groups=self.target_groups.to(device),
            weights=weights,
        )

    @property
    def _shape(self) -> tuple[int, int]:
        if self.weights is not None:
            return int(self.weights.shape[0]), int(self.weights.shape[1])
        rows = int(self.row_groups.max()) + 1 if self.row_groups.numel() else 0
        return rows, int(self.target_groups.max()) + 1 if self.target_groups.numel() else 0

    def table(self, like: Tensor) -> Float[Tensor, "row_group target_group"]:
        """w_gh of every block, in the type of `like`."""
        if self.weights is None:
            return torch.ones(self._shape, dtype=like.dtype, device=like.device)
        return self.weights.to(dtype=like.dtype, device=like.device)

    def _norms(self, x: Float[Tensor, "source target"]) -> Float[Tensor, "row_group target_group"]:
        return block_norms(x, self.row_groups, self.target_groups, self._shape)

    def _pull(self, negative_gradient: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        return negative_gradient.clamp(min=0) if self.non_negative else negative_gradient

    def _by_group(self, strength: Float[Tensor, " target"]) -> Float[Tensor, " target_group"]:
        return strength.new_zeros(self._shape[1]).scatter_(0, self.target_groups, strength)


def row_group(sources: int, targets: int, *, non_negative: bool = False) -> Group:
    """The multitask Lasso, lambda * sum_i ||A_i,:||_2: a source is in for every target or for none.

    >>> import tl_circuitlasso as tcl
    >>> cross = torch.tensor([[0.9, 0.8], [0.01, 0.0]])
    >>> options = {"target_sq_norm": torch.ones(2), "strength": 0.5, "penalty": row_group(2, 2)}
    >>> (tcl.solve.lasso(torch.eye(2), cross, **options).value != 0).tolist()
    [[True, True], [False, False]]
    """
    return Group(torch.arange(sources), torch.zeros(targets, dtype=torch.long), non_negative=non_negative)
