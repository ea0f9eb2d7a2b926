"""ACDC (`TLACDCCorrespondence`): its subgraph dictionary and its edge keys, child first.

A key is `(child_name, child_index, parent_name, parent_index)`; an index is `(None, None, head)` for heads and
`(None,)` elsewhere, ACDC's `TorchIndex.hashable_tuple`. `load_subgraph` insists on exactly the model's keys, so every
edge of the correspondence is written, also the steps within a component: `hook_q_input -> hook_q` is present if
something kept feeds that port, `hook_q -> hook_result` and `hook_mlp_in -> hook_mlp_out` always (ACDC's
placeholders).

What is lost: scores (a subgraph is membership; `to_acdc_effects` gives them in the form of ACDC's `effect_size`),
weights, extras, provenance, parallel blocks (ACDC knows sequential ones only, so an MLP's own heads feed it there),
and with `use_pos_embed` the difference between an absent edge and one from either embedding. Edges without a port are
copied to q, k and v.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(
...     component_index(n_layers=1, n_heads=1), {("input", "a0.h0", "v"): .5, ("a0.h0", "logits"): -1.})
>>> to_acdc(graph)["blocks.0.hook_v_input", (None, None, 0), "blocks.0.hook_resid_pre", (None,)]
True
>>> from_acdc(to_acdc(graph)).kept_edges() == graph.kept_edges()
True
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_circuitlasso.data.sites import PORTS, Site, parse_site
from tl_circuitlasso.errors import FormatError
from tl_circuitlasso.formats import _hooks, _read
from tl_circuitlasso.formats._grid import QKV, Grid, graph_of, grid_of, grid_of_edges
from tl_circuitlasso.formats._hooks import Hook
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph

Index = tuple[int | None, ...]
Key = tuple[str, Index, str, Index]


def to_acdc(graph: AttributionGraph, path: str | Path | None = None, *, use_pos_embed: bool = False) -> dict[Key, bool]:
    """ACDC's subgraph dictionary, as its `load_subgraph` takes it, written to `path` (`.pth`) if one is given.

    Raises
    ------
    InputError: the graph has nodes that aren't components, or `path` can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> edges = to_acdc(demo.circuit)
    >>> len(edges), sum(edges.values())
    (337, 62)
    """
    subgraph = {key: kept for key, (_, kept) in _edges(graph, use_pos_embed).items()}
    subgraph |= _inner_edges(_sequential(graph), subgraph)
    if path is not None:
        _read.write_pt(path, subgraph)
    return subgraph


def to_acdc_effects(graph: AttributionGraph, *, use_pos_embed: bool = False) -> dict[Key, float]:
    """The kept edges' scores by ACDC's keys: set `edge.effect_size` from them, without which ACDC draws nothing.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> len(to_acdc_effects(demo.circuit))
    14
    """
    return {key: score for key, (score, kept) in _edges(graph, use_pos_embed).items() if kept}


def from_acdc(source: Source, *, effects: Mapping[Key, float] | None = None) -> AttributionGraph:
    """The graph in a subgraph dictionary or in the `.pth` that ACDC's `save_subgraph` wrote.

    Scores are `effects` where given, else 1 for present edges and 0 for absent ones. A model without `hook_mlp`
    keys has no MLPs. ACDC's `save_edges` pickles, and pickles aren't loaded: use `save_subgraph`.

    Raises
    ------
    FormatError: keys that aren't ACDC's, unknown hook points, edges against the order of computation.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> from_acdc(to_acdc(demo.circuit)).kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.expect_mapping(_read.read_source(source), label, "the file")
    with _read.reading(label):
        merged: dict[tuple[Site, Site, str], tuple[float, bool]] = {}
        layers = [0]
        for key, present in data.items():
            child, parent = _parse_key(key, label)
            layers += [_hooks.layer_of(child, label), _hooks.layer_of(parent, label)]
            target, origin = _hooks.parse_target(child, label), _hooks.parse_source(parent, label)
            if not isinstance(present, bool):
                raise FormatError(f"{label}: {key} is {str(present)[:80]!r}; an edge is present (True) or not (False)")
            if target is None or origin is None:
                continue
            score = float((effects or {}).get(key, present))
            if not math.isfinite(score):
                raise FormatError(f"{label}: the effect of {key} is {score}; effects must be finite numbers")
            edge = (origin, *target)
            before = merged.get(edge, (0.0, False))  # the two embeddings are one node here
            merged[edge] = (max(before[0], score, key=abs), before[1] or present)
        rows = [(*edge, score, kept) for edge, (score, kept) in merged.items()]
        return graph_of(grid_of_edges(rows, label, n_layers=1 + max(layers)))


