"""The fast solver for elementwise penalties on a shared Gram: batched working sets, one small problem per target.

    A = 0, pull = C
    repeat:  certify every target from its pull; set aside those within the tolerance
             working set = support + worst violators;  coordinate descent on its small Gram   (compiled)
             pull = C - G A for the targets that moved                                        (sparse x dense)

Screening rules don't pay here (nothing can be screened until the gap is almost closed); gaps are used for
certificates and to set finished targets aside.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like
from tl_circuitlasso.solve.tiles import Tiled, threaded

log = logging.getLogger(__name__)

CHUNK = 2048  # targets whose coefficients and gradients are in flight at once
DENSE_ABOVE = 0.3  # share of nonzeros from which a dense product is quicker than a sparse one
DENSE_UP_TO = 1 << 16  # entries of the Gram up to which the difference isn't worth compiling the sparse product
TILE_FROM = 12  # nonzeros per row of the Gram from which its tiles are worth a copy
SLICE_SECONDS = 0.2  # a compiled call can't be interrupted: keep each one short
SWEEPS_AT_ONCE = 500
STALE = 20  # rounds without a gap a tenth smaller after which rounding is all that is left


@dataclass(frozen=True)
class WorkingSet(AbstractSolver):
    """Batched working sets with an inner coordinate descent (numba), for L1, elastic net and their bounded versions.

    `max_iter` bounds the rounds, `least` the size of a first working set. `single` does the first rounds in float32.
    """

    max_iter: int = 200
    least: int = 32
    single: bool = False

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(loss, QuadraticGram) or not isinstance(penalty, L1):
            raise InputError("`working_set` needs a Gram and an elementwise penalty: use solver='auto' or 'fista'")
        # numpy asks for large pages: a torch tensor of this size takes several times as long to touch
        coef = np.empty(loss.shape[::-1])
        gap, rounds, stalled = np.full(loss.shape[1], np.inf), np.zeros(loss.shape[1], np.int64), False
        grams = [loss.tiled(np.float32)] if self.single else []
        grams.append(loss.tiled(np.float64))
        room = [np.empty((min(CHUNK, loss.shape[1]), loss.shape[0])) for _ in range(2)]
        for start in range(0, loss.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            chunk = _chunk(loss, penalty, strength, part, room)
            if init is None:
                coef[part] = 0.0
            else:
                coef[part] = np.where(chunk["upper"] > 0, _target_major(init[:, part]), 0.0)
                if penalty.non_negative:  # the gap says nothing about coefficients out of bounds
                    np.maximum(coef[part], 0.0, out=coef[part])
            for gram in grams:
                goal = tol if gram.dtype == np.float64 else max(0.5 * tol, 2e-6)
                coef[part] = np.minimum(coef[part], chunk["upper"])  # float32 can round a bound up
                gap[part], spent, stuck = self._rounds(gram, chunk, coef[part], room[1], goal, init is None)
                rounds[part] += spent
            stalled = stalled or stuck
        return Answer(torch.from_numpy(coef).T, torch.from_numpy(gap), torch.from_numpy(rounds), stalled)

    def _rounds(
        self, gram: Tiled, chunk: dict[str, Any], answer: np.ndarray, room: np.ndarray, tol: float, fresh: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Rounds of certify, choose, descend on one chunk of targets at one precision; `answer` is improved."""
        kernels = compiled()
        data = {name: entry.astype(gram.dtype, copy=False) for name, entry in chunk.items() if name in _FLOATS}
        coef, cross, square = answer.astype(gram.dtype, copy=False), data["cross"], chunk["square"]
        todo = np.arange(len(cross))
        gap, sweeps, rounds = (
            np.full(len(cross), np.inf),
            np.zeros(len(cross), np.int64),
            np.zeros(len(cross), np.int64),
        )
        best, stale = gap.copy(), np.zeros(len(cross), np.int64)
        room = _within(room, cross)
        pull = cross
        if not fresh or coef.any():
            pull = room
            products(kernels, gram, cross, coef, todo, pull)

        def improve(some: np.ndarray) -> None:
            kernels.one_round(
                gram.whole, cross, coef, pull, data["weight"], data["squared"], data["upper"], data["reach"], square,
                chunk["strength"], chunk["one_sided"], chunk["ridged"], chunk["boxed"], some, gap, sweeps, tol,
                self.least, SWEEPS_AT_ONCE,
            )  # fmt: skip

        for _ in range(self.max_iter):
            in_slices(improve, todo)
            todo = todo[(gap[todo] > tol * 0.5 * square[todo]) & (sweeps[todo] >= 0)]
            if not len(todo):
                break
            rounds[todo] += 1
            todo = improving(todo, gap, best, stale)
            pull = room
            products(kernels, gram, cross, coef, todo, pull)
        stuck = bool((sweeps < 0).any() or (stale >= STALE).any())
        moved = np.flatnonzero((gap > tol * 0.5 * square) & (sweeps >= 0))  # after their last certificate
        if len(moved):
            pull = room
            products(kernels, gram, cross, coef, moved, pull)
            sweeps[moved] = -1  # certified, and left as they are
            in_slices(improve, moved)
        if coef is not answer:
            answer[:] = coef
        relative = np.divide(gap, 0.5 * square, out=np.zeros_like(gap), where=square > 0)
        return relative, rounds, stuck


