"""An 8B model's 1.6 million edges through EAP-IG's files, in seconds."""

import time

import pytest
import torch

from tl_circuitlasso import formats
from tl_circuitlasso.formats._grid import Grid, graph_of
from tl_circuitlasso.graph.components import Components


@pytest.mark.slow
def test_eight_billion_parameters(tmp_path) -> None:
    parts = Components(n_layers=32, n_heads=32)
    score = torch.randn(parts.n_sources, parts.n_readers, dtype=torch.float64)
    graph = graph_of(Grid(parts, score, score.abs() > 3))
    assert len(graph) == 1_592_881
    for suffix, limit in ((".pt", 5), (".json", 60)):
        path, start = tmp_path / f"graph{suffix}", time.perf_counter()
        formats.to_eap(graph, path)
        assert time.perf_counter() - start < limit
        again = formats.from_eap(path)
        assert torch.equal(again.score, graph.score) and torch.equal(again.kept, graph.kept)
