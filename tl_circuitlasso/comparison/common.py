"""A common set of candidate edges for several graphs, and what each graph says of them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Common:
    """Candidate edges as numbers `source * len(names) + target`, and what each graph says of them, ports merged.

    `score` is the entry of largest size over the ports; `rows` says which common edge each row of a graph belongs to
    (-1: none).
    """

    graphs: Mapping[str, AttributionGraph]
    names: list[str]
    key: np.ndarray
    score: np.ndarray
    kept: np.ndarray
    rows: list[np.ndarray]

    @classmethod
    def of(cls, graphs: Mapping[str, AttributionGraph], given: Collection[Sequence[str]] | None) -> "Common":
        names = list(dict.fromkeys(name for graph in graphs.values() for name in graph.index.names))
        number = {name: n for n, name in enumerate(names)}
        keys = [_keys_of(graph, number) for graph in graphs.values()]
        if given is None:
            key = keys[0]
            for other in keys[1:]:
                key = np.intersect1d(key, other)
            key = np.unique(key)
        else:
            key = _pair_keys(given, "candidate_edges", graphs, number)
        if not len(key):
            shown = ", ".join(f"{name!r} ({graph.index.names[0]}, ...)" for name, graph in graphs.items())
            raise InputError(f"`graphs` share no candidate edge: graphs of different bases or models? {shown}")
        parts = [_at(graph, own, key) for graph, own in zip(graphs.values(), keys)]
        score, kept, rows = zip(*parts)
        return cls(graphs, names, key, np.stack(score), np.stack(kept), list(rows))

    def marks(self, edges: Collection[Sequence[str]] | AttributionGraph) -> np.ndarray:
        """Which common candidates are among `edges`."""
        pairs = edges.kept_edges() if isinstance(edges, AttributionGraph) else edges
        key = _pair_keys(pairs, "true_edges", self.graphs, {name: n for n, name in enumerate(self.names)})
        if len(outside := np.setdiff1d(key, self.key)):
            raise InputError(
                f"`true_edges` has {'->'.join(self.edge(int(outside[0])))}, which isn't a candidate of every graph"
            )
        return np.isin(self.key, key)

    def edge(self, key: int) -> Edge:
        source, target = divmod(key, len(self.names))
        return self.names[source], self.names[target]

    def order(self, n: int) -> np.ndarray:
        """The candidates from the strongest to the weakest in graph `n`: kept ones first, then by |score|."""
        return np.lexsort((self.key, -np.abs(self.score[n]), ~self.kept[n]))

    def cut(self, n: int, circuit: np.ndarray) -> AttributionGraph:
        """Graph `n` with exactly those edges kept: through the ports that it kept, or, where it chose none, that are as
        strong as the weakest of the edges."""
        graph = list(self.graphs.values())[n]
        by_choice = self.kept[n] & (not is_ranking(graph))
        weakest = np.abs(self.score[n][circuit & ~by_choice]).min(initial=math.inf)
        place = np.maximum(self.rows[n], 0)
        inside = (self.rows[n] >= 0) & circuit[place]
        port = np.where(by_choice[place], graph.kept.numpy(), np.abs(graph.score.numpy()) >= weakest)
        return graph.keep(torch.from_numpy(inside & port))


def _keys_of(graph: AttributionGraph, number: Mapping[str, int]) -> np.ndarray:
    own = np.array([number[name] for name in graph.index.names], dtype=np.int64)
    return own[graph.source.numpy()] * len(number) + own[graph.target.numpy()]


def _pair_keys(
    edges: Collection[Sequence[str]], what: str, graphs: Mapping[str, AttributionGraph], number: Mapping[str, int]
) -> np.ndarray:
    pairs = sorted({tuple(edge) for edge in edges})
    if not pairs or {len(edge) for edge in pairs} != {2}:
        raise InputError(f"`{what}` must be (source, target) pairs, at least one; ports are merged here")
    known = {name: set(graph.index.names) for name, graph in graphs.items()}
    for node in dict.fromkeys(node for edge in pairs for node in edge):
        for name, names in known.items():
            if node not in names:
                raise InputError(
                    f"`{what}` names {node!r}, which the graph {name!r} doesn't know: write names as it does "
                    f"({', '.join(list(graphs[name].index.names)[:3])}, ...)"
                )
    return np.unique(np.array([number[s] * len(number) + number[t] for s, t in pairs], dtype=np.int64))


def _at(graph: AttributionGraph, own: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A graph's score and membership at each of the sorted `key`, and the place in `key` of each of its rows."""
    place = np.minimum(np.searchsorted(key, own), len(key) - 1)
    rows = np.where(key[place] == own, place, -1)
    score, kept = np.zeros(len(key)), np.zeros(len(key), dtype=bool)
    inside = np.flatnonzero(rows >= 0)
    values = graph.score.numpy()[inside]
    rising = np.argsort(np.abs(values), kind="stable")
    score[rows[inside[rising]]] = values[rising]  # the last write wins: the entry of largest size
    kept[rows[inside[graph.kept.numpy()[inside]]]] = True
    return score, kept, rows


def is_ranking(graph: AttributionGraph) -> bool:
    """Whether the graph keeps every candidate edge, so that only its scores say something."""
    return len(graph) > 0 and bool(graph.kept.all())
