"""circuits-benchmark (InterpBench): edge lists, `[("blocks.0.attn.hook_result[1]", "blocks.1.hook_mlp_in"), ...]`.

Its `edges_list_to_circuit` turns such a list into a `Circuit`, and `calculate_fpr_and_tpr` judges that.

What is lost: everything but the kept edges (scores, candidates, weights, provenance). An edge without a port is
written as q, k and v; `input` is written as both `hook_embed` and `hook_pos_embed`. On the way in the model's shape
is the smallest that holds the edges unless `n_layers` and `n_heads` are given, steps within a component are skipped,
and an edge that ends at a head's `hook_result` has no port.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_circuits_benchmark(graph)
[('blocks.0.attn.hook_result[1]', 'blocks.0.hook_mlp_in')]
"""

import re
from pathlib import Path
from typing import Any

from tl_circuitlasso.data.sites import PORTS, Site, parse_site
from tl_circuitlasso.errors import FormatError
from tl_circuitlasso.formats import _hooks, _read
from tl_circuitlasso.formats._grid import graph_of, grid_of, grid_of_edges
from tl_circuitlasso.formats._hooks import Hook
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph

_NODE = re.compile(r"([\w.]{1,200})(?:\[(\d{1,5})\])?\Z")


def to_circuits_benchmark(
    graph: AttributionGraph, path: str | Path | None = None, *, use_pos_embed: bool = True
) -> list[tuple[str, str]]:
    """The kept edges as pairs of hook points, written to `path` as JSON if one is given.

    Raises
    ------
    InputError: the graph has nodes that aren't components, or `path` can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> to_circuits_benchmark(demo.circuit)[0]
    ('hook_embed', 'blocks.0.hook_q_input[1]')
    """
    grid = grid_of(graph)
    nodes = [*(parse_site(name) for name in grid.parts.sources()), Site("logits")]
    node, port = grid.parts.column_nodes()
    row, column = grid.parts.edges()
    kept = grid.kept[row, column]
    row, column = row[kept], column[kept]
    edges = [
        (_text(parent), _text(_hooks.target_hook(nodes[t], PORTS[p], grid.parts)))
        for r, t, p in zip(row.tolist(), node[column].tolist(), port[column].tolist())
        for parent in _hooks.source_hooks(nodes[r], use_pos_embed)
    ]
    if path is not None:
        _read.write_json(path, edges, indent=1)
    return edges


def from_circuits_benchmark(
    source: Source, *, n_layers: int | None = None, n_heads: int | None = None
) -> AttributionGraph:
    """The graph of an edge list (pairs, or a JSON file of pairs); listed edges have score 1 and are kept.

    Raises
    ------
    FormatError: not a list of pairs of hook points, unknown ones, or edges against the order of computation.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> again = from_circuits_benchmark(to_circuits_benchmark(demo.circuit))
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.read_json(source) if isinstance(source, (str, Path)) else source
    with _read.reading(label):
        if not isinstance(data, (list, tuple, set, frozenset)):
            raise FormatError(f"{label}: a {type(data).__name__} where a list of pairs of hook points is expected")
        pairs = [_pair(pair, label) for pair in data]
        rows = []
        for parent, child in pairs:
            origin, target = _hooks.parse_source(parent, label), _hooks.parse_target(child, label)
            if origin is not None and target is not None and origin != target[0]:
                rows.append((origin, *target, 1.0, True))
        layers = 1 + max((_hooks.layer_of(hook, label) for pair in pairs for hook in pair), default=0)
        return graph_of(grid_of_edges(rows, label, n_layers=n_layers or layers, n_heads=n_heads, attn_only=False))


def _text(hook: Hook) -> str:
    name, head = hook
    return name if head is None else f"{name}[{head}]"


def _pair(pair: Any, label: str) -> tuple[Hook, Hook]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise FormatError(f"{label}: {str(pair)[:80]} isn't a pair (from, to) of hook points")
    return _parse(pair[0], label), _parse(pair[1], label)


def _parse(text: Any, label: str) -> Hook:
    match = _NODE.match(text) if isinstance(text, str) else None
    if match is None:
        raise FormatError(f"{label}: {str(text)[:80]!r} isn't a hook point such as blocks.0.attn.hook_result[1]")
    return match[1], None if match[2] is None else int(match[2])
