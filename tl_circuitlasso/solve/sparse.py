"""Moments of sparse codes (SAE features) without making them dense: streaming, in float64.

A batch is a CSR matrix (sample, source). On CPU a compiled row gather (Gustavson 1978) builds one row of the Gram at a
time, touching only pairs of sources that fire together, and only the upper triangle.
On CUDA the batch is either scattered in float64 or multiplied densely in bfloat16 parts, whichever its density favours.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.path import Moments

SCATTER_BELOW = 1 / 256  # density up to which an accelerator scatters pairs instead of multiplying dense batches


@dataclass(frozen=True, eq=False)
class CodeSums:
    """Raw sums over samples: count, sum of codes, X'X, and with targets their sums, X'Y and squares. They add up.

    Codes are mostly zeros, so their raw second moments are no larger than the centred ones and float64 loses nothing.
    """

    count: int
    sums: Float[Tensor, " source"]
    scatter: Float[Tensor, "source source"]
    target_sums: Float[Tensor, " target"]
    cross: Float[Tensor, "source target"]
    target_squares: Float[Tensor, " target"]

    def __add__(self, other: "CodeSums") -> "CodeSums":
        return CodeSums(
            self.count + other.count,
            self.sums + other.sums,
            self.scatter + other.scatter,
            self.target_sums + other.target_sums,
            self.cross + other.cross,
            self.target_squares + other.target_squares,
        )

    def centred(self) -> Moments:
        """The moments about the mean: what `lasso` takes."""
        if not self.count:
            raise InputError("no samples have been added yet")
        mean, target_mean = self.sums / self.count, self.target_sums / self.count
        gram = self.scatter / self.count - mean[:, None] * mean
        return Moments(
            (gram + gram.T) / 2,
            self.cross / self.count - mean[:, None] * target_mean,
            (self.target_squares / self.count - target_mean.square()).clamp(min=0),
            self.count,
        )


def code_sums(codes: Tensor, targets: Float[Tensor, "sample target"] | None = None) -> CodeSums:
    """The sums of one batch of codes (sample, source), CSR or dense; `targets` are dense, none by default.

    >>> codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).to_sparse_csr()
    >>> code_sums(codes).scatter.tolist()
    [[1.0, 0.0], [0.0, 4.0]]
    """
    codes = codes.detach()
    values = codes.values() if codes.layout == torch.sparse_csr else codes
    if not bool(torch.isfinite(values).all()):
        raise InputError("`codes` hold NaN or infinite values: check the activations that were encoded")
    samples = codes.shape[0]
    none = torch.zeros(samples, 0, dtype=torch.float64, device=codes.device)
    y = none if targets is None else targets.detach().double()
    if len(y) != samples:
        raise InputError(f"`targets` must have {samples} rows like `codes`, got {len(y)}")
    sums, scatter, cross = _sums_cpu(codes, y) if codes.device.type == "cpu" else _sums_dense(codes, y)
    return CodeSums(samples, sums, scatter, y.sum(0), cross, y.square().sum(0))


def csr_matrix(codes: Tensor) -> scipy.sparse.csr_matrix:
    """CSR or dense codes on the CPU as a sorted scipy matrix in float64; torch's CSR lacks most products."""
    codes = codes.detach()
    if codes.layout != torch.sparse_csr:
        return scipy.sparse.csr_matrix(codes.double().numpy())
    parts = (codes.values().double().numpy(), codes.col_indices().numpy(), codes.crow_indices().numpy())
    matrix = scipy.sparse.csr_matrix(parts, shape=tuple(codes.shape), copy=True)
    matrix.sum_duplicates()
    return matrix


def _sums_cpu(codes: Tensor, targets: Float[Tensor, "sample target"]) -> tuple[Tensor, Tensor, Tensor]:
    matrix = csr_matrix(codes)
    sums = torch.from_numpy(np.asarray(matrix.sum(0)).ravel())
    return sums, gram_of_codes(matrix), torch.from_numpy(np.ascontiguousarray(matrix.T @ targets.numpy()))


