"""What an edge does when its parent is taken out or turned up: the weight of an edge under penalty "read".

A regression coefficient says what predicts the child; with parents that fire together it stands for others, too. What
the child's code does when feature i alone is taken out where it fires is told by how it is read: the pre-activation
moves by z_i D_ij (D as in `features.read`), and an active code with it, or the whole code goes where it falls below
what the SAE lets through. Per unit of z_i,

    S_ij = sum_m delta_mij / sum_m z_mi,     delta_mij = z_mi D_ij  if z_mj > 0,   z_mj  if z_mj - z_mi D_ij < theta_mj

over all samples m, and 0 where j isn't active: children that would be turned on aren't counted. theta_mj is the SAE's
threshold, zero for a plain ReLU. In TopK features compete for places: the one to beat is the sample's weakest, w, which
falls as well when what it reads is taken out, to theta_mj = z_mw - z_mi max(D_iw, 0).

What attention brings of a feature is taken out with it: for an edge through attention delta is made of the mixed code
z~_mi and its own D, over the samples where i doesn't fire itself, and still per unit of what fires, sum_m z_mi.

`LEAST` asks an edge for an effect that can be told from none, in standard deviations of both (the score) and in lengths
of what both features write.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.features.fit import Regressed, Units
from tl_circuitlasso.features.samples import Gate, PairData, Part
from tl_circuitlasso.sharing import ALONE, Ranks
from tl_circuitlasso.solve.working_set import numba_available

LEAST = 0.05
ENTRIES = 1 << 24  # of a part's columns side by side, edge by edge


def with_effects(found: Regressed, pair: PairData, units: Units, ranks: Ranks = ALONE) -> Regressed:
    """With S_ij as the edges' effect, and scores of it, where it is known how the child reads the parent."""
    if pair.reads is None or pair.pooled:
        return found
    rows = (found.source < len(pair.reads)).nonzero().flatten()
    source, target = found.source[rows], found.target[rows]
    with ranks.together():
        own = changes(pair, source, target)
    change, mass = (ranks.sum(x) for x in own)
    effect, score = found.effect.clone(), found.score.clone()
    feature, seen = source % len(pair.features), source >= len(pair.features)
    effect[rows] = _of_all_heads(change, (seen * len(pair.features) + feature) * len(units.target) + target)
    effect[rows] /= mass[feature].clamp(min=1e-300)
    score[rows] = effect[rows] * units.source[feature] / units.target[target]
    return replace(found, effect=effect, score=score)


