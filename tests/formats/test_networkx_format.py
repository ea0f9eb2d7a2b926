"""networkx, GraphML, GEXF and Cytoscape JSON: what comes back, foreign graphs, cycles and refusals."""

import json
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given

from tests.formats.helpers import GOLDEN, GRAPHS, feature_graph, random_graph, small_graph
from tl_circuitlasso import formats
from tl_circuitlasso.data.sites import parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

SUFFIX = {"auto-circuit": ".pt", "acdc": ".pth", "graphml": ".graphml", "gexf": ".gexf", "mib": ""}
WITHOUT_PROVENANCE = {"acdc", "auto-circuit", "circuits-benchmark", "gexf"}


def with_everything() -> AttributionGraph:
    graph = feature_graph()
    return replace(
        graph,
        weight=graph.score / 3,
        extras={"stability": torch.linspace(0, 1, len(graph), dtype=torch.float64)},
        certificates=({"target": "logits", "gap": 1e-5, "iterations": 7, "converged": True},),
    )


def same(ours: AttributionGraph, theirs: AttributionGraph) -> None:
    order = ["source", "target", "port"]
    tables = [graph.edge_table().sort_values(order).reset_index(drop=True) for graph in (ours, theirs)]
    assert tables[0].equals(tables[1][list(tables[0].columns)])
    assert ours.index == theirs.index


@given(GRAPHS)
def test_networkx_round_trip(arguments) -> None:
    graph = random_graph(*arguments)
    again = formats.from_networkx(formats.to_networkx(graph))
    same(graph, again)
    assert again.provenance == graph.provenance


@pytest.mark.parametrize("make", [small_graph, with_everything])
@pytest.mark.parametrize("suffix", [".graphml", ".gexf", ".cyjs"])
def test_file_round_trip(make, suffix: str, tmp_path) -> None:
    graph, path = make(), tmp_path / f"graph{suffix}"
    formats.to_networkx(graph, path)
    read = {".graphml": formats.from_graphml, ".gexf": formats.from_gexf, ".cyjs": formats.from_cytoscape}[suffix]
    again = read(path)
    same(graph, again)
    if suffix != ".gexf":
        assert again.provenance == graph.provenance and again.node_info == graph.node_info
        assert again.certificate.equals(graph.certificate)


def test_own_writers_give_what_the_suffix_gives(tmp_path) -> None:
    formats.to_graphml(small_graph(), tmp_path / "a")
    formats.to_gexf(small_graph(), tmp_path / "b")
    same(small_graph(), formats.from_graphml(tmp_path / "a"))
    same(small_graph(), formats.from_gexf(tmp_path / "b"))


def test_golden_cytoscape(tmp_path) -> None:
    data = formats.to_cytoscape(small_graph(), tmp_path / "graph.json")
    assert (
        data == json.loads((GOLDEN / "cytoscape.json").read_text()) == json.loads((tmp_path / "graph.json").read_text())
    )
    same(small_graph(), formats.from_cytoscape(data))


def test_ports_make_a_multigraph() -> None:
    assert isinstance(formats.to_networkx(feature_graph()), nx.DiGraph)
    assert not formats.to_networkx(feature_graph()).is_multigraph()
    multi = formats.to_networkx(small_graph())
    assert multi.is_multigraph() and multi.edges["input", "a0.h0", "k"]["score"] == -0.25


def test_only_kept_edges() -> None:
    graph = small_graph()
    kept = formats.to_networkx(graph, kept_only=True)
    assert set(kept.edges()) == graph.kept_edges() and set(kept.nodes) == set(graph.index.names)


def test_algorithms_of_networkx_apply() -> None:
    graph = formats.to_networkx(feature_graph())
    assert nx.has_path(graph, "input", "logits") and nx.is_directed_acyclic_graph(graph)


def foreign(*edges, **attributes) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_edges_from((u, v, {"score": 1.0} | attributes) for u, v in edges)
    return graph


def test_a_foreign_graph_of_components_takes_their_order() -> None:
    graph = formats.from_networkx(foreign(("a0.h1", "m0"), ("input", "a0.h1"), ("m0", "logits")))
    assert graph.index.names == ("input", "a0.h1", "m0", "logits")
    assert graph.index.ranks.tolist() == [0, 1, 2, 3]


