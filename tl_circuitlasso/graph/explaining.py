"""What a graph says about one node: what feeds it, what it feeds, where it fires, and how it reaches the target.

>>> from tl_circuitlasso.graph import AttributionGraph
>>> from tl_circuitlasso.graph.nodes import component_index
>>> index = component_index(n_layers=2, n_heads=1)
>>> graph = AttributionGraph.from_edges(index, {
...     ("input", "m0"): 0.8, ("m0", "m1"): -0.5, ("m1", "logits"): 0.9, ("m0", "logits"): 0.2})
>>> print(explain(graph, "m0"))
m0
parents
  +0.8000  input
children
  -0.5000  m1
  +0.2000  logits
>>> for path in strongest_paths(graph, "input", 2):
...     print(path)
-0.3600  input -> m0 -> m1 -> logits
+0.1600  input -> m0 -> logits
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_matrix

from tl_circuitlasso._checks import fraction, whole_number
from tl_circuitlasso._fits import told
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph


class Edge(NamedTuple):
    """One end of an edge as seen from the other."""

    node: str
    port: str
    score: float
    weight: float


@dataclass(frozen=True)
class Explanation:
    """One node of a graph: `print` it, or let a notebook show it.

    Attributes
    ----------
    node: its name. info: what the graph knows of it (frequency, top tokens, contexts, ...). labels: of its neighbours.
    parents, children: kept edges, strongest first.
    """

    node: str
    info: Mapping[str, Any]
    parents: tuple[Edge, ...]
    children: tuple[Edge, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """Parents and children as one table: role, node, label, port, score, weight."""
        rows = [("parent", *edge) for edge in self.parents] + [("child", *edge) for edge in self.children]
        frame = pd.DataFrame(rows, columns=["role", "node", "port", "score", "weight"])
        frame.insert(2, "label", [self.labels.get(node, "") for node in frame["node"]])
        return frame

    def __str__(self) -> str:
        lines = [" ".join(filter(None, (self.node, _title(self.info)))), *facts(self.info)]
        if not (self.parents or self.children):
            lines.append("in no kept edge: graph.edge_table() has the candidates")
        for role, edges in (("parents", self.parents), ("children", self.children)):
            lines += [role, *(f"  {e.score:+.4f}  {self._name(e)}" for e in edges)] if edges else [f"no {role}"]
        contexts = self.info.get("contexts", ())
        lines += ["contexts", *(f"  {_value(c)}  {context_text(c)}" for c in contexts)] if contexts else []
        return "\n".join(lines)

    def _name(self, edge: Edge) -> str:
        return " ".join(filter(None, (edge.node, f"<{edge.port}>" if edge.port else "", self.labels.get(edge.node))))

    def _repr_html_(self) -> str:
        parts = [f"<h4>{escape(self.node)} {escape(_title(self.info))}</h4>"]
        parts += [f"<p>{escape(line)}</p>" for line in facts(self.info)]
        parts.append(self.table().to_html(index=False, float_format=lambda x: f"{x:+.4f}", border=0))
        told = [(_value(one), _marked(one, "<mark>{}</mark>", escape)) for one in self.info.get("contexts", ())]
        contexts = [f"<li>{value} {text}</li>" for value, text in told]
        return "".join([*parts, *(["<ul>", *contexts, "</ul>"] if contexts else [])])

    html = property(_repr_html_, doc="The explanation as an HTML fragment; everything that came from data is escaped.")


@told
def explain(graph: AttributionGraph, node: str, k: int = 10) -> Explanation:
    """The node's `k` strongest kept parents and children, by |score|, with all that the graph knows of it.

    Raises
    ------
    InputError: no such node, or `k` below 1.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> [edge.node for edge in explain(demo.circuit, "a2.h0").parents]
    ['m0', 'a1.h2']
    """
    k = whole_number("k", k)
    here = graph.index.position(node)
    parents = _neighbours(graph, graph.source, graph.kept & (graph.target == here), k)
    children = _neighbours(graph, graph.target, graph.kept & (graph.source == here), k)
    names = dict.fromkeys(edge.node for edge in (*parents, *children))
    labels = {name: title for name in names if (title := label(graph, name))}
    return Explanation(node, graph.node_info.get(node, {}), parents, children, labels)


def label(graph: AttributionGraph, node: str) -> str:
    """What a node is about in a few words: its label, else its top tokens; empty where nothing is known."""
    return _title(graph.node_info.get(node, {}))


def _neighbours(graph: AttributionGraph, ends: Any, rows: Any, k: int) -> tuple[Edge, ...]:
    chosen = rows.nonzero().flatten()
    chosen = chosen[graph.score[chosen].abs().argsort(descending=True, stable=True)][:k].tolist()
    names = graph.index.names
    return tuple(
        Edge(names[int(ends[row])], PORTS[int(graph.port[row])], float(graph.score[row]), float(graph.weight[row]))
        for row in chosen
    )


# ---- paths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """A way through kept edges. `score`: the product of its edges' scores, signed; `weakest`: its smallest |score|."""

    nodes: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        return math.prod(self.scores)

    @property
    def weakest(self) -> float:
        return min(map(abs, self.scores))

    def __str__(self) -> str:
        return f"{self.score:+.4f}  {' -> '.join(self.nodes)}"


