"""Streaming moments: equal to the one-shot covariance however the data arrive, and safe on disk."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_circuitlasso.data.statistics import Moments, Statistics, add_folds, empty_folds
from tl_circuitlasso.errors import FormatError, InputError


def covariance(x: torch.Tensor) -> torch.Tensor:
    """The definition, in one shot: sums over samples and coordinates of products of centred columns."""
    centred = x.double() - x.double().mean(0)
    return torch.einsum("mci,mcj->ij", centred, centred) / len(x)


@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(1, 40), min_size=0, max_size=4),
    offset=st.sampled_from([0.0, 1.0, 1e3, -1e5]),
    coords=st.integers(1, 3),
)
def test_any_split_gives_the_same_gram(seed: int, cuts: list[int], offset: float, coords: int) -> None:
    x = torch.randn(41, coords, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    edges = sorted({0, 41, *cuts})
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    streamed = Moments.empty(coords=coords, nodes=5)
    for part in parts:
        streamed = streamed.add(part)
    merged = Moments.empty(coords=coords, nodes=5)
    for part in parts:
        merged = merged + Moments.empty(coords=coords, nodes=5).add(part)
    expected = covariance(x)
    for moments in (streamed, merged):
        assert moments.count == 41
        torch.testing.assert_close(moments.gram(), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.mean(), x.mean(0), rtol=1e-12, atol=1e-12)


def test_float32_data_far_from_zero_keep_their_spread() -> None:
    x = torch.randn(5000, 1, 3) + 300.0
    moments = Moments.empty(coords=1, nodes=3)
    for part in x.split(100):
        moments = moments.add(part)
    torch.testing.assert_close(moments.gram(), covariance(x), rtol=1e-10, atol=1e-10)


def test_folds_add_up_to_the_whole() -> None:
    x, fold = torch.randn(30, 1, 4), torch.arange(30) % 3
    moments = empty_folds("m", 3, coords=1, nodes=4, device="cpu")
    add_folds(moments, "m", x, fold, 3)
    statistics = Statistics(moments=moments, meta={"folds": 3})
    torch.testing.assert_close(statistics.whole("m").gram(), covariance(x))
    torch.testing.assert_close(statistics.part("m", [0, 2]).gram(), covariance(x[fold != 1]))


def example(seed: int = 0, model: str = "tiny") -> Statistics:
    x = torch.randn(10, 1, 3, generator=torch.Generator().manual_seed(seed))
    rows = {"samples": x[:, 0], "priority": torch.arange(seed, seed + 10, dtype=torch.float64)}
    moments = {"m@0": Moments.empty(coords=1, nodes=3).add(x)}
    return Statistics(moments, {"total": x.sum(0)}, rows, {"pilot": torch.eye(3)}, 1, {"model": model, "capacity": 12})


def test_save_and_load_lose_nothing(tmp_path: Path) -> None:
    example().save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    assert torch.equal(back.whole("m").gram(), example().whole("m").gram())
    assert back.meta == example().meta and back.done == 1
    assert all(torch.equal(back.rows[key], value) for key, value in example().rows.items())


def test_merging_keeps_the_rows_of_smallest_priority_in_any_order() -> None:
    one, two = example(0), example(3)
    for merged in (one + two, two + one):
        assert sorted(merged.rows["priority"].tolist()) == sorted([*range(10), *range(3, 13)])[:12]
    assert (one + two).done == 2


def test_statistics_of_different_models_do_not_merge() -> None:
    with pytest.raises(InputError, match="model"):
        example() + example(model="other")


def test_a_graph_file_is_no_statistics_file(tmp_path: Path) -> None:
    from tests.test_graph import random_graph

    random_graph().save(tmp_path / "g.safetensors")
    with pytest.raises(FormatError, match=r"g\.safetensors"):
        Statistics.load(tmp_path / "g.safetensors")
