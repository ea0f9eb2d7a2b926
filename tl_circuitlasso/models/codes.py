"""Sparse codes: the few features that are active at each sample, in CSR on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """A sparse matrix (sample, feature) in CSR: row m is entries starts[m] to starts[m + 1]."""

    starts: Int[Tensor, " row_ends"]
    columns: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    width: int

    @property
    def rows(self) -> int:
        """The number of samples."""
        return len(self.starts) - 1

    @property
    def row(self) -> Int[Tensor, " entry"]:
        """The sample of every entry."""
        return torch.repeat_interleave(torch.arange(self.rows), self.starts.diff())

    def matrix(self, values: Float[Tensor, " entry"] | None = None) -> scipy.sparse.csr_matrix:
        """The same for scipy, without a copy; or with other values in their places."""
        parts = (self.values if values is None else values, self.columns, self.starts)
        return scipy.sparse.csr_matrix(tuple(part.numpy() for part in parts), (self.rows, self.width))


def sparse_codes(dense: Float[Tensor, "sample feature"]) -> Codes:
    """The nonzero entries, on the CPU."""
    rows, columns = dense.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(dense))
    starts = torch.zeros(len(dense) + 1, dtype=torch.int64)
    starts[1:] = counts.cumsum(0).cpu()
    return Codes(starts, columns.int().cpu(), dense[rows, columns].float().cpu(), dense.shape[1])


def stacked(parts: Sequence[Codes]) -> Codes:
    """Samples below samples."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part.columns))
    starts = [part.starts[:-1] + end for part, end in zip(parts, ends)]
    return Codes(
        torch.cat([*starts, torch.tensor([ends[-1]])]),
        torch.cat([part.columns for part in parts]),
        torch.cat([part.values for part in parts]),
        parts[0].width,
    )
