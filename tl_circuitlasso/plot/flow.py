"""Concepts on their way through the layers: carried along, merged, dropped."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from tl_circuitlasso._checks import instance, whole_number
from tl_circuitlasso.apps.concepts import Concepts
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.explaining import label
from tl_circuitlasso.plot import style
from tl_circuitlasso.plot.rows import shorten

Point = tuple[float, float]

COLOURS = {"persistence": style.SERIES[0], "merging": style.SERIES[2], "dropping": style.NEGATIVE}
_COLUMN, _ROW, _BOX = 2.6, 0.42, (1.7, 0.3)
_LETTERS = 17
_PARENTS = 5  # drawn of one merge


def flow(
    found: Concepts,
    path: str | FilePath | None = None,
    *,
    chains: int = 12,
    merges: int = 6,
    drops: int = 6,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw what `apps.concepts` found: hooks are columns, from left to right; every feature is a box.

    The longest `chains` of persistence (blue lanes), the strongest `merges` (green, parents running together, at most
    five of each) and the most frequent features dropped (`drops`; red, their lane ends in a cross), each as wide as its
    |score|. Features are called by their label or top tokens, else by number.

    Raises
    ------
    InputError: numbers below 0, nothing to draw, an unknown suffix, or a path that can't be written to.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> figure = flow(tcl.apps.concepts(graph))
    >>> len(figure.axes)
    1
    """
    instance("found", found, Concepts, "what apps.concepts returned; a graph is drawn by plot.circuit")
    for name, value in {"chains": chains, "merges": merges, "drops": drops}.items():
        whole_number(name, value, least=0)
    lanes = _lanes(found, chains, merges, drops)
    if not lanes:
        raise InputError("`found` has nothing to draw: loosen the rules of apps.concepts, or draw more of each")
    hooks = _hooks(found, {node for lane, _ in lanes for node in lane})
    places = _places(lanes, hooks)
    figure, axes = _page(ax, hooks, places)
    for (source, target), (score, kind) in _ribbons(found, lanes).items():
        _draw_ribbon(axes, places[source], places[target], score, COLOURS[kind])
    for node, kind in _kinds(lanes).items():
        _draw_node(axes, places[node], _text(found, node), kind)
    _captions(axes, hooks, title)
    return style.save(figure, path)


def _lanes(found: Concepts, chains: int, merges: int, drops: int) -> list[tuple[tuple[str, ...], str]]:
    """Groups of nodes that are drawn side by side, with what they show."""
    kept = [(tuple(nodes), "persistence") for nodes in found.persistence["nodes"][:chains]]
    kept += [
        ((*parents[:_PARENTS], node), "merging")
        for node, parents in zip(found.merging["node"][:merges], found.merging["parents"][:merges])
    ]
    return kept + [((node,), "dropping") for node in found.dropping["node"][:drops]]


def _hooks(found: Concepts, nodes: set[str]) -> dict[str, int]:
    sites = [str(block.site) for block in found.graph.index.blocks]
    used = {str(found.graph.index.site(node)) for node in nodes}
    return {site: number for number, site in enumerate(site for site in sites if site in used)}


def _places(lanes: Sequence[tuple[tuple[str, ...], str]], hooks: Mapping[str, int]) -> dict[str, Point]:
    """Each lane takes the next free row; what of it shares a hook is stacked."""
    places: dict[str, Point] = {}
    row = 0
    for nodes, _ in lanes:
        new = [node for node in nodes if node not in places]
        by_hook: dict[str, list[str]] = {}
        for node in new:
            by_hook.setdefault(node.rpartition("#")[0], []).append(node)
        height = max((len(some) for some in by_hook.values()), default=0)
        for hook, some in by_hook.items():
            for number, node in enumerate(some):
                offset = number + (height - len(some)) / 2
                places[node] = (hooks[hook] * _COLUMN, -(row + offset) * _ROW)
        row += height
    return places


def _ribbons(found: Concepts, lanes: Sequence[tuple[tuple[str, ...], str]]) -> dict[tuple[str, str], tuple[float, str]]:
    scores = _scores(found)
    drawn: dict[tuple[str, str], tuple[float, str]] = {}
    for nodes, kind in lanes:
        ends = pairwise(nodes) if kind == "persistence" else ((node, nodes[-1]) for node in nodes[:-1])
        for pair in ends:
            drawn.setdefault(pair, (abs(scores.get(pair, 0.0)), kind))
    return drawn


def _scores(found: Concepts) -> dict[tuple[str, str], float]:
    table = found.graph.edge_table()
    table = table[table["kept"]]
    best: dict[tuple[str, str], float] = {}
    for source, target, score in zip(table["source"], table["target"], table["score"]):
        best.setdefault((source, target), score)  # the table's strongest row of a pair comes first
    return best


def _kinds(lanes: Sequence[tuple[tuple[str, ...], str]]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for nodes, kind in lanes:
        for node in nodes:
            kinds[node] = "dropping" if kind == "dropping" else kinds.get(node, kind)
    return kinds


def _text(found: Concepts, node: str) -> str:
    return shorten(label(found.graph, node).strip() or "#" + node.rpartition("#")[2], _LETTERS)


def _page(ax: Axes | None, hooks: Mapping[str, int], places: Mapping[str, Point]) -> tuple[Figure, Axes]:
    bottom = min(y for _, y in places.values()) - _ROW
    right = (len(hooks) - 1) * _COLUMN + _BOX[0]
    figure, axes = style.axes_for(ax, max(5.0, min(16.0, right + 1.6)), max(2.2, min(18.0, 1.2 - bottom)))
    if ax is None:
        axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(-_BOX[0], right + 0.4), ylim=(bottom, 1.1))
    axes.axis("off")
    return figure, axes


def _draw_ribbon(ax: Axes, start: Point, end: Point, score: float, colour: str) -> None:
    (x0, y0), (x1, y1) = (start[0] + _BOX[0] / 2, start[1]), (end[0] - _BOX[0] / 2, end[1])
    middle = (x0 + x1) / 2
    curve = Path([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    width = 0.8 + 7.0 * min(score, 1.0)
    ax.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, linewidth=width, alpha=0.55, capstyle="butt"))


def _draw_node(ax: Axes, place: Point, text: str, kind: str) -> None:
    (x, y), (width, height) = place, _BOX
    corner = (x - width / 2, y - height / 2)
    colours: Any = {"facecolor": style.PAPER, "edgecolor": COLOURS[kind]}
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, linewidth=1.2, zorder=3, **colours))
    ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=style.INK, zorder=4, parse_math=False)
    if kind == "dropping":
        end = x + width / 2 + 0.35
        ax.plot([x + width / 2, end], [y, y], color=COLOURS[kind], linewidth=1.4, linestyle=(0, (2, 1.5)))
        ax.plot([end], [y], marker="x", color=COLOURS[kind], markersize=6, markeredgewidth=1.6)


def _captions(ax: Axes, hooks: Mapping[str, int], title: str | None) -> None:
    for hook, number in hooks.items():
        short = hook.removeprefix("blocks.").replace(".hook_", " ")
        ax.text(number * _COLUMN, 0.42, short, ha="center", va="bottom", fontsize=8.5, color=style.FAINT_INK)
    left = ax.get_xlim()[0]
    if title:
        ax.text(left + 0.1, 1.05, title, ha="left", va="top", fontsize=11, color=style.INK, weight="bold")
    x = left + 0.1
    for kind, colour in COLOURS.items():
        ax.text(x, ax.get_ylim()[0] + 0.04, kind, ha="left", va="bottom", fontsize=8, color=colour, weight="bold")
        x += 1.15
