"""Faithfulness against size: how soon a ranking of edges gives a circuit that does what the model does.

The Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151) takes ten sizes and two areas: CPR,
under faithfulness (more is better), and CMD, between faithfulness and 1 (less is better).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import one_of, shortened
from tl_circuitlasso.baselines import observational
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, check_graph, prune, score_matrix
from tl_circuitlasso.evaluate.faithfulness import LEVELS, check_scale, share_interval, shares
from tl_circuitlasso.evaluate.feature_edges import edge_scores, in_order, leading, wiring_of
from tl_circuitlasso.evaluate.features import (
    Run,
    circuit_of,
    feature_sites,
    has_features,
    measure_features,
    node_scores,
)
from tl_circuitlasso.evaluate.interventions import Measured, measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Ablation, CutOptions, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.selection import Edges, grown, ranked
from tl_circuitlasso.models.feature_patch import FeatureSite
from tl_circuitlasso.models.prompt_forms import AnyPrompts

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness at growing sizes.

    Attributes
    ----------
    shares: the sizes as shares of all edges (of features, of all the graph's nodes); requested: as numbers of them.
    sizes: the edges that are left after pruning, q, k and v counted apart; of features, the nodes.
    faithfulness, low, high: at each size, with its 95 % bootstrap interval over prompts.
    cpr: area under the faithfulness over `shares`, by trapezoids. cmd: area between the faithfulness and 1. Both only
        say something of sizes that reach from next to nothing to everything, as MIB's do.
    model, ablated: the metric's mean per prompt of the model and with every edge cut.
    forward_passes: forward passes per prompt, baselines included.
    """

    shares: tuple[float, ...]
    requested: tuple[int, ...]
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    cpr: float
    cmd: float
    model: float
    ablated: float
    forward_passes: float

    def table(self) -> pd.DataFrame:
        """One row per size."""
        columns = ("shares", "requested", "sizes", "faithfulness", "low", "high")
        return pd.DataFrame({name: getattr(self, name) for name in columns})


@verb
def curve(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    sizes: Sequence[int | float] = MIB_SHARES,
    absolute: bool = False,
    rule: str = "top",
    level: str | None = None,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> Curve:
    """The faithfulness of the circuits of the highest-scored edges, at MIB's ten sizes.

    Parameters
    ----------
    graph: its scores rank the edges; which of them are kept doesn't matter. Edges that it doesn't have score 0. A graph
        of features has its nodes ranked, by what their outgoing edges say of the target; `absolute` and `rule` mean
        nothing then. At level "edge" its edges are ranked, by |score| times what their end says of the target.
    sizes: rising; floats are shares of all the model's edges (of the graph's features) in (0, 1], whole numbers are
        numbers of edges (of nodes, for a graph of features): `sizes=[100, 200, 300, 1000]`.
    absolute: rank by |score|; MIB's CPR ranks by the signed score, its CMD by |score|.
    rule: "top" takes the highest-scored edges, "greedy" grows the circuit backwards from the logits, always taking the
        best edge into what is already there.
    level: as in `faithfulness`; components are always cut by their edges.
    options: as in `tcl.Experiment`.

    Raises
    ------
    InputError: sizes that don't rise, shares outside (0, 1], numbers below 1 or beyond what there is, both kinds mixed,
        an unknown rule, and as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> found = curve(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target, sizes=[6, 100])
    >>> found.requested, found.faithfulness[1] > 0.9
    ((6, 100), True)
    """
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options)
    return curves(setup, {"": graph}, sizes=sizes, absolute=absolute, rule=rule, level=level, seed=seed)[""]


