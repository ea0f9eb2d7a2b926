"""Where nodes stand and how edges run in a layered drawing (Sugiyama, Tagawa and Toda 1981).

The rows are given by the order of computation. An edge that skips rows gets a bend point in every row it crosses, so
that it runs around the nodes of that row instead of under them. Bend points and nodes are ordered together to cross
little (barycentre sweeps), then moved sideways to make edges straight: in each row a weighted least-squares fit under
minimum distances, which is an isotonic regression. Nodes that are given a column keep it, and only bend points move.

>>> drawing = place([["input"], ["a0.h0", "a0.h1"], ["logits"]], [("input", "a0.h0"), ("a0.h0", "logits")], {})
>>> drawing.row_of["logits"], len(drawing.routes[0])
(2, 2)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from scipy.optimize import isotonic_regression

Point = tuple[float, float]
_NODE_GAP, _BEND_WIDTH, _BEND_GAP = 0.26, 0.06, 0.12
_COLUMN_GAP, _FIRM = 0.34, 1e5  # between columns; how little a node in a column gives way to bend points
_SWEEPS, _RELAXATIONS = 16, 120
_PATIENCE = 100_000  # items times relaxations: a second or so
_ASPECT = 1.15  # height over width to aim at
MAX_BENDS = 8000  # past that many, long edges run straight: nobody can follow them one by one anyway


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions in units of about one inch, bottom row at y = 0.

    `routes` has one polyline per edge, from its source over its bend points to its target; `room` says of each of those
    points how far it is from the nearest node of its row (0 at the two ends).
    """

    position: dict[str, Point]
    row_of: dict[str, int]
    row_y: list[float]
    routes: list[list[Point]]
    room: list[list[float]]

    @property
    def width(self) -> float:
        return self.span[1] - self.span[0]

    @property
    def span(self) -> tuple[float, float]:
        """The leftmost and rightmost x in use, without the width of the nodes."""
        xs = [x for x, _ in self.position.values()] + [x for route in self.routes for x, _ in route]
        return (min(xs), max(xs)) if xs else (0.0, 0.0)


@dataclass(eq=False)
class _Item:
    """A node or a bend point while it's being placed; `links` hold (item, weight) by direction: -1 below, +1 above."""

    width: float
    bend: bool
    x: float = 0.0
    fixed: float | None = None
    links: dict[int, list[tuple["_Item", float]]] = field(default_factory=lambda: {-1: [], 1: []})