def strongest_paths(
    graph: AttributionGraph, source: str, k: int = 5, *, target: str | None = None, by: str = "product"
) -> tuple[Path, ...]:
    """The `k` strongest ways from `source` to `target` through kept edges, strongest first.

    by: "product", the product of the edges' |score| (for scores that are shares or standardised coefficients), or
    "bottleneck", the smallest |score| on the way (for scores that are effects on the target, with ties broken by the
    product). Where an edge has several ports, its largest |score| counts. `target` is the graph's last node unless
    named. No way gives an empty tuple. One pass over the kept edges, keeping k ways to each node.

    Raises
    ------
    InputError: an unknown node, `k` below 1, an unknown `by`, or a source that isn't computed before the target.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> strongest_paths(demo.circuit, "input", 1, by="bottleneck")[0].nodes
    ('input', 'a0.h1', 'a1.h2', 'a2.h0', 'logits')
    """
    k = whole_number("k", k)
    if by not in ("product", "bottleneck"):
        raise InputError(f"`by` is {by!r}: paths are compared by 'product' or 'bottleneck'")
    end = graph.index.names[-1] if target is None else target
    if not graph.index.may_feed(source, end):
        raise InputError(f"`source` {source} isn't computed before {end}: name an earlier source")
    start, goal = graph.index.position(source), graph.index.position(end)
    ranks, edges = graph.index.ranks.tolist(), _merged_edges(graph)
    best: dict[int, list[_Way]] = defaultdict(list, {start: [_Way((math.inf, 0.0), (start,), ())]})
    for (u, v), score in sorted(edges.items(), key=lambda item: ranks[item[0][1]]):
        ways = [way.extended(v, score, by) for way in best.get(u, ())]
        best[v] = heapq.nlargest(k, [*best[v], *ways], key=lambda way: way.value) if ways else best[v]
    names = graph.index.names
    return tuple(Path(tuple(names[n] for n in way.nodes), way.scores) for way in best[goal])


class _Way(NamedTuple):
    value: tuple[float, float]  # what ways are compared by, then the tie-breaker
    nodes: tuple[int, ...]
    scores: tuple[float, ...]

    def extended(self, node: int, score: float, by: str) -> "_Way":
        width, product = self.value
        log = product + math.log(abs(score))
        value = (log if by == "product" else min(width, abs(score)), log)
        return _Way(value, (*self.nodes, node), (*self.scores, score))


def _merged_edges(graph: AttributionGraph) -> dict[tuple[int, int], float]:
    """Kept edges with a score, ports merged to the largest |score|."""
    found: dict[tuple[int, int], float] = {}
    rows = graph.kept & (graph.score != 0)
    ends = zip(graph.source[rows].tolist(), graph.target[rows].tolist(), graph.score[rows].tolist())
    for source, target, score in ends:
        if abs(score) > abs(found.get((source, target), 0.0)):
            found[source, target] = score
    return found


# ---- supernodes -----------------------------------------------------------------------------------------------------


@told
def supernodes(graph: AttributionGraph, similarity: int | float = 0.5) -> dict[str, tuple[str, ...]]:
    """Groups of nodes of one site that play one part: they have nearly the same parents and children.

    The rule: a node's profile is the vector of its kept edges' scores, incoming and outgoing; nodes of a site are
    joined by average linkage as long as the mean cosine of the profiles of two groups is at least `similarity`. Only
    groups of two or more are returned, by a name made of what most members are about, largest first.

    Raises
    ------
    InputError: `similarity` isn't above 0 and at most 1.

    >>> from tl_circuitlasso.data.sites import Site
    >>> from tl_circuitlasso.graph.nodes import Block, NodeIndex
    >>> index = NodeIndex((Block(Site("input"), 0), Block(Site("mlp", 0), 1, (3, 7)), Block(Site("logits"), 2)))
    >>> edges = {("input", "m0#3"): 1.0, ("input", "m0#7"): 0.9, ("m0#3", "logits"): 1.0, ("m0#7", "logits"): 0.8}
    >>> list(supernodes(AttributionGraph.from_edges(index, edges)).values())
    [('m0#3', 'm0#7')]
    """
    fraction("similarity", similarity, "that is the least cosine")
    profiles = _profiles(graph)
    blocks = graph.index.block_of.numpy()
    groups: list[tuple[str, ...]] = []
    for block in np.unique(blocks):
        members = np.flatnonzero((blocks == block) & (np.diff(profiles.indptr) > 0))
        groups += _joined(profiles[members], [graph.index.names[i] for i in members], similarity)
    groups.sort(key=lambda group: (-len(group), group))
    return _named(graph, groups)