@verb
def curves(
    model: Any,
    graphs: Mapping[str, AttributionGraph],
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    sizes: Sequence[int | float] = MIB_SHARES,
    absolute: bool = False,
    rule: str = "top",
    level: str | None = None,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> dict[str, Curve]:
    """The curve of each graph, on the same baselines; arguments as in `curve`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graphs = {"planted": demo.circuit, "chance": tcl.baselines.random_edges(demo.model)}
    >>> found = curves(demo.model, graphs, demo.tokens, demo.corrupted, demo.target, sizes=[20, 200])
    >>> found["planted"].faithfulness[0] > found["chance"].faithfulness[0]
    True
    """
    _check_sizes(sizes)
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    if any(map(has_features, graphs.values())):
        way = _edge_circuits if one_of("level", level or "node", LEVELS) == "edge" else _node_circuits
        return {name: _feature_curve(setup, name, graph, sizes, rule, seed, way) for name, graph in graphs.items()}
    one_of("level", level or "edge", ("edge",))
    layouts = [check_graph(graph, setup.adapter) for graph in graphs.values()]
    if not layouts:
        raise InputError("`graphs` is empty: give at least one graph")
    layout = layouts[0]
    total = int(layout.mask().sum())
    requested = _numbers(sizes, total, "edges of the model")
    kept = [select(score_matrix(graph, layout), layout, requested, absolute, rule) for graph in graphs.values()]
    measured = measure(setup, torch.cat(kept))
    check_scale(measured)
    parts = zip(graphs, kept, measured.circuits.split(len(sizes)))
    return {
        name: _curve(_as_shares(sizes, total), requested, _counts(prune(own, layout)), _with(measured, circuits), seed)
        for name, own, circuits in parts
    }


@dataclass(frozen=True, eq=False)
class _Circuits:
    """Circuits of a graph of features: of how many nodes or edges of how many, and the last of none."""

    total: int
    requested: list[int]
    sizes: tuple[int, ...]
    sites: Sequence[FeatureSite]
    runs: Sequence[Run]


def _feature_curve(
    setup: Experiment, name: str, graph: AttributionGraph, sizes: Sequence[int | float], rule: str, seed: int, way: Any
) -> Curve:
    if not has_features(graph):
        raise InputError(f"`graphs` mixes features with whole components: {name!r} has no features")
    made = way(setup, graph, sizes, rule, f"of graph {name!r}" if name else "of `graph`")
    measured = measure_features(setup, made.sites, made.runs)
    check_scale(measured)
    return _curve(_as_shares(sizes, made.total), made.requested, made.sizes, measured, seed)


def _node_circuits(
    setup: Experiment, graph: AttributionGraph, sizes: Sequence[int | float], rule: str, whose: str
) -> _Circuits:
    sites, scores = feature_sites(graph, setup.adapter, setup.saes), node_scores(graph)
    order = sorted(scores, key=lambda node: -scores[node])
    requested = _numbers(sizes, len(order), f"nodes {whose}")
    runs = [circuit_of(setup, graph, sites, set(order[:count])) for count in (*requested, 0)]
    return _Circuits(len(order), requested, tuple(requested), sites, runs)


def _edge_circuits(
    setup: Experiment, graph: AttributionGraph, sizes: Sequence[int | float], rule: str, whose: str
) -> _Circuits:
    sites = in_order(graph, feature_sites(graph, setup.adapter, setup.saes))
    order = _order(Edges(graph.source, graph.target, graph.index.ranks), edge_scores(graph), rule)
    requested = _numbers(sizes, len(graph.score), f"edges {whose}")
    kept = torch.zeros(len(requested), len(graph.score), dtype=torch.bool)
    for mask, count in zip(kept, requested):
        mask[order[:count]] = True
    circuits = [graph.keep(mask) for mask in kept]
    left = tuple(int(leading(circuit).sum()) for circuit in circuits)
    runs = [wiring_of(setup, circuit, sites) for circuit in circuits]
    return _Circuits(kept.shape[1], requested, left, sites, [*runs, circuit_of(setup, graph, sites, set())])


def _check_sizes(sizes: Sequence[int | float]) -> None:
    """Rising shares in (0, 1], or rising whole numbers from 1; at least two."""
    if not isinstance(sizes, Sequence) or not all(isinstance(size, int | float) for size in sizes):
        raise InputError(f"`sizes` is {shortened(sizes)}: give a list of shares of all edges, or of numbers of them")
    rising = all(low < high for low, high in pairwise(sizes))
    good = all(size >= 1 for size in sizes) if _whole(sizes) else all(0 < size <= 1 for size in sizes)
    mixed = not _whole(sizes) and any(isinstance(size, int) and size > 1 for size in sizes)
    if len(sizes) < 2 or not rising or not good or mixed:
        raise InputError(
            f"`sizes` are {tuple(sizes)}: give at least two rising shares of all edges, above 0, up to 1, or at least "
            "two rising whole numbers of them"
        )


def _whole(sizes: Sequence[int | float]) -> bool:
    """Whether sizes are numbers of edges, not shares of all."""
    return all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)


