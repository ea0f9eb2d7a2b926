"""In, out, or abstain: what an edge's stability says about the truth, learnt on circuits that are known.

A method that finds an edge in every resample may still be wrong each time. Where the true circuit is known, thresholds
on the share of resamples can be chosen by the errors that they make, and carried over to models of the same kind:

    in    share >= keep:  the share of false edges among those called in
    out   share <= drop:  the share of true edges among those called out, and the share of the true that are called out

are, in expectation over circuits, at most 1 - confidence. Edges of one model stand and fall together, so a circuit
counts as one draw, however many edges it has. Each threshold goes as far as

    (1 + sum over n circuits of the largest error up to here) / (n + 1)  <=  1 - confidence

allows, which makes the promise hold for one circuit more, whatever the errors' distribution (conformal risk control,
Angelopoulos et al., arXiv 2208.02814); of the n only those count in which some edge is called so, lest a verdict that
is rarely given look safe. Where even the extreme share is wrong too often, edges are never called so. Between the two
the verdict is abstain.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.stability import Edge, Stability

Known = tuple[Stability, Collection[Edge]]  # how steady a method is on a model, and the model's true edges
Shares = Float[np.ndarray, " edge"]
Truth = Bool[np.ndarray, " edge"]


@dataclass(frozen=True)
class Calibration:
    """Thresholds on the share of resamples that keep an edge.

    Attributes
    ----------
    keep: the least share of edges that are called in; None if no edge may be.
    drop: the largest share of edges that are called out; None if no edge may be.
    confidence: as it was asked for.
    circuits, true_edges, false_edges: what these thresholds rest on.
    """

    keep: float | None
    drop: float | None
    confidence: float
    circuits: int
    true_edges: int
    false_edges: int

    def verdict(self, share: int | float) -> str:
        """ "in", "out" or "abstain" for one share.

        >>> Calibration(0.9, 0.2, 0.9, 20, 40, 400).verdict(0.5)
        'abstain'
        """
        if self.keep is not None and share >= self.keep:
            return "in"
        return "out" if self.drop is not None and share <= self.drop else "abstain"

    def verdicts(self, found: Stability) -> pd.DataFrame:
        """Every candidate edge with its share and verdict, the steadiest first."""
        rows = [(*edge, share, self.verdict(share)) for edge, share in found.shares.items()]
        table = pd.DataFrame(rows, columns=["source", "target", "share", "verdict"])
        return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def judge(self, found: Stability, truth: Collection[Edge]) -> pd.DataFrame:
        """How many true and false edges get each verdict, on a circuit that is known (and wasn't learnt from).

        Raises
        ------
        InputError: a true edge that isn't a candidate.
        """
        true = _members(found, truth).tolist()
        seen = Counter(zip(map(self.verdict, found.shares.values()), true))
        rows = ["in", "abstain", "out"]
        columns = {name: [seen[row, is_true] for row in rows] for name, is_true in (("true", True), ("false", False))}
        return pd.DataFrame(columns, index=pd.Index(rows, name="verdict"))


def calibrate(known: Iterable[Known], *, confidence: int | float = 0.9) -> Calibration:
    """Thresholds for "in" and "out" from circuits that are known.

    Parameters
    ----------
    known: for each known circuit a method's `stability` on it, and its true edges. Later graphs must come from the same
        method with the same number of resamples, on models of the same kind: nothing is promised about others.
        `tcl.synthetic.planted_transformer` makes as many known circuits as are needed.
    confidence: 1 - the error rate that each verdict may have.

    Raises
    ------
    InputError: too few circuits for this confidence (9 at .9, 4 at .8), a confidence outside (0, 1), or a true edge
        that isn't a candidate.

    >>> edges = [("input", f"m{i}") for i in range(6)]
    >>> shares = pd.DataFrame({"source": "input", "target": ["m0", "m1", "m2"], "share": 1.0})
    >>> found = Stability(1.0, shares, (3, 3), frozenset(edges))
    >>> calibrate([(found, edges[:3])] * 9)
    Calibration(keep=1.0, drop=0.0, confidence=0.9, circuits=9, true_edges=27, false_edges=27)
    """
    fraction("confidence", confidence, whole=False)
    shares = [(np.array(list(found.shares.values())), _members(found, truth)) for found, truth in known]
    may = 1 - confidence
    if len(shares) < (least := math.ceil(1 / may - 1e-9) - 1):
        raise InputError(
            f"`known` has {len(shares)} circuits: at confidence {confidence} thresholds rest on {least} or more; give "
            "more (`tcl.synthetic.planted_transformer` makes some), or a lower `confidence`"
        )
    steps = np.unique(np.concatenate([share for share, _ in shares]))
    keep = _furthest(steps[::-1], [_called_in(*one, steps[::-1]) for one in shares], may)
    drop = _furthest(steps, [_called_out(*one, steps) for one in shares], may)
    if keep is not None and drop is not None and drop >= keep:  # what may be called in isn't called out
        below = steps[steps < keep]
        drop = float(below.max()) if len(below) else None
    true, total = (int(sum(count)) for count in zip(*((is_true.sum(), len(is_true)) for _, is_true in shares)))
    return Calibration(keep, drop, float(confidence), len(shares), true, total - true)


Called = tuple[Float[np.ndarray, " step"], Bool[np.ndarray, " step"]]  # the error, and whether any edge is called so


def _called_in(share: Shares, true: Truth, steps: Float[np.ndarray, " step"]) -> Called:
    """At each step, from the highest, the share of false edges among those at or above it."""
    called = share >= steps[:, None]
    return (called & ~true).sum(1) / called.sum(1).clip(1), called.sum(1) > 0


def _called_out(share: Shares, true: Truth, steps: Float[np.ndarray, " step"]) -> Called:
    """At each step, from the lowest, the larger of two shares: of true edges among those at or below it, and of these
    among the true edges."""
    called = share <= steps[:, None]
    lost = (called & true).sum(1)
    return np.maximum(lost / called.sum(1).clip(1), lost / max(1, true.sum())), called.sum(1) > 0


def _furthest(steps: Float[np.ndarray, " step"], called: Sequence[Called], may: float) -> float | None:
    """The last step up to which one circuit more may be expected to be wrong no oftener than it may."""
    wrong, some = (np.array(part) for part in zip(*called))
    worst = np.maximum.accumulate(wrong, axis=1)
    good = (1 + worst.sum(0)) / (1 + some.sum(0)) <= may + 1e-9
    return float(steps[good.nonzero()[0][-1]]) if good.any() else None


def _members(found: Stability, truth: Collection[Edge]) -> np.ndarray:
    true = set(truth)
    if outside := sorted(true - found.candidates):
        raise InputError(f"`known` has the true edge {' -> '.join(outside[0])}, which the method couldn't have kept")
    return np.array([edge in true for edge in found.shares], dtype=bool)