def _profiles(graph: AttributionGraph) -> csr_matrix:
    """One row per node: scores of its outgoing edges, then of its incoming ones, scaled to length 1."""
    edges, n = _merged_edges(graph), len(graph.index)
    ends = np.array(list(edges), dtype=np.int64).reshape(-1, 2)
    scores = np.array(list(edges.values()))
    rows, columns = np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], n + ends[:, 0]])
    whole = csr_matrix((np.concatenate([scores, scores]), (rows, columns)), shape=(n, 2 * n))
    length = np.sqrt(np.asarray(whole.multiply(whole).sum(1)).ravel())
    whole.data /= np.repeat(length, np.diff(whole.indptr))
    return whole


def _joined(profiles: csr_matrix, names: Sequence[str], similarity: float) -> list[tuple[str, ...]]:
    if len(names) < 2:
        return []
    cosine = (profiles @ profiles.T).toarray()
    distance = np.clip(1 - cosine[np.triu_indices(len(names), 1)], 0, None)
    group_of = fcluster(linkage(distance, "average"), 1 - similarity + 1e-9, "distance")
    return [
        tuple(name for name, its_group in zip(names, group_of.tolist()) if its_group == group)
        for group, size in Counter(group_of.tolist()).items()
        if size > 1
    ]


def _named(graph: AttributionGraph, groups: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for group in groups:
        about = Counter(word for name in group if (word := _word(graph.node_info.get(name, {}))))
        site = str(graph.index.site(group[0]))
        base = f"{about.most_common(1)[0][0]} @ {site}" if about else f"{site} x {len(group)}"
        same = sum(name == base or name.startswith(f"{base} (") for name in found)
        found[f"{base} ({same + 1})" if same else base] = group
    return found


# ---- words ----------------------------------------------------------------------------------------------------------


def facts(info: Mapping[str, Any]) -> list[str]:
    """What a node contributes, how often and how strongly a feature fires, on which tokens, and what its direction
    promotes, as text lines."""
    lines = []
    if "contribution" in info:
        lines.append(f"contributes {float(info['contribution']):+.3g} to the target's difference")
    if "frequency" in info:
        mean = f", mean {info['mean']:.3g} where it does" if "mean" in info else ""
        lines.append(f"fires on {100 * float(info['frequency']):.2g} % of samples{mean}")
    for key, words in (("top_tokens", "fires on"), ("top_logits", "promotes")):
        if tokens := info.get(key):
            lines.append(f"{words} {' '.join(map(repr, tokens))}")
    return lines


def _title(info: Mapping[str, Any]) -> str:
    if text := info.get("label"):
        return str(text)
    tokens = info.get("top_tokens") or ()
    return "|".join(repr(token)[1:-1] for token in list(tokens)[:3])


def _word(info: Mapping[str, Any]) -> str:
    tokens = info.get("top_tokens") or ()
    return str(info.get("label") or (repr(tokens[0])[1:-1] if tokens else ""))


def context_text(context: Mapping[str, Any]) -> str:
    """A context as one line, the token on which the feature fires in brackets."""
    if _tokens_at(context) is None:
        return str(context.get("text", ""))
    return _marked(context, "[{}]", str).replace("\n", "\\n")


def _marked(context: Mapping[str, Any], mark: str, written: Callable[[str], str]) -> str:
    """The context as it's `written`, with a mark around the token on which the feature fires."""
    found = _tokens_at(context)
    if found is None:
        return written(str(context.get("text", "")))
    tokens, at = found
    return "".join(mark.format(written(t)) if i == at else written(t) for i, t in enumerate(tokens))


def _tokens_at(context: Mapping[str, Any]) -> tuple[Sequence[str], int] | None:
    tokens, at = context.get("tokens"), context.get("at")
    return None if tokens is None or at is None else (tokens, at)


def _value(context: Mapping[str, Any]) -> str:
    return f"{float(context['value']):.3g}" if "value" in context else ""
