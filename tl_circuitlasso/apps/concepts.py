"""What becomes of concepts from layer to layer: carried along, merged, or dropped.

Found by rule in a graph of SAE features, from its kept edges alone:

- *persistence*: i -> j where j is the child that i feeds most strongly, i the strongest parent of j, and the score is
  positive and at least `carried`. Chains of such edges are one concept on its way through the layers.
- *merging*: a feature with two or more parents whose scores are positive and at least `part` of the strongest one's,
  none of which carries more than `dominant` of the sum of all positive scores.
- *dropping*: a feature that no edge to a later hook carries on with |score| of `dropped` or more, though its hook
  feeds another one.

Scores are standardised coefficients, so they compare across features. The three phenomena are those of the CircuitLasso
paper (Yin et al. 2026); the rules are this library's.

>>> from tl_circuitlasso.graph.nodes import Block, NodeIndex
>>> from tl_circuitlasso.data.sites import parse_site
>>> hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
>>> index = NodeIndex(tuple(Block(parse_site(hook), rank, (0, 1)) for rank, hook in enumerate(hooks)))
>>> graph = AttributionGraph.from_edges(index, {
...     (f"{hooks[0]}#0", f"{hooks[1]}#0"): 0.9, (f"{hooks[1]}#0", f"{hooks[2]}#0"): 0.8,
...     (f"{hooks[0]}#1", f"{hooks[1]}#1"): 0.05})
>>> found = concepts(graph)
>>> found.persistence["layers"].tolist(), found.dropping["node"].str[-1].tolist()
([3], ['1', '1'])
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.explaining import context_text, label

Edges = Mapping[tuple[str, str], float]
PHENOMENA = ("persistence", "merging", "dropping")


@dataclass(frozen=True, eq=False)
class Concepts:
    """What `concepts` found, strongest first.

    Attributes
    ----------
    graph: the graph they were found in.
    persistence: one row per chain: nodes, layers (how many hooks it spans), score (product of its edges' scores),
        weakest, label, context, to_target.
    merging: one row per child: node, parents, shares (each parent's part of the positive scores), score (that of its
        second parent: what makes it a merge), label, context, to_target.
    dropping: one row per feature: node, carried (its largest |score| onwards), frequency (share of samples on which it
        fires; NaN where the graph doesn't know), label, context, to_target.
    """

    graph: AttributionGraph
    persistence: pd.DataFrame
    merging: pd.DataFrame
    dropping: pd.DataFrame

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {name: len(getattr(self, name)) for name in PHENOMENA}

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        return f"Concepts({found}; {self.graph.n_kept} edges)"


def concepts(
    graph: AttributionGraph,
    *,
    carried: int | float = 0.3,
    part: int | float = 0.5,
    dominant: int | float = 0.7,
    dropped: int | float = 0.1,
) -> Concepts:
    """Persistence, merging and dropping in a graph of SAE features, by the rules at the top of this module.

    `to_target` in the tables is the largest product of |score| on a way from the feature (of a chain: its last one) to
    the graph's target; 0 where there is no way.

    Raises
    ------
    InputError: a bound outside (0, 1], or a graph without edges between features of hooks.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> found = tcl.apps.concepts(graph)
    >>> sorted(found.counts())
    ['dropping', 'merging', 'persistence']
    """
    for name, value in {"carried": carried, "part": part, "dominant": dominant, "dropped": dropped}.items():
        fraction(name, value)
    every = _scores(graph)
    edges = {ends: score for ends, score in every.items() if all(_is_feature(graph, node) for node in ends)}
    if not edges:
        raise InputError("`graph` keeps no edge between features of hooks: make it with basis=SAEFeatures({...})")
    reach = _reach(graph, every)
    about = _About(graph, reach)
    return Concepts(
        graph,
        about.frame(_chains(edges, carried), ["nodes", "layers", "score", "weakest"], lambda row: row["nodes"][-1]),
        about.frame(_merges(edges, part, dominant), ["node", "parents", "shares", "score"], lambda row: row["node"]),
        about.frame(_drops(graph, edges, dropped), ["node", "carried", "frequency"], lambda row: row["node"]),
    )


def _scores(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    """Kept edges by name, ports merged to the largest |score|."""
    found: dict[tuple[str, str], float] = {}
    names, rows = graph.index.names, graph.kept
    for s, t, score in zip(graph.source[rows].tolist(), graph.target[rows].tolist(), graph.score[rows].tolist()):
        ends = names[s], names[t]
        if abs(score) >= abs(found.get(ends, 0.0)):
            found[ends] = score
    return found


def _is_feature(graph: AttributionGraph, node: str) -> bool:
    return graph.index.site(node).kind == "hook" and "#" in node


def _chains(edges: Edges, carried: float) -> list[dict[str, Any]]:
    """Longest runs of edges that are the strongest for both of their ends."""
    onward = _strongest(edges, 0)
    back = _strongest(edges, 1)
    steps = {
        source: target
        for source, (target, score) in onward.items()
        if score >= carried and back[target] == (source, score)
    }
    found = []
    for start in sorted(set(steps) - set(steps.values())):
        nodes = [start]
        while nodes[-1] in steps:
            nodes.append(steps[nodes[-1]])
        scores = [edges[ends] for ends in pairwise(nodes)]
        found.append({"nodes": tuple(nodes), "layers": len(nodes), "score": _product(scores), "weakest": min(scores)})
    return sorted(found, key=lambda row: (-row["layers"], -row["score"]))


def _strongest(edges: Edges, end: int) -> dict[str, tuple[str, float]]:
    """For every node the other end and the score of its strongest edge, as its source (0) or its target (1)."""
    found: dict[str, tuple[str, float]] = {}
    for ends, score in edges.items():
        node, other = ends[end], ends[1 - end]
        if node not in found or abs(score) > abs(found[node][1]):
            found[node] = other, score
    return found


def _merges(edges: Edges, part: float, dominant: float) -> list[dict[str, Any]]:
    parents: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (source, target), score in edges.items():
        if score > 0:
            parents[target].append((score, source))
    found = []
    for node, some in parents.items():
        total, most = sum(score for score, _ in some), max(score for score, _ in some)
        strong = sorted((pair for pair in some if pair[0] >= part * most), key=lambda pair: (-pair[0], pair[1]))
        if len(strong) > 1 and most <= dominant * total:
            shares = tuple(score / total for score, _ in strong)
            names = tuple(name for _, name in strong)
            found.append({"node": node, "parents": names, "shares": shares, "score": strong[1][0]})
    return sorted(found, key=lambda row: (-row["score"], row["node"]))


def _drops(graph: AttributionGraph, edges: Edges, dropped: float) -> list[dict[str, Any]]:
    onward = {source: abs(score) for source, (_, score) in _strongest(edges, 0).items()}
    feeding = {str(graph.index.site(source)) for source, _ in edges}
    found = []
    for node in graph.index.names:
        if _is_feature(graph, node) and str(graph.index.site(node)) in feeding and onward.get(node, 0.0) < dropped:
            frequency = float(graph.node_info.get(node, {}).get("frequency", float("nan")))
            found.append({"node": node, "carried": onward.get(node, 0.0), "frequency": frequency})
    return sorted(
        found, key=lambda row: (-row["frequency"] if row["frequency"] == row["frequency"] else 0.0, row["node"])
    )


def _reach(graph: AttributionGraph, edges: Edges) -> dict[str, float]:
    """The largest product of |score| on a way from each node to the last one."""
    ranks = graph.index.ranks.tolist()
    found = {graph.index.names[-1]: 1.0}
    for (source, target), score in sorted(edges.items(), key=lambda item: -ranks[graph.index.position(item[0][1])]):
        found[source] = max(found.get(source, 0.0), abs(score) * found.get(target, 0.0))
    return found


def _product(scores: Iterable[float]) -> float:
    result = 1.0
    for score in scores:
        result *= score
    return result


@dataclass(frozen=True, eq=False)
class _About:
    """Adds to rows what is known of their node."""

    graph: AttributionGraph
    reach: Mapping[str, float]

    def frame(self, rows: list[dict[str, Any]], columns: list[str], node_of: Any) -> pd.DataFrame:
        full = [row | self._facts(node_of(row)) for row in rows]
        return pd.DataFrame(full, columns=[*columns, "label", "context", "to_target"])

    def _facts(self, node: str) -> dict[str, Any]:
        contexts = self.graph.node_info.get(node, {}).get("contexts") or ()
        return {
            "label": label(self.graph, node),
            "context": context_text(contexts[0]) if contexts else "",
            "to_target": self.reach.get(node, 0.0),
        }
