"""The fast solver for group penalties on a shared Gram: batched working sets of row groups, one problem per block.

The rounds are those of `working_set`, with target groups in the place of targets; the inner problem is solved block by
block, exactly, in coordinates in which the Gram of every row group is diagonal:

    min_Z  1/2 tr(Z'DZ) - tr(R'Z) + lambda w ||Z||_F      Z_i = R_i t / (d_i t + lambda w),  t = ||Z||_F

(Qin, Scheinberg & Goldfarb 2013, section 4). Where all groups are white, or nearly, nothing is turned: a bound on the
eigenvalues of a group takes the place of D, and a step is a plain shrinkage that still goes down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import fair_start
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.working_set import CHUNK, STALE, compiled, improving, in_slices, products

SWEEPS_AT_ONCE = 200
ALONE_UP_TO = 1 << 20  # entries of a Gram that stays in cache, so that each target group may take its own products
ROUNDS = 4  # that a target group which does is taken through at once
WHITE = 2.0  # ratio of a group's eigenvalues up to which turning it costs more than the sweeps that it spares


@dataclass(frozen=True)
class GroupSet(AbstractSolver):
    """Batched working sets of row groups with an inner block descent (numba), for `Group` without bounds.

    `max_iter` bounds the rounds, `least` the groups of a first working set.
    """

    max_iter: int = 200
    least: int = 8

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(loss, QuadraticGram) or not isinstance(penalty, Group) or penalty.non_negative:
            raise InputError("`GroupSet` needs a Gram and an unbounded group penalty: use `RowSet` or `Fista`")
        init = None if init is None else fair_start(loss, penalty, init, strength)
        turned = _Turned.of(loss, penalty, strength, init)
        gap = np.full(len(turned.square), np.inf)
        rounds, stuck = np.zeros(len(gap), np.int64), False
        pull = turned.cross.copy()
        if init is not None:
            products(compiled(), turned.gram, turned.cross, turned.coef, np.arange(len(pull)), pull)
        for part in turned.parts():
            stuck = self._rounds(turned, pull, part, tol, gap, rounds) or stuck
        null = 0.5 * turned.square
        relative = torch.from_numpy(np.divide(gap, null, out=np.zeros_like(gap), where=null > 0))
        group = penalty.target_groups
        return Answer(turned.value(), relative[group], torch.from_numpy(rounds)[group], stuck)

    def _rounds(
        self, turned: "_Turned", pull: np.ndarray, part: np.ndarray, tol: float, gap: np.ndarray, rounds: np.ndarray
    ) -> bool:
        """Rounds of certify, choose, descend on the target groups in `part`."""
        loops, todo, sweeps = _compiled_groups(), part, np.zeros(len(gap), np.int64)
        best, stale = np.full(len(gap), np.inf), np.zeros(len(gap), np.int64)
        at_once = min(ROUNDS, self.max_iter) if turned.gram.size <= ALONE_UP_TO else 1

        def improve(some: np.ndarray) -> None:
            loops.group_rounds(
                turned.gram, turned.eigen, turned.cross, turned.coef, pull, turned.weight, turned.row_starts,
                turned.column_starts, turned.square, turned.strength, some, gap, rounds, sweeps, tol,
                self.least, SWEEPS_AT_ONCE, at_once,
            )  # fmt: skip

        for _ in range(-(-self.max_iter // at_once)):
            in_slices(improve, todo)
            todo = todo[(gap[todo] > tol * 0.5 * turned.square[todo]) & (sweeps[todo] >= 0)]
            if not len(todo):
                break
            todo = improving(todo, gap, best, stale)
            if at_once == 1:
                products(compiled(), turned.gram, turned.cross, turned.coef, turned.columns(todo), pull)
        stuck = bool((sweeps[part] < 0).any() or (stale[part] >= STALE).any())
        moved = part[
            (gap[part] > tol * 0.5 * turned.square[part]) & (sweeps[part] >= 0)
        ]  # after their last certificate
        if len(moved):
            if at_once == 1:
                products(compiled(), turned.gram, turned.cross, turned.coef, turned.columns(moved), pull)
            sweeps[moved] = -1  # certified, and left as they are
            in_slices(improve, moved)
        return stuck


@dataclass(frozen=True, eq=False)
class _Turned:
    """A group problem with the members of every group side by side and the Gram of every row group diagonal.

    Target-major numpy arrays, but for `coef` all fixed; `turn` maps rows of the caller's order into rotated ones.
    """

    gram: np.ndarray
    eigen: np.ndarray
    cross: np.ndarray
    coef: np.ndarray
    weight: np.ndarray  # (target group, row group)
    row_starts: np.ndarray
    column_starts: np.ndarray
    square: np.ndarray
    strength: np.ndarray
    rotation: "_Rotation"
    column_order: Tensor

    @classmethod
    def of(
        cls,
        loss: QuadraticGram,
        penalty: Group,
        strength: Float[Tensor, " target"],
        init: Float[Tensor, "source target"] | None,
    ) -> "_Turned":
        rows, columns = penalty.row_groups, penalty.target_groups
        column_order = columns.argsort(stable=True)
        weight = penalty.table(loss.cross)
        row_starts, column_starts = _starts(rows, weight.shape[0]), _starts(columns, weight.shape[1])
        rotation = _Rotation.of(loss.gram, rows, row_starts)
        coef = torch.zeros_like(loss.cross.T) if init is None else rotation.forward(init[:, column_order]).T
        level = strength.new_zeros(weight.shape[1]).scatter_(0, columns, strength)
        square = strength.new_zeros(weight.shape[1]).index_add_(0, columns, loss.target_sq_norm)
        return cls(
            gram=rotation.gram(loss.gram).numpy(),
            eigen=rotation.eigen.numpy(),
            cross=rotation.forward(loss.cross[:, column_order]).T.contiguous().numpy(),
            coef=coef.clone(memory_format=torch.contiguous_format).numpy(),
            weight=weight.T.contiguous().numpy(),
            row_starts=row_starts,
            column_starts=column_starts,
            square=square.numpy(),
            strength=level.numpy(),
            rotation=rotation,
            column_order=column_order,
        )

    def parts(self) -> list[np.ndarray]:
        """Target groups in chunks of about CHUNK columns."""
        chunk = self.column_starts[:-1] // CHUNK
        return [np.flatnonzero(chunk == k) for k in np.unique(chunk)]

    def columns(self, groups: np.ndarray) -> np.ndarray:
        """The columns of some target groups."""
        inside = np.zeros(len(self.column_starts) - 1, np.bool_)
        inside[groups] = True
        return np.flatnonzero(np.repeat(inside, np.diff(self.column_starts)))

    def value(self) -> Float[Tensor, "source target"]:
        """The coefficients in the caller's order and coordinates."""
        out = torch.empty(self.coef.shape[::-1], dtype=torch.float64)
        out[:, self.column_order] = self.rotation.backward(torch.from_numpy(self.coef).T.contiguous())
        return out


