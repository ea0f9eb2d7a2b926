"""Graphs that the picture tests share."""

import random

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

NASTY = "</script><script>window.hacked = true</script>"

SMALL_EDGES = {
    ("input", "a0.h1", "v"): 0.8,
    ("input", "m0", ""): 0.3,
    ("a0.h1", "m0", ""): 0.7,
    ("m0", "a1.h0", "k"): 0.9,
    ("m0", "a1.h0", "q"): 0.2,
    ("input", "a1.h0", "v"): 0.4,
    ("a1.h0", "m1", ""): 0.5,
    ("a0.h1", "m1", ""): -0.35,
    ("m1", "logits", ""): 0.95,
    ("a1.h0", "logits", ""): 1.0,
    ("a0.h3", "a1.h2", "q"): 0.1,
}


def small_graph() -> AttributionGraph:
    """Two layers of four heads; all but the weakest edge kept."""
    return AttributionGraph.from_edges(component_index(n_layers=2, n_heads=4), SMALL_EDGES).threshold(0.15)


def dense_graph(n_layers: int, n_heads: int, keep: int, *, signed: bool = False, seed: int = 0) -> AttributionGraph:
    """Every edge of a model has a random score; the strongest `keep` are kept."""
    draw = random.Random(seed)
    index = component_index(n_layers=n_layers, n_heads=n_heads)
    pairs = [(s, t) for s in index.names for t in index.names if index.may_feed(s, t)]
    edges = {pair: draw.lognormvariate(0, 1.5) * (draw.choice([-1, 1]) if signed else 1) for pair in pairs}
    return strongest(AttributionGraph.from_edges(index, edges), keep)


def strongest(graph: AttributionGraph, count: int) -> AttributionGraph:
    """The strongest edges, on a path or not: what pictures show of a graph that has too many."""
    return graph.threshold(graph.score.abs().sort(descending=True).values[count - 1].item())


def feature_graph() -> AttributionGraph:
    """SAE features at two hooks, with labels and contexts, one of them hostile."""
    hooks = [parse_site(f"blocks.{layer}.hook_resid_post") for layer in (2, 5)]
    blocks = [Block(hook, rank, tuple(range(10, 40))) for rank, hook in enumerate(hooks)]
    low, high = ([f"{hook}#{n}" for n in range(10, 40)] for hook in hooks)
    edges = {(low[n], high[(3 * n) % 30]): 1.0 + n / 10 for n in range(20)}
    edges |= {(name, "logits"): 0.5 for name in high[::3]}
    info = {
        low[0]: {
            "label": NASTY,
            "frequency": 0.02,
            "contexts": [NASTY, {"tokens": ["The", " cat"], "values": [0.1, 2]}],
        },
        low[1]: {"label": "plural nouns after a number"},
    }
    index = NodeIndex((*blocks, Block(Site("logits"), 2)))
    return AttributionGraph.from_edges(index, edges, node_info=info)
