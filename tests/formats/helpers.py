"""Graphs of every kind that the formats meet, and what it means for two of them to be the same."""

from pathlib import Path

import torch
from hypothesis import strategies as st

from tl_circuitlasso.data.sites import PORTS, parse_site
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = ("A_gpt2", "B_llama", "C_pythia", "D_interpbench13")


def small_graph() -> AttributionGraph:
    """One layer of two heads with ports, round scores of either sign; three edges kept."""
    edges = {
        ("input", "a0.h0", "q"): 0.5,
        ("input", "a0.h0", "k"): -0.25,
        ("input", "a0.h1", "v"): 2.0,
        ("a0.h1", "m0", ""): -1.5,
        ("m0", "logits", ""): 1.0,
        ("a0.h0", "logits", ""): 0.125,
    }
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), edges, provenance={"seed": 7})
    return graph.threshold(1.0)


def feature_graph() -> AttributionGraph:
    """SAE features at three hooks, feature 17 at each of them, with labels and groups."""
    early, mlp, late = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
    sites = (("input", None), (early, (3, 17, 20)), (mlp, (17, 5)), (late, (17,)), ("logits", None))
    index = NodeIndex(tuple(Block(parse_site(site), rank, features) for rank, (site, features) in enumerate(sites)))
    edges = {
        ("input", f"{early}#17"): 0.5,
        (f"{early}#17", f"{mlp}#17"): -2.0,
        (f"{mlp}#17", f"{late}#17"): 1.0,
        (f"{late}#17", "logits"): 3.0,
        (f"{early}#3", "logits"): 0.25,
    }
    info = {f"{early}#17": {"label": "plural", "group": "number"}, f"{early}#3": {"group": "number"}}
    return AttributionGraph.from_edges(index, edges, node_info=info, provenance={"seed": 1})


ERROR = "blocks.0.hook_resid_post.hook_sae_error"


def graph_with_an_error() -> AttributionGraph:
    """Feature 0 of an SAE and what the SAE misses, both of which feed the logits."""
    hook = ERROR.rpartition(".")[0]
    sites = (("input", None), (hook, (0,)), (ERROR, None), ("logits", None))
    index = NodeIndex(tuple(Block(parse_site(site), rank, own) for rank, (site, own) in enumerate(sites)))
    edges = {("input", f"{hook}#0"): 2.0, (f"{hook}#0", "logits"): 1.0, (ERROR, "logits"): -1.0}
    return AttributionGraph.from_edges(index, edges)


def rows(graph: AttributionGraph) -> dict[tuple[str, str, str], tuple[float, bool]]:
    """Score and membership by source, target and port."""
    names, port = graph.index.names, [PORTS[p] for p in graph.port.tolist()]
    ends = zip(graph.source.tolist(), graph.target.tolist(), port)
    values = zip(graph.score.tolist(), graph.kept.tolist())
    return {(names[s], names[t], p): value for (s, t, p), value in zip(ends, values)}


def nonzero(graph: AttributionGraph) -> dict[tuple[str, str, str], tuple[float, bool]]:
    """Those rows that say something."""
    return {edge: value for edge, value in rows(graph).items() if value != (0.0, False)}


def random_graph(
    n_layers: int, n_heads: int, parallel: bool, attn_only: bool, ports: bool, seed: int, threshold: float
) -> AttributionGraph:
    """A component graph with normal scores, about a third of them zero."""
    index = component_index(n_layers=n_layers, n_heads=n_heads, parallel=parallel, attn_only=attn_only)
    source, target = index.allowed().nonzero(as_tuple=True)
    is_head = torch.tensor([name.startswith("a") for name in index.names])[target]
    port = torch.zeros_like(source)
    if ports:
        copies = torch.where(is_head, 3, 1)
        source, target, is_head = (column.repeat_interleave(copies) for column in (source, target, is_head))
        within = torch.cat([torch.arange(int(count)) for count in copies])
        port = torch.where(is_head, within + 1, 0)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(len(source), generator=generator, dtype=torch.float64)
    score[torch.rand(len(source), generator=generator) < 0.3] = 0
    kept = score.abs() > threshold
    return AttributionGraph(index, source, target, port, score, score.clone(), kept, provenance={"seed": 3})


# arguments of random_graph; the graph is built in the test, as building one checks types by random sampling
GRAPHS = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 16),
    st.sampled_from([0.0, 0.5, 1.5, 9.0]),
)
