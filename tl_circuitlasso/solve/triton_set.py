"""The inner coordinate descent of a working set as one Triton program per target (CUDA).

A program keeps coefficients, gradient and bounds of its target in registers and walks the coordinates in order; a row
of the small Gram is read only when its coordinate moves, which at the sparsity of a Lasso is rare. It is the loop of
`kernels.descend` without the certificate: rounds certify.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
@no_type_check
def _sweep(
    gram, coef, pull, cut, ridge, upper, width, sweeps, one_sided: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    target = tl.program_id(0)
    lane = tl.arange(0, block)
    inside = lane < width
    at = target * width + lane
    a = tl.load(coef + at, mask=inside, other=0.0)
    g = tl.load(pull + at, mask=inside, other=0.0)
    c = tl.load(cut + at, mask=inside, other=float("inf"))
    r = tl.load(ridge + at, mask=inside, other=0.0)
    u = tl.load(upper + at, mask=inside, other=0.0)
    square = gram + target.to(tl.int64) * width * width
    # Between any two coordinates: g = c - G a, all of it in registers; `moved` says whether this sweep changed a.
    sweep = 0
    moved = 1
    while (sweep < sweeps) & (moved > 0):
        moved = 0
        for k in range(width):
            here = lane == k  # a register can't be indexed: coordinate k is read as the sum of itself and zeros
            old = tl.sum(tl.where(here, a, 0.0), 0)
            z = tl.sum(tl.where(here, g, 0.0), 0) + old
            bar = tl.sum(tl.where(here, c, 0.0), 0)
            stiff = 1.0 + tl.sum(tl.where(here, r, 0.0), 0)
            top = tl.sum(tl.where(here, u, 0.0), 0)
            # `prox.threshold` of one number
            size = tl.maximum((z if one_sided else tl.abs(z)) - bar, 0.0)
            new = tl.minimum(tl.where(z > 0, size, -size) / stiff, top)
            step = new - old
            if step != 0.0:
                row = tl.load(square + k * width + lane, mask=inside, other=0.0)
                g -= step * row
                a = tl.where(here, new, a)
                moved = 1
        sweep += 1
    tl.store(coef + at, a, mask=inside)


def sweep_triton(
    gram: Float[Tensor, "open work work"],
    coef: Float[Tensor, "open work"],
    pull: Float[Tensor, "open work"],
    cut: Float[Tensor, "open work"],
    ridge: Float[Tensor, "open work"],
    upper: Float[Tensor, "open work"],
    non_negative: bool,
    sweeps: int,
) -> Float[Tensor, "open work"]:
    """`torch_set.sweep_torch` in one kernel launch."""
    result = coef.contiguous().clone()
    width = coef.shape[1]
    block = max(16, triton.next_power_of_2(width))
    launch = _sweep[(coef.shape[0],)]  # pyright: ignore - a launcher, for those who have triton
    launch(
        gram.contiguous(), result, pull.contiguous(), cut.contiguous(), ridge.contiguous(), upper.contiguous(),
        width, sweeps, non_negative, block, num_warps=max(1, min(8, block // 64)),
    )  # fmt: skip
    return result
