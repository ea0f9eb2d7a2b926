"""The Lasso that knows what the child reads: signs, weights, and where it isn't known."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tl_circuitlasso as tcl
from tl_circuitlasso import solve
from tl_circuitlasso.features.effects import LEAST, UNREAD, Q
from tl_circuitlasso.features.fit import Entries
from tl_circuitlasso.features.learning import NoEdges, UnreadPair
from tl_circuitlasso.features.read import FLOOR, Read, keeping_signs, read_lasso, read_weights


def problem(seed: int, sources: int = 12, targets: int = 4, samples: int = 400) -> tuple[solve.Moments, Tensor]:
    """Moments of standardised samples, and reads."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, sources, generator=random, dtype=torch.float64)
    x = x + x[:, :1]  # correlated parents
    reads = torch.randn(sources, targets, generator=random, dtype=torch.float64)
    y = x @ (reads * (torch.rand(sources, targets, generator=random) < 0.3)) + torch.randn(
        samples, targets, generator=random
    )
    x, y = ((part - part.mean(0)) / part.std(0, correction=0) for part in (x, y))
    return solve.Moments(x.T @ x / samples, x.T @ y / samples, torch.ones(targets, dtype=torch.float64), samples), reads


def objective(data: solve.Moments, value: Tensor, weights: Any, level: Tensor) -> Tensor:
    fit = 0.5 * (value * (data.gram @ value)).sum(0) - (value * data.cross).sum(0)
    return fit + level * torch.where(value == 0, 0.0, weights * value.abs()).sum(0)


@given(st.integers(0, 2**30))
def test_close_to_the_non_negative_garrote(seed: int) -> None:
    """min over a >= 0 of 1/2M ||y - sum_i a_i z_i D_ij||^2 + lambda sum a_i, solved target by target."""
    data, reads = problem(seed)
    found, _ = read_lasso(data, Read.of(reads, torch.ones(len(reads))), strength=0.1, tol=1e-10)
    assert bool((found.value * reads >= 0).all())
    for j in range(reads.shape[1]):
        d = torch.copysign(reads[:, j].abs().clamp(min=FLOOR * float(reads[:, j].abs().max())), reads[:, j])
        gram, cross = data.gram * d[:, None] * d, data.cross[:, [j]] * d[:, None]
        level = found.stats["strength"][j] * float(d.abs().max())  # a = A / D, weights are relative to the largest D
        exact = solve.lasso(
            gram, cross, target_sq_norm=data.target_sq_norm[[j]], strength=float(level), strength_is="absolute",
            penalty=solve.L1(non_negative=True), tol=1e-10,
        ).value[:, 0] * d  # fmt: skip
        one = solve.Moments(data.gram, data.cross[:, [j]], data.target_sq_norm[[j]], data.count)
        ours, best = (
            float(objective(one, some[:, None], 1 / d.abs()[:, None], level)) for some in (found.value[:, j], exact)
        )
        assert best - 1e-7 <= ours <= best + 0.02 * abs(best)


def test_a_parent_that_is_hardly_read_is_dear() -> None:
    gram, cross = torch.eye(2).double(), torch.tensor([[0.5], [0.6]]).double()
    data = solve.Moments(gram, cross, torch.ones(1).double(), 100)
    even = solve.lasso(gram, cross, target_sq_norm=torch.ones(1).double(), strength=0.5).value
    assert bool((even > 0).all())
    read = Read.of(torch.tensor([[1.0], [0.2]]).double(), torch.ones(2))
    found, penalty = read_lasso(data, read, strength=0.5, tol=1e-8)
    assert float(found.value[0]) > 0 and float(found.value[1]) == 0
    assert isinstance(penalty.weights, Tensor) and penalty.weights.flatten().tolist() == pytest.approx([1, 5])


def test_sources_of_which_nothing_is_known_are_free_in_sign() -> None:
    data = solve.Moments(torch.eye(2).double(), torch.tensor([[0.5], [-0.6]]).double(), torch.ones(1).double(), 100)
    read = Read.of(torch.tensor([[1.0]]).double(), torch.ones(2))
    found, _ = read_lasso(data, read, strength=0.1, tol=1e-8)
    assert float(found.value[1]) < 0 < float(found.value[0])


def test_weights_in_standard_units() -> None:
    """Two features, one that doesn't vary, and one source that isn't a feature; the last child reads nothing."""
    reads = torch.tensor([[1.0, -2.0, 0.0], [0.001, -0.001, 0.0], [5.0, 1.0, 0.0]]).double()
    weights = read_weights(reads[:2], torch.tensor([2.0, 1.0, 1.0]).double())
    rms = ((2.0**2 + FLOOR**2) / 2) ** 0.5
    assert weights[:2, 0].tolist() == pytest.approx([1.0, 2.0 / FLOOR])
    assert weights[:2, 1].tolist() == pytest.approx([1.0, 2.0 / FLOOR])
    assert weights[2, :2].tolist() == pytest.approx([2.0 / rms] * 2)
    assert weights[:, 2].tolist() == [1.0] * 3
    dead = read_weights(reads, torch.tensor([2.0, 1.0, torch.inf]).double())
    assert dead[2].tolist() == [1.0] * 3 and bool(dead.isfinite().all()) and bool((dead >= 1).all())