def _parse_key(key: Any, label: str) -> tuple[Hook, Hook]:
    """Child and parent hook of a key."""
    try:
        child, child_index, parent, parent_index = key
        return (child, _head_of(child_index)), (parent, _head_of(parent_index))
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"{label}: {str(key)[:120]} isn't a key (child_name, child_index, parent_name, parent_index)"
        ) from error


def _head_of(index: Any) -> int | None:
    index = tuple(index)
    if index == (None,):
        return None
    if len(index) == 3 and index[:2] == (None, None):
        return index[2]
    raise ValueError(f"{index} is not an index")


def _index_of(head: int | None) -> Index:
    return (None,) if head is None else (None, None, head)


def _sequential(graph: AttributionGraph) -> Grid:
    """The grid as if attention and MLP ran one after the other, which is all that ACDC knows."""
    grid = grid_of(graph)
    return replace(grid, parts=replace(grid.parts, parallel=False))


def _edges(graph: AttributionGraph, use_pos_embed: bool) -> dict[Key, tuple[float, bool]]:
    grid = _sequential(graph)
    edges: dict[Key, tuple[float, bool]] = {}
    for origin, target, port, score, kept in _grid_edges(grid):
        child, head = _hooks.target_hook(target, port, grid.parts)
        for parent, parent_head in _hooks.source_hooks(origin, use_pos_embed):
            edges[child, _index_of(head), parent, _index_of(parent_head)] = (score, kept)
    return edges


def _grid_edges(grid: Grid) -> Iterator[tuple[Site, Site, str, float, bool]]:
    """Every real edge; none at the MLPs of an attention-only model."""
    sources = [parse_site(name) for name in grid.parts.sources()]
    no_mlps = all(f"m{layer}" in grid.absent for layer in range(grid.parts.n_layers))
    nodes = [*sources, Site("logits")]
    node, port = grid.parts.column_nodes()
    row, column = grid.parts.edges()
    values = zip(grid.score[row, column].tolist(), grid.kept[row, column].tolist())
    for r, t, p, (score, kept) in zip(row.tolist(), node[column].tolist(), port[column].tolist(), values):
        if not (no_mlps and "mlp" in (nodes[r].kind, nodes[t].kind)):
            yield nodes[r], nodes[t], PORTS[p], score, kept


def _inner_edges(grid: Grid, subgraph: Mapping[Key, bool]) -> dict[Key, bool]:
    fed = {(child, index) for (child, index, _, _), kept in subgraph.items() if kept}
    inner: dict[Key, bool] = {}
    for layer in range(grid.parts.n_layers):
        block = f"blocks.{layer}"
        for index in map(_index_of, range(grid.parts.n_heads)):
            for port in QKV:
                read = f"{block}.hook_{port}_input"
                inner[f"{block}.attn.hook_{port}", index, read, index] = (read, index) in fed
                inner[f"{block}.attn.hook_result", index, f"{block}.attn.hook_{port}", index] = True
        if any(child == f"{block}.hook_mlp_in" for child, *_ in subgraph):
            inner[f"{block}.hook_mlp_out", (None,), f"{block}.hook_mlp_in", (None,)] = True
    return inner
