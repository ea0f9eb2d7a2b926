"""How close a graph is to a known circuit: edges and nodes, thresholded and as a ranking.

>>> import torch
>>> from tl_circuitlasso.graph import AttributionGraph
>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(
...     component_index(n_layers=1, n_heads=1), {("input", "a0.h0"): 1.0, ("a0.h0", "m0"): 0.2})
>>> truth = {("input", "a0.h0"), ("a0.h0", "logits")}
>>> candidates = truth | {("a0.h0", "m0"), ("input", "m0"), ("m0", "logits")}
>>> found = structure(graph, truth, candidates)
>>> found.shd, found.empty_shd, found.precision, found.node_shd
(2, 2, 0.5, 2)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from tl_circuitlasso._checks import as_seed, fraction, shortened, whole_number
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

Edge = tuple[str, ...]  # (source, target), or (source, target, port) where q, k and v are told apart


@dataclass(frozen=True)
class Structure:
    """A graph against the truth, over the candidate edges.

    Attributes
    ----------
    shd: structural Hamming distance: candidate edges that are kept and false, or true and not kept.
    empty_shd: what the graph without edges scores: the number of true edges.
    random_shd: the expected SHD of as many edges as were kept, drawn at random from the candidates.
    precision, recall, f1: of the kept edges; 0 where nothing is kept.
    auroc: chance that a true edge's |score| is above a false one's, ties counted half; NaN if every candidate is true.
    auprc: average precision of the ranking by |score|, tied edges entering together; `random_auprc` is chance level.
    kept, outside: number of kept candidates; number of kept edges that aren't candidates (they count for nothing else).
    node_shd, node_auroc: the same for nodes. A node is found if a kept candidate edge touches it; its score is the
        smaller of its largest incoming and its largest outgoing |score|. Nodes without incoming or without outgoing
        candidates (input, logits) are left out of the ranking.
    """

    shd: int
    empty_shd: int
    random_shd: float
    precision: float
    recall: float
    f1: float
    auroc: float
    auprc: float
    random_auprc: float
    kept: int
    outside: int
    node_shd: int
    empty_node_shd: int
    node_auroc: float

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for JSON: NaN becomes None."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


def structure(
    graph: AttributionGraph,
    true_edges: Collection[Sequence[str]],
    candidate_edges: Collection[Sequence[str]] | None = None,
    *,
    true_nodes: Collection[str] | None = None,
) -> Structure:
    """Compare `graph` with a known circuit over the edges that a method may return.

    Parameters
    ----------
    true_edges, candidate_edges: pairs (source, target), for which ports merge to the largest |score|; or triples
        (source, target, port) to compare q, k and v apart. The candidates are the graph's own unless others are given;
        a true edge that isn't among them is refused, not dropped.
    true_nodes: the nodes of the circuit; by default the ends of the true edges.

    Raises
    ------
    InputError: no true edges, a true edge that isn't a candidate, or a node that the graph doesn't know.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> found = structure(demo.circuit, demo.true_edges)
    >>> found.shd, found.empty_shd, found.auroc
    (0, 6, 1.0)
    """
    truth = _edges(true_edges, "true_edges")
    given = _own_candidates(graph, ports=len(next(iter(truth))) == 3) if candidate_edges is None else candidate_edges
    candidates = _edges(given, "candidate_edges")
    _check(graph, truth, candidates)
    ports = len(next(iter(candidates))) == 3
    scores, kept = _scores(graph, ports), _kept(graph, ports)
    found = kept & candidates
    ordered = sorted(candidates)
    label = np.array([edge in truth for edge in ordered])
    score = np.array([scores.get(edge, 0.0) for edge in ordered])
    nodes = _Nodes.of(candidates, truth, found, true_nodes)
    hits = len(found & truth)
    return Structure(
        shd=len(found ^ truth),
        empty_shd=len(truth),
        random_shd=len(found) + len(truth) - 2 * len(found) * len(truth) / len(candidates),
        precision=_ratio(hits, len(found)),
        recall=_ratio(hits, len(truth)),
        f1=_ratio(2 * hits, len(found) + len(truth)),
        auroc=auroc(score, label),
        auprc=auprc(score, label),
        random_auprc=len(truth) / len(candidates),
        kept=len(found),
        outside=len(kept - candidates),
        node_shd=len(nodes.found ^ nodes.true),
        empty_node_shd=len(nodes.true),
        node_auroc=_node_auroc(nodes, candidates, scores),
    )


def _own_candidates(graph: AttributionGraph, *, ports: bool) -> set[Edge]:
    if not ports:
        return set(graph.candidate_edges())
    return set(_triples(graph))


def _edges(edges: Collection[Sequence[str]], name: str) -> set[Edge]:
    if isinstance(edges, str) or not isinstance(edges, Collection):
        raise InputError(f"`{name}` is {shortened(edges)}: give a set of (source, target) pairs")
    found = {tuple(edge) for edge in edges}
    if not found:
        raise InputError(f"`{name}` is empty: give at least one (source, target) pair")
    if {len(edge) for edge in found} not in ({2}, {3}):
        raise InputError(f"`{name}` mixes lengths: give (source, target) pairs, or (source, target, port) triples")
    return found


def _check(graph: AttributionGraph, truth: set[Edge], candidates: set[Edge]) -> None:
    if missing := sorted(truth - candidates):
        raise InputError(f"`true_edges` has {'->'.join(missing[0])}, which isn't in `candidate_edges`: add it there")
    known = set(graph.index.names)
    for edge in sorted(candidates):
        if unknown := set(edge[:2]) - known:
            raise InputError(
                f"`candidate_edges` names {sorted(unknown)[0]!r}, which the graph doesn't know "
                f"({len(known)} nodes, {', '.join(graph.index.names[:3])}, ...): write names as the graph does"
            )
        if len(edge) == 3 and edge[2] not in PORTS:
            raise InputError(f"`candidate_edges` has the port {edge[2]!r}: write one of {PORTS}")


def _scores(graph: AttributionGraph, ports: bool) -> Mapping[Edge, float]:
    if not ports:
        return graph.pair_scores()
    return {edge: abs(float(score)) for edge, score in zip(_triples(graph), graph.score.tolist())}


def _kept(graph: AttributionGraph, ports: bool) -> set[Edge]:
    if not ports:
        return set(graph.kept_edges())
    return {edge for edge, kept in zip(_triples(graph), graph.kept.tolist()) if kept}


def _triples(graph: AttributionGraph) -> list[Edge]:
    names = graph.index.names
    rows = zip(graph.source.tolist(), graph.target.tolist(), graph.port.tolist())
    return [(names[s], names[t], PORTS[p]) for s, t, p in rows]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# ---- rankings -----------------------------------------------------------------------------------------------------


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve, P(score of a positive > score of a negative) + P(equal)/2; NaN with one class only."""
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(score)
    return float((ranks[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auprc(score: np.ndarray, label: np.ndarray) -> float:
    """Average precision: sum over thresholds of (recall step) * precision; tied scores enter at one threshold."""
    order = np.argsort(-score, kind="stable")
    score, label = score[order], label[order]
    ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    hits = np.cumsum(label)[ends]
    precision = hits / (ends + 1)
    return float((np.diff(hits, prepend=0) / label.sum() * precision).sum())


class _Nodes(NamedTuple):
    all: set[str]
    true: set[str]
    found: set[str]

    @classmethod
    def of(
        cls, candidates: set[Edge], truth: set[Edge], found: set[Edge], true_nodes: Collection[str] | None
    ) -> "_Nodes":
        every = _ends(candidates)
        true = _ends(truth) if true_nodes is None else set(true_nodes)
        if unknown := sorted(true - every):
            raise InputError(f"`true_nodes` has {unknown[0]!r}, which no candidate edge touches")
        return cls(every, true, _ends(found))


def _ends(edges: set[Edge]) -> set[str]:
    return {name for edge in edges for name in edge[:2]}


def _node_auroc(nodes: _Nodes, candidates: set[Edge], scores: Mapping[Edge, float]) -> float:
    incoming: dict[str, float] = {}
    outgoing: dict[str, float] = {}
    for edge in candidates:
        value = scores.get(edge, 0.0)
        outgoing[edge[0]] = max(outgoing.get(edge[0], 0.0), value)
        incoming[edge[1]] = max(incoming.get(edge[1], 0.0), value)
    inner = sorted(incoming.keys() & outgoing.keys())
    score = np.array([min(incoming[name], outgoing[name]) for name in inner])
    return auroc(score, np.array([name in nodes.true for name in inner], dtype=bool))


# ---- many cases ---------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over cases with its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float | int], *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """The mean of one figure over cases, with the percentile interval of `draws` resamples of the cases.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)

    Raises
    ------
    InputError: no values, or a NaN among them.
    """
    data = _finite(values, "values")
    fraction("level", level, "of resamples inside the interval", whole=False)
    draws, seed = whole_number("draws", draws, what="of resamples"), as_seed(seed)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(data[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high))


class PairedTest(NamedTuple):
    """The mean of a - b over the same cases, its bootstrap interval, and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p_value: float


_EXACT = 16  # up to 2^16 sign patterns are all tried; beyond, as many are drawn


def paired_test(
    a: Sequence[float | int], b: Sequence[float | int], *, seed: int = 0, level: float = 0.95
) -> PairedTest:
    """Sign-flip permutation test of two methods on the same cases: p = P(|mean of +-(a - b)| >= |mean of a - b|).

    Exact for up to 16 cases (all sign patterns), by 65,536 random patterns beyond. Needs no distribution, only that
    the two methods could be swapped on each case if they were equally good (Fisher 1935).

    Raises
    ------
    InputError: different lengths, no values, or NaN.

    >>> found = paired_test([0, 1, 0, 0], [2, 1, 3, 2])
    >>> round(found.p_value, 3)
    0.25
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if len(first) != len(second):
        raise InputError(
            f"`a` has {len(first)} values, `b` {len(second)}: give both methods' figures on the same cases"
        )
    difference = first - second
    signs = _signs(len(difference), seed)
    means = np.abs(signs @ difference) / len(difference)
    observed = abs(difference.mean())
    p_value = float((means >= observed - 1e-12 * max(1.0, observed)).mean())
    interval = bootstrap(difference.tolist(), level=level, seed=seed)
    return PairedTest(interval.mean, interval.low, interval.high, p_value)


def _signs(n: int, seed: int) -> np.ndarray:
    if n <= _EXACT:
        patterns = np.arange(2**n)[:, None] >> np.arange(n)
        return 1.0 - 2.0 * (patterns & 1)
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], size=(2**_EXACT, n))
    drawn[0] = 1.0  # the observed pattern belongs to the reference set, so that p is never 0
    return drawn


def _finite(values: Sequence[float | int], name: str) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise InputError(f"`{name}` must be a non-empty sequence of finite numbers, one per case")
    return data


def summary(cases: Mapping[str, Structure]) -> dict[str, Any]:
    """Each figure's mean over cases with its bootstrap interval; NaN figures are left out of their own mean.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> case = structure(demo.circuit, demo.true_edges)
    >>> sorted(summary({"one": case, "two": case}))[:3]
    ['auprc', 'auroc', 'empty_node_shd']
    """
    columns = {name: [asdict(case)[name] for case in cases.values()] for name in Structure.__dataclass_fields__}
    usable = {name: [v for v in values if not math.isnan(v)] for name, values in columns.items()}
    return {name: bootstrap(values) for name, values in usable.items() if values}
