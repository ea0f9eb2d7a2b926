"""The static drawing shows exactly the kept edges, labels inside their nodes, and files are whole or absent."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from tests.plot.graphs import NASTY, dense_graph, feature_graph, small_graph, strongest
from tl_circuitlasso import plot
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


def drawn(figure: Figure, kind: str) -> list[str]:
    gids = [patch.get_gid() or "" for patch in figure.axes[0].patches]
    return sorted(gid.removeprefix(f"{kind}:") for gid in gids if gid.startswith(f"{kind}:"))


def kept_names(graph: AttributionGraph) -> list[str]:
    table = graph.edge_table()
    rows = table[table.kept].itertuples()
    return sorted(f"{row.source}->{row.target}" + (f"<{row.port}>" if row.port else "") for row in rows)


@pytest.mark.parametrize("graph", [small_graph(), dense_graph(4, 4, 30, signed=True), feature_graph()])
def test_edges_drawn_are_the_kept_edges(graph):
    assert drawn(plot.circuit(graph), "edge") == kept_names(graph)


def test_a_small_model_is_drawn_whole_and_unused_parts_are_optional():
    graph = small_graph()
    assert len(drawn(plot.circuit(graph), "node")) == len(graph.index)
    without = drawn(plot.circuit(graph, isolated=False), "node")
    assert set(without) == graph.kept_nodes()


def test_a_large_model_leaves_unused_components_out_but_keeps_its_ends():
    graph = dense_graph(12, 12, 20)
    nodes = set(drawn(plot.circuit(graph), "node"))
    assert nodes == graph.kept_nodes() | {"input", "logits"}


def test_layers_stand_in_order():
    figure = plot.circuit(small_graph())
    heights = {p.get_gid(): p.get_window_extent().y0 for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)}
    column = ["input", "a0.h1", "m0", "a1.h0", "m1", "logits"]
    ys = [heights[f"node:{name}"] for name in column]
    assert ys == sorted(ys) and len(set(ys)) == len(ys)


@pytest.mark.parametrize("graph", [small_graph(), dense_graph(12, 12, 40), feature_graph()])
def test_labels_fit_into_their_nodes(graph):
    figure = plot.circuit(graph)
    axes = figure.axes[0]
    figure.canvas.draw()
    boxes = [patch.get_window_extent() for patch in axes.patches if (patch.get_gid() or "").startswith("node:")]
    texts = [text.get_window_extent() for text in axes.texts if text.get_zorder() == 6]
    assert len(texts) == len(boxes)
    for box, text in zip(boxes, texts):
        assert box.x0 <= text.x0 and text.x1 <= box.x1 and box.y0 <= text.y0 and text.y1 <= box.y1


def test_stronger_edges_are_wider_and_negative_ones_dashed():
    figure = plot.circuit(small_graph())
    edges = {p.get_gid(): p for p in figure.axes[0].patches if (p.get_gid() or "").startswith("edge:")}
    assert edges["edge:a1.h0->logits"].get_linewidth() > edges["edge:a1.h0->m1"].get_linewidth()
    assert edges["edge:a0.h1->m1"].get_linestyle() != "solid"
    assert edges["edge:a1.h0->m1"].get_linestyle() == "solid"
    ports = {edges[f"edge:{name}"].get_edgecolor()[:3] for name in ("m0->a1.h0<q>", "m0->a1.h0<k>", "input->a1.h0<v>")}
    assert len(ports) == 3


def test_too_many_edges_draw_the_strongest_and_say_so():
    graph = dense_graph(4, 4, 60)
    figure = plot.circuit(graph, max_edges=25)
    assert len(drawn(figure, "edge")) == 25
    assert any("strongest 25" in text.get_text() for text in figure.axes[0].texts)
    assert drawn(figure, "edge") == kept_names(strongest(graph, 25))


def test_a_circuit_without_edges_is_a_picture_too():
    graph = small_graph().top_k(0)
    assert drawn(plot.circuit(graph), "edge") == []
    empty = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {})
    assert len(drawn(plot.circuit(empty), "node")) == 4


def test_it_draws_into_given_axes():
    figure = Figure(figsize=(10, 5))
    left, right = figure.subplots(1, 2)
    assert plot.circuit(small_graph(), ax=right) is figure
    assert not left.patches and right.patches


def test_drawing_leaves_no_figure_behind():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot.circuit(small_graph())
    assert pyplot.get_fignums() == before


def test_svg_has_an_element_per_edge_and_survives_hostile_labels(tmp_path):
    path = tmp_path / "circuit.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.circuit(feature_graph(), path, title=NASTY)
    root = ET.parse(path).getroot()
    ids = {element.get("id") for element in root.iter()}
    assert {f"edge:{name}" for name in kept_names(feature_graph())} <= ids
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_files_are_written_whole_or_not_at_all(tmp_path, suffix, monkeypatch):
    path = tmp_path / "new" / f"circuit.{suffix}"
    plot.circuit(small_graph(), path)
    before = path.read_bytes()
    assert len(before) > 2000

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(InputError, match="disk full"):
        plot.circuit(small_graph(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r"`path`.*suffix '.bmp'"):
        plot.circuit(small_graph(), "circuit.bmp")
    with pytest.raises(InputError, match="`max_edges` is 0"):
        plot.circuit(small_graph(), max_edges=0)


def test_equal_zero_scores_are_drawn():
    graph = small_graph()
    flat = replace(graph, score=torch.zeros_like(graph.score))
    assert drawn(plot.circuit(flat), "edge") == kept_names(graph)


def head_places(figure) -> dict[str, float]:
    boxes = {(p.get_gid() or "")[5:]: p for p in figure.axes[0].patches if (p.get_gid() or "").startswith("node:")}
    return {name: p.get_x() + p.get_width() / 2 for name, p in boxes.items()}


def test_heads_stand_in_the_columns_of_their_numbers():
    graph = dense_graph(3, 5, 10)
    places = head_places(plot.circuit(graph))
    for layer in range(3):
        row = [places[f"a{layer}.h{head}"] for head in range(5)]
        assert row == sorted(row) and row == pytest.approx([places[f"a0.h{head}"] for head in range(5)], abs=0.2)
    assert places["m0"] == pytest.approx(places["m2"], abs=0.2)
    free = head_places(plot.circuit(graph, order="crossings"))
    rows = [[free[f"a{layer}.h{head}"] for head in range(5)] for layer in range(3)]
    assert any(row != sorted(row) for row in rows)


def test_many_heads_are_dealt_out_to_several_rows():
    graph = dense_graph(1, 40, 30)
    figure = plot.circuit(graph, isolated=True)
    places = head_places(figure)
    assert places["a0.h0"] == pytest.approx(places["a0.h2"], abs=0.2) and places["a0.h3"] > places["a0.h0"]


def test_features_have_no_numbered_order():
    with pytest.raises(InputError, match="`order='number'`"):
        plot.circuit(feature_graph(), order="number")
    with pytest.raises(InputError, match="`order` is 'size'"):
        plot.circuit(small_graph(), order="size")
    assert plot.circuit(feature_graph(), order="auto")
