"""Does a circuit do what the model does? Everything outside it is ablated, and the metric measured again.

Edges outside the circuit carry what their source does on corrupted prompts, its mean, or nothing; q, k and v of a head
are inputs of their own. The circuit is pruned first: edges that aren't on a path from the input to the logits count
for nothing.

>>> import tl_circuitlasso as tcl
>>> demo = tcl.load_demo(prompts=16)
>>> graph = tcl.AttributionGraph.from_edges(
...     tcl.nodes.component_index(n_layers=3, n_heads=4), {edge: 1.0 for edge in demo.true_edges})
>>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
>>> bool(faithfulness(demo.model, graph, demo.tokens, demo.corrupted, metric).faithfulness > 0.9)
True
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.data import Prompts
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, check_graph, edge_cells, kept_matrix, prune
from tl_circuitlasso.evaluate.interventions import Intervention, Measured, intervention, measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.sites import PORTS

DRAWS, LEVEL = 2000, 0.95
TOGETHER = 512  # circuits whose edges are held in memory at once


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the model's behaviour a circuit keeps.

    Attributes
    ----------
    model, ablated, circuit: the metric's mean per prompt of the whole model, with every edge cut, and of the circuit.
    faithfulness: (circuit - ablated) / (model - ablated): 1 is the model, 0 is no circuit at all.
    low, high: its 95 % bootstrap interval over prompts.
    edges: the number of edges after pruning, q, k and v counted apart.
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
    per_prompt: dict[str, Float[Tensor, " prompt"]]
    forward_passes: float

    def __repr__(self) -> str:
        return (
            f"Faithfulness({self.faithfulness:.4g} [{self.low:.4g}, {self.high:.4g}], {self.edges} edges; metric: "
            f"model {self.model:.4g}, circuit {self.circuit:.4g}, ablated {self.ablated:.4g})"
        )


def faithfulness(
    model: Any,
    graph: AttributionGraph,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Metric,
    ablation: str = "patch",
    *,
    level: str = "edge",
    attention_mask: Tensor | None = None,
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    seed: int = 0,
) -> Faithfulness:
    """(m(circuit) - m(ablated)) / (m(model) - m(ablated)), as in MIB (Mueller et al. 2025, arXiv 2504.13151).

    Parameters
    ----------
    clean, corrupted: token ids (prompt, pos) or strings, pairs of equal length. `corrupted` may be None for "mean" and
        "zero".
    metric: `metric(logits, rows)` returns the sum over a batch's rows of what the circuit should keep high; `rows` are
        the prompts' numbers in the data set. `evaluate.logit_diff` and its neighbours make some.
    ablation: what an edge outside the circuit carries: the source's output on the corrupted prompt ("patch"), its mean
        over prompts at the same position ("mean"), over prompts and positions ("mean-all"), or nothing ("zero").
    level: "edge" keeps the kept edges, "node" all edges between the kept nodes.
    attention_mask: True at real positions; left and right padding are both right.
    mean_over: whether means are over the "clean" or the "corrupted" prompts.
    input_node: whether `input` is the token embedding alone ("embed", as in EAP-IG) or with learned positions
        ("resid"). It makes no difference to "patch".

    Raises
    ------
    InputError: a graph of another model, prompts or metric that can't be used, or a metric that is the same for the
        model and for the ablated model, so that there's no scale.
    """
    setup = intervention(
        model,
        clean,
        corrupted,
        metric,
        ablation,
        attention_mask=attention_mask,
        mean_over=mean_over,
        input_node=input_node,
        batch_size=batch_size,
    )
    layout = check_graph(graph, setup.adapter)
    return _judge(setup, kept_matrix(graph, layout, level=level), layout, seed)


def completeness(
    model: Any,
    graph: AttributionGraph,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Metric,
    ablation: str = "patch",
    *,
    level: str = "edge",
    seed: int = 0,
    **options: Any,
) -> Faithfulness:
    """The faithfulness of everything but the circuit: near 0 where the circuit leaves nothing out (Marks et al. 2024,
    arXiv 2403.19647). Arguments as in `faithfulness`."""
    setup = intervention(model, clean, corrupted, metric, ablation, **options)
    layout = check_graph(graph, setup.adapter)
    return _judge(setup, ~kept_matrix(graph, layout, level=level) & layout.mask(), layout, seed)


def _judge(setup: Intervention, kept: EdgeMatrix, layout: EdgeLayout, seed: int) -> Faithfulness:
    measured = measure(setup, kept)
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
        edges=int(prune(kept, layout).sum()),
        per_prompt={"model": measured.model, "ablated": measured.ablated, "circuit": circuit},
        forward_passes=measured.forward_passes,
    )


# ---- figures of many circuits ---------------------------------------------------------------------------------------


def check_scale(measured: Measured) -> None:
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
    """The 95 % percentile interval of each circuit's faithfulness over resamples of the prompts."""
    weights = _resamples(len(measured.model), seed)
    ablated, model = weights @ measured.ablated.numpy(), weights @ measured.model.numpy()
    drawn = (weights @ measured.circuits.numpy().T - ablated[:, None]) / (model - ablated)[:, None]
    return _interval(drawn)


