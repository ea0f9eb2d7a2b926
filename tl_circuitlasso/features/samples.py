"""The matrices of one regression, chunk by chunk: what a child's features are, and how it sees its parent's."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.models.codes import Codes
from tl_circuitlasso.models.feature_codes import Chunk, route_key
from tl_circuitlasso.models.feature_store import CodeStore
from tl_circuitlasso.models.feature_sums import Effects

FOLDS = 10
_HELD, _FOLD, _SPAN = 2654435761, 2246822519, 1 << 32  # odd multipliers spread neighbouring numbers evenly


@dataclass(frozen=True)
class Column:
    """How one copy of the parent's codes is seen: at the child's own position (port ""), or through attention ("v")."""

    key: str
    port: str
    head: int = -1


@dataclass(frozen=True, eq=False)
class PairData:
    """One parent and one child, and where their samples are.

    parent, child: hooks, the child None where it is the target; columns: the copies of the parent's codes; features,
    child_features: the kept ones; errors: how many directions of the parent's error stand behind the codes; pooled:
    whether samples are prompts; effects: what each parent feature does to each child feature, of all copies, where
    penalty "read" wants to know and it can be told; given: the samples, where not from the store.
    """

    store: CodeStore
    parent: str
    child: str | None
    columns: tuple[Column, ...]
    features: Int[Tensor, " source"]
    child_features: Int[Tensor, " target"]
    errors: int
    pooled: bool
    held_out: float
    effects: Effects | None = None
    given: "tuple[Part, ...] | None" = None

    @property
    def sources(self) -> int:
        """The number of columns that explain."""
        return len(self.columns) * len(self.features) + self.errors

    def count(self, held: bool) -> int:
        """How many samples `parts` gives."""
        if self.given is not None:
            return sum(len(part.prompt) for part in self.parts(held))
        total = 0
        for chunk in self.store:
            rows = chunk.prompt if self.child is not None else chunk.prompt[chunk.target_rows]
            rows = rows.unique() if self.pooled else rows
            total += int((is_held(rows, self.held_out) == held).sum())
        return total

    def parts(self, held: bool) -> Iterator["Part"]:
        """The samples that are regressed on, or those held out, chunk by chunk."""
        for part in map(partial(_part, self), self.store) if self.given is None else self.given:
            rows = is_held(part.prompt, self.held_out)
            rows = rows if held else ~rows
            if bool(rows.any()):
                yield part if bool(rows.all()) else part.take(rows.nonzero().flatten())


@dataclass(frozen=True, eq=False)
class Part:
    """Samples of one chunk: parent's codes (sample, copies x feature), its error, the child's codes or target."""

    codes: scipy.sparse.csr_matrix
    extra: Float[Tensor, "sample direction"]
    child: scipy.sparse.csr_matrix | Tensor
    prompt: Int[Tensor, " sample"]

    def take(self, rows: Int[Tensor, " row"]) -> "Part":
        """Some of the samples."""
        at = rows.numpy()
        return Part(self.codes[at], self.extra[rows], self.child[at], self.prompt[rows])

    def fold(self, number: int) -> "Part":
        """The samples of one fold; whole prompts go to one fold."""
        return self.take((fold_of(self.prompt) == number).nonzero().flatten())


def columns_of(parent: str, route: str | None, heads: int | None) -> tuple[Column, ...]:
    """The copies of a parent's codes: its own position, and through attention by route (and head)."""
    here = (Column(parent, ""),)
    if route is None:
        return here
    if heads is None:
        return (*here, Column(route_key(parent, route), "v"))
    return (*here, *(Column(route_key(parent, route, head), "v", head) for head in range(heads)))


def fold_of(prompt: Int[Tensor, " sample"]) -> Int[Tensor, " sample"]:
    """A number from 0 to FOLDS - 1 for every prompt, spread evenly over whatever order prompts come in."""
    return ((prompt * _FOLD) % _SPAN) * FOLDS // _SPAN