def _numbers(sizes: Sequence[int | float], total: int, what: str) -> list[int]:
    if not _whole(sizes):
        return [int(share * total) for share in sizes]
    if sizes[-1] > total:
        raise InputError(f"`sizes` ask for {sizes[-1]}, but there are only {total} {what}")
    return [int(size) for size in sizes]


def _as_shares(sizes: Sequence[int | float], total: int) -> list[float]:
    return [size / total for size in sizes] if _whole(sizes) else [float(size) for size in sizes]


def _counts(kept: EdgeMatrix) -> tuple[int, ...]:
    return tuple(kept.flatten(1).sum(1).tolist())


def _with(measured: Measured, circuits: Tensor) -> Measured:
    return Measured(measured.model, measured.ablated, circuits, measured.forward_passes)


def _curve(
    sizes: Sequence[int | float], requested: list[int], kept: tuple[int, ...], measured: Measured, seed: int
) -> Curve:
    found = shares(measured).numpy()
    intervals = share_interval(measured, seed)
    return Curve(
        shares=tuple(map(float, sizes)),
        requested=tuple(requested),
        sizes=kept,
        faithfulness=tuple(found.tolist()),
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
        cpr=_area(sizes, found),
        cmd=_area(sizes, np.abs(1 - found)),
        model=float(measured.model.mean()),
        ablated=float(measured.ablated.mean()),
        forward_passes=measured.forward_passes,
    )


def _area(x: Sequence[int | float], y: np.ndarray) -> float:
    steps = np.diff(np.asarray(x, dtype=float))
    return float((steps * (y[1:] + y[:-1]) / 2).sum())


# ---- which edges at which size --------------------------------------------------------------------------------------


def select(
    scores: Float[Tensor, "source reader"], layout: EdgeLayout, counts: Sequence[int], absolute: bool, rule: str
) -> EdgeMatrix:
    """The circuits of so many edges; ties go to the edge that comes first in the order of computation."""
    source, column = layout.mask().nonzero(as_tuple=True)
    values = (scores.abs() if absolute else scores)[source, column]
    edges = Edges(source, torch.tensor(layout.targets()[0])[column], layout.index.ranks)
    order = _order(edges, values, rule)
    kept = torch.zeros(len(counts), layout.n_sources, layout.n_readers, dtype=torch.bool)
    for number, count in enumerate(counts):
        kept[number, source[order[:count]], column[order[:count]]] = True
    return kept


def _order(edges: Edges, values: Float[Tensor, " edge"], rule: str) -> Int[Tensor, " some"]:
    return ranked(values) if one_of("rule", rule, ("top", "greedy")) == "top" else grown(edges, values)


# ---- what to compare with -------------------------------------------------------------------------------------------


@verb
def magnitude(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    ablation: Ablation = "patch",
    **options: Unpack[CutOptions],
) -> AttributionGraph:
    """Every edge scored by how much its source alone changes: the mean over real positions of |u - ablated u|.

    `baselines.METHODS["magnitude"]` without a metric; arguments as in `tcl.Experiment`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = magnitude(demo.model, demo.tokens, demo.corrupted)
    >>> bool((graph.score >= 0).all())
    True
    """
    return observational.magnitude(Experiment.of(model, clean, corrupted, None, ablation, **options))
