"""Proximal steps as pure functions: argmin_z 1/2 ||z - x||^2 + h(z), elementwise or by group."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def threshold(
    x: Float[Tensor, "row column"],
    bar: Float[Tensor, "#row #column"],
    ridge: Float[Tensor, "#row #column"] | None = None,
    upper: Float[Tensor, "#row #column"] | None = None,
    *,
    one_sided: bool = False,
) -> Float[Tensor, "row column"]:
    """argmin_z 1/2 (z - x)^2 + bar |z| + ridge/2 z^2, with 0 <= z if `one_sided`, and z <= upper:

        min(sign(x) max(|x| - bar, 0) / (1 + ridge), upper)

    The coordinate step of every elementwise penalty where the Gram has a unit diagonal. What numba and Triton run is
    the same formula on one number: `kernels.threshold` and `triton_set._sweep`.

    >>> threshold(torch.tensor([[3.0], [1.0]]), torch.tensor([[2.0]])).flatten().tolist()
    [1.0, 0.0]
    """
    size = torch.clamp((x if one_sided else x.abs()) - bar, min=0)
    step = size if one_sided else torch.sign(x) * size
    step = step if ridge is None else step / (1 + ridge)
    return step if upper is None else torch.minimum(step, upper)


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
