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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like

log = logging.getLogger(__name__)

CHUNK = 2048  # targets whose coefficients and gradients are in flight at once
DENSE_ABOVE = 0.2  # share of nonzeros from which a dense product is quicker than a sparse one
DENSE_UP_TO = 1 << 16  # entries of the Gram up to which the difference isn't worth compiling the sparse product
TILE = 64  # columns of the Gram that stay in cache over a chunk of targets
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
        value = torch.empty(loss.cross.shape, dtype=loss.cross.dtype)
        gap = np.full(loss.shape[1], np.inf)
        rounds, stalled = np.zeros(loss.shape[1], np.int64), False
        grams = {np.dtype(np.float64): np.ascontiguousarray(loss.gram.numpy())}
        if self.single:
            grams = {np.dtype(np.float32): grams[np.dtype(np.float64)].astype(np.float32), **grams}
        for start in range(0, loss.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            chunk = _chunk(loss, penalty, strength, part)
            coef = np.zeros_like(chunk["cross"]) if init is None else _target_major(init[:, part])
            for dtype, gram in grams.items():
                coef = np.minimum(coef, chunk["upper"])  # float32 can round a bound up
                goal = tol if dtype == np.float64 else max(0.5 * tol, 2e-6)
                coef, gap[part], spent, stuck = self._rounds(gram, chunk, coef.astype(dtype), goal, init is None)
                rounds[part] += spent
            stalled = stalled or stuck
            value[:, part] = torch.from_numpy(coef).T
        return Answer(value, torch.from_numpy(gap), torch.from_numpy(rounds), stalled)

    def _rounds(
        self, gram: np.ndarray, chunk: dict[str, Any], coef: np.ndarray, tol: float, fresh: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Rounds of certify, choose, descend on one chunk of targets at one precision."""
        kernels = compiled()
        data = {name: entry.astype(gram.dtype, copy=False) for name, entry in chunk.items() if name in _FLOATS}
        cross, square = data["cross"], chunk["square"]
        todo = np.arange(len(cross))
        gap, sweeps, rounds = (
            np.full(len(cross), np.inf),
            np.zeros(len(cross), np.int64),
            np.zeros(len(cross), np.int64),
        )
        best, stale = gap.copy(), np.zeros(len(cross), np.int64)
        pull = cross.copy()
        if not fresh or coef.any():
            products(kernels, gram, cross, coef, todo, pull)

        def improve(some: np.ndarray) -> None:
            kernels.one_round(
                gram, cross, coef, pull, data["weight"], data["squared"], data["upper"], chunk["forbid"], square,
                chunk["strength"], chunk["one_sided"], some, gap, sweeps, tol, self.least, SWEEPS_AT_ONCE,
            )  # fmt: skip

        for _ in range(self.max_iter):
            in_slices(improve, todo)
            todo = todo[(gap[todo] > tol * 0.5 * square[todo]) & (sweeps[todo] >= 0)]
            if not len(todo):
                break
            rounds[todo] += 1
            better = gap[todo] < 0.9 * best[todo]
            best[todo], stale[todo] = np.minimum(best[todo], gap[todo]), np.where(better, 0, stale[todo] + 1)
            todo = todo[stale[todo] < STALE]
            products(kernels, gram, cross, coef, todo, pull)
        relative = np.divide(gap, 0.5 * square, out=np.zeros_like(gap), where=square > 0)
        return coef, relative, rounds, bool((sweeps < 0).any() or (stale >= STALE).any())


_FLOATS = ("cross", "weight", "squared", "upper")


def compiled() -> ModuleType:
    """The numba kernels, imported (and compiled, once per machine) when first needed."""
    from tl_circuitlasso.solve import kernels

    return kernels


def numba_available() -> bool:
    """Whether the compiled kernels can be used; without numba the `torch_set` solver takes over."""
    try:
        compiled()
    except ImportError:
        return False
    return True


def _chunk(loss: QuadraticGram, penalty: L1, strength: Float[Tensor, " target"], part: slice) -> dict[str, Any]:
    """Target-major numpy views of one chunk; rows shared by all targets stay a single row."""
    cross = loss.cross[:, part]
    like = cross[:, :1]
    entries = penalty.restrict(None, torch.arange(loss.shape[1])[part])
    weight = entries.weight(like)
    upper = entries_like(torch.inf if entries.upper is None else entries.upper, like)
    squared = entries_like(0.0 if entries.squared is None else entries.squared, like)
    return {
        "cross": _target_major(cross),
        "weight": _target_major(torch.where(torch.isinf(weight), 1.0, weight)),
        "upper": _target_major(upper),
        "squared": _target_major(squared),
        "forbid": _target_major(torch.isinf(weight) | (upper == 0)),
        "square": loss.target_sq_norm[part].double().numpy(),
        "strength": strength[part].double().numpy(),
        "one_sided": penalty.non_negative,
    }


def _target_major(matrix: Shaped[Tensor, "source any"]) -> np.ndarray:
    """A transposed copy, by torch: it goes through tiles where numpy would stride."""
    return matrix.T.clone(memory_format=torch.contiguous_format).numpy()


def products(
    kernels: ModuleType, gram: np.ndarray, cross: np.ndarray, coef: np.ndarray, todo: np.ndarray, pull: np.ndarray
) -> None:
    """pull = cross - coef @ gram on the rows in `todo`, sparse or dense by the share of nonzeros."""
    sample = coef[todo[:: max(1, len(todo) // 64)]]
    if gram.size <= DENSE_UP_TO or np.count_nonzero(sample) > DENSE_ABOVE * sample.size:
        fitted = torch.from_numpy(coef[todo]) @ torch.from_numpy(gram)
        pull[todo] = cross[todo] - fitted.numpy()
    else:
        _threaded(lambda some: kernels.sparse_products(gram, cross, coef, some, pull, TILE), todo)


def in_slices(work: Callable[[np.ndarray], None], todo: np.ndarray) -> None:
    """Do `work` on slices of `todo` short enough that Ctrl-C is answered at once."""
    size, start = 1, 0
    while start < len(todo):
        clock = time.perf_counter()
        _threaded(work, todo[start : start + size])
        start += size
        spent = time.perf_counter() - clock
        size = max(1, int(size * min(4.0, SLICE_SECONDS / max(spent, 1e-9))))


def _threaded(work: Callable[[np.ndarray], None], todo: np.ndarray) -> None:
    """Split targets over torch's threads; each target is computed alone, so the split changes nothing."""
    threads = min(torch.get_num_threads(), len(todo))
    if threads <= 1:
        work(todo)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, _interleaved(todo, threads)))


def _interleaved(todo: np.ndarray, parts: int) -> Iterator[np.ndarray]:
    return (np.ascontiguousarray(todo[k::parts]) for k in range(parts))
