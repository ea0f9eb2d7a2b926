"""The layered drawing of a circuit: layers bottom up, one ribbon per kept edge."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.plot import style
from tl_circuitlasso.plot.layout import Layout, Point, place
from tl_circuitlasso.plot.rows import (
    ENDS,
    columns_of,
    fold,
    fold_numbered,
    node_label,
    row_label,
    shorten,
    site_ranks,
)

_NODE_HEIGHT = 0.32
_EDGE_STEP, _PORT_GAP = 0.14, 0.1  # between edges that meet at a node, and between the ports of a head
_MOST_SLOPE = 0.25  # sideways per unit upwards, where an edge passes close between nodes
_CLOSE = 0.35  # from a node, where an edge passes it upright
_ROW_WIDTH = 16  # nodes; a longer row is folded
_SHOW_ISOLATED = 64  # a model of at most this many components is drawn whole, unused ones faintly
_LINE_LETTERS = 15  # of a label; a longer one takes two lines
_MARGIN = 0.35


@dataclass(frozen=True, eq=False)
class Ribbon:
    """One drawn edge: which one, how strong, its colour, and its size relative to the strongest."""

    source: str
    target: str
    port: str
    score: float
    share: float

    @property
    def colour(self) -> str:
        return style.NEGATIVE if self.score < 0 and not self.port else style.PORT_COLOURS[self.port]

    @property
    def name(self) -> str:
        return f"edge:{self.source}->{self.target}" + (f"<{self.port}>" if self.port else "")


def circuit(
    graph: AttributionGraph,
    path: str | FilePath | None = None,
    *,
    title: str | None = None,
    max_edges: int = 300,
    isolated: bool | None = None,
    order: str = "auto",
    ax: Axes | None = None,
) -> Figure:
    """Draw the kept edges of `graph` between its nodes, in layers from `input` at the bottom to the target on top.

    An edge is as wide as its |score|; its colour tells the port it feeds (q, k, v or none), dashes and a bar at its
    end a negative score. Nodes outside the circuit are drawn faintly where the model is small (`isolated=None`),
    always (True) or never (False). `order="number"` puts every head in the column of its number and MLPs in a column of
    their own, "crossings" whatever makes edges cross least; "auto" numbers heads and leaves features and neurons free.
    A graph with more than `max_edges` kept edges shows its strongest ones, and says so.
    `path` ends in .png, .svg, .pdf, .jpg or .webp; in an SVG every edge has the id `edge:source->target<port>`.

    Raises
    ------
    InputError: `max_edges` below 1, an unknown `order` or suffix, or a path that can't be written to.

    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> graph = AttributionGraph.from_edges(
    ...     component_index(n_layers=1, n_heads=2), {("input", "a0.h1", "v"): .8, ("a0.h1", "logits"): 1.})
    >>> len([patch for patch in circuit(graph).axes[0].patches if (patch.get_gid() or "").startswith("edge:")])
    2
    """
    ribbons = strongest(graph, max_edges)
    names = _shown(graph, ribbons, isolated)
    columns, deal = _columns(names, order)
    rows, labels = _rows(graph, names, deal)
    texts = {name: _text(graph, name) for name in names}
    layout = place(rows, [(r.source, r.target) for r in ribbons], _widths(texts, ribbons), columns)
    notes = _notes(graph, ribbons, len(texts))
    page = _Page.around(layout, texts, ribbons, title, ax)
    page.bands(labels)
    page.ribbons()
    page.nodes(graph)
    page.captions(title, notes)
    return style.save(page.figure, path)


def strongest(graph: AttributionGraph, max_edges: int) -> list[Ribbon]:
    """The kept edges, strongest first, at most `max_edges` of them."""
    max_edges = whole_number("max_edges", max_edges, what="of edges to draw")
    kept = graph.kept.nonzero().flatten()
    order = kept[graph.score[kept].abs().argsort(descending=True, stable=True)][:max_edges]
    names = graph.index.names
    largest = float(graph.score[order[:1]].abs().sum()) or 1.0
    ends = zip(*(column[order].tolist() for column in (graph.source, graph.target, graph.port, graph.score)))
    return [Ribbon(names[s], names[t], PORTS[p], score, abs(score) / largest) for s, t, p, score in ends]


def _shown(graph: AttributionGraph, ribbons: Sequence[Ribbon], isolated: bool | None) -> list[str]:
    """The nodes to draw, in the order of computation."""
    small = len(graph.index) <= _SHOW_ISOLATED and columns_of(graph.index.names, _ROW_WIDTH) is not None
    whole = small if isolated is None else isolated
    used = {name for ribbon in ribbons for name in (ribbon.source, ribbon.target)}
    return [name for name in graph.index.names if whole or name in used or name in ENDS]


def _columns(names: Sequence[str], order: str) -> tuple[dict[str, int] | None, int]:
    """The nodes' columns, and how many rows the heads of a layer are dealt out to; None and 0 where nodes are free."""
    if order not in ("auto", "number", "crossings"):
        raise InputError(f"`order` is {order!r}: write 'auto', 'number' or 'crossings'")
    found = None if order == "crossings" else columns_of(names, _ROW_WIDTH)
    if found is None and order == "number":
        raise InputError("`order='number'` is for heads and MLPs, and this graph has other nodes: use 'crossings'")
    return found or (None, 0)