def mean_interval(values: Float[Tensor, "row prompt"], seed: int = 0) -> list[tuple[float, float]]:
    """The 95 % percentile interval of each row's mean over resamples of the prompts."""
    return _interval(_resamples(values.shape[1], seed) @ values.numpy().T)


def _resamples(prompts: int, seed: int) -> np.ndarray:
    """Weights (draw, prompt), each row a resample."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS) / prompts


def _interval(drawn: np.ndarray) -> list[tuple[float, float]]:
    with np.errstate(invalid="ignore"):
        ends = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [(float(low), float(high)) for low, high in ends.T]


# ---- one edge at a time ---------------------------------------------------------------------------------------------


def minimality(
    model: Any,
    graph: AttributionGraph,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Metric,
    ablation: str = "patch",
    *,
    tolerance: int | float = 0.01,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """What each kept edge is worth to its circuit: the metric's fall when it alone is cut too.

    One row per kept edge that is on a path from the input to the logits, largest fall first: source, target, port, drop
    (m(circuit) - m(circuit without it), mean per prompt), low, high (95 % bootstrap interval), and useless: its share
    of m(model) - m(ablated) isn't above `tolerance`, or the interval holds zero. Arguments as in `faithfulness`.
    """
    setup = intervention(model, clean, corrupted, metric, ablation, **options)
    layout = check_graph(graph, setup.adapter)
    kept = prune(kept_matrix(graph, layout), layout)
    rows = live_rows(graph, layout, kept)
    found = without_each(setup, graph, layout, kept, rows)
    drops = found.base - found.values
    intervals = mean_interval(drops, seed)
    scale = abs(float((found.model - found.ablated).mean()))
    names = graph.index.names
    table = pd.DataFrame(
        {
            "source": [names[int(graph.source[row])] for row in rows],
            "target": [names[int(graph.target[row])] for row in rows],
            "port": [PORTS[int(graph.port[row])] for row in rows],
            "drop": drops.mean(1).numpy(),
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
        }
    )
    table["useless"] = (table["drop"].abs() <= tolerance * scale) | ((table.low <= 0) & (table.high >= 0))
    return table.sort_values("drop", ascending=False, kind="stable", ignore_index=True)


@dataclass(frozen=True, eq=False)
class Without:
    """Each prompt's metric of a circuit (`base`) and of the circuit without each of some edges (`values`)."""

    model: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    base: Float[Tensor, " prompt"]
    values: Float[Tensor, "row prompt"]
    forward_passes: float


def live_rows(graph: AttributionGraph, layout: EdgeLayout, kept: EdgeMatrix) -> list[int]:
    """The graph's edges that have an entry in a circuit.

    Raises
    ------
    InputError: there is none.
    """
    cells = edge_cells(graph, layout)
    mask = kept[0].numpy()
    rows = [row for row, own in enumerate(cells) if bool(graph.kept[row]) and any(mask[cell] for cell in own)]
    if not rows:
        raise InputError("`graph` keeps no edge on a path from the input to the logits: lower its threshold")
    return rows


def without_each(
    setup: Intervention, graph: AttributionGraph, layout: EdgeLayout, kept: EdgeMatrix, rows: list[int]
) -> Without:
    """The circuit `kept`, and the same without each edge of `rows`."""
    cells, parts = edge_cells(graph, layout), []
    for first in range(0, len(rows), TOGETHER):
        some = rows[first : first + TOGETHER]
        circuits = kept.repeat(1 + len(some), 1, 1)
        for number, row in enumerate(some, 1):
            for source, column in cells[row]:
                circuits[number, source, column] = False
        parts.append(measure(setup, circuits))
    values = torch.cat([part.circuits[1:] for part in parts])
    passes = sum(part.forward_passes for part in parts)
    return Without(parts[0].model, parts[0].ablated, parts[0].circuits[0], values, passes)
