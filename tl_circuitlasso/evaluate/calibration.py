"""In, out, or abstain: what an edge's stability says about the truth, learnt on circuits that are known.

A method that finds an edge in every resample may still be wrong each time. Where the true circuit is known, thresholds
on the share of resamples can be chosen by the errors that they make, and carried over to models of the same kind:

    in    share >= keep:  of the edges called in, at most 1 - confidence are false
    out   share <= drop:  of the true edges, at most 1 - confidence are called out

Each threshold goes as far as the upper end of an exact binomial interval for its error rate allows; where even the
extreme share can't be shown to be good enough, edges are never called so. Between the two the verdict is abstain.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import beta

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.stability import Edge, Stability

Known = tuple[Stability, Collection[Edge]]  # how steady a method is on a model, and the model's true edges


@dataclass(frozen=True)
class Calibration:
    """Thresholds on the share of resamples that keep an edge.

    Attributes
    ----------
    keep: the least share of edges that are called in; None if no edge may be.
    drop: the largest share of edges that are called out; None if no edge may be.
    confidence, level: as they were asked for.
    true_edges, false_edges: how many edges of known truth these thresholds rest on.
    """

    keep: float | None
    drop: float | None
    confidence: float
    level: float
    true_edges: int
    false_edges: int

    def verdict(self, share: int | float) -> str:
        """ "in", "out" or "abstain" for one share.

        >>> Calibration(0.9, 0.2, 0.9, 0.05, 40, 400).verdict(0.5)
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


def calibrate(known: Iterable[Known], *, confidence: int | float = 0.9, level: int | float = 0.05) -> Calibration:
    """Thresholds for "in" and "out" from circuits that are known.

    Parameters
    ----------
    known: for each known circuit a method's `stability` on it, and its true edges. Later graphs must come from the same
        method with the same number of resamples, on models of the same kind: nothing is promised about others.
    confidence: 1 - the error rate that each verdict may have. level: the chance that a threshold breaks it; edges are
        counted as independent draws.

    Raises
    ------
    InputError: nothing known, numbers outside (0, 1), or a true edge that isn't a candidate.

    >>> edges = [("input", f"m{i}") for i in range(100)]
    >>> shares = pd.DataFrame({"source": "input", "target": [e[1] for e in edges[:50]], "share": 1.0})
    >>> found = Stability(1.0, shares, (50, 50), frozenset(edges))
    >>> calibrate([(found, edges[:50])])
    Calibration(keep=1.0, drop=0.0, confidence=0.9, level=0.05, true_edges=50, false_edges=50)
    """
    for name, value in (("confidence", confidence), ("level", level)):
        if not 0 < value < 1:
            raise InputError(f"`{name}` is {value!r}: give a share between 0 and 1")
    known = list(known)
    if not known:
        raise InputError("`known` is empty: give (stability, true edges) of one circuit or more")
    shares = np.concatenate([list(found.shares.values()) for found, _ in known])
    true = np.concatenate([_members(found, truth) for found, truth in known])
    steps = np.unique(shares)
    keep = _furthest(steps[::-1], [true[shares >= step] for step in steps[::-1]], confidence, level)
    lost = [shares[true] > step for step in steps]
    drop = _furthest(steps, lost, confidence, level)
    if keep is not None and drop is not None and drop >= keep:  # what may be called in isn't called out
        below = steps[steps < keep]
        drop = float(below.max()) if len(below) else None
    return Calibration(keep, drop, float(confidence), float(level), int(true.sum()), int((~true).sum()))


def _furthest(
    steps: np.ndarray, right: Sequence[np.ndarray], confidence: int | float, level: int | float
) -> float | None:
    """The last step of those that, one after the other, are right often enough."""
    last = None
    for step, good in zip(steps, right):
        if _most_wrong(len(good), int((~good).sum()), level) > 1 - confidence:
            break
        last = float(step)
    return last


def _most_wrong(count: int, wrong: int, level: int | float) -> float:
    """The upper end of the exact binomial interval for an error rate."""
    return 1.0 if wrong >= count else float(beta.ppf(1 - level, wrong + 1, count - wrong))


def _members(found: Stability, truth: Collection[Edge]) -> np.ndarray:
    true = set(truth)
    if outside := sorted(true - found.candidates):
        raise InputError(f"`known` has the true edge {' -> '.join(outside[0])}, which the method couldn't have kept")
    return np.array([edge in true for edge in found.shares], dtype=bool)
