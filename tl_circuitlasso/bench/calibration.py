"""Is an edge's stability what it says? How many edges of each stability are true, over cases and seeds."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
STABLE = 0.9  # edges that were chosen in so many resamples should be true as often


def calibration(found: Iterable[tuple[float, bool]]) -> pd.DataFrame:
    """The share of true edges by stability: one line per bin, which begins `at least` there and ends before the next.

    found: stability and truth of every candidate edge.

    >>> calibration([(0.0, False), (0.95, True), (1.0, True), (1.0, False)])
       at least  edges  true  share true
    0       0.0      1     0    0.000000
    1       0.9      3     2    0.666667
    """
    pairs = np.array(list(found), dtype=float).reshape(-1, 2)
    stability, true = pairs.T
    place = np.clip(np.digitize(stability, BINS) - 1, 0, len(BINS) - 2)
    lines = []
    for number in sorted(set(place.tolist())):
        inside = true[place == number]
        lines.append((BINS[number], len(inside), int(inside.sum()), float(inside.mean())))
    return pd.DataFrame(lines, columns=["at least", "edges", "true", "share true"])


def share_of_stable(found: Iterable[tuple[float, bool]]) -> tuple[int, float]:
    """How many edges have a stability of `STABLE` or more, and the share of them that is true (NaN: none)."""
    stable = [true for stability, true in found if stability >= STABLE]
    return len(stable), float(np.mean(stable)) if stable else float("nan")
