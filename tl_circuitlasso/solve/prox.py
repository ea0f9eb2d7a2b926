"""Proximal steps as pure functions: argmin_z 1/2 ||z - x||^2 + h(z), elementwise or by group."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def soft_threshold(
    x: Float[Tensor, "source target"], threshold: Float[Tensor, "#source #target"]
) -> Float[Tensor, "source target"]:
    """argmin_z 1/2 ||z - x||^2 + sum_i threshold_i |z_i| = sign(x) max(|x| - threshold, 0).

    >>> soft_threshold(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0]])).flatten().tolist()
    [1.0, 0.0]
    """
    return torch.sign(x) * torch.clamp(x.abs() - threshold, min=0)


def one_sided_threshold(
    x: Float[Tensor, "source target"], threshold: Float[Tensor, "#source #target"]
) -> Float[Tensor, "source target"]:
    """argmin_{z >= 0} 1/2 ||z - x||^2 + sum_i threshold_i z_i = max(x - threshold, 0)."""
    return torch.clamp(x - threshold, min=0)


def group_shrink(
    x: Float[Tensor, "source target"],
    threshold: Float[Tensor, "row_group target_group"],
    row_groups: Int[Tensor, " source"],
    target_groups: Int[Tensor, " target"],
) -> Float[Tensor, "source target"]:
    """argmin_Z 1/2 ||Z - X||^2 + sum_gh threshold_gh ||Z_gh||_F: each block X_gh times max(1 - threshold / norm, 0)."""
    norm = block_norms(x, row_groups, target_groups, threshold.shape)
    factor = torch.where(norm > threshold, 1 - threshold / norm.clamp(min=torch.finfo(x.dtype).tiny), 0)
    return x * factor[row_groups][:, target_groups]


def block_norms(
    x: Float[Tensor, "source target"],
    row_groups: Int[Tensor, " source"],
    target_groups: Int[Tensor, " target"],
    shape: tuple[int, ...] | None = None,
) -> Float[Tensor, "row_group target_group"]:
    """||X_gh||_F of every (row group, target group) block."""
    rows, columns = shape or (int(row_groups.max()) + 1, int(target_groups.max()) + 1)
    by_row = x.new_zeros(rows, x.shape[1]).index_add_(0, row_groups, x.square())
    return x.new_zeros(rows, columns).index_add_(1, target_groups, by_row).sqrt()