def _rows(graph: AttributionGraph, shown: Sequence[str], deal: int) -> tuple[list[list[str]], list[tuple[str, int]]]:
    """Node names row by row, bottom up, and per band of rows its label and how many rows it has."""
    ranks, names = site_ranks(graph), set(shown)
    by_rank: dict = {}
    for block in graph.index.blocks:
        drawn = [name for name in block.names if name in names]
        if drawn:
            sites, members = by_rank.setdefault(ranks[block.site], ([], []))
            sites.append(block.site)
            members.extend(drawn)
    rows, labels = [], []
    for _, (sites, members) in sorted(by_rank.items()):
        folded = fold_numbered(members, deal) if deal else fold(members, _ROW_WIDTH)
        rows += folded
        labels.append((row_label(sites), len(folded)))
    return rows, labels


def _text(graph: AttributionGraph, name: str) -> str:
    label = node_label(name, graph.node_info.get(name))
    lines = textwrap.wrap(label, _LINE_LETTERS) or [label]
    return "\n".join([lines[0], shorten(" ".join(lines[1:]), _LINE_LETTERS)] if lines[1:] else lines)


def _widths(texts: dict[str, str], ribbons: Sequence[Ribbon]) -> dict[str, float]:
    """Wide enough for the label and for the edges that meet at the node, those of each port side by side."""
    leaving = Counter(ribbon.source for ribbon in ribbons)
    entering = Counter(ribbon.target for ribbon in ribbons)
    ports = Counter(name for name, _ in {(ribbon.target, ribbon.port) for ribbon in ribbons})
    return {
        name: max(
            0.62,
            0.26 + 0.083 * max(map(len, text.split("\n"))) * (0.85 if "\n" in text else 1.0),
            min(2.6, 0.2 + _EDGE_STEP * max(leaving[name], entering[name]) + _PORT_GAP * ports[name]),
        )
        for name, text in texts.items()
    }


def _notes(graph: AttributionGraph, ribbons: Sequence[Ribbon], n_nodes: int) -> str:
    kept, pairs = int(graph.kept.sum()), graph.n_kept
    parts = [f"{pairs:,} edges kept" + (f", {kept:,} with q, k and v apart" if kept != pairs else "")]
    if len(ribbons) < kept:
        parts.append(f"the strongest {len(ribbons):,} drawn")
    hidden = len(graph.index) - n_nodes
    if hidden:
        parts.append(f"{hidden:,} nodes outside the circuit not drawn")
    return " · ".join(parts)


