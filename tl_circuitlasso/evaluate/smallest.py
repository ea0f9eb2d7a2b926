"""The smallest circuit that keeps a behaviour, from a few measured circuits: never edge by edge.

Circuits grown back from the target by |score| hold one another, so how many edges it takes is found as a number is
looked up: a few sizes are measured, then a few between the last that is too small and the first that isn't.
"""

from dataclasses import replace
from typing import Any

import torch
from typing_extensions import Unpack

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import check_graph, kept_matrix
from tl_circuitlasso.evaluate.faithfulness import check_scale, shares
from tl_circuitlasso.evaluate.interventions import measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Ablation, CutOptions, Experiment, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.prompt_forms import AnyPrompts

SHARE = 0.9  # of the behaviour, what a circuit must keep
FIRST, THEN = 6, 3  # sizes measured at once: before anything is known, and between two known sizes
CLOSE = 1.1  # ratio of the two sizes at which the search ends


@verb
def smallest(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    share: int | float = SHARE,
    **options: Unpack[CutOptions],
) -> AttributionGraph:
    """The graph with the fewest edges kept that are measured to have faithfulness >= `share`, as all larger ones do.

    k* = min { k : faithfulness(top_k(k', how="greedy")) >= share for every measured k' >= k }, to a tenth of k

    Sizes are searched by their logarithm; each measured circuit takes one forward pass over the prompts, a search about
    fifteen, however many edges there are. Which edges the graph keeps doesn't matter, its scores do.

    Returns
    -------
    AttributionGraph: `kept` are the circuit's edges, (source, target) pairs counting once; `provenance["smallest"]` has
        the share, the measured sizes with their faithfulness, and the forward passes per prompt.

    Parameters
    ----------
    share: of the behaviour, above 0 and at most 1. options: as in `tcl.Experiment`; others as in `faithfulness`.

    Raises
    ------
    InputError: a share outside (0, 1], a graph all of whose edges together don't keep so much, and as in
        `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, target=demo.target, positions="last", progress=False)
    >>> circuit = smallest(demo.model, graph, demo.tokens, demo.corrupted, demo.target, progress=False)
    >>> circuit.n_kept <= 10, dict(circuit.provenance["smallest"]["measured"])[circuit.n_kept] >= 0.9
    (True, True)
    """
    fraction("share", share, f"of the behaviour, such as {SHARE}")
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    layout = check_graph(graph, setup.adapter)
    most = graph.keep(torch.ones(len(graph), dtype=torch.bool)).prune().n_kept
    found: dict[int, float] = {}
    edges: dict[int, int] = {}  # of a size, which may be fewer where no more of them make whole paths
    passes, high, sizes = 0.0, 0, _spread(most)
    while sizes:
        circuits = {size: graph.top_k(size, how="greedy") for size in sizes}
        measured = measure(setup, torch.cat([kept_matrix(one, layout) for one in circuits.values()]))
        check_scale(measured)
        found |= dict(zip(circuits, shares(measured).tolist()))
        edges |= {size: one.n_kept for size, one in circuits.items()}
        passes += measured.forward_passes
        low, high = _bracket(found, share)
        sizes = _between(low, high) if high else []
    if not high:
        raise InputError(
            f"`graph` keeps {found[max(found)]:.3g} of the behaviour with all its {most} edges on paths, less than "
            f"`share` {share}: ask for less, or give a graph with more candidate edges"
        )
    told = sorted({(edges[size], kept) for size, kept in found.items()})
    report = {"share": share, "measured": told, "forward_passes": passes, "prompts": len(setup)}
    return replace(
        graph.top_k(high, how="greedy"), provenance={**graph.provenance, "smallest": report | {"ablation": setup.cut}}
    )


def _bracket(found: dict[int, float], share: float) -> tuple[int, int]:
    """The largest measured size that is too small, and the least above it (0: there's none)."""
    failed = max((size for size, kept in found.items() if kept < share), default=0)
    return failed, min((size for size in found if size > failed), default=0)


def _spread(most: int) -> list[int]:
    """The sizes that are measured first, from one edge to all, evenly by their logarithm."""
    return sorted({round(most ** (step / (FIRST - 1))) for step in range(FIRST)})


def _between(low: int, high: int) -> list[int]:
    """A few sizes strictly between two, evenly by their logarithm; none where the two are close."""
    if high <= max(low * CLOSE, low + 1):
        return []
    bottom = max(low, 1)
    inside = {round(bottom * (high / bottom) ** (step / (THEN + 1))) for step in range(1, THEN + 1)}
    return sorted(size for size in inside if low < size < high)