_FLOATS = ("cross", "weight", "squared", "upper", "reach")


def compiled() -> ModuleType:
    """The numba kernels, imported (and compiled, once per machine) when first needed."""
    from tl_circuitlasso.solve import kernels

    return kernels


def _chunk(
    loss: QuadraticGram, penalty: L1, strength: Float[Tensor, " target"], part: slice, room: list[np.ndarray]
) -> dict[str, Any]:
    """Target-major numpy views of one chunk; rows shared by all targets stay a single row."""
    cross = loss.cross[:, part]
    like = cross[:, :1]
    entries = penalty.restrict(None, torch.arange(loss.shape[1])[part])
    weight = entries.weight(like)
    upper = entries_like(torch.inf if entries.upper is None else entries.upper, like)
    upper = torch.where(torch.isinf(weight), 0.0, upper)  # forbidden
    weight = torch.where(torch.isinf(weight), 1.0, weight)
    squared = entries_like(0.0 if entries.squared is None else entries.squared, like)
    return {
        "cross": _whole(cross, *room),
        "weight": _target_major(weight),
        "upper": _target_major(upper),
        "reach": _target_major(torch.where(torch.isinf(upper), 1 / weight, 0.0)),
        "squared": _target_major(squared),
        "ridged": entries.squared is not None,
        "boxed": entries.upper is not None,
        "square": loss.target_sq_norm[part].double().numpy(),
        "strength": strength[part].double().numpy(),
        "one_sided": penalty.non_negative,
    }


def _target_major(matrix: Shaped[Tensor, "source any"]) -> np.ndarray:
    """A transposed copy, by torch: it goes through tiles where numpy would stride."""
    return matrix.T.clone(memory_format=torch.contiguous_format).numpy()


def _whole(matrix: Shaped[Tensor, "source any"], out: np.ndarray, between: np.ndarray) -> np.ndarray:
    """The same into memory that is there already; tiles are for whole matrices, so some columns are copied first."""
    sources, targets = matrix.shape
    if not matrix.is_contiguous():
        matrix = torch.from_numpy(between).view(-1)[: matrix.numel()].view(sources, targets).copy_(matrix)
    torch.from_numpy(out[:targets]).copy_(matrix.T)
    return out[:targets]


def _within(room: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Some of a room of float64 seen as numbers of another type: what lies in it means nothing, so none are cast."""
    return room.reshape(-1).view(like.dtype)[: like.size].reshape(like.shape)


def products(
    kernels: ModuleType, gram: np.ndarray | Tiled, cross: np.ndarray, coef: np.ndarray, todo: np.ndarray,
    pull: np.ndarray,
) -> None:  # fmt: skip
    """pull = cross - coef @ gram on the rows in `todo`, sparse or dense by the share of nonzeros."""
    gram = gram if isinstance(gram, Tiled) else Tiled(gram)
    sample = coef[todo[:: max(1, len(todo) // 64)]]
    share = np.count_nonzero(sample) / max(sample.size, 1)
    if gram.whole.size <= DENSE_UP_TO or share > DENSE_ABOVE:
        fitted = torch.from_numpy(coef[todo]) @ torch.from_numpy(gram.whole)
        pull[todo] = cross[todo] - fitted.numpy()
    elif share * len(todo) <= TILE_FROM:
        none = np.empty((0, 0, 0), gram.dtype)
        threaded(partial(kernels.sparse_products, gram.whole, none, 0, cross, coef, pull), todo)
    else:
        none = np.empty((0, 0), gram.dtype)
        for left, tiles in gram.strips():
            threaded(partial(kernels.sparse_products, none, tiles, left, cross, coef, pull), todo)


def improving(
    todo: Int[np.ndarray, " todo"],
    gap: Float[np.ndarray, " target"],
    best: Float[np.ndarray, " target"],
    stale: Int[np.ndarray, " target"],
) -> Int[np.ndarray, " left"]:
    """Those of `todo` whose gaps still fall; keeps up each one's `best`, and its rounds without a better one."""
    better = gap[todo] < 0.9 * best[todo]
    best[todo], stale[todo] = np.minimum(best[todo], gap[todo]), np.where(better, 0, stale[todo] + 1)
    return todo[stale[todo] < STALE]


def in_slices(work: Callable[[np.ndarray], None], todo: np.ndarray) -> None:
    """Do `work` on slices of `todo` short enough that Ctrl-C is answered at once."""
    size, start = 1, 0
    while start < len(todo):
        clock = time.perf_counter()
        threaded(work, todo[start : start + size])
        start += size
        spent = time.perf_counter() - clock
        size = max(1, int(size * min(4.0, SLICE_SECONDS / max(spent, 1e-9))))