def to_torch(matrix: scipy.sparse.csr_matrix | Tensor) -> Tensor:
    """A scipy CSR matrix as torch's, without a copy; tensors as they are."""
    if isinstance(matrix, Tensor):
        return matrix
    parts = (torch.from_numpy(np.asarray(part)) for part in (matrix.indptr, matrix.indices, matrix.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state"
        return torch.sparse_csr_tensor(*parts, size=matrix.shape, check_invariants=False)


def _part(pair: PairData, chunk: Chunk) -> Part:
    kept = pair.features.numpy()
    copies = [_matrix(chunk.codes[column.key], kept) for column in pair.columns]
    codes = copies[0] if len(copies) == 1 else scipy.sparse.csr_matrix(scipy.sparse.hstack(copies, format="csr"))
    extra = chunk.errors[pair.parent] if pair.errors else torch.zeros(chunk.samples, 0)
    prompt = chunk.prompt
    if pair.child is not None:
        child = _matrix(chunk.codes[pair.child], pair.child_features.numpy())
        return _pooled(chunk, codes, extra, child) if pair.pooled else Part(codes, extra, child, prompt)
    if pair.pooled:
        target = _sums_by_prompt(chunk, chunk.target_rows) @ chunk.target.numpy()
        count = np.bincount(chunk.places(prompt[chunk.target_rows]).numpy(), minlength=len(chunk.ends))
        mean = torch.from_numpy(target / np.maximum(count, 1)[:, None]).float()
        return _pooled(chunk, codes, extra, mean[torch.from_numpy(count > 0)], torch.from_numpy(count > 0))
    rows = chunk.target_rows
    return Part(scipy.sparse.csr_matrix(codes[rows.numpy()]), extra[rows], chunk.target, prompt[rows])


def _matrix(codes: Codes, kept: np.ndarray) -> scipy.sparse.csr_matrix:
    """The kept columns of codes."""
    table = np.full(codes.width, -1, dtype=np.int32)
    table[kept] = np.arange(len(kept), dtype=np.int32)
    columns = table[codes.columns.numpy()]
    alive = columns >= 0
    before = np.concatenate([[0], np.cumsum(alive)])
    ends = before[codes.starts.numpy()]
    return scipy.sparse.csr_matrix(
        (codes.values.numpy()[alive], columns[alive], ends.astype(np.int32 if ends[-1] < 2**31 else np.int64)),
        (codes.rows, len(kept)),
    )


def _pooled(
    chunk: Chunk,
    codes: scipy.sparse.csr_matrix,
    extra: Tensor,
    child: scipy.sparse.csr_matrix | Tensor,
    has: Tensor | None = None,
) -> Part:
    """Means over each prompt's samples; `has` marks the prompts of `child`'s rows, where it is pooled already."""
    sums = _sums_by_prompt(chunk, None)
    count = np.asarray(sums.sum(1)).ravel()
    mean = scipy.sparse.csr_matrix(scipy.sparse.diags(1 / np.maximum(count, 1)) @ sums)
    own = torch.from_numpy(count > 0) if has is None else has
    rows = own.numpy().nonzero()[0]
    mean = scipy.sparse.csr_matrix(mean[rows])
    pooled = child if has is not None else scipy.sparse.csr_matrix(mean @ child, dtype=np.float32)
    return Part(
        scipy.sparse.csr_matrix(mean @ codes, dtype=np.float32),
        torch.from_numpy(mean @ extra.numpy()).float(),
        pooled,
        chunk.numbers[own],
    )


def _sums_by_prompt(chunk: Chunk, rows: Tensor | None) -> scipy.sparse.csr_matrix:
    """(prompt, sample): 1 where a sample belongs to a prompt."""
    prompt = chunk.places(chunk.prompt if rows is None else chunk.prompt[rows]).numpy()
    shape = (len(chunk.ends), len(prompt))
    return scipy.sparse.csr_matrix((np.ones(len(prompt)), (prompt, np.arange(len(prompt)))), shape)


def is_held(prompt: Int[Tensor, " sample"], share: float) -> Tensor:
    """Whether each sample's prompt is held out: a `share` of all prompts, the same ones in every run."""
    return ((prompt * _HELD) % _SPAN) < share * _SPAN
