"""Charts beside the drawing: the strength path, two methods edge against edge, and faithfulness against size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from tl_circuitlasso._checks import instance
from tl_circuitlasso.comparison.common import Common
from tl_circuitlasso.comparison.figures import rank_correlation
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.plot import style

Pair = tuple[str, str]
_MOST_POINTS = 20_000
_LABEL = 75  # pixels that an edge's name takes beside its point


@runtime_checkable
class Curve(Protocol):
    """Faithfulness at several circuit sizes, as `evaluate.curve` returns it."""

    @property
    def sizes(self) -> Any: ...
    @property
    def faithfulness(self) -> Any: ...
    @property
    def cpr(self) -> float: ...
    @property
    def cmd(self) -> float: ...


# ---- strength path --------------------------------------------------------------------------------------------------


def strength_path(
    graphs: Mapping[float, AttributionGraph],
    path: str | Path | None = None,
    *,
    chosen: float | None = None,
    top: int = 10,
    title: str | None = None,
) -> Figure:
    """What is kept at each strength: scores of the `top` edges, how many edges there are, and how stable they are.

    `graphs` maps each strength (lambda as a fraction of lambda_max) to the graph solved at it. An edge's score counts
    as 0 where it isn't kept. The stability panel appears where graphs carry the column `extras["stability"]`.

    Raises
    ------
    InputError: fewer than two strengths, one that isn't above 0, or a `chosen` that isn't among them.

    >>> from tl_circuitlasso.graph import AttributionGraph
    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> edges = {("input", "m0"): 1.0, ("m0", "logits"): -0.5, ("input", "logits"): 0.1}
    >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), edges)
    >>> len(strength_path({0.3: graph.threshold(0.5), 0.1: graph}).axes) >= 2
    True
    """
    instance("graphs", graphs, Mapping, "{strength: graph, ...}, a graph for each strength")
    strengths = sorted(graphs, reverse=True)
    if len(strengths) < 2 or strengths[-1] <= 0:
        raise InputError(f"`graphs` has the strengths {strengths}: give at least two, all above 0")
    if chosen is not None and chosen not in graphs:
        raise InputError(f"`chosen` is {chosen!r}, which isn't among the strengths {strengths}")
    scores = [_column(graphs[s], "score") for s in strengths]
    edges = _leading(scores, top)
    tables = {"score": scores}
    if any("stability" in graph.extras for graph in graphs.values()):
        tables["stability"] = [_column(graphs[s], "stability") for s in strengths]
    heights = [3.0, 1.3, 1.0] if len(tables) > 1 else [3.0, 1.0]
    panels = style.new_figure(7.6, 1.2 + sum(heights))
    axes = panels.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    for ax, (name, table) in zip(axes, tables.items()):
        _edge_lines(style.plain(ax), strengths, table, edges, name)
    _count_steps(style.plain(axes[-1]), strengths, [graphs[s].n_kept for s in strengths])
    for ax in axes:
        if chosen is not None:
            ax.axvline(chosen, color=style.FAINT_INK, lw=1.0, ls=(0, (2, 2)), zorder=0)
    axes[-1].set(xscale="log", xlabel="strength (fraction of λ_max)", xlim=(strengths[0] * 1.05, strengths[-1]))
    if len(strengths) <= 9:
        axes[-1].set_xticks(strengths, [f"{strength:.2g}" for strength in strengths])
    axes[-1].xaxis.set_minor_formatter(NullFormatter())
    return style.finished(panels, axes[0], title, path, alone=True)


def _column(graph: AttributionGraph, name: str) -> dict[Pair, float]:
    """Each kept edge's value of largest size over its ports."""
    values = graph.score if name == "score" else graph.extras.get(name)
    if values is None:
        return {}
    names, out = graph.index.names, {}
    rows = graph.kept.nonzero().flatten()
    for s, t, value in zip(graph.source[rows].tolist(), graph.target[rows].tolist(), values[rows].tolist()):
        pair = (names[s], names[t])
        if pair not in out or abs(value) > abs(out[pair]):
            out[pair] = value
    return out


def _leading(tables: Sequence[Mapping[Pair, float]], top: int) -> list[Pair]:
    """The edges with the largest size anywhere on the path."""
    largest: dict[Pair, float] = {}
    for table in tables:
        for pair, value in table.items():
            largest[pair] = max(abs(value), largest.get(pair, 0.0))
    return sorted(largest, key=lambda pair: (-largest[pair], pair))[:top]


def _edge_lines(
    ax: Axes, strengths: Sequence[float], tables: Sequence[Mapping[Pair, float]], edges: Sequence[Pair], name: str
) -> None:
    ends = []
    for number, pair in enumerate(edges):
        values = [table.get(pair, 0.0) for table in tables]
        colour = style.SERIES[number % len(style.SERIES)]
        dash = "solid" if number < len(style.SERIES) else (0, (4, 1.5))
        ax.plot(strengths, values, color=colour, lw=1.7, ls=dash, marker="o", ms=3, gid=f"edge:{pair[0]}->{pair[1]}")
        ends.append((values[-1], f"{pair[0]} → {pair[1]}", colour))
    ax.axhline(0.0, color=style.RULE, lw=0.8, zorder=0)
    ax.set_ylabel(name)
    if name == "score":
        _end_labels(ax, ends)