def test_a_foreign_graph_of_features_takes_the_order_of_its_edges() -> None:
    late, early = "blocks.5.hook_resid_post", "blocks.1.hook_resid_post"
    graph = formats.from_networkx(foreign((f"{early}#3", f"{late}#9"), (f"{early}#1", f"{late}#9"), weight=0.5))
    assert [str(block.site) for block in graph.index.blocks] == [early, late]
    assert graph.index.blocks[0].features == (3, 1) and graph.weight.tolist() == [0.5, 0.5]


def test_weight_stands_in_for_score() -> None:
    graph = nx.DiGraph()
    graph.add_edge("input", "logits", weight=2)
    assert formats.from_networkx(graph).score.tolist() == [2.0]


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    for score in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.int64(2)):
        graph = formats.from_networkx(foreign(("input", "m0"), score=score, weight=score, p=score))
        assert graph.score.tolist() == [float(score)] and graph.extras["p"].tolist() == [float(score)]


@pytest.mark.parametrize("format", sorted(formats.files.WRITERS))
@pytest.mark.parametrize("candidates", [True, False])
def test_an_empty_circuit_survives_every_format(format: str, candidates: bool, tmp_path) -> None:
    graph = small_graph().top_k(0) if candidates else AttributionGraph.from_edges(small_graph().index, {})
    suffix = SUFFIX.get(format, ".json")
    options = {"model": "tiny"} if format == "mib" else {"membership": True} if format == "auto-circuit" else {}
    formats.write(graph, tmp_path / f"graph{suffix}", format, **options)
    assert formats.read(tmp_path / f"graph{suffix}", format).n_kept == 0


def test_scores_alone_cannot_say_that_a_circuit_is_empty(caplog) -> None:
    formats.to_auto_circuit(small_graph())
    formats.to_auto_circuit(small_graph().top_k(0), membership=True)
    assert not caplog.text
    formats.to_auto_circuit(small_graph().top_k(0))
    assert "write it with membership=True" in caplog.text


@pytest.mark.parametrize("suffix", [".graphml", ".gexf", ".cyjs"])
def test_large_feature_numbers_come_back(suffix: str, tmp_path) -> None:
    hook, number = "blocks.0.hook_resid_post", (1 << 59) + 1  # a pair of numbers as one, such as pages give
    sites = (Block(parse_site("input"), 0), Block(parse_site(hook), 1, (number,)))
    graph = AttributionGraph.from_edges(NodeIndex(sites), {("input", f"{hook}#{number}"): 1.0})
    formats.to_networkx(graph, tmp_path / f"graph{suffix}")
    assert formats.read(tmp_path / f"graph{suffix}").kept_edges() == graph.kept_edges()


@pytest.mark.parametrize("write", [formats.to_acdc, formats.to_auto_circuit])
def test_tensors_are_not_written_under_the_name_of_another_kind(write, tmp_path) -> None:
    with pytest.raises(InputError, match=r"name end in \.pt or \.pth"):
        write(small_graph(), tmp_path / "graph.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".graphml", ".gexf", ".cyjs"])
def test_control_characters_in_names_come_back(suffix: str, tmp_path) -> None:
    hooks = [f"blocks.0.hook_{sign}" for sign in ("\x01", "\ud800", "\\", "\\u0041", "ä")]
    index = NodeIndex(tuple(Block(parse_site(hook), rank, (3,)) for rank, hook in enumerate(hooks)))
    edges = {(f"{hook}#3", f"{hooks[-1]}#3"): 1.0 for hook in hooks[:-1]}
    graph = AttributionGraph.from_edges(index, edges, node_info={f"{hooks[0]}#3": {"label": "\x02"}})
    formats.to_networkx(graph, tmp_path / f"graph{suffix}")
    assert formats.read(tmp_path / f"graph{suffix}").kept_edges() == graph.kept_edges()


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".graphml", ".cyjs"])
def test_unknown_extras_and_paths_in_provenance_are_written(suffix: str, tmp_path) -> None:
    base = small_graph()
    effect = torch.full((len(base),), 0.5, dtype=torch.float64).index_fill(0, torch.tensor([1]), torch.nan)
    facts = {"model": tmp_path, "seed": np.int64(3), "rate": torch.tensor(0.5), "sizes": (1, 2)}
    graph = replace(base, extras={"effect": effect}, provenance=facts)
    formats.write(graph, tmp_path / f"graph{suffix}", "circuit-lasso" if suffix == ".json" else None)
    again = formats.read(tmp_path / f"graph{suffix}")
    torch.testing.assert_close(again.extras["effect"], effect, equal_nan=True)
    assert again.provenance == {"model": str(tmp_path), "seed": 3, "rate": 0.5, "sizes": [1, 2]}


