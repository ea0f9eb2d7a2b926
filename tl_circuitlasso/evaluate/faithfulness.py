"""Does a circuit do what the model does? Everything outside it is ablated, and the metric measured again.

Edges outside the circuit carry what their source does on corrupted prompts, its mean, or nothing; q, k and v of a head
are inputs of their own. The circuit is pruned first: edges that aren't on a path from the input to the logits count
for nothing.

>>> import tl_circuitlasso as tcl
>>> from tl_circuitlasso.graph.nodes import component_index
>>> demo = tcl.load_demo(prompts=16)
>>> graph = tcl.AttributionGraph.from_edges(
...     component_index(n_layers=3, n_heads=4), {edge: 1.0 for edge in demo.true_edges})
>>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
>>> bool(faithfulness(demo.model, graph, demo.tokens, demo.corrupted, metric).faithfulness > 0.9)
True
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import as_seed, one_of, warn
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, check_graph, kept_matrix, prune
from tl_circuitlasso.evaluate.feature_edges import in_order, leading, wiring_of
from tl_circuitlasso.evaluate.features import (
    circuit_of,
    feature_sites,
    has_features,
    measure_features,
    node_scores,
)
from tl_circuitlasso.evaluate.interventions import Measured, measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Ablation, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.prompt_forms import AnyPrompts

DRAWS, LEVEL = 2000, 0.95
LEVELS = ("node", "edge")


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the model's behaviour a circuit keeps.

    Attributes
    ----------
    model, ablated, circuit: the metric's mean per prompt of the whole model, with every edge cut, and of the circuit.
    faithfulness: (circuit - ablated) / (model - ablated): 1 is the model, 0 is no circuit at all.
    low, high: its 95 % bootstrap interval over prompts.
    edges: the number of edges after pruning, q, k and v counted apart; of features, the kept edges.
    nodes: the number of nodes between which they run, or of kept features.
    per_prompt: the three metrics of each prompt, by name.
    forward_passes: forward passes per prompt that it took, baselines included.
    """

    model: float
    ablated: float
    circuit: float
    faithfulness: float
    low: float
    high: float
    edges: int
    nodes: int
    per_prompt: dict[str, Float[Tensor, " prompt"]]
    forward_passes: float

    def __repr__(self) -> str:
        return (
            f"Faithfulness({self.faithfulness:.4g} [{self.low:.4g}, {self.high:.4g}], {self.edges} edges, "
            f"{self.nodes} nodes; metric: model {self.model:.4g}, circuit {self.circuit:.4g}, "
            f"ablated {self.ablated:.4g})"
        )


