"""A graph on the component grid: the common ground of EAP-IG, MIB, ACDC and AutoCircuit.

All four see a transformer as nodes `input`, heads, MLPs and `logits` with q, k and v inputs told apart. `Grid` holds
a graph's scores and membership in EAP-IG's layout: rows are sources in order of computation, columns are inputs (per
layer all q, all k, all v, then the MLP; logits last).

How an `AttributionGraph` becomes a grid, and back
--------------------------------------------------
- An edge into a head without a port is copied to q, k and v; an edge with its own port has precedence over the copy.
- Coordinates of a site (neurons `m3#17`) are projected on their component: the score of largest size, kept if any is.
- On the way back the ports are merged again only if the graph had none (the file says so) and q, k and v still agree.
- Every real edge becomes a candidate; nodes that the graph never had are dropped again if nothing touches them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats._read import MAX_EDGES
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import QKV, Components
from tl_circuitlasso.graph.nodes import Block, NodeIndex


def checked_components(n_layers: int, n_heads: int, parallel: bool, label: str) -> Components:
    """The shape, unless it asks for more edges than any model that this library reads has."""
    parts = Components(n_layers, n_heads, parallel)
    if n_layers * n_heads > MAX_EDGES or parts.n_edges > MAX_EDGES:
        raise FormatError(f"{label}: {n_layers} layers of {n_heads} heads make over {MAX_EDGES:,} edges: wrong `cfg`?")
    return parts


@dataclass(frozen=True, eq=False)
class Grid:
    """Scores and membership of a component graph in EAP-IG's layout.

    Attributes
    ----------
    merged: the graph had no ports, so q, k and v are copies.
    absent: components that the graph didn't have (all MLPs of an attention-only model).
    sink: `logits`, or `target` where the graph explains a behaviour.
    """

    parts: Components
    score: Float[Tensor, "source column"]
    kept: Bool[Tensor, "source column"]
    merged: bool = False
    absent: tuple[str, ...] = ()
    sink: str = "logits"

    def note(self) -> dict[str, Any]:
        """What a neighbour's file can't say itself, as plain data; empty where there's nothing to say."""
        note: dict[str, Any] = {"ports": "merged"} if self.merged else {}
        if self.absent:
            note["absent"] = list(self.absent)
        return note | ({"sink": self.sink} if self.sink != "logits" else {})

    def with_note(self, note: Mapping[str, Any]) -> "Grid":
        """The grid with what `note` said; unknown or ill-typed entries are ignored, as for any stranger's file."""
        absent = note.get("absent")
        names = {name for name in absent if isinstance(name, str)} if isinstance(absent, list) else set()
        return replace(
            self,
            merged=note.get("ports") == "merged",
            absent=tuple(name for name in self.parts.sources() if name in names),
            sink="target" if note.get("sink") == "target" else "logits",
        )


# ---- graph to grid --------------------------------------------------------------------------------------------------


def grid_of(graph: AttributionGraph) -> Grid:
    """The graph on the component grid.

    Raises
    ------
    InputError: the graph has nodes that aren't components (SAE features, residual dimensions), a port at a node that
        isn't a head, or an edge that a transformer doesn't have.
    """
    sites = [block.site for block in graph.index.blocks]
    _check_sites(sites)
    parts = _components_of(graph)
    rows = torch.tensor([parts.row(site) for site in sites])[graph.index.block_of]
    is_head = torch.tensor([site.kind == "head" for site in sites])[graph.index.block_of][graph.target]
    cells = _cells(parts, rows, is_head, graph)
    score, kept = _largest(parts, cells, graph)
    present = {str(site) for site in sites}
    return Grid(
        parts,
        score,
        kept,
        merged=bool(is_head.any()) and not bool((graph.port[is_head] != 0).any()),
        absent=tuple(name for name in parts.sources() if name not in present),
        sink="logits" if "logits" in present or "target" not in present else "target",
    )


