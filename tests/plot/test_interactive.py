"""The page as a file: self-contained, safe against hostile labels, faithful to the graph."""

import json
import re
from dataclasses import replace
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plot.graphs import NASTY, dense_graph, feature_graph, small_graph, strongest
from tl_circuitlasso import plot
from tl_circuitlasso.data.sites import PORTS, Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index
from tl_circuitlasso.plot.interactive import embed

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def read(path) -> tuple[str, dict]:
    text = path.read_text(encoding="utf-8")
    return text, json.loads(_DATA.search(text)[1])


def edges_of(data: dict, graph: int = 0, *, kept: bool = True) -> set[tuple[str, str, str]]:
    names = [node["name"] for node in data["nodes"]]
    return {(names[e[0]], names[e[1]], PORTS[e[2]]) for e in data["graphs"][graph]["edges"] if e[4] == kept}


def rows(graph: AttributionGraph, *, kept: bool = True) -> set[tuple[str, str, str]]:
    table = graph.edge_table()
    return {(row.source, row.target, row.port) for row in table[table.kept == kept].itertuples()}


@pytest.mark.parametrize("graph", [small_graph(), dense_graph(3, 3, 9), feature_graph()])
def test_the_page_holds_the_graph(tmp_path, graph):
    path = plot.interactive(graph, tmp_path / "graph.html")
    _, data = read(path)
    assert edges_of(data) == rows(graph) and edges_of(data, kept=False) == rows(graph, kept=False)
    sizes = [abs(edge[3]) for edge in data["graphs"][0]["edges"]]
    assert sizes == sorted(sizes, reverse=True)
    assert data["n_nodes"] == len(graph.index)


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text, _ = read(plot.interactive(feature_graph(), tmp_path / "graph.html", other=feature_graph().top_k(3)))
    assert "default-src 'none'" in text
    loads = re.compile(
        r"""(?:\bsrc|\bhref|\bdata)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(|\bfetch\(|XMLHttpRequest|<link\b|<iframe\b"""
    )
    page = text.replace(_DATA.search(text)[1], "")
    assert not loads.findall(page)
    assert "Mike Bostock" in text and "ISC" in text  # the library's licence travels with it


def test_hostile_labels_stay_text(tmp_path):
    text, data = read(plot.interactive(feature_graph(), tmp_path / "graph.html", title=NASTY))
    assert NASTY not in text
    assert {node["label"] for node in data["nodes"]} >= {NASTY}
    assert text.count("</script>") == text.count("<script")


@given(
    st.recursive(st.text() | st.floats() | st.integers() | st.booleans() | st.none(), lambda x: st.lists(x, max_size=3))
)
def test_embedded_data_comes_back_and_never_ends_its_element(value):
    text = embed(value)
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == _without_nan(value)


def _without_nan(value):
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def test_only_the_strongest_edges_are_embedded_and_kept_ones_always(tmp_path):
    graph = dense_graph(3, 3, 12)
    weakest = graph.keep(graph.score <= graph.score.kthvalue(5).values)
    _, data = read(plot.interactive(weakest, tmp_path / "graph.html", max_edges=20))
    assert edges_of(data) == rows(weakest)
    assert edges_of(data, kept=False) == rows(strongest(graph, 15))
    assert data["note"].startswith(f"{len(graph) - 20} weakest")


def test_a_sparse_graph_over_many_features_stays_small(tmp_path):
    blocks = (
        Block(Site("hook", 3, hook="blocks.3.hook_resid_post"), 0, tuple(range(30_000))),
        Block(Site("logits"), 1),
    )
    edges = {("blocks.3.hook_resid_post#7", "logits"): 1.0, ("blocks.3.hook_resid_post#9", "logits"): 0.5}
    path = plot.interactive(AttributionGraph.from_edges(NodeIndex(blocks), edges), tmp_path / "graph.html")
    assert path.stat().st_size < 200_000
    assert len(read(path)[1]["nodes"]) == 3


def test_a_title_names_a_model_and_not_the_folder_where_it_lies(tmp_path):
    for model, named in ((str(tmp_path / "smollm2"), "smollm2"), ("org/model", "org/model")):
        text, _ = read(plot.interactive(replace(small_graph(), provenance={"model": model}), tmp_path / "graph.html"))
        assert f"<h1>Circuit of {named}</h1>" in text


