"""From the caller's matrices to a checked problem in scaled units, and back.

Solvers work on b = s_i a_ij / t_j with s_i = sqrt(G_ii) and t_j = sqrt(Y_jj): a Gram with a unit diagonal and targets
of unit size. The objective is the same, so weights are divided by s_i; one column in other units (x 1e6) would
otherwise stall every solver and spoil its certificate. A dead source (G_ii = 0) or target (Y_jj = 0) keeps a 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractPenalty
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.losses import QuadraticGram

DEAD = 1e-30  # relative to the largest diagonal entry: a column scaled by 1e-6 beside one scaled by 1e6 is alive
ASYMMETRY = 1e-6  # relative to the standard deviations; the solution moves by no more than this
NEGATIVE = 1e-9  # of the largest variance: what rounding can leave of a source that doesn't vary
BLOCK = 256
CHOLESKY_UP_TO = 1024  # above this the proof of definiteness would cost as much as the solve


@dataclass(frozen=True, eq=False)
class Scaled:
    """A quadratic problem in scaled units (float64) and the way back to the caller's."""

    loss: QuadraticGram
    penalty: AbstractPenalty
    source_scale: Float[Tensor, " source"]
    target_scale: Float[Tensor, " target"]
    dead_sources: Bool[Tensor, " source"]
    dead_targets: Bool[Tensor, " target"]

    def enter(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        """Coefficients in scaled units."""
        return self._alive(value.to(self.source_scale) * self.source_scale[:, None] / self.target_scale)

    def leave(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        """Coefficients in the caller's units."""
        if not bool((self.source_scale == 1).all()):
            value = value / self.source_scale[:, None]
        if not bool((self.target_scale == 1).all()):
            value = value * self.target_scale
        return self._alive(value)

    def _alive(self, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        if not bool(self.dead_sources.any()) and not bool(self.dead_targets.any()):
            return value
        return torch.where(self.dead_sources[:, None] | self.dead_targets, 0, value)


def check_matrices(
    gram: Float[Tensor, "source source"],
    cross: Float[Tensor, "source target"],
    target_sq_norm: Float[Tensor, " target"],
    names: Sequence[str] | None = None,
) -> None:
    """InputError, naming matrix and row, for NaN, infinities, an asymmetric or an indefinite Gram."""
    check_finite("gram", gram, names)
    check_finite("cross", cross, names)
    check_finite("target_sq_norm", target_sq_norm[:, None])
    if bool((target_sq_norm < 0).any()):
        raise InputError("`target_sq_norm` must be >= 0: pass the diagonal of Y'Y / M")
    diagonal = gram.diagonal()
    if len(diagonal) and float(diagonal.min()) < -NEGATIVE * float(diagonal.abs().max()):
        row = int(diagonal.argmin())
        given = f"source {_name(row, names)} has the variance {float(diagonal[row]):.3g}"
        raise InputError(
            f"`gram` isn't positive semidefinite ({given}): pass X'X / M of the centred samples, accumulated in float64"
        )
    _check_symmetric(gram, names)


def check_finite(name: str, matrix: Float[Tensor, "row column"], names: Sequence[str] | None = None) -> None:
    """InputError naming the first row and column of `name` that is NaN or infinite."""
    if bool(torch.isfinite(matrix.sum())):  # one pass without a mask of full size; NaN and inf survive a sum
        return
    rows = torch.isfinite(matrix).all(1)
    if bool(rows.all()):
        return
    row = int((~rows).nonzero()[0])
    column = int((~torch.isfinite(matrix[row])).nonzero()[0])
    raise InputError(
        f"`{name}` holds {float(matrix[row, column])} at row {_name(row, names)}, column {column}"
        f" ({int((~rows).sum())} bad rows in all): find the activation that overflowed, or drop that source"
    )


def check_finite_codes(name: str, codes: Tensor) -> None:
    """InputError naming the first row and column of a CSR matrix that is NaN or infinite."""
    bad = (~torch.isfinite(codes.values())).nonzero()[:, 0]
    if not len(bad):
        return
    place = int(bad[0])
    row = int(torch.searchsorted(codes.crow_indices(), place, right=True)) - 1
    raise InputError(
        f"`{name}` holds {float(codes.values()[place])} at row {row}, column {int(codes.col_indices()[place])}"
        f" ({len(bad)} bad entries in all): find the activation that overflowed, or drop that source"
    )


def scale(
    gram: Float[Tensor, "source source"],
    cross: Float[Tensor, "source target"],
    target_sq_norm: Float[Tensor, " target"],
    penalty: AbstractPenalty,
    *,
    precision: float = 2.3e-16,
    standardise: bool = False,
    check: bool = True,
) -> Scaled:
    """The problem in scaled units; `precision` is the rounding unit of the caller's matrices."""
    diagonal = gram.diagonal()
    top = float(diagonal.max()) if diagonal.numel() else 0.0
    dead_sources, dead_targets = diagonal <= DEAD * top, target_sq_norm <= 0
    source_scale, target_scale = _size(diagonal, dead_sources), _size(target_sq_norm, dead_targets)
    if isinstance(penalty, Group) and not standardise:
        source_scale = _even(source_scale, penalty.row_groups, dead_sources)
    if (coupled := penalty.coupled()) is not None:
        target_scale = _even(target_scale, coupled, dead_targets)
    if not bool((source_scale == 1).all()):
        gram = (gram / source_scale[:, None]).div_(source_scale)
        cross = cross / source_scale[:, None]
    if not bool((target_scale == 1).all()):
        cross = cross / target_scale
    if bool(dead_sources.any()):
        gram, cross = _buried(gram, cross, dead_sources)
    if bool(dead_targets.any()):
        cross = torch.where(dead_targets, 0, cross)
    square = torch.where(dead_targets, 0, target_sq_norm / target_scale.square())
    if check:
        _check_definite(gram, cross, square, precision)
    ones = torch.ones_like(source_scale)
    penalty = penalty.rescale(ones if standardise else source_scale, target_scale)
    return Scaled(QuadraticGram(gram, cross, square), penalty, source_scale, target_scale, dead_sources, dead_targets)


def explain_failure(loss: QuadraticGram, value: Float[Tensor, "source target"], precision: float) -> None:
    """InputError if a solve failed because its Gram is indefinite or does not belong to its cross and target norms."""
    fitted = (value * (loss.gram @ value)).sum(0)
    residual = loss.target_sq_norm - 2 * (value * loss.cross).sum(0) + fitted
    slack = 1e3 * precision * loss.shape[0]
    if (
        not bool(torch.isfinite(residual).all())
        or bool((fitted < -slack * value.square().sum(0)).any())
        or bool((residual < -slack).any())
    ):
        raise InputError(
            "`gram`, `cross` and `target_sq_norm` can't come from one data set: a direction of negative variance was"
            " met. Compute all three from the same centred samples, in float64"
        )


def _check_symmetric(gram: Float[Tensor, "source source"], names: Sequence[str] | None) -> None:
    size = gram.diagonal().clamp(min=0).sqrt() + torch.finfo(gram.dtype).tiny
    wide = BLOCK if gram.device.type == "cpu" else 16 * BLOCK
    blocks = [slice(start, start + wide) for start in range(0, len(size), wide)]
    least = [float(size[block].min()) for block in blocks]
    for number, rows in enumerate(blocks):
        for other, columns in enumerate(blocks[number:], number):  # a block and its mirror stay in cache
            off = gram[rows, columns] - gram[columns, rows].T
            low, high = torch.aminmax(off)
            if max(-float(low), float(high)) <= ASYMMETRY * least[number] * least[other]:
                continue  # no need to look at each entry's own scale
            off = off.div_(size[rows, None]).div_(size[columns]).abs_()
            if float(off.max()) > ASYMMETRY:
                row, column = (int(i) for i in (off > ASYMMETRY).nonzero()[0])
                row, column = row + rows.start, column + columns.start
                raise InputError(
                    f"`gram` isn't symmetric: entries ({_name(row, names)}, {column}) and its mirror differ by"
                    f" {float((gram[row, column] - gram[column, row]).abs()):.3g}; pass X'X / M, or (G + G') / 2 if the"
                    " difference is rounding"
                )


def _buried(
    gram: Float[Tensor, "source source"], cross: Float[Tensor, "source target"], dead: Bool[Tensor, " source"]
) -> tuple[Float[Tensor, "source source"], Float[Tensor, "source target"]]:
    """Dead sources as isolated unit columns that nothing pulls at."""
    identity = torch.eye(len(dead), dtype=gram.dtype, device=gram.device)
    return torch.where(dead[:, None] | dead, identity, gram), torch.where(dead[:, None], 0, cross)


def _check_definite(
    unit: Float[Tensor, "source source"],
    cross: Float[Tensor, "source target"],
    square: Float[Tensor, " target"],
    precision: float,
) -> None:
    if not unit.numel():
        return
    slack = max(100 * precision * len(unit), 1e-9)
    low, high = torch.aminmax(unit)
    message = "`gram` isn't positive semidefinite ({}): pass X'X / M of the centred samples, accumulated in float64"
    if float(unit.diagonal().min()) < 0 or max(-float(low), float(high)) > float(unit.diagonal().max()) * (1 + slack):
        raise InputError(message.format("a covariance exceeds the product of its standard deviations"))
    if len(unit) <= CHOLESKY_UP_TO:
        shifted = unit + slack * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        if int(torch.linalg.cholesky_ex(shifted).info) != 0:
            raise InputError(message.format(f"smallest eigenvalue {float(torch.linalg.eigvalsh(unit)[0]):.3g}"))
    low, high = cross.amin(0), cross.amax(0)  # several times as quick as both in one along this dimension
    if bool((torch.maximum(-low, high).square() > (square * unit.diagonal().max()) * (1 + slack) + slack).any()):
        raise InputError(
            "`cross` exceeds what `gram` and `target_sq_norm` allow: compute all three from the same samples"
        )


def _size(square: Float[Tensor, " row"], dead: Bool[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Standard deviations; those of 1 but for rounding are 1, which spares standardised data two copies."""
    size = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    return torch.where(dead | ((size - 1).abs() < 1e-12), 1.0, size)


def _even(scale: Float[Tensor, " row"], groups: Tensor, dead: Bool[Tensor, " row"]) -> Float[Tensor, " row"]:
    """One scale per group, the root mean square of its live members: a Frobenius norm allows no other."""
    if not len(scale):
        return scale
    zeros = scale.new_zeros(int(groups.max()) + 1)
    total = zeros.index_add(0, groups, torch.where(dead, 0, scale.square()))
    count = zeros.index_add(0, groups, (~dead).to(scale.dtype))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0).sqrt()[groups]


def _name(row: int, names: Sequence[str] | None) -> int | str:
    return row if names is None else f"{row} ({names[row]})"
