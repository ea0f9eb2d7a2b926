"""Circuits of several graphs, their agreement, truth and costs, as tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from tl_circuitlasso.comparison.common import Common, is_ranking
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.structure import auroc
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import cost


def ranking_size(common: Common, edges: int | None, truth: np.ndarray | None) -> int:
    """How many edges a ranking's circuit has."""
    if edges is not None:
        return edges
    chosen = [int(kept.sum()) for graph, kept in zip(common.graphs.values(), common.kept) if not is_ranking(graph)]
    if chosen:
        return max(1, min(chosen))
    if truth is not None:
        return int(truth.sum())
    raise InputError(
        "`graphs` all keep every candidate edge, so none says how large a circuit is: give `edges`, the number to "
        "compare, or cut them by threshold or top_k"
    )


def circuit(common: Common, n: int, edges: int | None, size: int) -> np.ndarray:
    """Which common candidates make graph `n`'s circuit."""
    graph = list(common.graphs.values())[n]
    if edges is None and not is_ranking(graph):
        return common.kept[n]
    circuit = np.zeros(len(common.key), dtype=bool)
    circuit[common.order(n)[:size]] = True
    return circuit


def agreement(common: Common, circuits: np.ndarray, equal: int, a: int, b: int) -> dict[str, Any]:
    names = list(common.graphs)
    both, union = int((circuits[a] & circuits[b]).sum()), int((circuits[a] | circuits[b]).sum())
    top = np.zeros((2, len(common.key)), dtype=bool)
    for row, n in enumerate((a, b)):
        top[row, common.order(n)[:equal]] = True
    either, size = top.any(0), np.abs(common.score)
    return {
        "a": names[a],
        "b": names[b],
        "both": both,
        "only_a": int(circuits[a].sum()) - both,
        "only_b": int(circuits[b].sum()) - both,
        "jaccard": both / union if union else math.nan,
        "jaccard_top": top.all(0).sum() / either.sum() if equal else math.nan,
        "rank_correlation": rank_correlation(size[a], size[b]),
        "rank_correlation_top": rank_correlation(size[a][either], size[b][either]),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of ranks; NaN where there are fewer than three values or one side has only one value.

    >>> rank_correlation(np.array([1., 2., 9.]), np.array([2., 4., 5.]))
    1.0
    """
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return math.nan
    return round(float(spearmanr(a, b)[0]), 12)  # type: ignore[arg-type]


def table(
    common: Common,
    circuits: np.ndarray,
    truth: np.ndarray | None,
    pairs: pd.DataFrame,
    measured: Mapping[str, Mapping[str, Any]],
    graphs: Mapping[str, AttributionGraph],
) -> pd.DataFrame:
    agreement = pairs[pairs.a == next(iter(graphs))].set_index("b")
    columns = ["jaccard", "jaccard_top", "rank_correlation", "rank_correlation_top"]
    rows = []
    for n, (name, graph) in enumerate(graphs.items()):
        row: dict[str, Any] = {"graph": name, "edges": int(circuits[n].sum())}
        row |= dict(agreement.loc[name, columns]) if name in agreement.index else dict.fromkeys(columns, math.nan)
        if truth is not None:
            row |= _against(truth, circuits[n], np.abs(common.score[n]))
        rows.append(row | dict(measured.get(name, {})) | _costs(graph))
    return pd.DataFrame(rows).set_index("graph").dropna(axis=1, how="all")


def _against(truth: np.ndarray, circuit: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    hits, found = int((truth & circuit).sum()), int(circuit.sum())
    return {
        "shd": int((truth ^ circuit).sum()),
        "precision": hits / found if found else 0.0,
        "recall": hits / int(truth.sum()),
        "auroc": auroc(size, truth),
    }


def _costs(graph: AttributionGraph) -> dict[str, float]:
    """Seconds, passes per prompt and memory as the provenance has them; NaN where it hasn't."""
    found = cost(graph.provenance)
    return {name: math.nan if value is None else value for name, value in found.items()}


def overlap(common: Common, circuits: np.ndarray, truth: np.ndarray | None) -> pd.DataFrame:
    """The edges of any circuit, those that all have first, then by the mean of each score over its graph's largest."""
    names = list(common.graphs)
    some = np.flatnonzero(circuits.any(0) if truth is None else circuits.any(0) | truth)
    size = np.abs(common.score)
    share = (size / np.maximum(size.max(1, keepdims=True), 1e-300)).mean(0)[some]
    member = circuits[:, some]
    order = np.lexsort((common.key[some], -share, -member.sum(0)))
    ends = [common.edge(int(common.key[some[n]])) for n in order]
    rows: dict[str, Any] = {"source": [s for s, _ in ends], "target": [t for _, t in ends]}
    rows["where"] = [_where(member[:, n], names) for n in order]
    rows |= {name: common.score[n, some[order]] for n, name in enumerate(names)}
    if truth is not None:
        rows["true"] = truth[some[order]]
    return pd.DataFrame(rows)


def _where(member: np.ndarray, names: Sequence[str]) -> str:
    if member.all():
        return "both" if len(names) == 2 else "all"
    owners = [name for name, inside in zip(names, member) if inside]
    return " + ".join(owners) + (" only" if len(owners) == 1 else "") if owners else "truth only"