def _of_all_heads(change: Float[Tensor, " edge"], key: Int[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """What one head brings is taken out of all of them: the sum over an edge's coefficients, for each of these."""
    same = torch.unique(key, return_inverse=True)[1]
    return torch.zeros_like(change).index_add_(0, same, change)[same]


def changes(
    pair: PairData, source: Int[Tensor, " edge"], target: Int[Tensor, " edge"]
) -> tuple[Float[Tensor, " edge"], Float[Tensor, " source"]]:
    """sum_m delta_mij of each edge, and sum_m z_mi of each feature, over the samples that are regressed on."""
    total, mass = np.zeros(len(source)), np.zeros(len(pair.features))
    ends = source.numpy(), target.numpy()
    changed = _compiled if numba_available() else _edge_by_edge
    for part in pair.parts(held=False):
        mass += np.bincount(part.codes.indices, part.codes.data, len(mass))[: len(mass)]
        total += changed(pair, part, *ends)
    return torch.from_numpy(total), torch.from_numpy(mass)


def _compiled(pair: PairData, part: Part, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """sum_m delta_mij of the edges over the samples of one chunk."""
    from tl_circuitlasso.features.effect_kernels import add_changes

    assert pair.reads is not None
    gate = pair.gate or Gate(torch.zeros(len(pair.child_features)))
    order = np.argsort(source, kind="stable")
    first = np.searchsorted(source[order], np.arange(len(pair.reads) + 1))
    child = scipy.sparse.csr_matrix(part.child)
    codes = [x for one in (part.codes, child) for x in (one.indptr.astype(np.int64), one.indices, one.data)]
    reads, thresholds = pair.reads.double().contiguous().numpy(), gate.thresholds.double().contiguous().numpy()
    found, total = np.zeros(len(source)), np.zeros(len(source))
    fires, code = np.zeros(len(pair.features), dtype=np.bool_), np.zeros(len(pair.child_features))
    add_changes(*codes, first, target[order], reads, thresholds, gate.top, fires, code, found)
    total[order] = found
    return total


def _edge_by_edge(pair: PairData, part: Part, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same without numba."""
    some, total = _Samples.of(pair, part), np.zeros(len(source))
    step = max(1, ENTRIES // max(int(np.diff(some.codes.indptr).max(initial=1)), 1))
    for start in range(0, len(source), step):
        edges = slice(start, start + step)
        total[edges] = some.changes(source[edges], target[edges])
    return total


@dataclass(frozen=True, eq=False)
class _Samples:
    """Codes of parent and child by column, how the child reads, and what a code must exceed.

    both: 1 + i z_j at the child's codes, so that one product with the parent's gives the codes of both where they meet.
    weakest, least: which feature of the child is weakest at each sample, and its code; None but for TopK.
    """

    codes: scipy.sparse.csc_matrix
    both: scipy.sparse.csc_matrix
    reads: np.ndarray
    thresholds: np.ndarray
    weakest: np.ndarray | None
    least: np.ndarray | None

    @classmethod
    def of(cls, pair: PairData, part: Part) -> "_Samples":
        """From the samples of one chunk."""
        assert pair.reads is not None
        gate = pair.gate or Gate(torch.zeros(len(pair.child_features)))
        parent = scipy.sparse.csr_matrix(part.codes, dtype=np.float64)
        codes = _elsewhere(parent, len(pair.features), len(pair.reads))
        child = scipy.sparse.csr_matrix(part.child, dtype=np.float64)
        weakest, least = _weakest(child) if gate.top else (None, None)
        both = scipy.sparse.csr_matrix((1 + 1j * child.data, child.indices, child.indptr), child.shape)
        reads, thresholds = pair.reads.double().numpy(), gate.thresholds.double().numpy()
        return cls(scipy.sparse.csc_matrix(codes), scipy.sparse.csc_matrix(both), reads, thresholds, weakest, least)

    def changes(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """sum_m delta_mij of some edges."""
        met = scipy.sparse.csc_matrix(self.codes[:, source].multiply(self.both[:, target]))
        edge, sample = np.repeat(np.arange(len(source)), np.diff(met.indptr)), met.indices
        parent = np.real(met.data)
        code, moved = np.divide(np.imag(met.data), parent), parent * self.reads[source, target][edge]
        threshold = self.thresholds[target[edge]]
        if self.weakest is not None and self.least is not None:
            falls = parent * self.reads[source[edge], self.weakest[sample]].clip(min=0)
            threshold = np.maximum(threshold, self.least[sample] - falls)
        gone = (moved > 0) & (code - moved < threshold)
        return np.bincount(edge, np.where(gone, code, moved), len(source))


def _elsewhere(codes: scipy.sparse.csr_matrix, features: int, known: int) -> scipy.sparse.csr_matrix:
    """The first `known` columns, with copies seen through attention only where the feature itself doesn't fire."""
    own, *copies = (codes[:, start : start + features] for start in range(0, known, features))
    return scipy.sparse.csr_matrix(scipy.sparse.hstack([own, *(copy - copy.multiply(own > 0) for copy in copies)]))


def _weakest(child: scipy.sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's weakest active feature and its code, 0 where none is active."""
    count = np.diff(child.indptr)
    rows = np.repeat(np.arange(len(count)), count)
    data = np.where(child.data > 0, child.data, np.inf)
    least, weakest = np.zeros(len(count)), np.zeros(len(count), dtype=np.int64)
    if len(data):
        least[count > 0] = np.minimum.reduceat(data, child.indptr[:-1][count > 0])
        first = data == least[rows]
        weakest[rows[first]] = child.indices[first]
    return weakest, np.where(np.isinf(least), 0.0, least)


def is_clear(
    found: Regressed, written: Float[Tensor, " source"], child_written: Float[Tensor, " target"]
) -> Bool[Tensor, " edge"]:
    """Which edges do enough: all that are in the regression where effects aren't known.

    written, child_written: the lengths of what one unit of each feature writes.
    """
    known = found.effect.isfinite()
    source, target = found.source % len(written), found.target.clamp(max=len(child_written) - 1)
    passed_on = found.effect.abs() * child_written[target] / written[source].clamp(min=1e-30)
    return ~known | ((found.score.abs() >= LEAST) & (passed_on >= LEAST))
