"""Influence on the target, against circuit-tracer's dense algebra written out."""

import math

import pytest
import torch

from tl_circuitlasso.apps import influence
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models.sae import ERROR, error_block

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]


def random_graph(seed: int = 0) -> AttributionGraph:
    blocks = []
    for rank, hook in enumerate(HOOKS):
        blocks += [Block(parse_site(hook), rank, (0, 1, 2, 3)), error_block(hook, rank)]
    index = NodeIndex((*blocks, Block(Site("target"), len(HOOKS))))
    generator = torch.Generator().manual_seed(seed)
    edges = {
        (source, target): float(torch.randn((), generator=generator))
        for source in index.names
        for target in index.names
        if index.may_feed(source, target) and not target.endswith(ERROR)
    }
    return AttributionGraph.from_edges(index, edges)


def dense(graph: AttributionGraph) -> tuple[torch.Tensor, float, float]:
    """Node influence, replacement and completeness by powers of the normalised matrix (row = target)."""
    size = len(graph.index)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[graph.target, graph.source] = torch.where(graph.kept, graph.score.abs(), 0.0)
    matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-10)
    end = torch.zeros(size, dtype=torch.float64)
    end[-1] = 1.0
    total, step = torch.zeros_like(end), end @ matrix
    while bool(step.any()):
        total, step = total + step, step @ matrix
    error = torch.tensor([name.endswith(ERROR) for name in graph.index.names])
    root = (matrix.sum(1) == 0) & ~error
    replacement = total[root].sum() / (total[root].sum() + total[error].sum())
    out = total + end
    return total, float(replacement), float(((1 - matrix[:, error].sum(1)) * out).sum() / out.sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_influence_and_scores_are_circuit_tracers(seed: int) -> None:
    graph = random_graph(seed)
    found = influence(graph)
    node, replacement, completeness = dense(graph)
    torch.testing.assert_close(found.node, node)
    assert found.replacement == pytest.approx(replacement) and found.completeness == pytest.approx(completeness)
    assert 0 < found.replacement < 1 and 0 < found.completeness < 1
    into_target = found.edge[graph.target == len(graph.index) - 1]
    assert float(into_target.sum()) == pytest.approx(1.0)
    assert found.nodes()["influence"].is_monotonic_decreasing


def test_thresholds_keep_the_shares_that_they_name() -> None:
    graph = random_graph()
    found = influence(graph)
    small = found.pruned(nodes=0.6, edges=0.9)
    kept = [graph.index.position(name) for name in small.kept_nodes() if name != "target"]
    dropped = [place for place in range(len(graph.index) - 1) if place not in kept]
    assert 0 < small.n_kept < graph.n_kept and float(found.node[dropped].max()) <= float(found.node.max())
    largest = found.node.sort(descending=True).values
    needed = int((largest.cumsum(0) / largest.sum() < 0.6).sum()) + 1
    assert len(kept) <= needed
    assert found.pruned(nodes=1.0, edges=1.0).n_kept == graph.prune().n_kept
    assert found.pruned(nodes=0.6).n_kept <= found.pruned(nodes=0.9).n_kept


def test_what_has_no_influence_is_said() -> None:
    empty = influence(random_graph().threshold(1e9))
    assert math.isnan(empty.replacement) and math.isnan(empty.completeness) and not len(empty.nodes())
    assert empty.pruned().n_kept == 0
    with pytest.raises(InputError, match="`edges` is 0"):
        empty.pruned(edges=0)