def test_unshrinking_never_turns_a_sign() -> None:
    lasso, refit = torch.tensor([[0.1, -0.2, 0.3], [0.2, 0.1, 0.0]], dtype=torch.float64)
    found = keeping_signs(Entries(torch.arange(3), torch.zeros(3, dtype=torch.long), lasso, refit))
    assert found.refit.tolist() == [0.2, -0.2, 0.0] and found.lasso.tolist() == lasso.tolist()


def test_a_graph_says_so_with_its_signs(story_graph) -> None:
    """Between features, coefficients and effects have one sign; kept edges have effects of some size."""
    table = story_graph.edge_table()
    table = table[table["source"].str.contains("#") & table["target"].str.contains("#")]
    assert bool((table["lasso"] * table["weight"] >= 0).all()) and bool(
        (table["regression"] * table["lasso"] >= 0).all()
    )
    kept = table[table["kept"]]
    assert 0 < len(kept) < len(table) and bool((kept["score"].abs() >= LEAST).all()) and bool((kept["q"] <= Q).all())
    assert bool((kept["weight"] < 0).any()) and bool((kept["regression"] == 0).any())
    assert bool((kept["weight"].abs() >= LEAST).all())  # these decoders have length 1


def test_objects_that_hide_their_matrix_are_read_like_others(demo, demo_saes) -> None:
    class Hidden:
        def __init__(self, inner: Any) -> None:
            self.encode, self.decode, self.W_dec = inner.encode, inner.decode, inner.W_dec

    hidden = {hook: Hidden(inner) for hook, inner in demo_saes.items()}
    graphs = [
        tcl.circuit_lasso(demo.model, demo.tokens[:200], basis=tcl.SAEFeatures(saes), progress=False)
        for saes in (hidden, demo_saes)
    ]
    assert graphs[0].kept_edges() == graphs[1].kept_edges()
    torch.testing.assert_close(graphs[0].weight, graphs[1].weight)


def test_where_nothing_is_known_few_edges_are_kept_with_a_warning(demo, demo_saes) -> None:
    """Features averaged over prompts have no position at which they could be taken out."""
    made = {}
    for penalty in ("read", "l1"):
        basis = tcl.SAEFeatures(demo_saes, mixing="pooled", penalty=penalty)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made[penalty] = tcl.circuit_lasso(demo.model, demo.tokens[:200], basis=basis, progress=False)
        assert any(issubclass(one.category, UnreadPair) for one in caught) == (penalty == "read")
    read, plain = made["read"], made["l1"]
    inner = [pair for pair in read.provenance["pairs"] if pair["target"] != "target"]
    assert all(pair["penalty"] == "l1" and pair["effects"] is None and "pooled" in pair["reason"] for pair in inner)
    assert read.n_kept < plain.n_kept
    inside = torch.tensor(["#" in name for name in read.index.names])
    rows = read.kept & inside[read.source] & inside[read.target]
    assert bool((read.score[rows].abs() >= UNREAD).all())


def test_a_pair_without_edges_says_why(demo, demo_saes) -> None:
    """Features that write nothing do nothing; those of the next pair are as before."""
    first, second, third = demo_saes
    silent = replace(demo_saes[first], W_dec=torch.zeros_like(demo_saes[first].W_dec))
    basis = tcl.SAEFeatures({first: silent, second: demo_saes[second], third: demo_saes[third]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = tcl.circuit_lasso(demo.model, demo.tokens[:200], basis=basis, progress=False)
    told = [str(one.message) for one in caught if issubclass(one.category, NoEdges)]
    assert len(told) == 1 and told[0].startswith(f"{first} -> {second}: no edge") and "from chance" in told[0]
    record = {pair["source"]: pair for pair in graph.provenance["pairs"] if pair["target"] != "target"}
    assert (record[first]["sure_effects"], record[first]["largest_sure_score"]) == (0, 0.0)
    rows = [name.startswith(f"{second}#") for name in graph.index.names]
    inner = torch.tensor(rows)[graph.source] & graph.kept & (graph.target < len(graph.index) - 1)
    largest = record[second]["largest_sure_score"]
    assert largest == pytest.approx(float(graph.score[inner].abs().max())) and largest > record[second]["least_score"]


def test_provenance_tells_of_every_pair_how_it_is_known(story_graph) -> None:
    pairs = {pair["target"]: (pair["effects"], pair["penalty"]) for pair in story_graph.provenance["pairs"]}
    assert pairs.pop("target") == (None, "l1") and set(pairs.values()) == {("replay", "read")}