def gram_of_codes(matrix: scipy.sparse.csr_matrix) -> Float[Tensor, "source source"]:
    """X'X in float64."""
    from tl_circuitlasso.solve.sparse_kernels import gather_gram

    columns = matrix.tocsc()
    places = scipy.sparse.csr_matrix((np.arange(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape).tocsc().data
    sources = columns.indptr.size - 1
    out = np.zeros((sources, sources))
    gather_gram(columns.indptr, columns.indices, places, matrix.indptr, matrix.indices, matrix.data, out)
    return torch.from_numpy(out)


def _sums_dense(codes: Tensor, targets: Float[Tensor, "sample target"]) -> tuple[Tensor, Tensor, Tensor]:
    dense = codes.to_dense() if codes.layout == torch.sparse_csr else codes
    double = dense.double()
    return double.sum(0), _scatter(codes), double.T @ targets


def _scatter(codes: Tensor) -> Float[Tensor, "source source"]:
    """X'X on an accelerator: float64 scatter of sparse rows, or bfloat16 products accumulated outside in float64."""
    if is_sparse(codes):
        out = torch.zeros(codes.shape[1], codes.shape[1], dtype=torch.float64, device=codes.device)
        rows = Rows.of(codes, slice(0, codes.shape[0]), codes.device)
        scatter_product(out, rows, rows)
        return out
    return dense_scatter(codes.to_dense() if codes.layout == torch.sparse_csr else codes)


def is_sparse(codes: Tensor) -> bool:
    """Whether a batch is CSR with so few entries that scattering pairs of them is quicker than a dense product."""
    return (
        codes.layout == torch.sparse_csr and codes.values().numel() <= SCATTER_BELOW * codes.shape[0] * codes.shape[1]
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a CSR matrix on a device, values in float64."""

    starts: Int[Tensor, " ends"]
    columns: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]

    @classmethod
    def of(cls, matrix: Tensor, rows: slice, device: torch.device | str) -> "Rows":
        """Those in the slice."""
        ends = matrix.crow_indices()[rows.start : rows.stop + 1].long()
        inside = slice(int(ends[0]), int(ends[-1]))
        columns, values = matrix.col_indices()[inside].long(), matrix.values()[inside].double()
        return cls((ends - ends[0]).to(device), columns.to(device), values.to(device))

    @property
    def row(self) -> Int[Tensor, " entry"]:
        """The row of every entry."""
        return torch.repeat_interleave(
            torch.arange(len(self.starts) - 1, device=self.starts.device), self.starts.diff()
        )


def scatter_product(out: Float[Tensor, "source target"], x: Rows, y: Rows) -> None:
    """out[i, j] += x_mi y_mj for every pair of entries of every row m: the first partners of all, then the second ones.

    `out` may have more rows and columns than the codes have.
    """
    row, columns, values = x.row, x.columns, x.values
    count = y.starts.diff()
    for partner in range(int(count.max()) if len(count) else 0):
        more = count[row] > partner
        row, columns, values = row[more], columns[more], values[more]
        at = y.starts[row] + partner
        out.view(-1).index_add_(0, columns * out.shape[1] + y.columns[at], values * y.values[at])


def dense_scatter(batch: Float[Tensor, "sample source"], step: int = 4096) -> Float[Tensor, "source source"]:
    """X'X of a dense batch by `add_product`, slab by slab."""
    out = torch.zeros(batch.shape[1], batch.shape[1], dtype=torch.float64, device=batch.device)
    for slab in batch.split(step):
        add_product(out, slab, slab)
    return out


def add_product(
    out: Float[Tensor, "source target"], x: Float[Tensor, "sample source"], y: Float[Tensor, "sample target"]
) -> None:
    """out += x'y by bfloat16 tensor-core products of x = high + low, float32 inside a slab, float64 across slabs.

    Codes that came out of a bfloat16 encoder have no low part, and one product is exact up to its accumulation; low
    times low is beyond float32. Off CUDA, where a product can't keep a wider result than its input, it is a plain
    float64 product.
    """
    if out.device.type != "cuda":
        out += x.double().T @ y.double()
        return
    left, right = _halves(x), _halves(y)
    for number, one in enumerate(left):
        for other in right if number == 0 else right[:1]:
            out += torch.mm(one.T, other, out_dtype=torch.float32)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """x as one or two bfloat16 terms."""
    high = x.to(torch.bfloat16)
    low = (x - high.to(x.dtype)).to(torch.bfloat16)
    return (high, low) if bool((low != 0).any()) else (high,)