def _check_sites(sites: list[Site]) -> None:
    foreign = [site for site in sites if site.kind in ("resid", "hook")]
    if foreign:
        raise InputError(
            f"`graph` has {foreign[0]}, which isn't a component (input, head, MLP, logits), so this format can't hold "
            "it: use to_circuit_tracer, to_neuronpedia, to_networkx or graph.save"
        )
    if {"logits", "target"} <= {site.kind for site in sites}:
        raise InputError(
            "`graph` has both logits and target: this format has one sink; build the graph for one of them"
        )


def _components_of(graph: AttributionGraph) -> Components:
    layered = [block for block in graph.index.blocks if block.site.kind in ("head", "mlp")]
    ranks: dict[tuple[int, str], int] = {(b.site.layer, b.site.kind): b.rank for b in layered}
    both = [layer for layer, kind in ranks if kind == "head" and (layer, "mlp") in ranks]
    parallel = {ranks[layer, "head"] == ranks[layer, "mlp"] for layer in both}
    if len(parallel) > 1:
        raise InputError("`graph` runs attention and MLP in parallel in some layers only: this format can't say so")
    n_layers = 1 + max((b.site.layer for b in layered), default=-1)
    n_heads = 1 + max((b.site.head for b in layered), default=-1)
    return Components(max(n_layers, 1), max(n_heads, 1), parallel == {True})


def _cells(
    parts: Components, rows: Int[Tensor, " node"], is_head: Bool[Tensor, " edge"], graph: AttributionGraph
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """Row of each edge, and its column; an edge into a head without port stands at its q column."""
    if bool(((graph.port != 0) & ~is_head).any()):
        raise InputError("`graph` has a q, k or v edge into a node that isn't a head: give that edge no port")
    column_node, _ = parts.column_nodes()
    first = torch.zeros(parts.n_sources + 1, dtype=torch.long)
    first.scatter_reduce_(0, column_node, torch.arange(parts.n_readers), "amin", include_self=False)
    ports_before = (graph.port - 1).clamp(min=0)
    column = first[rows[graph.target]] + ports_before * parts.n_heads
    real = torch.zeros(parts.n_sources + 1, parts.n_readers, dtype=torch.bool)
    real[:-1] = parts.mask()
    unreal = ~real[rows[graph.source], column]
    if bool(unreal.any()):
        edge = int(unreal.nonzero()[0])
        names = graph.index.names
        raise InputError(
            f"`graph` has {names[int(graph.source[edge])]}->{names[int(graph.target[edge])]}, an edge that a "
            "transformer of these components doesn't have"
        )
    return rows[graph.source], column


def _largest(
    parts: Components, cells: tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]], graph: AttributionGraph
) -> tuple[Float[Tensor, "source column"], Bool[Tensor, "source column"]]:
    """Scores and membership, portless edges copied to q, k and v, each cell with its entry of largest size."""
    row, column = cells
    _, column_port = parts.column_nodes()
    shared = (graph.port == 0) & (column_port[column] != 0)
    flat = row * parts.n_readers + column
    copies = torch.cat([flat[shared] + port * parts.n_heads for port in range(3)])
    score, kept, _ = _scatter(parts, copies, graph.score[shared].repeat(3), graph.kept[shared].repeat(3))
    own_score, own_kept, given = _scatter(parts, flat[~shared], graph.score[~shared], graph.kept[~shared])
    return torch.where(given, own_score, score), torch.where(given, own_kept, kept)


def _scatter(
    parts: Components, cell: Int[Tensor, " edge"], score: Float[Tensor, " edge"], kept: Bool[Tensor, " edge"]
) -> tuple[Float[Tensor, "source column"], Bool[Tensor, "source column"], Bool[Tensor, "source column"]]:
    shape = (parts.n_sources, parts.n_readers)
    flat = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    highest = flat.scatter_reduce(0, cell, score, "amax", include_self=False)
    lowest = flat.scatter_reduce(0, cell, score, "amin", include_self=False)
    member, given = torch.zeros(2, flat.numel(), dtype=torch.bool)
    member[cell[kept]] = True
    given[cell] = True
    largest = torch.where(highest >= -lowest, highest, lowest)
    return largest.view(shape), member.view(shape), given.view(shape)


# ---- grid to graph --------------------------------------------------------------------------------------------------


