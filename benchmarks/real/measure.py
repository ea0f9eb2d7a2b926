"""What is measured of each method: cost, faithfulness at every size, its own circuit, and how steady that is."""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.real.methods import Method, bare_passes
from benchmarks.real.tasks import BATCH, Task
from tl_circuitlasso import evaluate
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.bench.measure import Cost, measured
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import kept_matrix, score_matrix
from tl_circuitlasso.evaluate.curves import MIB_SHARES, Curve, select
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter, adapt

ABLATIONS = ("patch", "mean", "resample")
RANKINGS = ("|score|", "signed score")
WARM = 4  # prompts of the call that pays for imports and compilers before anything is timed
TOP = 0.01  # share of all edges whose steadiness is measured beside the own circuit's


def say(text: str) -> None:
    """A line on how far the work is."""
    print(text, file=sys.stderr, flush=True)


# ---- finding circuits, and what it costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """What a method took.

    seconds: processor time of all threads, on a GPU wall time.
    forwards: the same in bare forward passes over the same prompts, run before and after it.
    peak_mib: memory above what stood there before the call; above_bare_mib: less that of the bare passes; times_bare:
        the ratio of the two with the model's weights counted in both.
    """

    seconds: float
    forwards: float
    peak_mib: float
    above_bare_mib: float
    times_bare: float


@dataclass(frozen=True, eq=False)
class Found:
    """Graphs and costs by method, and why a method has none."""

    graphs: Mapping[str, AttributionGraph]
    spent: Mapping[str, Spent]
    left_out: Mapping[str, str]


def find(model: Any, task: Task, methods: Sequence[Method], seed: int) -> Found:
    """Every method's graph on the task, each run between two runs of bare forward passes."""
    device, weights = adapt(model).device, _weights_mib(model)
    graphs, spent, left_out = {}, {}, {}

    def bare() -> Cost:
        return measured(lambda: bare_passes(model, task.clean, device), device)[1]

    bare()
    for method in methods:
        say(f"  {method.name}")
        try:
            method.find(model, task.take(torch.arange(min(WARM, len(task)))), seed)
            before = bare()
            graph, cost = measured(lambda method=method: method.find(model, task, seed), device)
        except InputError as error:
            left_out[method.name] = str(error)
            continue
        graphs[method.name], spent[method.name] = graph, _spent(cost, (before, bare()), weights, device.type == "cuda")
    return Found(graphs, spent, left_out)


def _spent(cost: Cost, bare: tuple[Cost, Cost], weights: float, gpu: bool) -> Spent:
    spent, *bases = (one.seconds if gpu else one.cpu_seconds for one in (cost, *bare))
    peak, least = (_mib(one) for one in (cost, min(bare, key=_mib)))
    return Spent(spent, spent / (sum(bases) / 2), peak, peak - least, (weights + peak) / (weights + least))


def _mib(cost: Cost) -> float:
    return math.nan if cost.peak_mib is None else cost.peak_mib


def _weights_mib(model: Any) -> float:
    return sum(part.numel() * part.element_size() for part in model.parameters()) / 2**20


# ---- how faithful ---------------------------------------------------------------------------------------------------


def ablated(task: Task, ablation: str, seed: int) -> tuple[Tensor, str]:
    """The prompts that cut edges take from, and the ablation's name in `evaluate`: resampling is patching from others.

    Raises
    ------
    InputError: an unknown ablation.
    """
    if ablation not in ABLATIONS:
        raise InputError(f"`ablations` has {ablation!r}: there are {', '.join(ABLATIONS)}")
    return (task.others(seed), "patch") if ablation == "resample" else (task.corrupted, ablation)


def curves(
    model: Any, graphs: Mapping[str, AttributionGraph], task: Task, ablation: str, seed: int, rule: str = "greedy"
) -> dict[str, dict[str, Curve]]:
    """Each method's curve at MIB's sizes, by each ranking and `rule` (as in `evaluate.curve`).

    Scores without a negative one rank alike by both.
    """
    corrupted, how = ablated(task, ablation, seed)

    def ranked(some: Mapping[str, AttributionGraph], absolute: bool) -> dict[str, Curve]:
        say(f"  {ablation}: circuits of {len(some)} methods by {RANKINGS[not absolute]}")
        options: dict[str, Any] = {
            "sizes": MIB_SHARES,
            "absolute": absolute,
            "rule": rule,
            "batch_size": BATCH,
            "seed": seed,
        }
        return evaluate.curves(model, some, task.clean, corrupted, task.metric, how, **options) if some else {}

    by_size = ranked(graphs, True)
    signed = ranked({name: graph for name, graph in graphs.items() if bool((graph.score < 0).any())}, False)
    return {RANKINGS[0]: by_size, RANKINGS[1]: {name: signed.get(name, curve) for name, curve in by_size.items()}}


@dataclass(frozen=True)
class Circuit:
    """One circuit and its faithfulness, with a 95 % interval, under each ablation.

    own: whether the method chose it; else it's the method's strongest edges, as many as a method that chooses kept.
    edges: q, k and v apart; pairs: merged; connected: the edges, apart, that lie on a path from input to logits.
    """

    own: bool
    edges: int
    pairs: int
    connected: int
    faithfulness: Mapping[str, tuple[float, float, float]]


