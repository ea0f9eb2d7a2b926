"""Persistence, merging and dropping are found by their rules, and drawn."""

import pytest

from tl_circuitlasso import plot
from tl_circuitlasso.apps import concepts
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(3))


def node(layer: int, feature: int) -> str:
    return f"{HOOKS[layer]}#{feature}"


def graph_of(edges: dict) -> AttributionGraph:
    blocks = [Block(parse_site(hook), rank, tuple(range(5))) for rank, hook in enumerate(HOOKS)]
    info = {
        node(0, 4): {
            "frequency": 0.3,
            "top_tokens": [" gone"],
            "contexts": [{"tokens": ["a", "b"], "at": 1, "value": 1.0}],
        }
    }
    return AttributionGraph.from_edges(NodeIndex((*blocks, Block(Site("target"), 3))), edges, node_info=info)


@pytest.fixture
def graph() -> AttributionGraph:
    return graph_of(
        {
            (node(0, 0), node(1, 0)): 0.9,  # carried through all layers
            (node(1, 0), node(2, 0)): 0.8,
            (node(0, 1), node(1, 1)): 0.5,  # two parents of about the same weight
            (node(0, 2), node(1, 1)): 0.45,
            (node(0, 3), node(1, 1)): 0.1,
            (node(1, 1), node(2, 1)): -0.6,  # an opponent isn't the same concept
            (node(0, 4), node(1, 4)): 0.02,  # all but gone
            (node(2, 0), "target"): 0.5,
        }
    )


def test_persistence_follows_mutual_strongest_edges(graph: AttributionGraph) -> None:
    found = concepts(graph).persistence
    assert found["nodes"].tolist() == [tuple(node(layer, 0) for layer in range(3)), (node(0, 1), node(1, 1))]
    assert found["layers"].tolist() == [3, 2]
    assert found["score"][0] == pytest.approx(0.72) and found["weakest"][0] == 0.8
    assert found["to_target"].tolist() == [0.5, 0.0]


def test_an_edge_carries_only_if_strongest_for_both_ends(graph: AttributionGraph) -> None:
    rival = graph_of({(node(0, 0), node(1, 0)): 0.6, (node(0, 0), node(1, 1)): 0.7, (node(0, 1), node(1, 1)): 0.8})
    assert list(concepts(rival).persistence["nodes"]) == [(node(0, 1), node(1, 1))]
    assert concepts(graph, carried=0.95).persistence.empty


def test_merging_needs_two_strong_parents(graph: AttributionGraph) -> None:
    found = concepts(graph).merging
    assert found["node"].tolist() == [node(1, 1)]
    assert found["parents"][0] == (node(0, 1), node(0, 2))
    assert found["shares"][0] == pytest.approx((0.5 / 1.05, 0.45 / 1.05))
    assert concepts(graph, part=0.95).merging.empty
    assert concepts(graph, dominant=0.4).merging.empty


def test_dropping_lists_what_nothing_carries_on(graph: AttributionGraph) -> None:
    found = concepts(graph).dropping
    first = found.iloc[0]
    assert (first["node"], first["carried"], first["frequency"]) == (node(0, 4), 0.02, 0.3)
    assert (first["label"], first["context"]) == (" gone", "a[b]")
    dropped = set(found["node"])
    assert {node(1, 2), node(1, 3), node(1, 4)} <= dropped
    assert not dropped & {node(0, 0), node(1, 1), *(node(2, feature) for feature in range(5))}


def test_bad_input(graph: AttributionGraph) -> None:
    with pytest.raises(InputError, match="`carried`"):
        concepts(graph, carried=0)
    with pytest.raises(InputError, match="SAEFeatures"):
        concepts(AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0}))


def test_flow_draws_each_kind(graph: AttributionGraph, tmp_path) -> None:
    found = concepts(graph)
    figure = plot.flow(found, tmp_path / "flow.svg", title="Concepts")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"persistence", "merging", "dropping", "Concepts", "gone"} <= {text.strip() for text in texts}
    assert (tmp_path / "flow.svg").stat().st_size > 1000
    lanes = [patch for patch in figure.axes[0].patches if patch.get_path().vertices.shape == (4, 2)]
    assert len(lanes) == 4  # two in the long chain; one in the short chain, which is also a merging parent; its other


def test_flow_refuses_what_it_cannot_draw(graph: AttributionGraph) -> None:
    with pytest.raises(InputError, match="`chains`"):
        plot.flow(concepts(graph), chains=-1)
    with pytest.raises(InputError, match="nothing to draw"):
        plot.flow(concepts(graph), chains=0, merges=0, drops=0)
