"""Heat map, strength path, scatter and curves show the numbers that they were given."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.plot.graphs import dense_graph, feature_graph, small_graph, strongest
from tl_circuitlasso import plot
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index


def test_heat_map_holds_the_adjacency_and_dots_the_kept_edges():
    graph = small_graph()
    axes = plot.adjacency(graph).axes[0]
    image = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    expected = graph.adjacency().numpy()
    candidates = {(graph.index.position(s), graph.index.position(t)) for s, t in graph.candidate_edges()}
    for cell in np.ndindex(*image.shape):
        assert (image[cell] == expected[cell]) if cell in candidates else np.isnan(image[cell])
    dots = next(c for c in axes.collections if c.get_gid() == "kept").get_offsets()
    found = {(graph.index.names[int(row)], graph.index.names[int(column)]) for column, row in dots}
    assert found == graph.kept_edges()


def test_heat_map_by_block_takes_the_largest_score_between_two_sites():
    graph = feature_graph()
    axes = plot.adjacency(graph, by="block").axes[0]
    image = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    assert image.shape == (3, 3)
    assert image[0, 1] == pytest.approx(float(graph.score.max()))
    assert image[1, 2] == 0.5 and np.isnan(image[1, 0])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["L2 resid_post", "L5 resid_post", "logits"]


def test_large_graphs_are_shown_by_block_on_their_own():
    blocks = (Block(Site("hook", 3, hook="blocks.3.hook_resid_post"), 0, tuple(range(500))), Block(Site("logits"), 1))
    graph = AttributionGraph.from_edges(NodeIndex(blocks), {("blocks.3.hook_resid_post#7", "logits"): 1.0})
    assert plot.adjacency(graph).axes[0].images[0].get_array().shape[0] == len(graph.index.blocks)
    with pytest.raises(InputError, match="`by='node'` with 501 nodes"):
        plot.adjacency(graph, by="node")
    with pytest.raises(InputError, match="`by` is 'layer'"):
        plot.adjacency(graph, by="layer")


def path_graphs():
    base = dense_graph(3, 3, 40)
    return {strength: strongest(base, k) for strength, k in [(0.5, 2), (0.2, 6), (0.1, 12), (0.05, 30)]}


def test_strength_path_draws_scores_and_counts():
    graphs = path_graphs()
    axes = plot.strength_path(graphs, top=5, chosen=0.1).axes
    lines = [line for line in axes[0].lines if (line.get_gid() or "").startswith("edge:")]
    assert len(lines) == 5 and len(axes) == 2
    strongest = graphs[0.5].edge_table().iloc[0]
    line = next(line for line in lines if line.get_gid() == f"edge:{strongest.source}->{strongest.target}")
    assert list(line.get_xdata()) == [0.5, 0.2, 0.1, 0.05]
    assert list(line.get_ydata()) == pytest.approx([strongest.score] * 4)
    assert list(axes[1].lines[0].get_ydata()) == [2, 6, 12, 30]
    assert axes[0].get_xlim()[0] > axes[0].get_xlim()[1]


def test_strength_path_shows_stability_where_it_is_known():
    graphs = {s: replace(g, extras={"stability": g.kept.double() * 0.9}) for s, g in path_graphs().items()}
    axes = plot.strength_path(graphs).axes
    assert [ax.get_ylabel() for ax in axes] == ["score", "stability", "edges kept"]
    assert max(max(line.get_ydata()) for line in axes[1].lines if line.get_gid()) == 0.9


def test_strength_path_names_what_is_wrong():
    graphs = path_graphs()
    with pytest.raises(InputError, match=r"`graphs` has the strengths \[0.5\]"):
        plot.strength_path({0.5: graphs[0.5]})
    with pytest.raises(InputError, match=r"`chosen` is 0\.3"):
        plot.strength_path(graphs, chosen=0.3)


def test_scatter_sorts_edges_by_who_keeps_them():
    a = dense_graph(3, 3, 10)
    b = strongest(replace(a, score=a.score * 2), 15)
    axes = plot.scatter(a, b, names=("ours", "theirs")).axes[0]
    counts = {c.get_label(): len(c.get_offsets()) for c in axes.collections}
    assert counts[f"neither ({len(a) - 15})"] == len(a) - 15
    assert counts["only theirs (5)"] == 5 and counts["kept by both (10)"] == 10
    assert any("Spearman 1.00" in text.get_text() for text in axes.texts)
    points = np.concatenate([np.asarray(c.get_offsets()) for c in axes.collections])
    np.testing.assert_allclose(points[:, 0], points[:, 1])


def test_scatter_survives_zero_scores_and_refuses_strangers():
    a = small_graph()
    assert plot.scatter(a, replace(a, score=a.score * 0)).axes
    other = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("m0", "logits"): 1.0})
    with pytest.raises(InputError, match="share no candidate edge"):
        plot.scatter(a, other)


def test_curves_leave_size_zero_out_and_say_cpr(tmp_path):
    curve = SimpleNamespace(sizes=[0, 1, 10, 100], faithfulness=[0, 0.2, 0.8, 1.0], cpr=0.9, cmd=0.1)
    axes = plot.curves({"ours": curve}, tmp_path / "curves.svg").axes[0]
    assert list(axes.lines[0].get_xdata()) == [1, 10, 100] and axes.get_xscale() == "log"
    assert "CPR 0.900, CMD 0.100" in axes.get_legend().get_texts()[0].get_text()
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    with pytest.raises(InputError, match="`named` is empty"):
        plot.curves({})
    short = SimpleNamespace(sizes=[1, 2], faithfulness=[1.0], cpr=0.0, cmd=0.0)
    with pytest.raises(InputError, match=r"`named\['x'\]` has 2 sizes and 1 values"):
        plot.curves({"x": short})