def circuits(
    model: Any, found: Found, methods: Sequence[Method], task: Task, ablations: Sequence[str], seed: int
) -> dict[str, Circuit]:
    """The circuit that each method chooses; of the others, as many of the strongest edges as the last chooser kept."""
    choosers = {method.name for method in methods if method.chooses} & set(found.graphs)
    counts = [int(graph.kept.sum()) for name, graph in found.graphs.items() if name in choosers]
    own = {name: graph for name, graph in found.graphs.items() if name in choosers}
    cut = {name: strongest(graph, counts[-1]) for name, graph in found.graphs.items() if counts}
    return {name: _circuit(model, circuit, task, ablations, seed, name in own) for name, circuit in (cut | own).items()}


def strongest(graph: AttributionGraph, count: int) -> AttributionGraph:
    """The edges of largest |score|, q, k and v apart, as in the curves: on a path or not."""
    order = graph.score.abs().argsort(descending=True, stable=True)
    return graph.keep(torch.zeros_like(graph.kept).index_fill(0, order[:count], True))


def _circuit(
    model: Any, graph: AttributionGraph, task: Task, ablations: Sequence[str], seed: int, own: bool
) -> Circuit:
    judged, connected = {}, 0
    for ablation in ablations:
        corrupted, how = ablated(task, ablation, seed)
        found = evaluate.faithfulness(
            model, graph, task.clean, corrupted, task.metric, how, batch_size=BATCH, seed=seed
        )
        judged[ablation], connected = (found.faithfulness, found.low, found.high), found.edges
    return Circuit(own, int(graph.kept.sum()), graph.n_kept, connected, judged)


# ---- how steady -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Jaccard of the circuits of every two samples: mean, standard deviation, least; NaN where all are empty."""

    mean: float
    deviation: float
    least: float


def agreement(circuits: Bool[Tensor, "sample edge"]) -> Agreement:
    """How alike the samples' circuits are.

    >>> agreement(torch.tensor([[True, True, False], [True, False, False], [True, True, False]])).mean
    0.6666666666666666
    """
    marks = circuits.double()
    both = marks @ marks.T
    either = marks.sum(1)[:, None] + marks.sum(1)[None] - both
    above = torch.ones_like(both, dtype=torch.bool).triu(1)
    shares = (both / either)[above]
    shares = shares[~shares.isnan()]
    if not len(shares):
        return Agreement(math.nan, math.nan, math.nan)
    return Agreement(float(shares.mean()), float(shares.std(correction=0)), float(shares.min()))


@dataclass(frozen=True)
class Stability:
    """Over half-samples of the prompts: own circuits (None: the method chooses none), and the strongest edges."""

    own: Agreement | None
    top: Agreement
    n_top: int


def stability(model: Any, method: Method, task: Task, *, samples: int, seed: int) -> Stability:
    """Run the method on `samples` random halves of the prompts and compare the circuits."""
    say(f"  {method.name}: {samples} half-samples")
    layout = EdgeLayout(adapt(model).shape)
    count = int(TOP * int(layout.mask().sum()))
    halves = half_samples(len(task), samples, seed)
    scores, kept = _additive(model, method, task, halves, layout, seed) if method.additive else _rerun(
        model, method, task, halves, layout, seed
    )  # fmt: skip
    top = torch.cat([select(one, layout, [count], True, "top") for one in scores]).flatten(1)
    return Stability(agreement(kept) if method.chooses else None, agreement(top), count)


def half_samples(prompts: int, samples: int, seed: int) -> list[Int[Tensor, " row"]]:
    """Random halves of the prompts, in order."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(prompts, generator=draw)[: prompts // 2].sort().values for _ in range(samples)]


Samples = tuple[list[Float[Tensor, "source reader"]], Bool[Tensor, "sample edge"]]


def _rerun(model: Any, method: Method, task: Task, halves: list[Tensor], layout: EdgeLayout, seed: int) -> Samples:
    graphs = [method.find(model, task.take(rows), seed + number) for number, rows in enumerate(halves)]
    kept = torch.cat([kept_matrix(graph, layout) for graph in graphs]).flatten(1)
    return [score_matrix(graph, layout) for graph in graphs], kept


def _additive(model: Any, method: Method, task: Task, halves: list[Tensor], layout: EdgeLayout, seed: int) -> Samples:
    """The same without a run for each sample: scores of single prompts, averaged."""
    adapter: Adapter = adapt(model)
    singles = [
        score_matrix(method.find(adapter.model, task.take(torch.tensor([row])), seed), layout).float()
        for row in range(len(task))
    ]
    every = torch.stack(singles)
    scores = [every[rows].double().mean(0) for rows in halves]
    return scores, torch.zeros(len(halves), 0, dtype=torch.bool)


def sizes() -> list[tuple[int, float]]:
    """MIB's sizes up to 5 %, which tables show, with their places among all."""
    return list(itertools.takewhile(lambda size: size[1] <= 0.05, enumerate(MIB_SHARES)))
