"""Causal confirmation: the kept edges of a graph, and only those, are cut one at a time in the whole model.

Regression finds dependence, not cause. Searching by intervention costs a forward pass for every edge there is; testing
a sparse skeleton costs one for every edge it keeps, or as many as a budget allows: then the weakest kept edges are
tested, those that the skeleton is least sure of.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import whole_or_none
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import check_graph, kept_matrix
from tl_circuitlasso.evaluate.faithfulness import check_scale, mean_interval
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.evaluate.minimal import Without, live_rows, without_each
from tl_circuitlasso.experiment import Ablation, CutOptions, Experiment, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.verbs import in_order
from tl_circuitlasso.models.prompt_forms import AnyPrompts


@verb
def confirm(
    model: Any,
    graph: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    tolerance: int | float = 0.01,
    budget: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    **options: Unpack[CutOptions],
) -> AttributionGraph:
    """The graph with each kept edge's measured effect, less the edges that have none.

    effect(u -> v) = mean over prompts of m(model) - m(model in which v alone sees u's ablated output). An edge is
    refuted, and no longer kept, where |effect| is at most `tolerance` of |m(model) - m(ablated)| or its 95 % bootstrap
    interval over prompts holds zero. An edge that helps some prompts as much as it hurts others is refuted too: use a
    metric of the whole prediction, such as `evaluate.kl`, where that matters.

    Returns
    -------
    AttributionGraph: extras `measured` (1 for edges that were tested, else 0), `effect`, `effect_low`, `effect_high`
        (in the metric's units, 0 where not measured); `provenance["confirm"]` has the forward passes per prompt, what
        all edges would have taken, and how many edges were tested, refuted, and kept without a test.

    Parameters
    ----------
    tolerance: a share of m(model) - m(ablated), 0 or more.
    budget: the most edges that may be tested, those of smallest |score| first; others stay as they are. None tests all.
    process_group: as in `circuit_lasso`; the processes share the edges, and each gets the whole graph.
    options: as in `tcl.Experiment`; other arguments as in `faithfulness`.

    Raises
    ------
    InputError: no kept edge on a path from the input to the logits, a metric that doesn't change with every edge cut,
        and as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = confirm(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target)
    >>> graph.provenance["confirm"]["tested"], graph.n_kept
    (6, 6)
    """
    if not tolerance >= 0:
        raise InputError(f"`tolerance` is {tolerance!r}: give a share of the metric's range, 0 or more")
    budget = whole_or_none("budget", budget, what="of edges to test")
    model, graph = in_order(model, graph)
    ranks = as_ranks(process_group)
    with ranks.together():
        setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
        layout = check_graph(graph, setup.adapter)
        live = live_rows(graph, layout, kept_matrix(graph, layout))
        rows = _weakest(graph, live, budget)
        shares = [rows[turn :: ranks.size] for turn in range(ranks.size)]
        cut = partial(without_each, setup, graph, layout, layout.mask()[None])
        found = _side_by_side(ranks.map(shares, lambda some: _tensors(cut(some)), dict), len(rows))
    check_scale(found)
    effects = found.base - found.values
    intervals = torch.tensor(mean_interval(effects, seed), dtype=torch.float64)
    smallest = tolerance * abs(float((found.model - found.ablated).mean()))
    holds = (effects.mean(1).abs() > smallest) & ~((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    columns = {"effect": effects.mean(1), "effect_low": intervals[:, 0], "effect_high": intervals[:, 1]}
    extras = {name: _column(graph, rows, values) for name, values in columns.items()}
    report = {
        "ablation": setup.cut,
        "tolerance": tolerance,
        "tested": len(rows),
        "refuted": int((~holds).sum()),
        "untested": len(live) - len(rows),
        "forward_passes": found.forward_passes,
        "forward_passes_all_edges": found.forward_passes - len(rows) + len(graph),
        "prompts": len(setup.pairs),
    }
    return replace(
        graph,
        kept=_kept(graph, rows, holds),
        extras={**graph.extras, "measured": _column(graph, rows, torch.ones(len(rows), dtype=torch.float64)), **extras},
        provenance={**graph.provenance, "confirm": report},
    )


def _weakest(graph: AttributionGraph, rows: list[int], budget: int | None) -> list[int]:
    """The rows of smallest |score|, as many as may be tested, in their own order."""
    if budget is None or budget >= len(rows):
        return rows
    return sorted(sorted(rows, key=lambda row: abs(float(graph.score[row])))[:budget])


def _tensors(made: Without) -> dict[str, Tensor]:
    passes = torch.tensor(made.forward_passes, dtype=torch.float64)
    return {**vars(made), "forward_passes": passes}


def _side_by_side(parts: list[dict[str, Tensor]], rows: int) -> Without:
    """The edges of all processes, dealt out in turn; each has run the model and the ablated model for itself."""
    first = parts[0]
    values = first["values"].new_zeros(rows, first["values"].shape[1])
    for turn, part in enumerate(parts):
        values[turn :: len(parts)] = part["values"]
    passes = float(sum(part["forward_passes"] for part in parts))
    return Without(first["model"], first["ablated"], first["base"], values, passes)


def _column(graph: AttributionGraph, rows: list[int], values: Float[Tensor, " row"]) -> Float[Tensor, " edge"]:
    return torch.zeros(len(graph), dtype=torch.float64).index_put((torch.tensor(rows),), values)


def _kept(graph: AttributionGraph, rows: list[int], holds: Bool[Tensor, " row"]) -> Bool[Tensor, " edge"]:
    return graph.kept.clone().index_put((torch.tensor(rows),), holds)