def place(
    rows: Sequence[Sequence[str]],
    edges: Sequence[tuple[str, str]],
    widths: Mapping[str, float],
    columns: Mapping[str, int] | None = None,
) -> Layout:
    """Lay out `rows` (bottom up, each a list of node names) with `edges` that all run upwards.

    With `columns` the nodes of a column stand above each other, those of column 0 and those without one in the middle;
    left out, nodes are ordered and moved so that edges cross little and run straight.
    """
    items = {name: _Item(widths.get(name, 0.6), False) for row in rows for name in row}
    if columns is not None:
        _fix(items, columns)
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    grid = [[items[name] for name in row] for row in rows]
    spans = [row_of[target] - row_of[source] - 1 for source, target in edges]
    bent = sum(spans) <= MAX_BENDS
    chains = [_chain(items, row_of, grid, edge, bent) for edge in edges]
    if columns is not None:
        _order_bends(grid)
    elif bent:
        _order(grid)
    n_items = sum(map(len, grid))
    turns = max(20, min(_RELAXATIONS, _PATIENCE // n_items)) if bent else 0
    _straighten(grid, turns if columns is None else max(turns, 2))
    row_y = _proportion(grid)
    position = {name: (item.x, row_y[row_of[name]]) for name, item in items.items()}
    routes = [
        [(item.x, row_y[row]) for item, row in zip(chain, _chain_rows(row_of, edge, bent))]
        for chain, edge in zip(chains, edges)
    ]
    room = [
        [_room(item, grid[row]) for item, row in zip(chain, _chain_rows(row_of, edge, bent))]
        for chain, edge in zip(chains, edges)
    ]
    return Layout(position, row_of, row_y, routes, room)


def _room(item: _Item, row: Sequence[_Item]) -> float:
    """How far a bend point is from the nearest node of its row."""
    if not item.bend:
        return 0.0
    return min((abs(item.x - other.x) - other.width / 2 for other in row if not other.bend), default=math.inf)


def _chain_rows(row_of: Mapping[str, int], edge: tuple[str, str], bent: bool) -> Sequence[int]:
    first, last = row_of[edge[0]], row_of[edge[1]]
    return range(first, last + 1) if bent else (first, last)


def _chain(
    items: Mapping[str, _Item],
    row_of: Mapping[str, int],
    grid: list[list[_Item]],
    edge: tuple[str, str],
    bent: bool,
) -> list[_Item]:
    """The items that an edge runs through; its bend points are added to their rows."""
    source, target = (items[name] for name in edge)
    rows = _chain_rows(row_of, edge, bent)
    bends = [_Item(_BEND_WIDTH, True) for _ in rows[1:-1]]
    for row, bend in zip(rows[1:-1], bends):
        grid[row].append(bend)
    chain = [source, *bends, target]
    if bent or rows[1] - rows[0] == 1:
        for below, above in pairwise(chain):
            weight = (1.0, 2.0, 8.0)[below.bend + above.bend]  # straight in the middle, free at the ends
            below.links[1].append((above, weight))
            above.links[-1].append((below, weight))
    return chain


# ---- order within a row ---------------------------------------------------------------------------------------------


def _order(grid: list[list[_Item]]) -> None:
    """Sort each row by the mean place of its neighbours, up and down in turn; the sweep with fewest crossings wins."""
    _number(grid)
    best, best_crossings = [list(row) for row in grid], _crossings(grid)
    for sweep in range(_SWEEPS):
        direction = -1 if sweep % 2 == 0 else 1
        for row in grid[::-direction]:
            row.sort(key=lambda item: _barycentre(item, direction, sweep > _SWEEPS // 2))
            _number([row])
        crossings = _crossings(grid)
        if crossings < best_crossings:
            best, best_crossings = [list(row) for row in grid], crossings
        if best_crossings == 0:
            break
    grid[:] = best
    _number(grid)


def _number(grid: list[list[_Item]]) -> None:
    for row in grid:
        for place_, item in enumerate(row):
            item.x = (place_ + 0.5) / len(row)


def _fix(items: Mapping[str, _Item], columns: Mapping[str, int]) -> None:
    """The place of every node: column 0 in the middle, each column as wide as its widest node."""
    widest: dict[int, float] = {}
    for name, column in columns.items():
        widest[column] = max(widest.get(column, 0.0), items[name].width)
    centre = {0: 0.0}
    for side in (-1, 1):
        edge = widest[0] / 2 + _COLUMN_GAP if 0 in widest else _COLUMN_GAP / 2
        for column in sorted((column for column in widest if column * side > 0), key=abs):
            centre[column] = side * (edge + widest[column] / 2)
            edge += widest[column] + _COLUMN_GAP
    for name, item in items.items():
        item.fixed = item.x = centre[columns.get(name, 0)]


def _order_bends(grid: list[list[_Item]]) -> None:
    """Nodes as they stand; each bend point where the straight line between its edge's ends would pass."""
    for turn in range(_SWEEPS):
        for row in grid if turn % 2 == 0 else grid[::-1]:
            for item in row:
                if item.bend:
                    near = item.links[-1] + item.links[1]
                    item.x = sum(other.x for other, _ in near) / len(near)
    for row in grid:
        row.sort(key=lambda item: (item.x, _barycentre(item, 1, True)))


def _barycentre(item: _Item, direction: int, both: bool) -> float:
    links = item.links[direction] + (item.links[-direction] if both else [])
    return sum(other.x for other, _ in links) / len(links) if links else item.x


def _crossings(grid: list[list[_Item]]) -> int:
    """How many pairs of edges cross between neighbouring rows: inversions, counted with a Fenwick tree."""
    total = 0
    for below, above in pairwise(grid):
        place_ = {id(item): number for number, item in enumerate(above)}
        tree, seen = [0] * (len(above) + 1), 0
        for item in below:
            ends = sorted(place_[id(other)] for other, _ in item.links[1])
            total += sum(seen - _fenwick_sum(tree, end + 1) for end in ends)
            for end in ends:
                _fenwick_add(tree, end + 1)
            seen += len(ends)
    return total


def _fenwick_add(tree: list[int], at: int) -> None:
    while at < len(tree):
        tree[at] += 1
        at += at & -at


def _fenwick_sum(tree: list[int], at: int) -> int:
    total = 0
    while at > 0:
        total += tree[at]
        at -= at & -at
    return total


# ---- coordinates ----------------------------------------------------------------------------------------------------


def _straighten(grid: list[list[_Item]], relaxations: int) -> None:
    offsets = [_offsets(row) for row in grid]
    for row, offset in zip(grid, offsets):
        middle = offset[-1] / 2 if offset else 0.0
        for item, at in zip(row, offset):
            item.x = at - middle
    for turn in range(relaxations):
        numbers = range(len(grid)) if turn % 2 == 0 else range(len(grid) - 1, -1, -1)
        for number in numbers:
            _relax(grid[number], offsets[number])
    _centre(grid)


def _offsets(row: Sequence[_Item]) -> list[float]:
    """The tightest positions that keep every two neighbours apart."""
    at, out = 0.0, []
    for number, item in enumerate(row):
        if number:
            before = row[number - 1]
            gap = _BEND_GAP if before.bend or item.bend else _NODE_GAP
            at += (before.width + item.width) / 2 + gap
        out.append(at)
    return out


def _relax(row: Sequence[_Item], offset: Sequence[float]) -> None:
    """Move one row towards its neighbours: min sum w (x - wish)^2 with x[i+1] - x[i] >= offset[i+1] - offset[i]."""
    wishes, weights = [], []
    for item, at in zip(row, offset):
        links = item.links[-1] + item.links[1]
        weight = sum(w for _, w in links)
        wishes.append((sum(other.x * w for other, w in links) / weight if weight else item.x) - at)
        weights.append(weight or 0.1)
        if item.fixed is not None:
            wishes[-1], weights[-1] = item.fixed - at, _FIRM
    for item, value, at in zip(row, isotonic_regression(wishes, weights=weights).x.tolist(), offset):
        item.x = value + at


def _extent(grid: Sequence[Sequence[_Item]]) -> tuple[float, float]:
    xs = [item.x for row in grid for item in row]
    return (min(xs), max(xs)) if xs else (0.0, 0.0)


def _centre(grid: list[list[_Item]]) -> None:
    middle = sum(_extent(grid)) / 2
    for row in grid:
        for item in row:
            item.x -= middle


def _row_heights(grid: Sequence[Sequence[_Item]]) -> list[float]:
    """More room between rows whose edges run far sideways, so that none gets flat."""
    heights = [0.0]
    for row in grid[:-1]:
        reach = max((abs(item.x - other.x) for item in row for other, _ in item.links[1]), default=0.0)
        heights.append(heights[-1] + min(1.9, 0.72 + 0.14 * reach))
    return heights


def _proportion(grid: list[list[_Item]]) -> list[float]:
    """The rows' heights; columns and rows are spread towards a page that is a little taller than wide."""
    heights = _row_heights(grid)
    low, high = _extent(grid)
    width, height = high - low + 1.2, heights[-1] + 0.6
    stretch = min(1.3, max(1.0, 0.85 * height / _ASPECT / width))
    for row in grid:
        for item in row:
            item.x *= stretch
    heights = _row_heights(grid)
    rise = min(1.4, max(0.85, _ASPECT * width * stretch / (heights[-1] + 0.6)))
    return [y * rise for y in heights]