def graph_of(grid: Grid, **rest: Any) -> AttributionGraph:
    """The grid as a graph: one edge per real edge, in EAP-IG's order; weight = score."""
    row, column = grid.parts.edges()
    node, port = grid.parts.column_nodes()
    columns = {"source": row, "target": node[column], "port": port[column]}
    columns |= {"score": grid.score[row, column], "kept": grid.kept[row, column]}
    if grid.merged and _ports_agree(columns):
        columns = {name: column[columns["port"] <= 1] for name, column in columns.items()}
        columns["port"] = torch.zeros_like(columns["port"])
    index, columns = _without_absent(grid, columns)
    return AttributionGraph(index=index, weight=columns["score"].clone(), **columns, **rest)


def _ports_agree(columns: Mapping[str, Tensor]) -> bool:
    """Whether q, k and v, which stand side by side, have the same score and membership at every head."""
    heads = columns["port"] > 0
    score, kept = (columns[name][heads].view(-1, 3) for name in ("score", "kept"))
    return bool((score == score[:, :1]).all()) and bool((kept == kept[:, :1]).all())


def _without_absent(grid: Grid, columns: dict[str, Tensor]) -> tuple[NodeIndex, dict[str, Tensor]]:
    parts = grid.parts
    index = parts.index
    touched = (columns["score"] != 0) | columns["kept"]
    busy = torch.zeros(len(index), dtype=torch.bool)
    busy[columns["source"][touched]] = busy[columns["target"][touched]] = True
    absent = set(grid.absent)
    stays = torch.tensor([bool(used) or name not in absent for name, used in zip(index.names, busy)])
    blocks = [_sink(block, grid.sink) for block, stay in zip(index.blocks, stays.tolist()) if stay]
    edges = stays[columns["source"]] & stays[columns["target"]]
    position = stays.cumsum(0) - 1
    columns = {name: column[edges] for name, column in columns.items()}
    columns |= {name: position[columns[name]] for name in ("source", "target")}
    return NodeIndex(tuple(blocks)), columns


def _sink(block: Block, sink: str) -> Block:
    return Block(Site("target"), block.rank) if sink == "target" and block.site.kind == "logits" else block


# ---- named edges to grid --------------------------------------------------------------------------------------------

NamedEdge = tuple[Site, Site, str, float, bool]  # source, target, port ("" = all), score, kept


def grid_of_edges(
    edges: Iterable[NamedEdge],
    label: str,
    *,
    n_layers: int | None = None,
    n_heads: int | None = None,
    attn_only: bool | None = None,
    parallel: bool = False,
) -> Grid:
    """A grid from edges between sites; the model's shape is the smallest that holds them unless it's given.

    Raises
    ------
    FormatError: an edge against the order of computation, or outside of the given shape.
    """
    rows = list(edges)
    sites = [site for source, target, *_ in rows for site in (source, target)]
    found_layers = 1 + max((site.layer for site in sites), default=-1)
    found_heads = 1 + max((site.head for site in sites), default=-1)
    parts = checked_components(n_layers or max(found_layers, 1), n_heads or max(found_heads, 1), parallel, label)
    if found_layers > parts.n_layers or found_heads > parts.n_heads:
        raise FormatError(f"{label}: has layer {found_layers - 1} and head {found_heads - 1}, beyond the shape given")
    real = parts.mask()
    score, kept = torch.zeros(real.shape, dtype=torch.float64), torch.zeros_like(real)
    for source, target, port, value, member in rows:
        for one in QKV if target.kind == "head" and not port else (port,):
            row, column = parts.row(source), parts.column(target, one)
            if row >= parts.n_sources or not real[row, column]:
                raise FormatError(f"{label}: {source}->{target} runs against the order of computation: swap its ends?")
            score[row, column], kept[row, column] = value, member
    without_mlps = attn_only if attn_only is not None else not any(site.kind == "mlp" for site in sites)
    merged = any(t.kind == "head" for _, t, *_ in rows) and not any(p for *_, p, _, _ in rows)
    absent = tuple(f"m{layer}" for layer in range(parts.n_layers)) if without_mlps else ()
    return Grid(parts, score, kept, merged=merged, absent=absent)
