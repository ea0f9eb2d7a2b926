"""From a graph's kept edges to the matrix of sources by readers that an intervention works with.

An edge into a head without a port stands for its q, k and v at once. Edges that aren't on a path from the input to the
logits do nothing and are dropped before anything is measured or counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso._checks import instance
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.baselines.edges import as_circuits as as_circuits
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter

EdgeMatrix = Bool[Tensor, "circuit source reader"]


def as_graph(given: Any) -> AttributionGraph:
    """`given`, if it's a graph.

    Raises
    ------
    InputError: it isn't.
    """
    return instance("graph", given, AttributionGraph, "an AttributionGraph, as tcl.circuit_lasso returns it")


def check_graph(graph: AttributionGraph, adapter: Adapter) -> EdgeLayout:
    """The model's edges, which must be those of the graph.

    Raises
    ------
    InputError: nodes that aren't components, or a graph of another model.
    """
    as_graph(graph)
    layout = EdgeLayout(adapter.shape)
    theirs, ours = set(graph.index.names), set(layout.index.names)
    if parts := sorted(name for name in theirs if "#" in name or "hook" in name or name.startswith("resid.")):
        raise InputError(
            f"`graph` has the node {parts[0]!r}: here edges are cut between whole components (input, heads, "
            "MLPs, logits), found with basis='component'; graphs of features are for `faithfulness`, `completeness`, "
            "`minimality` and `curve`"
        )
    if theirs != ours:
        odd = sorted(theirs ^ ours)[0]
        owner = "the model doesn't have" if odd in theirs else "the graph doesn't know"
        raise InputError(f"`graph` belongs to another model: {owner} {odd!r}; give the model that it was found on")
    width = graph.provenance.get("d_model")
    if width not in (None, adapter.shape.d_model):
        raise InputError(
            f"`graph` belongs to another model: its d_model is {width}, this model's is {adapter.shape.d_model}"
        )
    return layout


def edge_cells(
    graph: AttributionGraph, layout: EdgeLayout, rows: Sequence[int] | None = None
) -> list[list[tuple[int, int]]]:
    """For each edge of the graph, or of `rows`, its entries in the matrix: one, or three for a head's merged ports."""
    names = layout.index.names
    nodes, ports = layout.targets()
    columns: dict[tuple[str, str], list[int]] = {}
    for column, (node, port) in enumerate(zip(nodes, ports)):
        columns.setdefault((names[node], PORTS[port]), []).append(column)
        if PORTS[port]:
            columns.setdefault((names[node], ""), []).append(column)
    own = graph.index.names
    chosen = slice(None) if rows is None else torch.tensor(rows, dtype=torch.long)
    ends = zip(graph.source[chosen].tolist(), graph.target[chosen].tolist(), graph.port[chosen].tolist())
    return [[(layout.index.position(own[s]), c) for c in columns[own[t], PORTS[p]]] for s, t, p in ends]


def kept_matrix(graph: AttributionGraph, layout: EdgeLayout, *, level: str = "edge") -> EdgeMatrix:
    """The kept edges of one graph; at level "node", all edges between its kept nodes.

    Raises
    ------
    InputError: an unknown level.
    """
    if level not in ("edge", "node"):
        raise InputError(f"`level` is {level!r}: write 'edge' or 'node'")
    if level == "node":
        return _between(graph.kept_nodes(), layout)
    matrix = torch.zeros(1, layout.n_sources, layout.n_readers, dtype=torch.bool)
    for cells in edge_cells(graph, layout, graph.kept.nonzero().flatten().tolist()):
        for source, column in cells:
            matrix[0, source, column] = True
    return matrix & layout.mask()


def _between(nodes: set[str], layout: EdgeLayout) -> EdgeMatrix:
    inside = torch.tensor([name in nodes or name in ("input", "logits") for name in layout.index.names])
    columns, _ = layout.targets()
    return (inside[: layout.n_sources, None] & inside[columns][None] & layout.mask())[None]


def score_matrix(graph: AttributionGraph, layout: EdgeLayout) -> Float[Tensor, "source reader"]:
    """Every edge's score; 0 where the graph has no such edge."""
    matrix = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64)
    for cells, score in zip(edge_cells(graph, layout), graph.score.tolist()):
        for source, column in cells:
            matrix[source, column] = score
    return matrix


def prune(kept: EdgeMatrix, layout: EdgeLayout) -> EdgeMatrix:
    """Drop edges of nodes that nothing kept feeds (but for the input) or that feed nothing kept, until none is left."""
    columns = torch.tensor(layout.targets()[0])
    while True:
        feeds = kept.any(2)
        fed = (
            torch.zeros_like(feeds, dtype=torch.int32)
            .index_add(1, columns[:-1], kept.any(1)[:, :-1].to(torch.int32))
            .bool()
        )
        fed[:, 0] = True
        read = torch.cat([feeds[:, columns[:-1]], torch.ones(len(kept), 1, dtype=torch.bool)], 1)
        pruned = kept & fed[:, :, None] & read[:, None, :]
        if torch.equal(pruned, kept):
            return pruned
        kept = pruned
