"""Several graphs in one figure: every edge of their circuits, scores against scores, and faithfulness against size."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_circuitlasso.plot import style
from tl_circuitlasso.plot.charts import curves, scatter
from tl_circuitlasso.plot.rows import shorten

_MOST_ROWS = 32


@runtime_checkable
class Compared(Protocol):
    """What `tcl.compare` returns, as far as it is drawn."""

    @property
    def overlap(self) -> pd.DataFrame: ...
    @property
    def pairs(self) -> pd.DataFrame: ...
    @property
    def graphs(self) -> Any: ...
    @property
    def curves(self) -> Any: ...


def side_by_side(found: Compared, path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """A figure of a comparison: `edges_by_graph`, then a scatter of two graphs or a map of more, then their curves."""
    wide = 3.1 + 0.72 * len(found.graphs)
    panels = [wide, 5.0, 5.6] if found.curves else [wide, 5.0]
    height = max(4.6, 1.5 + 0.235 * min(len(found.overlap), _MOST_ROWS))
    figure = style.new_figure(sum(panels), height)
    axes = figure.subplots(1, len(panels), gridspec_kw={"width_ratios": panels})
    edges_by_graph(axes[0], found)
    if len(found.graphs) == 2:
        scatter(*found.graphs.values(), names=tuple(found.graphs), labels=6, ax=axes[1])
    else:
        _agreement_map(axes[1], found)
    if found.curves:
        curves(found.curves, ax=axes[2])
    if title:
        figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold", color=style.INK)
    figure.set_layout_engine("tight", w_pad=2.4)
    return style.save(figure, path)


def edges_by_graph(ax: Axes, found: Compared) -> None:
    """One row per edge, one column per graph: a disc in the circuit, a ring outside, as large as the score's share."""
    table, names = found.overlap.head(_MOST_ROWS), list(found.graphs)
    rows = np.arange(len(table))
    for n, name in enumerate(names):
        share = table[name].abs() / (found.overlap[name].abs().max() or 1.0)
        circuit = found.graphs[name].kept_edges()
        inside = np.array([edge in circuit for edge in zip(table.source, table.target)], dtype=bool)
        size, colour = 14 + 190 * share.to_numpy() ** 0.8, style.SERIES[n % len(style.SERIES)]
        ax.scatter(np.full(inside.sum(), n), rows[inside], s=size[inside], color=colour, ec=style.PAPER, lw=0.6)
        ax.scatter(np.full((~inside).sum(), n), rows[~inside], s=size[~inside], fc="none", ec=style.FAINT_INK, lw=0.9)
    labels = [shorten(f"{s} → {t}", 40) for s, t in zip(table.source, table.target)]
    columns = [shorten(name, 16) for name in names]
    if "true" in table:
        ax.scatter(np.full(int(table.true.sum()), -1), rows[table.true], marker="D", s=26, color=style.INK)
        columns = ["truth", *columns]
    ax.set_xticks(np.arange(len(columns)) - ("true" in table), columns, rotation=35, ha="left")
    ax.set_yticks(rows, labels)
    ax.tick_params(length=0, labelsize=8.5, colors=style.INK)
    ax.xaxis.tick_top()
    ax.set(xlim=(-0.6 - ("true" in table), len(names) - 0.4), ylim=(len(table) - 0.3, -0.7))
    ax.hlines(rows, *ax.get_xlim(), color=style.RULE, lw=0.6, zorder=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if len(found.overlap) > len(table):
        more = f"and {len(found.overlap) - len(table):,} more edges"
        ax.text(0.0, -0.01, more, transform=ax.transAxes, size=8, color=style.FAINT_INK, va="top")


def _agreement_map(ax: Axes, found: Compared) -> None:
    """Jaccard indices of every two circuits above the diagonal, of equally many edges below it."""
    names = list(found.graphs)
    values = np.eye(len(names))
    for row in found.pairs.to_dict("records"):
        a, b = names.index(row["a"]), names.index(row["b"])
        values[a, b], values[b, a] = row["jaccard"], row["jaccard_top"]
    ax.imshow(values, cmap="Blues", vmin=0, vmax=1.15)
    for (a, b), value in np.ndenumerate(values):
        colour = style.PAPER if value > 0.6 else style.INK
        ax.text(b, a, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", size=9, color=colour)
    ticks = [shorten(name, 18) for name in names]
    ax.set_xticks(range(len(names)), ticks, rotation=35, ha="right")
    ax.set_yticks(range(len(names)), ticks)
    ax.tick_params(length=0, labelsize=8.5, colors=style.INK)
    ax.set_xlabel("Jaccard index: above of the circuits, below at equal size", size=9, color=style.FAINT_INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
