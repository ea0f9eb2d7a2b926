"""Circuits where the regression decides: as many edges as it weighs, those that work for their child first."""

import pytest
import torch
from torch import Tensor

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.discover import growing
from tl_circuitlasso.discover.choice import Edges
from tl_circuitlasso.discover.garrote import Child, aligned
from tl_circuitlasso.graph.nodes import Block, NodeIndex

ROWS = 16


def one_layer(into_target: Tensor) -> tuple[Edges, list[Child], Tensor]:
    """input -> m0 ... -> target: each MLP reads the input alone; `into_target` (row, MLP) is what it contributes."""
    n = into_target.shape[1]
    blocks = [Block(Site("input"), 0), *(Block(Site("mlp", i), 1) for i in range(n)), Block(Site("target"), 2)]
    index = NodeIndex(tuple(blocks))
    found = [child(i + 1, [0], into_target[:, i : i + 1]) for i in range(n)]
    found.append(child(n + 1, list(range(1, n + 1)), into_target))
    size = torch.cat([one.rows.abs().mean(0) for one in found]).double()
    return Edges.of(index, found, squares=False), found, size


def child(node: int, parents: list[int], rows: Tensor) -> Child:
    cost = rows.abs().mean(0, keepdim=True).double()
    return Child(node, (0,), torch.tensor(parents), rows, cost, None, cost, cost)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def working_beside_idle() -> Tensor:
    """Four MLPs that always work for the target, among 8 larger ones that cancel in every row."""
    steady = 1 + 0.1 * torch.rand(ROWS, 4, generator=drawn(0), dtype=torch.float64)
    sign = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, -1.0).double()[:, None]
    one = sign * (8 + torch.rand(ROWS, 4, generator=drawn(1), dtype=torch.float64))
    return torch.cat([steady, one, -one], dim=1)


def mlps(edges: Edges, kept: Tensor) -> set[int]:
    return {int(source) for source in edges.source[kept]} - {0}


def test_edges_that_work_for_their_child_come_first_where_others_dont_carry_enough() -> None:
    edges, found, size = one_layer(working_beside_idle())
    circuit = growing.grown(edges, found, size, count=8)
    assert mlps(edges, circuit.kept) == {1, 2, 3, 4} and circuit.carried >= growing.ENOUGH
    alone = growing.grown(edges, found, size, count=8, contrast=False)  # goes as far as a fifth, and then grows
    assert mlps(edges, alone.kept) > {1, 2, 3, 4}


def test_large_edges_stay_where_they_carry_enough() -> None:
    rows = working_beside_idle()
    rows[:, :4] *= 30  # strong enough by size, so that what works against the child is weighed as ever
    edges, found, size = one_layer(rows)
    circuit = growing.grown(edges, found, size, count=24)
    assert bool(circuit.kept.all())
    torch.testing.assert_close(circuit.worth, 0.4 + 0.6 * aligned(found))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_expected_isnt_luck(seed: int) -> None:
    """Of hundreds of MLPs of random sign the best aligned do little on other prompts, and that is what is said."""
    rows = torch.randn(2 * ROWS, 300, generator=drawn(seed), dtype=torch.float64)
    rows[:, :3] = 6.0
    edges, found, size = one_layer(rows[:ROWS])
    _, fresh, _ = one_layer(rows[ROWS:])
    circuit = growing.grown(edges, found, size, count=100)
    own, other = (edges.carried(some, edges.shares(some), circuit.kept) for some in (found, fresh))
    assert abs(circuit.carried - other) < abs(own - other) or own - other < 0.05


def test_as_few_more_as_carry_enough() -> None:
    rows = torch.ones(ROWS, 200, dtype=torch.float64)
    edges, found, size = one_layer(rows)
    circuit = growing.grown(edges, found, size, count=10)
    least = growing.ENOUGH * 200
    assert least <= len(mlps(edges, circuit.kept)) <= 1.1 * least and circuit.carried >= growing.ENOUGH


def test_few_rows_are_not_halved() -> None:
    rows = torch.ones(2, 4, dtype=torch.float64)
    edges, found, size = one_layer(rows)
    assert growing.grown(edges, found, size, count=2).carried >= growing.ENOUGH