def test_extras_and_provenance_are_told(tmp_path):
    graph = small_graph()
    extras = {"stability": torch.linspace(0, 1, len(graph), dtype=torch.float64), "effect": graph.score * float("nan")}
    told = replace(graph, extras=extras, provenance={"method": "CircuitLasso", "model": "toy", "seconds": 1.23456})
    text, data = read(plot.interactive(told, tmp_path / "graph.html"))
    assert data["extras"] == ["weight", "stability", "effect"]
    assert ["seconds", "1.235"] in data["graphs"][0]["about"]
    assert all(edge[7] is None for edge in data["graphs"][0]["edges"])
    assert "<h1>Circuit of toy</h1>" in text and data["graphs"][0]["name"] == "CircuitLasso"


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"prompts": 8, "prompts_given": 64, "partners": "random"}, "8 of 64, each beside random others"),
        ({"prompts": 8, "prompts_given": 8, "partners": "corrupted"}, "8, each beside its corrupted one"),
        ({"prompts": 8}, "8"),
    ],
)
def test_what_was_asked_comes_first(tmp_path, known, words):
    asked = {"target": "LogitDiff", "positions": "last", "unit": "logits"}
    told = replace(small_graph(), provenance={"arguments": {"seed": 0}, **asked, **known})
    about = read(plot.interactive(told, tmp_path / "graph.html"))[1]["graphs"][0]["about"]
    assert about[:4] == [["target", "LogitDiff"], ["positions", "last"], ["prompts", words], ["score", "logits"]]


def test_two_graphs_share_nodes_and_keep_their_names(tmp_path):
    a, b = small_graph(), small_graph().top_k(3)
    _, data = read(plot.interactive(a, tmp_path / "graph.html", other=b))
    assert [graph["name"] for graph in data["graphs"]] == ["graph 1", "graph 2"]
    assert edges_of(data, 0) == rows(a) and edges_of(data, 1) == rows(b)
    assert len(data["nodes"]) == len(a.index)
    _, data = read(plot.interactive(a, tmp_path / "graph.html", other=b, names=("ours", "EAP-IG")))
    assert [graph["name"] for graph in data["graphs"]] == ["ours", "EAP-IG"]


def test_graphs_over_different_sites_share_the_order_of_what_both_hold(tmp_path):
    a = AttributionGraph.from_edges(component_index(n_layers=2, n_heads=1, attn_only=True), {("a0.h0", "logits"): 1.0})
    b = AttributionGraph.from_edges(component_index(n_layers=2, n_heads=1), {("m0", "m1"): 1.0})
    _, data = read(plot.interactive(a, tmp_path / "graph.html", other=b))
    rank = {node["name"]: node["rank"] for node in data["nodes"]}
    order = ["input", "a0.h0", "m0", "a1.h0", "m1", "logits"]
    assert sorted(rank, key=lambda name: (rank[name], name)) == order and len(set(rank.values())) == 6


def test_graphs_that_disagree_on_the_order_are_refused(tmp_path):
    parallel = AttributionGraph.from_edges(
        component_index(n_layers=1, n_heads=1, parallel=True), {("input", "m0"): 1.0}
    )
    serial = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})
    with pytest.raises(InputError, match=r"`other` orders .* differently"):
        plot.interactive(parallel, tmp_path / "graph.html", other=serial)


def test_bad_arguments_are_named_and_nothing_is_left_behind(tmp_path):
    graph = small_graph()
    with pytest.raises(InputError, match="`max_edges` is 0"):
        plot.interactive(graph, tmp_path / "graph.html", max_edges=0)
    with pytest.raises(InputError, match="`names` has 1 entries"):
        plot.interactive(graph, tmp_path / "graph.html", other=graph, names=("one",))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="`path`"):
        plot.interactive(graph, tmp_path / "file" / "graph.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_bundled_library_is_small():
    folder = resources.files("tl_circuitlasso.plot") / "web"
    assert len((folder / "d3.min.js").read_bytes()) < 400_000
    assert "d3-zoom 3.0.0" in (folder / "d3.LICENSE.txt").read_text(encoding="utf-8")