@dataclass(eq=False)
class _Page:
    """One drawing in progress: axes in layout units, and how many points on paper one unit of type is."""

    figure: Figure
    ax: Axes
    layout: Layout
    texts: dict[str, str]
    widths: dict[str, float]
    edges: Sequence[Ribbon]
    scale: float

    @classmethod
    def around(
        cls,
        layout: Layout,
        texts: dict[str, str],
        edges: Sequence[Ribbon],
        title: str | None,
        ax: Axes | None,
    ) -> "_Page":
        widths = _widths(texts, edges)
        sides = [(x - widths[n] / 2, x + widths[n] / 2) for n, (x, _) in layout.position.items()] + [layout.span]
        left, right = min(a for a, _ in sides) - _MARGIN - 1.0, max(b for _, b in sides) + _MARGIN
        bottom, top = -0.95, layout.row_y[-1] + (0.95 if title else 0.45)
        width, height = right - left, top - bottom
        shrink = min(1.0, 18 / width, 18 / height)
        figure, axes = style.axes_for(ax, max(width, 4.2) * shrink, height * shrink)
        if ax is None:
            axes.set_position((0, 0, 1, 1))
        box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        spare = max(0.0, (4.2 - width) / 2) if ax is None else 0.0
        axes.set(xlim=(left - spare, right + spare), ylim=(bottom, top), aspect="equal")
        axes.axis("off")
        return cls(figure, axes, layout, texts, widths, edges, min(box.width / width, box.height / height, 1.0))

    def bands(self, labels: Sequence[tuple[str, int]]) -> None:
        """A faint stripe behind every other group of rows, its name at the left."""
        left, right = self.ax.get_xlim()
        ys, row = self.layout.row_y, 0
        for label, n_rows in labels:
            low, high = ys[row] - 0.27, ys[row + n_rows - 1] + 0.27
            if label:
                corner, width = (left + 0.12, low), right - left - 0.24
                self.ax.add_patch(Rectangle(corner, width, high - low, fc=style.BAND, ec="none", zorder=0))
            place, size = (left + 0.26, (low + high) / 2), 8.2 * max(self.scale, 0.6)
            self.ax.text(*place, label, size=size, color=style.FAINT_INK, va="center", zorder=1)
            row += n_rows

    def ribbons(self) -> None:
        """Weak edges first, so that strong ones lie on top; each with a rim of paper, so that crossings can be read."""
        ends = _meeting_points(self.layout, self.edges, self.widths)
        fade = 1.0 if len(self.edges) < 80 else 0.75
        order = sorted(range(len(self.edges)), key=lambda n: self.edges[n].share)
        for depth, number in enumerate(order):
            edge, (start, end) = self.edges[number], ends[number]
            width = (0.7 + 3.6 * edge.share**0.7) * max(self.scale, 0.3)
            route = [start, *self.layout.routes[number][1:-1], end]
            self._ribbon(
                edge,
                route,
                self.layout.room[number],
                width,
                (0.5 + 0.5 * edge.share**0.5) * fade,
                2 + depth / (len(order) + 1),
            )

    def _ribbon(
        self, edge: Ribbon, route: list[Point], room: list[float], width: float, alpha: float, zorder: float
    ) -> None:
        tip = 0.035 + 0.016 * width / max(self.scale, 0.3)
        x, y = route[-1]
        line = smooth(*_past_nodes([*route[:-1], (x, y - tip)], room))
        rim = PathPatch(line, fc="none", ec=style.PAPER, lw=width + 2.2 * self.scale, zorder=zorder, capstyle="butt")
        dash = (0, (3.2, 1.6)) if edge.score < 0 else "solid"
        body = PathPatch(line, fc="none", ec=edge.colour, lw=width, ls=dash, alpha=alpha, zorder=zorder, gid=edge.name)
        self.ax.add_patch(rim)
        self.ax.add_patch(body)
        if edge.score < 0:
            head = Rectangle((x - tip, y - tip), 2 * tip, 0.032, fc=edge.colour, ec="none", zorder=4)
        else:
            half = 0.62 * tip + 0.008
            head = Polygon([(x - half, y - tip), (x + half, y - tip), (x, y)], fc=edge.colour, ec="none", zorder=4)
        head.set_alpha(alpha)
        self.ax.add_patch(head)

    def nodes(self, graph: AttributionGraph) -> None:
        used = {name for edge in self.edges for name in (edge.source, edge.target)}
        for name, (x, y) in self.layout.position.items():
            self._node(name, node_look(graph, name), (x, y), name in used)

    def _node(self, name: str, look: str, at: Point, used: bool) -> None:
        width, height = self.widths[name], _NODE_HEIGHT
        rounding = {"head": 0.15, "mlp": 0.05}.get(look, 0.09)
        box = FancyBboxPatch(
            (at[0] - width / 2 + rounding, at[1] - height / 2 + rounding),
            width - 2 * rounding,
            max(height - 2 * rounding, 1e-3),
            boxstyle=f"round,pad={rounding},rounding_size={rounding}",
            fc=style.NODE_FACES[look] if used else style.PAPER,
            ec=style.NODE_RIMS[look] if used else style.RULE,
            lw=(1.0 if used else 0.7) * self.scale,
            zorder=5,
            gid=f"node:{name}",
        )
        self.ax.add_patch(box)
        ink = style.PAPER if look == "end" and used else style.INK if used else "#B4BDC7"
        two_lines = "\n" in self.texts[name]
        self.ax.text(
            at[0], at[1] - 0.005, self.texts[name], size=(7.2 if two_lines else 9.0) * self.scale, color=ink, zorder=6,
            weight="bold" if look == "end" else "normal", ha="center", linespacing=1.0,
            va="center" if two_lines else "center_baseline",
        )  # fmt: skip

    def captions(self, title: str | None, notes: str) -> None:
        left, right = self.ax.get_xlim()
        type_scale = max(self.scale, 0.6)
        bottom, top = self.ax.get_ylim()
        if title:
            place, size = (left + 0.26, top - 0.36), 12.5 * type_scale
            self.ax.text(*place, title, size=size, color=style.INK, weight="bold", va="center")
        self.ax.text(right - 0.14, bottom + 0.14, notes, size=7.4 * type_scale, color=style.FAINT_INK, ha="right")
        handles = _legend(self.edges, type_scale)
        if handles:
            self.ax.legend(
                handles=handles, loc="lower left", ncols=len(handles), frameon=False, fontsize=7.8 * type_scale,
                labelcolor=style.INK, handlelength=1.9, columnspacing=1.3, borderaxespad=0.5,
                bbox_to_anchor=(0.0, 0.26 / (top - bottom)),
            )  # fmt: skip


