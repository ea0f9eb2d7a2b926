"""The adjacency matrix as a heat map, node by node or, for large graphs, block by block."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.plot import style
from tl_circuitlasso.plot.rows import row_label, short_hook

_MOST_NODES = 400  # past that a node is less than a pixel wide
_MOST_LABELS = 44
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#8C2D04", style.NEGATIVE, style.PAPER, "#3F8FCB", "#08306B"])


@dataclass(frozen=True, eq=False)
class _Table:
    """What is shown: values (NaN where no edge is possible), kept cells, names, and where layers begin."""

    values: np.ndarray
    kept: np.ndarray
    names: list[str]
    groups: list[tuple[str, int]]


def adjacency(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    by: str = "auto",
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Scores as a heat map: row = source, column = target, lines between layers, a dot on every kept edge.

    `by="node"` has one row per node; `by="block"` one per site, with the score of largest size between the two sites;
    "auto" takes nodes up to 400 of them. Grey cells hold no candidate edge. Colour grows with the square
    root of |score|, blue for positive and red-brown for negative.

    Raises
    ------
    InputError: an unknown `by`, or `by="node"` with more than 400 nodes.

    >>> from tl_circuitlasso.graph import AttributionGraph
    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> edges = {("input", "m0"): 1.0, ("m0", "logits"): -0.5, ("input", "logits"): 0.1}
    >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), edges)
    >>> adjacency(graph, title="Scores").axes[0].get_ylabel()
    'source'
    """
    table = _table(graph, by)
    side = 1.6 + min(9.0, max(3.2, 0.2 * len(table.names)))
    figure, axes = style.axes_for(ax, side + 1.0, side + (0.3 if title else 0.0))
    top = float(np.nanmax(np.abs(table.values), initial=0.0)) or 1.0
    norm = FuncNorm((lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * v**2), vmin=-top, vmax=top)
    axes.set_facecolor("#E4E8ED")
    image = axes.imshow(table.values, cmap=_SIGNED, norm=norm, interpolation="nearest", aspect="equal")
    _mark_kept(axes, table)
    _draw_groups(axes, table)
    axes.set(xlabel="target", ylabel="source")
    axes.xaxis.label.set(color=style.INK, size=9.5)
    axes.yaxis.label.set(color=style.INK, size=9.5)
    ticks = [-top, -top / 4, 0.0, top / 4, top]
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="score", ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=style.FAINT_INK, labelsize=8, length=0)
    return style.finished(figure, axes, title, path, alone=ax is None)


def _table(graph: AttributionGraph, by: str) -> _Table:
    if by not in ("auto", "node", "block"):
        raise InputError(f"`by` is {by!r}: write 'auto', 'node' or 'block'")
    n_nodes = len(graph.index)
    if by == "node" and n_nodes > _MOST_NODES:
        raise InputError(f"`by='node'` with {n_nodes:,} nodes: at most {_MOST_NODES} can be told apart; use 'block'")
    blocks = by == "block" or (by == "auto" and n_nodes > _MOST_NODES)
    of = graph.index.block_of if blocks else torch.arange(n_nodes)
    count = len(graph.index.blocks) if blocks else n_nodes
    sites = [block.site for block in graph.index.blocks for _ in range(1 if blocks else block.size)]
    names = [_short(site) for site in sites] if blocks else list(graph.index.names)
    cell = (of[graph.source] * count + of[graph.target]).numpy()
    score = graph.score.numpy()
    values = np.full(count * count, np.nan)
    weakest_first = np.argsort(np.abs(score), kind="stable")
    values[cell[weakest_first]] = score[weakest_first]  # the last write to a cell wins: the largest |score|
    kept = np.zeros(count * count, dtype=bool)
    kept[cell[graph.kept.numpy()]] = True
    return _Table(values.reshape(count, count), kept.reshape(count, count), names, _groups(sites))


def _short(site: Site) -> str:
    return f"L{site.layer} {short_hook(site.hook)}" if site.kind == "hook" else str(site)


def _groups(sites: list[Site]) -> list[tuple[str, int]]:
    """Where each layer begins, and its name."""
    groups: list[tuple[str, int]] = []
    for number, site in enumerate(sites):
        name = f"L{site.layer}" if site.layer >= 0 else row_label([site]) or str(site)
        if not groups or groups[-1][0] != name:
            groups.append((name, number))
    return groups


def _mark_kept(axes: Axes, table: _Table) -> None:
    rows, columns = table.kept.nonzero()
    size = min(14.0, 700.0 / len(table.names))
    axes.scatter(columns, rows, s=size, facecolor=style.INK, edgecolor=style.PAPER, linewidth=0.5, gid="kept")


def _draw_groups(axes: Axes, table: _Table) -> None:
    count = len(table.names)
    for _, start in table.groups[1:]:
        axes.axhline(start - 0.5, color=style.PAPER, lw=1.3)
        axes.axvline(start - 0.5, color=style.PAPER, lw=1.3)
    if count <= _MOST_LABELS:
        places, labels = list(range(count)), table.names
    else:
        ends = [start for _, start in table.groups[1:]] + [count]
        places = [(start + end - 1) / 2 for (_, start), end in zip(table.groups, ends)]
        labels = [name for name, _ in table.groups]
    axes.set_xticks(places, labels, rotation=90, size=7.5, color=style.FAINT_INK)
    axes.set_yticks(places, labels, size=7.5, color=style.FAINT_INK)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