@dataclass(frozen=True, eq=False)
class _Rotation:
    """Rows sorted by group, then each group turned into the eigenvectors of its own Gram.

    `order` is None where rows are sorted as they come. Groups of one size are turned together: `members` holds their
    (group, row) places, `vectors` their eigenvectors.
    """

    order: Int[Tensor, " source"] | None
    eigen: Float[Tensor, " source"]
    members: tuple[Int[Tensor, "_group _own"], ...]
    vectors: tuple[Float[Tensor, "_group _own _own"], ...]

    @classmethod
    def of(cls, gram: Float[Tensor, "source source"], rows: Int[Tensor, " source"], starts: np.ndarray) -> "_Rotation":
        order = None if bool((rows.diff() >= 0).all()) else rows.argsort(stable=True)
        first, size = torch.from_numpy(starts[:-1]), torch.from_numpy(np.diff(starts))
        eigen, members, vectors = gram.diagonal().clone() if order is None else gram.diagonal()[order], [], []
        for own in torch.unique(size[size > 1]).tolist():
            at = first[size == own][:, None] + torch.arange(own)
            inside = at if order is None else order[at]
            blocks = gram[inside[:, :, None], inside[:, None, :]]
            low, high = _discs(blocks)
            if bool((high <= WHITE * low).all()):
                eigen[at] = high[:, None]
                continue
            eigen[at], basis = torch.linalg.eigh(blocks)
            members.append(at)
            vectors.append(basis)
        return cls(order, eigen.clamp(min=0), tuple(members), tuple(vectors))

    def forward(self, matrix: Float[Tensor, "source any"]) -> Float[Tensor, "source any"]:
        """Rows into sorted, rotated coordinates, a new matrix."""
        matrix = matrix.clone(memory_format=torch.contiguous_format) if self.order is None else matrix[self.order]
        return self._turned(matrix, [basis.mT for basis in self.vectors])

    def backward(self, matrix: Float[Tensor, "source any"]) -> Float[Tensor, "source any"]:
        """The way back; overwrites `matrix`."""
        matrix = self._turned(matrix, self.vectors)
        return matrix if self.order is None else torch.empty_like(matrix).index_copy_(0, self.order, matrix)

    def gram(self, gram: Float[Tensor, "source source"]) -> Float[Tensor, "source source"]:
        """Rows and columns turned; the Gram of a turned group is then `eigen` exactly."""
        if self.order is None and not self.members:
            return gram.contiguous()
        turned = self.forward(self.forward(gram).T)
        for at in self.members:
            turned[at[:, :, None], at[:, None, :]] = torch.diag_embed(self.eigen[at])
        return turned

    def _turned(
        self, matrix: Float[Tensor, "source any"], bases: Sequence[Float[Tensor, "_group _own _own"]]
    ) -> Float[Tensor, "source any"]:
        for at, basis in zip(self.members, bases):
            if at.numel() == len(matrix):  # all groups are of this size
                return (basis @ matrix.view(*at.shape, -1)).flatten(0, 1)
            matrix[at] = basis @ matrix[at]
        return matrix


def _discs(blocks: Float[Tensor, "group own own"]) -> tuple[Float[Tensor, " group"], Float[Tensor, " group"]]:
    """Bounds of the eigenvalues of symmetric blocks (Gershgorin)."""
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    others = blocks.abs().sum(2) - diagonal
    return (diagonal - others).amin(1), (diagonal + others).amax(1)


def _compiled_groups() -> ModuleType:
    from tl_circuitlasso.solve import group_kernels

    return group_kernels


def _starts(groups: Int[Tensor, " member"], count: int) -> np.ndarray:
    """Where each group begins once members are sorted, and the total at the end."""
    return np.concatenate([[0], torch.bincount(groups, minlength=count).cumsum(0).numpy()]).astype(np.int64)
