"""A Gram cut into tiles that stay in cache over many targets, and work that is shared out over threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

TILE = 256  # columns of the Gram that stay in cache over a chunk of targets
KEEP_UP_TO = 1 << 28  # entries of the Gram up to which its tiles are kept; beyond, they are made anew in every round
ROWS = 64  # copied into tiles at once


class Tiled:
    """A Gram and, where asked for, the same numbers tile by tile, which products with many nonzeros go through."""

    def __init__(self, whole: np.ndarray) -> None:
        self.whole, self.dtype = whole, whole.dtype
        self._kept: np.ndarray | None = None

    def strips(self) -> Iterator[tuple[int, np.ndarray]]:
        """First column and (tile, row, column) of groups of tiles: one group, kept, if that is little memory."""
        size = len(self.whole)
        wide = max(TILE, KEEP_UP_TO // size // TILE * TILE)
        for left in range(0, size, wide):
            tiles = _tiles(self.whole, left, min(left + wide, size)) if self._kept is None else self._kept
            if wide >= size:
                self._kept = tiles
            yield left, tiles


def _tiles(whole: np.ndarray, left: int, right: int) -> np.ndarray:
    """Some columns of a matrix as (tile, row, column): what is read together lies together."""
    full, rest = divmod(right - left, TILE)
    tiles = np.empty((full + (rest > 0), len(whole), TILE), whole.dtype)

    def copy(starts: np.ndarray) -> None:
        for start in starts:
            rows = slice(start, start + ROWS)
            block = whole[rows, left : right - rest]
            tiles[:full, rows] = block.reshape(len(block), full, TILE).swapaxes(0, 1)
            if rest:
                tiles[full, rows, :rest] = whole[rows, right - rest : right]

    threaded(copy, np.arange(0, len(whole), ROWS))
    return tiles


def threaded(work: Callable[[np.ndarray], None], todo: np.ndarray) -> None:
    """Split targets over torch's threads; each target is computed alone, so the split changes nothing."""
    threads = min(torch.get_num_threads(), len(todo))
    if threads <= 1:
        work(todo)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, _interleaved(todo, threads)))


def _interleaved(todo: np.ndarray, parts: int) -> Iterator[np.ndarray]:
    return (np.ascontiguousarray(todo[k::parts]) for k in range(parts))
