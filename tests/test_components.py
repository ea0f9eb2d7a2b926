"""The grid of components: every count, name and place agrees with the nodes' own order of computation."""

import itertools

import pytest
import torch

from tl_circuitlasso.data.sites import PORTS, parse_site
from tl_circuitlasso.graph.components import QKV, Components

GRIDS = [
    Components(layers, heads, parallel=parallel, attn_only=attn_only)
    for layers, heads, parallel, attn_only in itertools.product((1, 3), (1, 4), (False, True), (False, True))
]


@pytest.mark.parametrize("parts", GRIDS, ids=str)
def test_an_edge_is_what_the_order_of_computation_allows(parts: Components) -> None:
    names, index = [*parts.sources(), "logits"], parts.index
    nodes, ports = parts.column_nodes()
    assert names == list(index.names) and len(nodes) == len(ports) == parts.n_readers
    for column, (node, port) in enumerate(zip(nodes.tolist(), ports.tolist())):
        allowed = [index.may_feed(source, names[node]) for source in parts.sources()]
        assert parts.mask()[:, column].tolist() == allowed
        assert parts.column(parse_site(names[node]), PORTS[port]) == column
    edges = torch.stack(parts.edges(), dim=1)
    assert sorted(edges.tolist()) == parts.mask().nonzero().tolist()
    assert parts.n_edges == int(parts.mask().sum()) == len(parts.edge_names()) == len(set(parts.edge_names()))


@pytest.mark.parametrize("parts", GRIDS, ids=str)
def test_every_source_has_one_place(parts: Components) -> None:
    rows = [parts.row(parse_site(name)) for name in parts.sources()]
    assert rows == list(range(parts.n_sources)) and parts.row(parse_site("logits")) == parts.n_sources
    groups = parts.groups()
    assert [row for some in groups.values() for row in range(some.start, some.stop)] == rows
    assert [name.startswith("m") for name in parts.sources()] == parts.is_mlp().tolist()
    for layer, head in itertools.product(range(parts.n_layers), range(parts.n_heads)):
        assert parts.sources()[parts.head(layer, head)] == f"a{layer}.h{head}"
        assert parts.before(layer) == groups[layer, "heads"].start


@pytest.mark.parametrize("parts", GRIDS, ids=str)
def test_readers_fill_the_columns_once_and_in_order(parts: Components) -> None:
    columns = [torch.arange(parts.n_readers)[parts.columns(*reader)] for reader in parts.readers()]
    assert torch.equal(torch.cat(columns), torch.arange(parts.n_readers))
    assert all(parts.sources_of(layer, port) == parts.before(layer) for layer, port in parts.readers() if port in QKV)
    assert parts.sources_of(parts.n_layers, "") == parts.n_sources