def _end_labels(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name every line at its right end, moved apart by the least that keeps the texts from overlapping."""
    low, high = ax.get_ylim()
    step = min(0.062, 1.0 / max(len(ends), 1))
    ranked = sorted(ends)
    wishes = [(value - low) / (high - low) - number * step for number, (value, _, _) in enumerate(ranked)]
    apart = isotonic_regression(wishes).x.tolist() if wishes else []
    bounded = [min(max(wish, 0.0), 1.0 - (len(ends) - 1) * step) for wish in apart]
    for number, ((_, text, colour), place) in enumerate(zip(ranked, bounded)):
        ax.annotate(
            text, (1.0, place + number * step), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
            size=8, color=colour, va="center", annotation_clip=False,
        )  # fmt: skip


def _count_steps(ax: Axes, strengths: Sequence[float], counts: Sequence[int]) -> None:
    ax.step(strengths, counts, where="mid", color=style.INK, lw=1.5)
    ax.fill_between(strengths, counts, step="mid", color=style.BAND)
    ax.set(ylabel="edges kept", ylim=(0, max(max(counts), 1) * 1.15))


# ---- two methods ----------------------------------------------------------------------------------------------------


def scatter(
    a: AttributionGraph,
    b: AttributionGraph,
    path: str | Path | None = None,
    *,
    names: tuple[str, str] = ("a", "b"),
    labels: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Each edge that both graphs could have returned: its |score| in `a` against its |score| in `b`.

    Scores are shares of each graph's largest, on logarithmic axes; colour and shape tell which graph keeps the edge,
    and the corner says Spearman's rank correlation. Up to `labels` edges are named: the strongest that only one keeps,
    then the strongest of all.

    Raises
    ------
    InputError: the graphs share no candidate edge.

    >>> from tl_circuitlasso.graph import AttributionGraph
    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> edges = {("input", "m0"): 1.0, ("m0", "logits"): -0.5, ("input", "logits"): 0.1}
    >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), edges)
    >>> scatter(graph, graph.threshold(0.5), names=("all", "strong")).axes[0].get_xlabel()
    '|score| / largest, all'
    """
    common = Common.of({names[0]: a, names[1]: b}, None)
    x, y = (_shares(np.abs(scores)) for scores in common.score)
    figure, axes = style.axes_for(ax, 6.4, 6.0)
    style.plain(axes)
    group = 2 * common.kept[0] + common.kept[1]
    _points(axes, x, y, group, names)
    axes.plot([1e-9, 1.0], [1e-9, 1.0], color=style.RULE, lw=1.0, zorder=0)
    floor = min(x.min(), y.min()) / 1.5
    axes.set(xscale="log", yscale="log", xlim=(floor, 1.9), ylim=(floor, 1.9))
    axes.set(xlabel=f"|score| / largest, {names[0]}", ylabel=f"|score| / largest, {names[1]}")
    _name_points(axes, common, x, y, group, labels)
    _say_correlation(axes, *np.abs(common.score))
    look: Any = {"frameon": False, "fontsize": 8.5, "labelcolor": style.INK, "handletextpad": 0.3}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, columnspacing=1.0, **look)  # over no point
    return style.finished(figure, axes, title, path, alone=ax is None, pad=26)


def _shares(scores: np.ndarray) -> np.ndarray:
    """Scores over their largest; those at or near 0 are put on a common floor so that a logarithm exists."""
    values = scores / (scores.max() or 1.0)
    positive = values[values > 0]
    floor = max(1e-5, float(positive.min()) / 2) if positive.size else 1e-5
    return np.maximum(values, floor)


def _points(ax: Axes, x: np.ndarray, y: np.ndarray, group: np.ndarray, names: tuple[str, str]) -> None:
    looks = [
        ("neither", style.RULE, "o", 9),
        (f"only {names[1]}", style.SERIES[1], "s", 26),
        (f"only {names[0]}", style.SERIES[0], "^", 30),
        ("kept by both", style.INK, "o", 26),
    ]
    for number, (label, colour, marker, size) in enumerate(looks):
        here = group == number
        if here.any():
            text = f"{label} ({int(here.sum()):,})"
            if number == 0:
                here = _some(here)
            look = {"s": size, "c": colour, "marker": marker, "lw": 0.4, "ec": style.PAPER}
            ax.scatter(x[here], y[here], label=text, zorder=2 + number, **look)


