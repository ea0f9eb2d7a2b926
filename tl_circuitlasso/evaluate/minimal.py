"""What each part of a circuit is worth: the metric's fall when it alone is taken out too."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, check_graph, edge_cells, kept_matrix, prune
from tl_circuitlasso.evaluate.faithfulness import mean_interval
from tl_circuitlasso.evaluate.features import circuit_of, feature_sites, has_features, measure_features
from tl_circuitlasso.evaluate.interventions import measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Ablation, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.prompt_forms import AnyPrompts

TOGETHER = 512  # circuits whose edges are held in memory at once


@verb
def minimality(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    tolerance: int | float = 0.01,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> pd.DataFrame:
    """What each kept edge, or kept feature, is worth to its circuit: the metric's fall when it alone is cut too.

    One row per kept edge that is on a path from the input to the logits, largest fall first: source, target, port, drop
    (m(circuit) - m(circuit without it), mean per prompt), low, high (95 % bootstrap interval), and useless: its share
    of m(model) - m(ablated) isn't above `tolerance`, or the interval holds zero. Of features, one row per kept feature,
    with `node` in place of the edge's ends. Arguments as in `faithfulness`.

    Raises
    ------
    InputError: nothing is kept, and as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> table = minimality(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target)
    >>> list(table.columns), bool(table.useless.any())
    (['source', 'target', 'port', 'drop', 'low', 'high', 'useless'], False)
    """
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    if has_features(graph):
        names, found = _without_each_node(setup, graph)
        parts: dict[str, list[str]] = {"node": names}
    else:
        layout = check_graph(graph, setup.adapter)
        kept = prune(kept_matrix(graph, layout), layout)
        rows = live_rows(graph, layout, kept)
        found = without_each(setup, graph, layout, kept, rows)
        parts = _ends(graph, rows)
    drops = found.base - found.values
    intervals = mean_interval(drops, seed)
    scale = abs(float((found.model - found.ablated).mean()))
    table = pd.DataFrame(
        {
            **parts,
            "drop": drops.mean(1).numpy(),
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
        }
    )
    table["useless"] = (table["drop"].abs() <= tolerance * scale) | ((table.low <= 0) & (table.high >= 0))
    return table.sort_values("drop", ascending=False, kind="stable", ignore_index=True)


def _ends(graph: AttributionGraph, rows: list[int]) -> dict[str, list[str]]:
    names = graph.index.names
    return {
        "source": [names[int(graph.source[row])] for row in rows],
        "target": [names[int(graph.target[row])] for row in rows],
        "port": [PORTS[int(graph.port[row])] for row in rows],
    }


def _without_each_node(setup: Experiment, graph: AttributionGraph) -> "tuple[list[str], Without]":
    sites = feature_sites(graph, setup.adapter, setup.saes)
    kept = graph.kept_nodes()
    blocks = [block for block in graph.index.blocks if block.features is not None]
    names = [name for block in blocks for name in block.names if name in kept]
    if not names:
        raise InputError("`graph` keeps no feature: lower its threshold")
    circuits = [circuit_of(setup, graph, sites, kept - {name}) for name in ("", *names)]
    empty = circuit_of(setup, graph, sites, set())
    found = measure_features(setup, sites, [*circuits, empty])
    return names, Without(found.model, found.ablated, found.circuits[0], found.circuits[1:], found.forward_passes)


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
    mask, chosen = kept[0].numpy(), graph.kept.nonzero().flatten().tolist()
    rows = [row for row, own in zip(chosen, edge_cells(graph, layout, chosen)) if any(mask[cell] for cell in own)]
    if not rows:
        raise InputError("`graph` keeps no edge on a path from the input to the logits: lower its threshold")
    return rows


def without_each(
    setup: Experiment, graph: AttributionGraph, layout: EdgeLayout, kept: EdgeMatrix, rows: list[int]
) -> Without:
    """The circuit `kept`, and the same without each edge of `rows`."""
    cells, parts = edge_cells(graph, layout, rows), []
    for first in range(0, max(len(rows), 1), TOGETHER):
        some = cells[first : first + TOGETHER]
        circuits = kept.repeat(1 + len(some), 1, 1)
        for number, own in enumerate(some, 1):
            for source, column in own:
                circuits[number, source, column] = False
        parts.append(measure(setup, circuits))
    values = torch.cat([part.circuits[1:] for part in parts])
    passes = sum(part.forward_passes for part in parts)
    return Without(parts[0].model, parts[0].ablated, parts[0].circuits[0], values, passes)
