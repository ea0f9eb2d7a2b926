"""TransformerLens 4's own edge attribution: its `AttributionResult`, and circuits as lists of (writer, reader) nodes.

A node there stands at one position of one prompt pair: `Node("attn_head_out", position, layer, head)` writes,
`Node("v_input", position, layer, head)` reads. A graph here is over all positions, so on the way in scores are summed
over positions, and an edge is kept if it is at any of them; on the way out every kept edge stands at every position.

What is lost: positions; on the way out also weights, extras, certificates and provenance. Edges without a port are
copied to q, k and v.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.data.sites import PORTS, Site, parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._grid import graph_of, grid_of, grid_of_edges
from tl_circuitlasso.graph import AttributionGraph

MODULE = "transformer_lens.tools.analysis.attribution_patching"
_READERS = {"q_input": "q", "k_input": "k", "v_input": "v"}


def to_transformer_lens(graph: AttributionGraph, positions: int, *, result: bool = False) -> Any:
    """The kept edges as the circuit that its `faithfulness` takes: (writer, reader) pairs at `positions` positions.

    result: give an `AttributionResult` of all candidate edges instead, each score in equal parts at all positions.

    Raises
    ------
    InputError: TransformerLens 4 isn't installed, no positions, or nodes that aren't components.

    >>> circuit = to_transformer_lens(graph, positions=12)  # doctest: +SKIP
    """
    positions = whole_number("positions", positions, what="of positions, the length of the prompts")
    module = _package()
    grid = grid_of(graph)
    names = [*grid.parts.sources(), "logits"]
    node, port = grid.parts.column_nodes()
    row, column = grid.parts.edges()
    if not result:
        row, column = row[grid.kept[row, column]], column[grid.kept[row, column]]
    ends = [
        (parse_site(names[r]), parse_site(names[t]), PORTS[p])
        for r, t, p in zip(row.tolist(), node[column].tolist(), port[column].tolist())
    ]
    edges = [
        (_writer(module, writer, place), _reader(module, reader, port, place, grid.parts.n_layers))
        for place in range(positions)
        for writer, reader, port in ends
    ]
    if not result:
        return edges
    scores = (grid.score[row, column] / positions).tolist() * positions
    totals: dict[Any, float] = {}
    for (writer, _), score in zip(edges, scores):
        totals[writer] = totals.get(writer, 0.0) + score
    return module.AttributionResult(node_scores=totals, edge_scores=dict(zip(edges, scores)))


def from_transformer_lens(source: Any, *, parallel: bool = False) -> AttributionGraph:
    """The graph of an `AttributionResult`, whose edges are all kept, or of a circuit, whose listed edges are.

    Entries of a circuit are (writer, reader) or (writer, reader, score), as `top_edges` gives them; without a score an
    edge has 1. `parallel`: attention and MLP of a layer read the same stream; an edge from a head to its own layer's
    MLP shows that they don't.

    Raises
    ------
    FormatError: a result without edges (a sweep over nodes), other objects than its nodes, scores that aren't finite.

    >>> graph = from_transformer_lens(result)  # doctest: +SKIP
    """
    label = "the given attribution"
    with _read.reading(label):
        scores = getattr(source, "edge_scores", None)
        if scores is not None and not scores:
            raise FormatError(f"{label}: it has no edges; run the sweep with granularity='edge'")
        entries = _entries(scores if scores is not None else source, label)
        merged: dict[tuple[Site, Site, str], float] = {}
        n_layers = 1
        for writer, reader, score in entries:
            target, port, layer = _target(reader, label)
            n_layers = max(n_layers, 1 + layer)
            edge = (_source(writer, label), target, port)
            merged[edge] = merged.get(edge, 0.0) + score
        values = _read.number_columns(list(merged.values()), label, "score", lambda row: f"edge {row}").tolist()
        rows = [(*edge, value, True) for edge, value in zip(merged, values)]
        return graph_of(grid_of_edges(rows, label, n_layers=n_layers, parallel=parallel))


def _package() -> Any:
    try:
        module = import_module(MODULE)
    except ImportError as error:
        raise InputError(
            "`to_transformer_lens` makes nodes of TransformerLens 4's edge attribution, which isn't installed: "
            "pip install 'transformer-lens>=4'"
        ) from error
    return module


def _writer(module: Any, site: Site, position: int) -> Any:
    if site.kind == "input":
        return module.Node(kind="embed", position=position)
    if site.kind == "head":
        return module.Node(kind="attn_head_out", position=position, layer=site.layer, head=site.head)
    return module.Node(kind="mlp_out", position=position, layer=site.layer)


def _reader(module: Any, site: Site, port: str, position: int, n_layers: int) -> Any:
    if site.kind == "head":
        return module.Node(kind=f"{port}_input", position=position, layer=site.layer, head=site.head)
    if site.kind == "mlp":
        return module.Node(kind="mlp_in", position=position, layer=site.layer)
    return module.Node(kind="logits", position=position, layer=n_layers - 1)


def _entries(source: Any, label: str) -> list[tuple[Any, Any, float]]:
    if isinstance(source, Mapping):
        return [(writer, reader, score) for (writer, reader), score in source.items()]
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise FormatError(
            f"{label}: a {type(source).__name__} where an AttributionResult or a list of pairs is expected"
        )
    return [(*entry, 1.0) if len(entry) == 2 else tuple(entry) for entry in source]


def _source(node: Any, label: str) -> Site:
    match getattr(node, "kind", None):
        case "embed":
            return Site("input")
        case "attn_head_out":
            return Site(
                "head", _read.expect_int(node.layer, label, "layer"), _read.expect_int(node.head, label, "head")
            )
        case "mlp_out":
            return Site("mlp", _read.expect_int(node.layer, label, "layer"))
    raise FormatError(f"{label}: {str(node)[:80]} isn't a node that writes: embed, attn_head_out or mlp_out")


def _target(node: Any, label: str) -> tuple[Site, str, int]:
    """The reader's site, port and layer."""
    kind = getattr(node, "kind", None)
    if kind not in (*_READERS, "mlp_in", "logits"):
        raise FormatError(
            f"{label}: {str(node)[:80]} isn't a node that reads: q_input, k_input, v_input, mlp_in, logits"
        )
    layer = _read.expect_int(node.layer, label, "layer")
    if kind == "logits":
        return Site("logits"), "", layer
    if kind == "mlp_in":
        return Site("mlp", layer), "", layer
    return _head(node, label), _READERS[kind], layer


def _head(node: Any, label: str) -> Site:
    return Site("head", _read.expect_int(node.layer, label, "layer"), _read.expect_int(node.head, label, "head"))