def _some(mask: np.ndarray) -> np.ndarray:
    """At most so many of the points that no graph keeps as can still be told apart, spread over all of them."""
    chosen = np.flatnonzero(mask)
    thin = np.zeros_like(mask)
    thin[chosen[:: -(-len(chosen) // _MOST_POINTS)]] = True
    return thin


def _name_points(ax: Axes, common: Common, x: np.ndarray, y: np.ndarray, group: np.ndarray, labels: int) -> None:
    """Text beside points, most telling first; what would overlap an earlier text is left out."""
    kept_by_one, kept_by_none = (group == 1) | (group == 2), group == 0
    order = np.lexsort((common.key, -np.maximum(x, y), kept_by_none, ~kept_by_one))
    taken: list[tuple[float, float]] = []
    for n in order[: 4 * labels].tolist():
        place = ax.transData.transform((x[n], y[n]))
        if len(taken) == labels or any(abs(place[0] - u) < _LABEL and abs(place[1] - v) < 13 for u, v in taken):
            continue
        taken.append((float(place[0]), float(place[1])))
        left = _crowd(ax, x, y, n, -1) <= _crowd(ax, x, y, n, 1) if x[n] > 0.02 else False
        name = "→".join(common.edge(int(common.key[n])))
        ax.annotate(
            name, (x[n], y[n]), xytext=(-5 if left else 5, 4), textcoords="offset points", size=7.5, color=style.INK,
            ha="right" if left else "left", zorder=8,
        )  # fmt: skip


def _crowd(ax: Axes, x: np.ndarray, y: np.ndarray, n: int, side: int) -> int:
    """How many points would lie under a label at this side of point `n`, the frame's edge counting as many."""
    places = ax.transData.transform(np.column_stack([x, y]))
    across, up = (places - places[n]).T
    if places[n][0] + side * _LABEL > ax.bbox.x1:
        return len(x)
    return int(((side * across > 2) & (side * across < _LABEL) & (up > -7) & (up < 16)).sum())


def _say_correlation(ax: Axes, first: np.ndarray, second: np.ndarray) -> None:
    rank = rank_correlation(first, second)
    if not np.isnan(rank):
        text = f"Spearman {rank:.2f} over {len(first):,} edges"
        ax.text(0.985, 0.02, text, transform=ax.transAxes, ha="right", size=8.5, color=style.FAINT_INK)


# ---- faithfulness ---------------------------------------------------------------------------------------------------


def curves(
    named: Mapping[str, Curve],
    path: str | Path | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Faithfulness against circuit size (log axis), one line per method, with CPR (higher is better) and CMD (lower).

    A curve is anything with `sizes`, `faithfulness`, `cpr` and `cmd`, such as `evaluate.curve` returns. Size 0 has no
    place on a logarithmic axis and is left out.

    Raises
    ------
    InputError: no curve, or one whose `sizes` and `faithfulness` differ in length.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> setting = (demo.model, {"planted": demo.circuit}, demo.tokens, demo.corrupted, demo.target)
    >>> figure = curves(tcl.evaluate.curves(*setting, sizes=[20, 200]))
    >>> len(figure.axes)
    1
    """
    instance("named", named, Mapping, "{name: curve, ...}, with curves as evaluate.curve returns them")
    if not named:
        raise InputError("`named` is empty: give at least one curve")
    for name, curve in named.items():
        instance(f"named[{name!r}]", curve, Curve, "a curve as evaluate.curve returns it")
    figure, axes = style.axes_for(ax, 6.8, 4.4)
    style.plain(axes)
    for number, (name, curve) in enumerate(named.items()):
        sizes, values = np.asarray(curve.sizes, float), np.asarray(curve.faithfulness, float)
        if sizes.shape != values.shape:
            raise InputError(f"`named[{name!r}]` has {sizes.size} sizes and {values.size} values: one value per size")
        some = sizes > 0
        axes.plot(
            sizes[some], values[some], color=style.SERIES[number % len(style.SERIES)], lw=2.0, ms=4.5,
            marker="osD^vPX*"[number % 8], mec=style.PAPER, mew=0.6,
            label=f"{name}   CPR {float(curve.cpr):.3f}, CMD {float(curve.cmd):.3f}",
        )  # fmt: skip
    for level in (0.0, 1.0):
        axes.axhline(level, color=style.FAINT_INK if level else style.RULE, lw=0.9, ls=(0, (3, 3)), zorder=0)
    axes.set(xscale="log", xlabel="edges in the circuit", ylabel="faithfulness")
    under_label = axes.transAxes + ScaledTranslation(0.0, -0.5, figure.dpi_scale_trans)
    columns = 2 if ax is None and len(named) > 2 else 1  # beside other panels there is no room for two
    axes.legend(
        frameon=False, fontsize=8.8, labelcolor=style.INK, borderaxespad=0.0, handletextpad=0.5, loc="upper left",
        bbox_to_anchor=(0.0, 0.0), bbox_transform=under_label, ncols=columns, columnspacing=1.2,
    )  # fmt: skip
    return style.finished(figure, axes, title, path, alone=ax is None)
