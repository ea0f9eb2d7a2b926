"""Explanations of nodes, strongest paths and supernodes, on graphs whose answers are known."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.explaining import explain, label, strongest_paths, supernodes
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))


def index(features: int = 3) -> NodeIndex:
    blocks = [Block(parse_site(hook), rank, tuple(range(features))) for rank, hook in enumerate(HOOKS)]
    return NodeIndex((*blocks, Block(Site("target"), len(HOOKS))))


def node(layer: int, feature: int) -> str:
    return f"{HOOKS[layer]}#{feature}"


@pytest.fixture
def graph() -> AttributionGraph:
    edges = {
        (node(0, 0), node(1, 0)): 0.9,
        (node(0, 1), node(1, 0)): -0.2,
        (node(1, 0), node(2, 1)): 0.5,
        (node(1, 0), "target"): 0.4,
        (node(2, 1), "target"): -0.5,
    }
    info = {
        node(1, 0): {
            "frequency": 0.02,
            "mean": 1.25,
            "top_tokens": [" dog", " cat"],
            "top_logits": [" barked"],
            "contexts": [{"tokens": ["the", " <b>dog</b>", "\n"], "at": 1, "value": 2.5}],
        },
        node(0, 0): {"label": "animals & <pets>"},
    }
    return AttributionGraph.from_edges(index(), edges, node_info=info)


def test_parents_and_children_strongest_first(graph: AttributionGraph) -> None:
    found = explain(graph, node(1, 0))
    assert [(edge.node, edge.score) for edge in found.parents] == [(node(0, 0), 0.9), (node(0, 1), -0.2)]
    assert [edge.node for edge in found.children] == [node(2, 1), "target"]
    assert explain(graph, node(1, 0), k=1).parents == found.parents[:1]
    table = found.table()
    assert table["role"].tolist() == ["parent", "parent", "child", "child"]
    assert table["label"].tolist()[0] == "animals & <pets>"


def test_text_says_what_is_known(graph: AttributionGraph) -> None:
    text = str(explain(graph, node(1, 0)))
    for part in ("2 % of samples", "mean 1.25", "' dog'", "' barked'", "+0.9000", "-0.2000", "the[ <b>dog</b>]\\n"):
        assert part in text
    assert "no children" in str(explain(graph, "target"))


def test_html_escapes_what_came_from_data(graph: AttributionGraph) -> None:
    html = explain(graph, node(1, 0)).html
    assert "<mark> &lt;b&gt;dog&lt;/b&gt;</mark>" in html
    assert "animals &amp; &lt;pets&gt;" in html
    assert "<b>" not in html and "<pets>" not in html


def test_edges_that_are_not_kept_do_not_count(graph: AttributionGraph) -> None:
    found = explain(graph.threshold(0.45), node(1, 0))
    assert [edge.node for edge in (*found.parents, *found.children)] == [node(0, 0), node(2, 1)]
    assert label(graph, node(2, 2)) == ""


def test_paths_by_product_and_by_bottleneck(graph: AttributionGraph) -> None:
    paths = strongest_paths(graph, node(0, 0))
    assert [path.nodes[1:-1] for path in paths] == [(node(1, 0),), (node(1, 0), node(2, 1))]
    assert [round(path.score, 6) for path in paths] == [0.36, -0.225]
    first = strongest_paths(graph, node(0, 0), 1, by="bottleneck")[0]
    assert first.nodes == (node(0, 0), node(1, 0), node(2, 1), "target") and first.weakest == 0.5
    assert strongest_paths(graph, node(0, 2)) == ()
    assert strongest_paths(graph, node(0, 0), target=node(2, 1))[0].scores == (0.9, 0.5)


@given(st.integers(0, 2**30), st.integers(1, 7), st.sampled_from(["product", "bottleneck"]))
def test_paths_are_those_of_enumeration(seed: int, k: int, by: str) -> None:
    random = torch.Generator().manual_seed(seed)
    whole = component_index(n_layers=2, n_heads=1)
    scores = torch.rand(6, 6, generator=random, dtype=torch.float64) * 2 - 1
    present = torch.rand(6, 6, generator=random) < 0.7
    graph = AttributionGraph.from_adjacency(whole, torch.where(whole.allowed() & present, scores, 0.0))
    table = {(s, t): float(scores[whole.position(s), whole.position(t)]) for s, t in graph.kept_edges()}
    inner, ways = whole.names[1:-1], []
    for chosen in product([False, True], repeat=len(inner)):
        nodes = ("input", *(name for name, taken in zip(inner, chosen) if taken), "logits")
        pairs = list(pairwise(nodes))
        if all(pair in table for pair in pairs):
            sizes = torch.tensor([abs(table[pair]) for pair in pairs], dtype=torch.float64)
            ways.append(float(sizes.prod() if by == "product" else sizes.min()))
    found = strongest_paths(graph, "input", k, by=by)
    values = [abs(path.score) if by == "product" else path.weakest for path in found]
    assert values == pytest.approx(sorted(ways, reverse=True)[:k])


def test_supernodes_join_nodes_with_the_same_part() -> None:
    edges = {}
    for feature in (0, 1):  # twins: same parent, same children
        edges |= {(node(0, 0), node(1, feature)): 0.5, (node(1, feature), node(2, 0)): 0.6 + feature / 10}
    edges |= {(node(0, 1), node(1, 2)): 0.7, (node(1, 2), node(2, 2)): 0.7}
    graph = AttributionGraph.from_edges(index(), edges, node_info={node(1, 0): {"label": "dogs"}})
    assert supernodes(graph) == {f"dogs @ {HOOKS[1]}": (node(1, 0), node(1, 1))}
    assert supernodes(graph, 1.0) == {}


def test_supernodes_tell_signs_apart() -> None:
    edges = {(node(0, 0), node(1, 0)): 0.5, (node(0, 0), node(1, 1)): -0.5}
    assert supernodes(AttributionGraph.from_edges(index(), edges)) == {}


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda g: explain(g, "nobody"), "nobody"),
        (lambda g: explain(g, "target", 0), "`k`"),
        (lambda g: strongest_paths(g, "target"), "`source`"),
        (lambda g: strongest_paths(g, node(0, 0), by="sum"), "`by`"),
        (lambda g: strongest_paths(g, node(0, 0), k=0), "`k`"),
        (lambda g: supernodes(g, 0), "`similarity`"),
    ],
)
def test_bad_input(graph: AttributionGraph, call, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call(graph)
