"""Moments of one set of sparse codes against another, streaming: the statistics of circuits among SAE features.

Sources are codes (CSR) and a few dense columns beside them, targets are codes or dense columns. Sums are raw, in
float64, and added to in place: codes are mostly zeros, so nothing is lost by centring at the end.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.path import Moments
from tl_circuitlasso.solve.sparse import Rows, add_product, csr_matrix, is_sparse, scatter_product
from tl_circuitlasso.solve.strength import RIDGE, refit_support

STRIP = 64  # sources that one thread takes at a time
MIRROR = 1024  # rows of the Gram mirrored at once
_SUMS = ("sums", "upper", "target_sums", "cross", "target_squares")
DENSE_FROM = 0.1  # share of nonzeros (codes seen through attention have many) from which a dense product is quicker
DENSE_ROWS = 2048  # samples that are dense at once on a CPU
DENSE_STRIP = 256  # sources whose rows of the upper triangle are made together
SLAB = 8192  # samples that are dense at once on an accelerator; of sparse ones it takes eight times as many


@dataclass(frozen=True, eq=False)
class PairSums:
    """Raw sums over samples of sources X = [codes, extra] and targets Y: X'X, X'Y, diag Y'Y and the sums of both.

    `upper` has the upper triangle of X'X; it may be shared by several sums of the same sources, of which only the
    `owner` adds to it.

    >>> codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> PairSums.empty(2, 2).add(codes, codes).centred().cross.tolist()
    [[0.25, -0.5], [-0.5, 1.0]]
    """

    count: int
    sums: Float[Tensor, " source"]
    upper: Float[Tensor, "source source"]
    target_sums: Float[Tensor, " target"]
    cross: Float[Tensor, "source target"]
    target_squares: Float[Tensor, " target"]
    owner: bool = True

    @classmethod
    def empty(
        cls,
        sources: int,
        targets: int,
        *,
        device: torch.device | str = "cpu",
        upper: Float[Tensor, "source source"] | None = None,
    ) -> "PairSums":
        """No samples yet; `upper` is that of other sums over the same sources, already or elsewhere filled."""
        zeros = {"dtype": torch.float64, "device": device}
        return cls(
            0,
            torch.zeros(sources, **zeros),
            torch.zeros(sources, sources, **zeros) if upper is None else upper,
            torch.zeros(targets, **zeros),
            torch.zeros(sources, targets, **zeros),
            torch.zeros(targets, **zeros),
            upper is None,
        )

    def add(self, codes: Tensor, targets: Tensor, extra: Float[Tensor, "sample column"] | None = None) -> "PairSums":
        """With some samples added. Consumes `self`: its buffers are updated in place, as a stream needs.

        Raises InputError for different numbers of samples or columns.
        """
        dense = torch.zeros(codes.shape[0], 0) if extra is None else extra
        if not codes.shape[0] == targets.shape[0] == len(dense):
            raise InputError(
                f"`codes`, `targets` and `extra` need the same samples: {codes.shape[0]}, {targets.shape[0]} and"
                f" {len(dense)}"
            )
        if (codes.shape[1] + dense.shape[1], targets.shape[1]) != tuple(self.cross.shape):
            raise InputError(
                f"`codes` with `extra` and `targets` have {codes.shape[1] + dense.shape[1]} and {targets.shape[1]}"
                f" columns, these sums {tuple(self.cross.shape)}"
            )
        if self.cross.device.type == "cpu":
            add = _add_cpu
        else:
            add = _add_scattered if is_sparse(codes) and is_sparse(targets) else _add_dense
        add(self, codes.detach(), targets.detach(), dense.detach().to(self.cross))
        return replace(self, count=self.count + codes.shape[0])

    def __add__(self, other: "PairSums") -> "PairSums":
        """The sums of both sets of samples, in new buffers."""
        if self.cross.shape != other.cross.shape:
            raise InputError(f"sums over {tuple(self.cross.shape)} and {tuple(other.cross.shape)} columns don't add up")
        both = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return PairSums(count=self.count + other.count, **both)

    @property
    def means(self) -> tuple[Float[Tensor, " source"], Float[Tensor, " target"]]:
        """The mean of every source and target."""
        return self.sums / max(self.count, 1), self.target_sums / max(self.count, 1)

    def centred(self, about: tuple[Tensor, Tensor] | None = None) -> Moments:
        """The moments about the mean, or `about` that of a larger set of samples: what `lasso` takes.

        Raises InputError where nothing has been added.
        """
        if not self.count:
            raise InputError("no samples have been added yet")
        own, target_own = self.means
        mean, target_mean = self.means if about is None else about
        gram = _mirrored(self.upper).div_(self.count).addr_(mean, own, alpha=-1)
        cross = (self.cross / self.count).addr_(mean, target_own, alpha=-1)
        if about is not None:
            gram.addr_(own - mean, mean, alpha=-1)
            cross.addr_(own - mean, target_mean, alpha=-1)
        square = self.target_squares / self.count - target_mean * (2 * target_own - target_mean)
        return Moments(gram, cross, square.clamp(min=0), self.count)


def refit_entries(
    data: Moments, source: Int[Tensor, " entry"], target: Int[Tensor, " entry"]
) -> Float[Tensor, " entry"]:
    """Least squares on each target's support, given and answered as entries of a sparse matrix, ordered by target.

    What `refit_support` does for dense coefficients, without a second matrix of full size.

    >>> data = Moments(torch.eye(2), torch.tensor([[2.0], [3.0]]), torch.ones(1), 1)
    >>> refit_entries(data, torch.tensor([1]), torch.tensor([0])).round(decimals=6).tolist()
    [3.0]
    """
    if data.gram.device.type != "cpu":
        support = torch.zeros_like(data.cross, dtype=torch.float64)
        support[source, target] = 1.0
        return refit_support(data, support)[source, target]
    from tl_circuitlasso.solve.pair_kernels import least_squares

    counts = torch.bincount(target, minlength=data.cross.shape[1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).numpy()
    gram, cross = data.gram.double().numpy(), data.cross[source, target].double().numpy()
    rows, out = source.numpy(), np.zeros(len(source))
    _threaded(len(counts), lambda a, b: least_squares(gram, cross, starts, rows, out, RIDGE, a, b))
    return torch.from_numpy(out)


def _mirrored(upper: Float[Tensor, "source source"]) -> Float[Tensor, "source source"]:
    """A whole symmetric matrix from its upper triangle, strip by strip."""
    whole = upper.clone()
    for start in range(0, len(whole), MIRROR):
        strip, rest = slice(start, start + MIRROR), slice(start + MIRROR, None)
        block = upper[strip, strip]
        whole[strip, strip] = block.triu() + block.triu(1).T
        whole[rest, strip] = upper[strip, rest].T
    return whole


def _add_cpu(sums: PairSums, codes: Tensor, targets: Tensor, extra: Float[Tensor, "sample column"]) -> None:
    x, y, dense, p = csr_matrix(codes), csr_matrix(targets), extra.numpy(), codes.shape[1]
    sums.sums[:p] += torch.from_numpy(np.asarray(x.sum(0)).ravel())
    sums.sums[p:] += extra.sum(0)
    sums.target_sums.add_(torch.from_numpy(np.asarray(y.sum(0)).ravel()))
    sums.target_squares.add_(torch.from_numpy(np.asarray(y.multiply(y).sum(0)).ravel()))
    sums.cross[p:] += torch.from_numpy(np.ascontiguousarray((y.T @ dense).T))
    _products(x, y, p, sums.cross.numpy(), sums.upper.numpy() if sums.owner else None)
    if sums.owner:
        sums.upper[:p, p:] += torch.from_numpy(np.ascontiguousarray(x.T @ dense))
        sums.upper[p:, p:] += extra.T @ extra


def _products(
    x: scipy.sparse.csr_matrix, y: scipy.sparse.csr_matrix, sources: int, cross: np.ndarray, upper: np.ndarray | None
) -> None:
    """cross += X'Y and the upper triangle of upper += X'X, for the sparse sources."""
    from tl_circuitlasso.solve.pair_kernels import gather_cross, gather_upper

    samples = len(x.indptr) - 1
    if upper is not None and x.nnz >= DENSE_FROM * samples * sources:
        _add_upper(x, samples, sources, upper)
        upper = None
    by_place = scipy.sparse.csr_matrix((np.arange(x.nnz), x.indices, x.indptr), x.shape).tocsc()
    starts, rows, places = by_place.indptr, by_place.indices, np.asarray(by_place.data, dtype=np.int64)
    values = x.data[places]
    _threaded(sources, lambda a, b: gather_cross(starts, rows, values, y.indptr, y.indices, y.data, cross, a, b))
    if upper is not None:
        _threaded(sources, lambda a, b: gather_upper(starts, rows, places, x.indptr, x.indices, x.data, upper, a, b))


def _add_upper(x: scipy.sparse.csr_matrix, samples: int, sources: int, upper: np.ndarray) -> None:
    """upper += X'X on and right of the diagonal, strip by strip, by dense products in float64."""
    whole = torch.from_numpy(upper)
    for start in range(0, samples, DENSE_ROWS):
        rows = torch.from_numpy(x[start : start + DENSE_ROWS].toarray()).double()
        for left in range(0, sources, DENSE_STRIP):
            right = min(left + DENSE_STRIP, sources)
            whole[left:right, left:sources].addmm_(rows[:, left:right].T, rows[:, left:])


