"""The attribution graph: what it refuses, what its operations promise, and that files lose nothing."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.explaining import explain
from tl_circuitlasso.graph.nodes import NodeIndex, component_index

INDEX = component_index(n_layers=2, n_heads=2)


def random_graph(seed: int = 0, ports: bool = True, index: NodeIndex = INDEX) -> AttributionGraph:
    generator = torch.Generator().manual_seed(seed)
    edges = {}
    for s, t in index.allowed().nonzero().tolist():
        heads = index.names[t].startswith("a") and ports
        for port in ("q", "k", "v") if heads else ("",):
            edges[index.names[s], index.names[t], port] = torch.randn(1, generator=generator).item()
    graph = AttributionGraph.from_edges(index, edges, provenance={"seed": seed})
    return graph.keep(torch.rand(len(graph), generator=generator) < 0.4)


graphs = st.builds(random_graph, seed=st.integers(0, 10_000), ports=st.booleans())


@given(graphs, st.floats(0, 3))
def test_threshold_keeps_exactly_what_reaches_it(graph: AttributionGraph, x: float) -> None:
    assert torch.equal(graph.threshold(x).kept, graph.score.abs() >= x)


@given(graphs)
def test_prune_leaves_only_edges_on_a_path_and_is_idempotent(graph: AttributionGraph) -> None:
    import networkx as nx

    pruned = graph.prune()
    net = nx.DiGraph(graph.kept_edges())
    net.add_nodes_from(["input", "logits"])
    on_path = nx.descendants(net, "input") | {"input"}
    to_sink = nx.ancestors(net, "logits") | {"logits"}
    assert pruned.kept_edges() == {(s, t) for s, t in graph.kept_edges() if s in on_path and t in to_sink}
    assert torch.equal(pruned.prune().kept, pruned.kept)


@given(graphs)
def test_subgraph_keeps_edges_inside(graph: AttributionGraph) -> None:
    nodes = {"input", "a0.h0", "m1", "logits"}
    inside = graph.subgraph(nodes)
    assert inside.kept_edges() == {e for e in graph.kept_edges() if set(e) <= nodes}
    assert len(inside) == len(graph)


@given(graphs)
def test_adjacency_merges_ports_by_size(graph: AttributionGraph) -> None:
    matrix = graph.adjacency()
    table = graph.edge_table()
    for (source, target), rows in table.groupby(["source", "target"]):
        best = rows.score.loc[rows.score.abs().idxmax()]
        assert matrix[INDEX.position(source), INDEX.position(target)] == best
    assert torch.equal(matrix.abs(), graph.adjacency(absolute=True))
    assert not bool(matrix[~INDEX.allowed()].any())


def test_edge_table_has_the_promised_columns_in_order_of_size() -> None:
    table = random_graph().edge_table()
    assert list(table.columns) == ["source", "target", "port", "weight", "score", "kept"]
    assert table.score.abs().is_monotonic_decreasing
    assert set(table.port) == {"", "q", "k", "v"}


@pytest.mark.parametrize("name", ["g.safetensors", "g.json", "folder"])
@given(graph=graphs)
def test_save_and_load_lose_nothing(tmp_path: Path, name: str, graph: AttributionGraph) -> None:
    from dataclasses import replace

    certificates = ({"target": "m0", "gap": 1e-5, "iterations": 3, "converged": True},)
    graph = replace(graph, extras={"stability": graph.score.abs()}, certificates=certificates)
    graph.save(tmp_path / name)
    back = AttributionGraph.load(tmp_path / name)
    for column in ("source", "target", "port", "score", "weight", "kept"):
        assert torch.equal(getattr(back, column), getattr(graph, column)), column
    assert torch.equal(back.extras["stability"], graph.extras["stability"])
    assert back.index == graph.index
    assert back.provenance == graph.provenance
    assert back.certificate.equals(graph.certificate)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_showing_names_the_strongest_edges() -> None:
    graph = random_graph().top_k(3)
    first = graph.edge_table().query("kept").iloc[0]
    assert f"{first.source} -> {first.target}" in repr(graph)
    assert "3 of" in repr(graph) and first.source in graph._repr_html_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": torch.tensor([float("nan")])}, "`score`"),
        ({"extras": {"stability": torch.tensor([1.0, 2.0])}}, "length"),
        ({"source": torch.tensor([7]), "target": torch.tensor([0])}, "order of computation"),
        ({"source": torch.tensor([99])}, "positions in the index"),
        ({"port": torch.tensor([9])}, "`port`"),
    ],
)
def test_inconsistent_columns_are_refused(change: dict, message: str) -> None:
    columns = {
        "source": torch.tensor([0]),
        "target": torch.tensor([1]),
        "port": torch.tensor([0]),
        "score": torch.tensor([1.0]),
        "weight": torch.tensor([1.0]),
        "kept": torch.tensor([True]),
    }
    with pytest.raises(InputError, match=message):
        AttributionGraph(INDEX, **(columns | change))


def test_wrong_arguments_are_named() -> None:
    graph = random_graph()
    for call, name in [
        (lambda: graph.threshold(-1), "`x`"),
        (lambda: graph.threshold(float("nan")), "`x`"),
        (lambda: graph.top_k(-1), "`k`"),
        (lambda: graph.top_k(True), "`k`"),
        (lambda: graph.subgraph(["a9.h9"]), "a9.h9"),
        (lambda: graph.adjacency(port="z"), "`port`"),
        (lambda: AttributionGraph.from_edges(INDEX, {("input", "m0", "x"): 1.0}), "port"),
    ]:
        with pytest.raises(InputError, match=name):
            call()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InputError, match="`path`"):
        random_graph().save(tmp_path / "file" / "g.json")


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    random_graph().save(good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:200])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(2)}, str(foreign))
    random_graph().save(tmp_path / "good.json")
    data = json.loads((tmp_path / "good.json").read_text())
    wrong = {
        "version.json": data | {"version": 99},
        "kind.json": data | {"kind": "eap"},
        "edges.json": {k: v for k, v in data.items() if k != "edges"},
        "node.json": data | {"edges": [data["edges"][0] | {"source": "nobody"}]},
        "score.json": data | {"edges": [data["edges"][0] | {"score": "high"}]},
        "list.json": [1, 2],
    }
    for name, content in wrong.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "text.json").write_text("{")
    names = [cut, foreign, tmp_path / "missing.json", tmp_path / "no.safetensors", tmp_path / "text.json"]
    for path in [*names, *(tmp_path / name for name in wrong)]:
        with pytest.raises(FormatError, match=path.stem):
            AttributionGraph.load(path)


# ---- verbs of other rooms -------------------------------------------------------------------------------------------


def test_nodes_and_edges_are_those_of_the_circuit_in_order() -> None:
    graph = random_graph()
    assert set(graph.nodes) == graph.kept_nodes() and list(graph.nodes) == sorted(graph.nodes, key=INDEX.position)
    edges = graph.edges
    assert set(zip(edges.source, edges.target)) == graph.kept_edges() and len(edges) == int(graph.kept.sum())
    assert edges.score.abs().is_monotonic_decreasing and "kept" not in edges


@pytest.mark.parametrize("format", ["png", "svg", "html", "eap", "circuit-lasso", "graphml"])
def test_a_graph_is_written_in_any_format_and_opened_again(format: str, tmp_path: Path) -> None:
    import tl_circuitlasso as tcl

    graph = random_graph().prune()
    suffix = {"eap": "json", "circuit-lasso": "safetensors"}.get(format, format)
    path = graph.to(format, tmp_path / f"graph.{suffix}")
    assert path.stat().st_size > 500
    if format not in ("png", "svg", "html"):
        assert tcl.load(path).kept_edges() == graph.kept_edges()
    if format == "png":
        with pytest.raises(InputError, match=r"doesn't end in \.png"):
            graph.to("png", tmp_path / "graph.jpg")


def test_a_notebook_draws_the_circuit(monkeypatch: pytest.MonkeyPatch) -> None:
    import webbrowser

    graph = random_graph()
    assert 'src="data:image/svg+xml;base64,' in graph._repr_html_() and graph.nodes[0] in graph._repr_html_()
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = graph.show(title="A title")
    assert opened == [page.path.as_uri()] and "<iframe srcdoc=" in page._repr_html_()
    assert "<script" not in page._repr_html_()  # the page is the value of an attribute


def test_masks_and_names_that_fit_no_graph_are_refused() -> None:
    graph = random_graph()
    assert graph.keep([True] * len(graph)).n_kept == len(graph.candidate_edges())
    for mask in ([True], [1] * len(graph), ["a"], graph.score):
        with pytest.raises(InputError, match="`mask`"):
            graph.keep(mask)
    with pytest.raises(InputError, match=r"`nodes` is 'm0'"):
        graph.subgraph("m0")


def test_a_node_outside_the_circuit_says_so() -> None:
    graph = AttributionGraph.from_edges(
        component_index(n_layers=2, n_heads=2), {("a0.h0", "m1"): 1.0, ("m0", "m1"): 0.5}
    )
    assert "in no kept edge" in str(explain(graph.top_k(1), "m0"))
    assert "in no kept edge" not in str(explain(graph, "m0"))


def test_ports_that_are_listed_apart_are_said_to_be() -> None:
    index = component_index(n_layers=4, n_heads=4)
    heads = [f"a1.h{head}" for head in range(4)]
    apart = AttributionGraph.from_edges(index, {("input", head, port): 1.0 for head in heads for port in "qkv"})
    assert "4 of 4 edges kept" in repr(apart)
    assert repr(apart).endswith("... 4 more, those into q, k and v apart: graph.edge_table()")