def _legend(edges: Sequence[Ribbon], scale: float) -> list[Line2D]:
    """One entry per kind of edge that the drawing holds."""
    ports = [port for port in ("q", "k", "v", "") if any(e.port == port and (port or e.score >= 0) for e in edges)]
    words = {"": "edge"} | {port: f"into {port}" for port in "qkv"}
    lines = [Line2D([], [], color=style.PORT_COLOURS[port], lw=2.4 * scale, label=words[port]) for port in ports]
    negative = [edge for edge in edges if edge.score < 0]
    if negative:
        colour = style.NEGATIVE if any(not edge.port for edge in negative) else style.INK
        lines.append(Line2D([], [], color=colour, lw=2.4 * scale, ls=(0, (2.2, 1.2)), label="negative"))
    return lines


def node_look(graph: AttributionGraph, name: str) -> str:
    """How a node is painted: as a head, an MLP, an end of the model, or anything else."""
    site = graph.index.site(name)
    if site.kind in ENDS and name in ENDS:
        return "end"
    return site.kind if site.kind in ("head", "mlp") and "#" not in name else "other"


def _meeting_points(layout: Layout, edges: Sequence[Ribbon], widths: dict[str, float]) -> list[tuple[Point, Point]]:
    """Where each edge leaves its source and enters its target: side by side, in the order in which they come in.

    The q, k and v ports of a head are entered from left to right in that order.
    """
    leaving: dict[str, list[int]] = {}
    entering: dict[str, list[int]] = {}
    for number, edge in enumerate(edges):
        leaving.setdefault(edge.source, []).append(number)
        entering.setdefault(edge.target, []).append(number)
    first: dict[int, Point] = {}
    last: dict[int, Point] = {}
    for name, numbers in leaving.items():
        numbers.sort(key=lambda n: (layout.routes[n][1], PORTS.index(edges[n].port)))
        first |= _side_by_side(numbers, [0.0] * len(numbers), layout.position[name], widths[name], _NODE_HEIGHT / 2)
    for name, numbers in entering.items():
        numbers.sort(key=lambda n: (PORTS.index(edges[n].port), layout.routes[n][-2]))
        gaps = [0.0] + [_PORT_GAP * (edges[a].port != edges[b].port) for a, b in pairwise(numbers)]
        last |= _side_by_side(numbers, gaps, layout.position[name], widths[name], -_NODE_HEIGHT / 2)
    return [(first[number], last[number]) for number in range(len(edges))]