def _threaded(sources: int, work: Callable[[int, int], None]) -> None:
    """Strips of sources over torch's threads; each is computed alone, so the split changes nothing."""
    edges = [(start, min(start + STRIP, sources)) for start in range(0, sources, STRIP)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda edge: work(*edge), edges))


def _add_scattered(sums: PairSums, codes: Tensor, targets: Tensor, extra: Float[Tensor, "sample column"]) -> None:
    p, device = codes.shape[1], sums.cross.device
    for start in range(0, codes.shape[0], 8 * SLAB):
        rows = slice(start, start + 8 * SLAB)
        x, y, dense = Rows.of(codes, rows, device), Rows.of(targets, rows, device), extra[rows]
        sums.sums.index_add_(0, x.columns, x.values)
        sums.target_sums.index_add_(0, y.columns, y.values)
        sums.target_squares.index_add_(0, y.columns, y.values.square())
        scatter_product(sums.cross, x, y)
        sums.sums[p:] += dense.sum(0)
        sums.cross[p:].T.index_add_(0, y.columns, y.values[:, None] * dense[y.row])
        if sums.owner:
            scatter_product(sums.upper, x, x)
            sums.upper[:p, p:].index_add_(0, x.columns, x.values[:, None] * dense[x.row])
            sums.upper[p:, p:] += dense.T @ dense


def _add_dense(sums: PairSums, codes: Tensor, targets: Tensor, extra: Float[Tensor, "sample column"]) -> None:
    for start in range(0, codes.shape[0], SLAB):
        rows = slice(start, start + SLAB)
        x = torch.cat([_dense(codes, rows, sums), extra[rows].float()], 1)
        y = _dense(targets, rows, sums)
        sums.sums.add_(x.sum(0, dtype=torch.float64))
        sums.target_sums.add_(y.sum(0, dtype=torch.float64))
        sums.target_squares.add_(y.double().square().sum(0))
        add_product(sums.cross, x, y)
        if sums.owner:
            add_product(sums.upper, x, x)


def _dense(matrix: Tensor, rows: slice, sums: PairSums) -> Float[Tensor, "sample column"]:
    """Some rows of CSR or dense codes as float32 on the device of the sums."""
    if matrix.layout != torch.sparse_csr:
        return matrix[rows].to(sums.cross.device, torch.float32)
    some = Rows.of(matrix, rows, sums.cross.device)
    dense = torch.zeros(len(some.starts) - 1, matrix.shape[1], device=sums.cross.device)
    return dense.index_put_((some.row, some.columns), some.values.float())
