"""What a table of measured edges says: signs, precision and rank correlation, by method, set and kind."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr


def summary_of(table: Any) -> pd.DataFrame:
    """Per method, set and kind: how many edges, and the figures of `EdgeCheck.summary`."""
    rows = []
    for (method, which), part in table.groupby(["method", "set"], sort=False):
        for kind in ("all", "persistence", "rest"):
            some = part if kind == "all" else part[part["kind"] == kind]
            rows.append({"method": method, "set": which, "kind": kind, **_figures(some)})
    return pd.DataFrame(rows).set_index(["method", "set", "kind"])


def _figures(some: Any) -> dict[str, Any]:
    return {
        "edges": len(some),
        "sign_agreement": _agreement(some, "effect"),
        "sign_amplified": _agreement(some, "effect_amplified"),
        "sign_pre": _agreement(some, "effect_pre"),
        "precision": float(some["real"].mean()) if len(some) else float("nan"),
        "spearman": _spearman(some, "effect"),
        "spearman_pre": _spearman(some, "effect_pre"),
    }


def _agreement(some: Any, effect: str) -> float:
    known = some[some[effect].notna() & (some["weight"] != 0)]
    return float((np.sign(known["weight"]) == np.sign(known[effect])).mean()) if len(known) else float("nan")


def _spearman(some: Any, effect: str) -> float:
    known = some[some[effect].notna() & (some["weight"] != 0)]
    if len(known) < 3 or known[effect].abs().nunique() < 2 or known["weight"].abs().nunique() < 2:
        return float("nan")
    found: Any = spearmanr(known["weight"].abs(), known[effect].abs())
    return float(found[0])


def by_sign(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Of kept edges with a real effect, the share with the right sign, for positive and negative effects apart."""
    rows = []
    for method in methods:
        some: Any = table[(table["method"] == method) & (table["set"] == "kept") & table["real"]]
        right = np.sign(some["weight"]) == np.sign(some["effect"])
        apart = {name: right[sign * some["effect"] > 0] for name, sign in (("+", 1), ("-", -1))}
        rows += [
            {"method": method, "sign": name, "edges": len(one), "sign_agreement": one.mean() if len(one) else np.nan}
            for name, one in apart.items()
        ]
    return pd.DataFrame(rows).set_index(["method", "sign"])