@verb
def faithfulness(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    level: str | None = None,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> Faithfulness:
    """(m(circuit) - m(ablated)) / (m(model) - m(ablated)), as in MIB (Mueller et al. 2025, arXiv 2504.13151).

    Parameters
    ----------
    model, clean, corrupted, metric, ablation: as in `tcl.Experiment`, or an experiment in the model's place alone.
    level: "edge" keeps the kept edges, "node" all edges between the kept nodes. None is "edge", but for graphs of
        neurons, residual dimensions or SAE features, which are tested by their nodes: by their edges one circuit
        takes a forward pass (or a part of one) for each set of parents that features of it have.
    seed: of the resamples behind the interval.
    options: as in `tcl.Experiment`.

    Raises
    ------
    InputError: a graph of another model, prompts or metric that can't be used, or a metric that is the same for the
        model and for the ablated model, so that there's no scale.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> found = faithfulness(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target)
    >>> found.nodes, found.faithfulness > 0.9, found.low <= found.faithfulness <= found.high
    (6, True, True)
    """
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    return _either(setup, graph, level, seed, complement=False)


@verb
def completeness(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    level: str | None = None,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> Faithfulness:
    """The faithfulness of everything but the circuit: near 0 where the circuit leaves nothing out (Marks et al. 2024,
    arXiv 2403.19647). Arguments as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> abs(completeness(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target).faithfulness) < 0.1
    True
    """
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    return _either(setup, graph, level, seed, complement=True)


def _either(
    setup: Experiment, graph: AttributionGraph, level: str | None, seed: int, *, complement: bool
) -> Faithfulness:
    if has_features(graph):
        judge = _judge_edges if one_of("level", level or "node", LEVELS) == "edge" else _judge_features
        return judge(setup, graph, seed, complement)
    if setup.saes:
        raise InputError("`saes` goes with a graph of SAE features; the nodes of this one are whole components")
    layout = check_graph(graph, setup.adapter)
    kept = kept_matrix(graph, layout, level=level or "edge")
    return _judge(setup, ~kept & layout.mask() if complement else kept, layout, seed)


def _judge(setup: Experiment, kept: EdgeMatrix, layout: EdgeLayout, seed: int) -> Faithfulness:
    pruned = prune(kept, layout)
    nodes = int(pruned.any(2).sum()) + bool(pruned.any())  # the sources, and the logits
    return _figures(measure(setup, kept), seed, edges=int(pruned.sum()), nodes=nodes)


def _judge_features(setup: Experiment, graph: AttributionGraph, seed: int, complement: bool) -> Faithfulness:
    sites = feature_sites(graph, setup.adapter, setup.saes)
    circuit = circuit_of(setup, graph, sites, graph.kept_nodes(), rest=complement)
    empty = circuit_of(setup, graph, sites, set())
    nodes = sum(int(kept.features.sum()) for kept in circuit.values())
    return _figures(measure_features(setup, sites, [circuit, empty]), seed, edges=graph.n_kept, nodes=nodes)


def _judge_edges(setup: Experiment, graph: AttributionGraph, seed: int, complement: bool) -> Faithfulness:
    sites = in_order(graph, feature_sites(graph, setup.adapter, setup.saes))
    wiring = wiring_of(setup, graph, sites, rest=complement)
    measured = measure_features(setup, sites, [wiring, circuit_of(setup, graph, sites, set())])
    kept = graph.keep(leading(graph))
    inside = node_scores(graph).keys() & kept.kept_nodes()
    return _figures(measured, seed, edges=kept.n_kept, nodes=len(inside))


def _figures(measured: Measured, seed: int, *, edges: int, nodes: int) -> Faithfulness:
    check_scale(measured)
    circuit = measured.circuits[0]
    low, high = share_interval(measured, seed)[0]
    return Faithfulness(
        model=float(measured.model.mean()),
        ablated=float(measured.ablated.mean()),
        circuit=float(circuit.mean()),
        faithfulness=float(shares(measured)[0]),
        low=low,
        high=high,
        edges=edges,
        nodes=nodes,
        per_prompt={"model": measured.model, "ablated": measured.ablated, "circuit": circuit},
        forward_passes=measured.forward_passes,
    )


# ---- figures of many circuits ---------------------------------------------------------------------------------------


@runtime_checkable
class Scaled(Protocol):
    """What has each prompt's metric of the model and of the model with every edge cut."""

    @property
    def model(self) -> Float[Tensor, " prompt"]: ...

    @property
    def ablated(self) -> Float[Tensor, " prompt"]: ...


def check_scale(measured: Scaled) -> None:
    """Raise an InputError where the model and the ablated model can't be told apart by the metric."""
    model, ablated = float(measured.model.mean()), float(measured.ablated.mean())
    if abs(model - ablated) <= 1e-6 * max(abs(model), abs(ablated), 1e-6):
        raise InputError(
            f"`metric` is {model:.4g} for the model and {ablated:.4g} with every edge cut, so faithfulness has no "
            "scale: use a metric that the ablation changes, or other corrupted prompts"
        )


def shares(measured: Measured) -> Float[Tensor, " circuit"]:
    """Each circuit's faithfulness."""
    ablated = measured.ablated.mean()
    return (measured.circuits.mean(1) - ablated) / (measured.model.mean() - ablated)


def share_interval(measured: Measured, seed: int = 0) -> list[tuple[float, float]]:
    """The 95 % percentile interval of each circuit's faithfulness over resamples of the prompts.

    NaN, with a warning, where many resamples hold only prompts that the ablation doesn't change.
    """
    weights = _resamples(len(measured.model), seed)
    ablated, model = weights @ measured.ablated.numpy(), weights @ measured.model.numpy()
    scale = np.where(model == ablated, np.nan, model - ablated)
    if np.isnan(scale).mean() > (1 - LEVEL) / 2:
        changed = int((measured.model != measured.ablated).sum())
        warn(
            f"faithfulness has no interval: the ablation changes {changed} of {len(measured.model)} prompts, too few "
            "to resample; give corrupted prompts that differ from the clean ones"
        )
        return [(math.nan, math.nan)] * len(measured.circuits)
    return _interval((weights @ measured.circuits.numpy().T - ablated[:, None]) / scale[:, None])


def mean_interval(values: Float[Tensor, "row prompt"], seed: int = 0) -> list[tuple[float, float]]:
    """The 95 % percentile interval of each row's mean over resamples of the prompts."""
    return _interval(_resamples(values.shape[1], seed) @ values.numpy().T)


def _resamples(prompts: int, seed: int) -> np.ndarray:
    """Weights (draw, prompt), each row a resample."""
    return (
        np.random.default_rng(as_seed(seed)).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS) / prompts
    )


def _interval(drawn: np.ndarray) -> list[tuple[float, float]]:
    with np.errstate(invalid="ignore"):
        ends = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [(float(low), float(high)) for low, high in ends.T]
