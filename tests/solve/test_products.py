"""Products of sparse coefficients with a Gram: by rows, by tiles that are kept or made in turn, and dense."""

import numpy as np
import pytest
import torch

from tl_circuitlasso.solve import L1, lasso, moments_of, prepare, tiles, working_set

kernels = pytest.importorskip("tl_circuitlasso.solve.kernels")


def problem(sources: int, targets: int, share: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    gram = rng.standard_normal((sources, sources))
    coef = np.where(rng.random((targets, sources)) < share, rng.standard_normal((targets, sources)), 0.0)
    return gram + gram.T, rng.standard_normal((targets, sources)), coef


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("sources", "share", "kept"),
    [(300, 0.01, 1 << 20), (300, 0.1, 1 << 20), (256, 0.1, 1 << 20), (700, 0.05, 700 * 300), (300, 0.9, 1 << 20)],
    ids=["rows", "tiles", "whole tiles", "tiles in turn", "dense"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_to_the_pull_gives_the_same(
    sources: int, share: float, kept: int, dtype: type, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "KEEP_UP_TO", kept)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gram, cross, coef = (entry.astype(dtype) for entry in problem(sources, 150, share))
    todo, pull = np.arange(0, 150, 2), np.full_like(cross, np.nan)
    tiled = tiles.Tiled(gram)
    try:
        for _ in range(2):  # the second time with tiles that are there
            working_set.products(kernels, tiled, cross, coef, todo, pull)
    finally:
        torch.set_num_threads(before)
    exact = cross[todo].astype(np.float64) - coef[todo].astype(np.float64) @ gram
    np.testing.assert_allclose(pull[todo], exact, atol=1e-10 if dtype == np.float64 else 1e-3)
    assert np.isnan(pull[1::2]).all()


def test_tiles_hold_every_column_once() -> None:
    gram, _, _ = problem(700, 1, 0.1)
    for _, group in tiles.Tiled(gram).strips():
        assert np.array_equal(np.concatenate(list(group), 1)[:, :700], gram)


def test_a_start_from_forbidden_entries_is_set_to_zero() -> None:
    torch.manual_seed(0)
    data = moments_of(torch.randn(60, 12, dtype=torch.float64), torch.randn(60, 3, dtype=torch.float64))
    weights = torch.ones(12, 3, dtype=torch.float64)
    weights[::3] = torch.inf
    matrices = {"gram": data.gram, "cross": data.cross, "target_sq_norm": data.target_sq_norm}
    options = {"strength": 0.1, "penalty": L1(weights), "tol": 1e-9}
    warm = lasso(**matrices, **options, init=torch.ones(12, 3, dtype=torch.float64))
    assert bool(warm.converged.all()) and not warm.value[::3].any()
    torch.testing.assert_close(warm.value, lasso(**matrices, **options).value, atol=1e-6, rtol=0)


def test_more_targets_than_one_chunk_give_what_they_give_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = moments_of(torch.randn(80, 300, dtype=torch.float64), torch.randn(80, 50, dtype=torch.float64))
    whole = lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.3)
    monkeypatch.setattr(working_set, "CHUNK", 16)
    parts = lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.3)
    torch.testing.assert_close(parts.value, whole.value, atol=1e-12, rtol=0)
    assert bool(parts.converged.all())


def test_a_path_makes_the_tiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 400, generator=generator, dtype=torch.float64)
    y = x @ torch.where(torch.rand(400, 300, generator=generator) < 0.1, 1.0, 0.0).double()
    data, made = moments_of(x - x.mean(0), y - y.mean(0)), []
    real = tiles.Tiled.strips
    monkeypatch.setattr(tiles.Tiled, "strips", lambda self: made.append(id(self)) or real(self))
    problem = prepare(data.gram, data.cross, target_sq_norm=data.target_sq_norm)
    for strength in (0.4, 0.2, 0.1):
        problem.at(strength)
    assert len(made) >= 3 and len(set(made)) == 1
