"""Layered layout: nothing overlaps, long edges run around nodes, and easy crossings are removed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.plot import layout
from tl_circuitlasso.plot.circuit import smooth
from tl_circuitlasso.plot.layout import place

WIDTH = 0.6


def traced(route) -> np.ndarray:
    """Many points of the curve; it's flattened at a hundred times the size, because that is done to the pixel."""
    large = smooth([(100 * x, 100 * y) for x, y in route])
    return large.to_polygons(closed_only=False)[0] / 100


@st.composite
def drawings(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    rows = [[f"{row}.{n}" for n in range(size)] for row, size in enumerate(sizes)]
    pairs = [
        (s, t) for low in range(len(rows)) for high in range(low + 1, len(rows)) for s in rows[low] for t in rows[high]
    ]
    return rows, draw(st.lists(st.sampled_from(pairs), max_size=25, unique=True))


@given(drawings())
def test_nodes_of_a_row_keep_their_distance(drawing):
    rows, edges = drawing
    placed = place(rows, edges, {})
    for row in rows:
        xs = sorted(placed.position[name][0] for name in row)
        assert all(right - left >= WIDTH - 1e-9 for left, right in pairwise(xs))
        assert len({placed.position[name][1] for name in row}) == 1


@given(drawings())
def test_routes_join_their_ends_upwards_and_miss_every_node(drawing):
    rows, edges = drawing
    placed = place(rows, edges, {})
    for (source, target), route in zip(edges, placed.routes):
        assert route[0] == placed.position[source] and route[-1] == placed.position[target]
        ys = [y for _, y in route]
        assert ys == sorted(set(ys))
        for x, y in route[1:-1]:
            row = rows[placed.row_y.index(y)]
            assert all(abs(placed.position[name][0] - x) >= WIDTH / 2 for name in row)


@given(drawings())
def test_curves_pass_beside_nodes_not_through_them(drawing):
    rows, edges = drawing
    placed = place(rows, edges, {})
    for (source, target), route in zip(edges, placed.routes):
        curve = traced(route)
        for name, (x, y) in placed.position.items():
            if name not in (source, target):
                inside = (np.abs(curve[:, 1] - y) < 0.15) & (np.abs(curve[:, 0] - x) < WIDTH / 2)
                assert not inside.any(), (name, source, target)


def test_easy_crossings_are_removed():
    rows = [["a", "b", "c"], ["A", "B", "C"]]
    placed = place(rows, [("a", "C"), ("b", "B"), ("c", "A")], {})
    xs = {name: x for name, (x, _) in placed.position.items()}
    below, above = sorted("abc", key=xs.get), sorted("ABC", key=xs.get)
    assert [{"a": "C", "b": "B", "c": "A"}[name] for name in below] == above


def test_wide_nodes_get_their_room():
    placed = place([["a", "b"], ["c"]], [("a", "c"), ("b", "c")], {"a": 3.0, "b": 1.0})
    assert abs(placed.position["a"][0] - placed.position["b"][0]) >= 2.0


def test_huge_graphs_are_laid_out_on_a_plain_grid(monkeypatch):
    monkeypatch.setattr(layout, "MAX_BENDS", 1)
    rows = [["a", "b"], ["c"], ["d"], ["e"]]
    placed = place(rows, [("a", "e"), ("b", "d")], {})
    assert [len(route) for route in placed.routes] == [2, 2]
    assert placed.position["a"][0] < placed.position["b"][0]


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=7))
def test_curves_stay_between_their_points(xs):
    points = [(x, float(y)) for y, x in enumerate(xs)]
    curve = traced(points)
    for (x0, y0), (x1, y1) in pairwise(points):
        piece = curve[(curve[:, 1] >= y0) & (curve[:, 1] <= y1)]
        assert piece[:, 0].min() >= min(x0, x1) - 0.02 and piece[:, 0].max() <= max(x0, x1) + 0.02


@given(drawings(), st.integers(1, 5))
def test_columns_stand_above_each_other_and_bends_run_around_them(drawing, middle):
    rows, edges = drawing
    columns = {name: n - middle for row in rows for n, name in enumerate(row)}
    placed = place(rows, edges, {}, columns)
    for row in rows:
        xs = [placed.position[name][0] for name in row]
        assert all(right - left >= WIDTH - 1e-9 for left, right in pairwise(xs))  # in the order of their columns
    for route, room in zip(placed.routes, placed.room):
        for (x, y), space in list(zip(route, room))[1:-1]:
            row = rows[placed.row_y.index(y)]
            nearest = min(abs(placed.position[name][0] - x) for name in row) - WIDTH / 2
            assert nearest >= 0 and space == pytest.approx(nearest)


def test_without_bends_columns_are_exact():
    rows = [["in"], ["a", "b", "c"], ["m"], ["d", "f"], ["out"]]
    columns = {"a": -1, "b": 1, "c": 2, "m": 0, "d": -1, "f": 2}
    placed = place(rows, [("in", "a"), ("a", "m"), ("m", "d")], {"b": 1.4}, columns).position
    assert placed["a"][0] == pytest.approx(placed["d"][0]) and placed["c"][0] == pytest.approx(placed["f"][0])
    assert placed["in"][0] == pytest.approx(placed["m"][0]) and placed["out"][0] == pytest.approx(placed["m"][0])
    assert placed["a"][0] < placed["m"][0] < placed["b"][0] < placed["c"][0]