def _side_by_side(
    numbers: Sequence[int], gaps: Sequence[float], centre: Point, width: float, rise: float
) -> dict[int, Point]:
    """Places for edges along one side of a node: even steps, wider where a gap is asked for."""
    at, total = [], 0.0
    for number, gap in enumerate(gaps):
        total += gap + (_EDGE_STEP if number else 0.0)
        at.append(total)
    squeeze = min(1.0, 0.74 * width / total) if total else 1.0
    return {n: (centre[0] + (x - total / 2) * squeeze, centre[1] + rise) for n, x in zip(numbers, at)}


def _past_nodes(route: Sequence[Point], room: Sequence[float]) -> tuple[list[Point], list[float]]:
    """The route with an upright piece wherever it passes close beside a node, and how slanted it may be elsewhere."""
    points, slants = [], []
    for (x, y), space in zip(route, room):
        close = 0 < space < _CLOSE
        points += [(x, y - _NODE_HEIGHT / 2), (x, y + _NODE_HEIGHT / 2)] if close else [(x, y)]
        slants += [_MOST_SLOPE] * 2 if close else [max(_MOST_SLOPE, 0.55 * space / _NODE_HEIGHT)]
    return points, slants


def smooth(route: Sequence[Point], flattest: Sequence[float] | None = None) -> Path:
    """A curve through the points that never overshoots and stands upright at both ends.

    Cubic pieces in y whose slopes are limited as by Fritsch and Carlson (1980): the harmonic mean of the two sides, or
    0 where they turn; at no point flatter than `flattest` (sideways per unit upwards), so that the curve doesn't cut
    a corner of a node beside its bend point.
    """
    limits = [_MOST_SLOPE] * len(route) if flattest is None else flattest
    steep = [(x1 - x0) / (y1 - y0) for (x0, y0), (x1, y1) in pairwise(route)]
    inner = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(steep)]
    slopes = [0.0, *(min(max(slope, -most), most) for slope, most in zip(inner, limits[1:-1])), 0.0]
    points, codes = [route[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1), s0, s1 in zip(route, route[1:], slopes, slopes[1:]):
        reach = 0.46 * (y1 - y0)
        points += [(x0 + s0 * reach, y0 + reach), (x1 - s1 * reach, y1 - reach), (x1, y1)]
        codes += [Path.CURVE4] * 3
    return Path(points, codes)