@pytest.mark.parametrize("format", sorted(set(formats.files.WRITERS) - WITHOUT_PROVENANCE))
@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_what_a_file_cannot_say_is_refused_by_its_place(format: str, value: object, tmp_path) -> None:
    graph = replace(small_graph(), provenance={"outer": [{"inner": value}]})
    options = {"model": "tiny"} if format == "mib" else {}
    with pytest.raises(InputError, match=r"outer\[0\]\.inner"):
        formats.write(graph, tmp_path / f"graph{SUFFIX.get(format, '.json')}", format, **options)
    assert not list(tmp_path.rglob("*.json"))


BAD_GRAPHS = {
    "undirected": (lambda: nx.Graph([("input", "logits")]), "undirected"),
    "empty": (nx.DiGraph, "no nodes"),
    "no score": (lambda: nx.DiGraph([("input", "logits")]), "neither"),
    "cycle": (lambda: foreign(("resid.1", "resid.2"), ("resid.2", "resid.1")), "cycle"),
    "self": (lambda: foreign(("resid.1", "resid.1")), "cycle"),
    "cycle of components": (lambda: foreign(("m0", "m1"), ("m1", "m0")), "order of computation"),
    "unknown node": (lambda: foreign(("input", "somewhere")), "somewhere"),
    "no feature number": (lambda: foreign(("input", "m0#x")), "m0#x"),
    "whole and part": (lambda: foreign(("input", "m0"), ("input", "m0#3")), "one or the other"),
    "NaN": (lambda: foreign(("input", "m0"), score=float("nan")), "finite"),
    "score as text": (lambda: foreign(("input", "m0"), score="1"), "a number is expected"),
    "odd port": (lambda: foreign(("input", "a0.h0"), port="z"), "port"),
    "port as a list": (lambda: foreign(("input", "a0.h0"), port=[1]), "port"),
    "not a graph": (lambda: [1, 2], "networkx graph is expected"),
}


@pytest.mark.parametrize("fault", BAD_GRAPHS)
def test_faulty_graphs_are_named(fault: str) -> None:
    make, message = BAD_GRAPHS[fault]
    with pytest.raises(FormatError, match=message):
        formats.from_networkx(make())


def test_ranks_that_differ_within_a_site() -> None:
    graph = foreign(("m0#1", "m1#2"), ("m0#3", "m1#2"))
    nx.set_node_attributes(graph, {"m0#1": 0, "m0#3": 1, "m1#2": 2}, "rank")
    with pytest.raises(FormatError, match="different ranks"):
        formats.from_networkx(graph)


def test_an_extra_column_with_a_reserved_name_is_refused() -> None:
    graph = replace(feature_graph(), extras={"key": torch.zeros(5, dtype=torch.float64)})
    with pytest.raises(InputError, match="'key'"):
        formats.to_networkx(graph)


def test_an_unknown_suffix_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="graphml"):
        formats.to_networkx(small_graph(), tmp_path / "graph.dot")


def test_entities_are_refused(tmp_path) -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE g [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><graphml>&b;</graphml>'
    (tmp_path / "graph.graphml").write_text(bomb)
    with pytest.raises(FormatError, match="entities"):
        formats.from_graphml(tmp_path / "graph.graphml")
    (tmp_path / "graph.graphml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(FormatError, match="UTF-8"):
        formats.from_graphml(tmp_path / "graph.graphml")


@pytest.mark.parametrize("data", [{}, {"elements": []}, {"elements": {"nodes": 3, "edges": []}}, [], "x" * 9, None])
def test_faulty_cytoscape_is_refused(data) -> None:
    with pytest.raises(FormatError):
        formats.from_cytoscape(data)
