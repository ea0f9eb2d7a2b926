"""Blocks, checkpoints, interrupts, sparse codes, and targets sharded over two processes."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.apart import as_two
from tests.helpers import join_two
from tests.solve.problems import planted
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError, SolveError
from tl_circuitlasso.solve import (
    L1,
    ElasticNet,
    Group,
    Layout,
    PairSums,
    all_reduce_moments,
    block_lasso,
    code_sums,
    lasso,
    lasso_sharded,
    moments_of,
    row_group,
    scatter_sums,
)
from tl_circuitlasso.solve.base import Status

LAYOUT = Layout([5, 10, 5, 10], [0, 1, 1, 2])


def standard_gram(seed: int = 0) -> torch.Tensor:
    x = planted(seed=seed).features
    return torch.corrcoef(x.T)


@pytest.mark.parametrize("grouped", [False, True])
def test_blocks_obey_the_order_and_equal_one_whole_problem(grouped: bool) -> None:
    gram = standard_gram()
    solution = block_lasso(gram, LAYOUT, strength=0.2, grouped=grouped, tol=1e-8)
    ranks = LAYOUT.node_ranks()
    assert bool((solution.value[ranks[:, None] >= ranks] == 0).all())
    assert bool(solution.converged.all()) and int((solution.value != 0).sum()) > 10
    rows = ranks < 1
    penalty = Group(torch.zeros(5, dtype=torch.long), torch.tensor([0] * 10 + [1] * 5)) if grouped else None
    alone = lasso(
        gram[rows][:, rows],
        gram[rows][:, ranks == 1],
        target_sq_norm=torch.ones(15),
        strength=0.2,
        penalty=penalty,
        tol=1e-8,
    )
    torch.testing.assert_close(solution.value[:5, 5:20], alone.value)


def test_an_interrupted_solve_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch) -> None:
    gram, file = standard_gram(), tmp_path / "solve.safetensors"
    whole = block_lasso(gram, LAYOUT, strength=0.2)
    calls = []

    def interrupted(*args, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return lasso(*args, **options)

    monkeypatch.setattr("tl_circuitlasso.solve.blocks.lasso", interrupted)
    with pytest.raises(KeyboardInterrupt):
        block_lasso(gram, LAYOUT, strength=0.2, checkpoint=file)
    assert file.exists()
    monkeypatch.setattr("tl_circuitlasso.solve.blocks.lasso", lambda *a, **o: (calls.append(1), lasso(*a, **o))[1])
    resumed = block_lasso(gram, LAYOUT, strength=0.2, checkpoint=file)
    assert len(calls) == 2  # one rank before the interrupt, only the other after it
    assert torch.equal(resumed.value, whole.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["solve.safetensors"]


def test_foreign_or_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "solve.safetensors"
    block_lasso(standard_gram(), LAYOUT, strength=0.2, checkpoint=file)
    with pytest.raises(FormatError, match="belongs to another problem"):
        block_lasso(standard_gram(1), LAYOUT, strength=0.2, checkpoint=file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        block_lasso(standard_gram(), LAYOUT, strength=0.2, checkpoint=file)
    with pytest.raises(InputError, match="`layout` describes 3 nodes"):
        block_lasso(standard_gram(), Layout([3], [0]), strength=0.2)


@pytest.mark.slow  # its clock is the wall: on a busy machine the interrupt arrives late
def test_ctrl_c_returns_control_at_once_and_leaves_the_matrices_alone() -> None:
    problem = planted(samples=400, sources=300, targets=300, correlation=0.99)
    matrices = problem.matrices
    before = {name: matrix.clone() for name, matrix in matrices.items()}
    few = {"target_sq_norm": problem.square, "strength": 0.5, "solver": "working_set"}
    lasso(problem.gram[:5, :5], problem.cross[:5], **few)  # compiled beforehand
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    clock = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        lasso(**matrices, strength=1e-5, tol=1e-13)
        time.sleep(30)
    assert time.perf_counter() - clock < 6
    assert all(torch.equal(before[name], matrices[name]) for name in before)


def test_gram_of_sparse_codes_equals_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(200, 40, generator=generator).double() * (torch.rand(200, 40, generator=generator) < 0.1)
    codes[:, 7] = 0
    targets = torch.randn(200, 3, generator=generator, dtype=torch.float64) + 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        parts = [code_sums(codes[k : k + 50].to_sparse_csr(), targets[k : k + 50]) for k in range(0, 200, 50)]
    sums = parts[0] + parts[1] + parts[2] + parts[3]
    data = sums.centred()
    centred, about = codes - codes.mean(0), targets - targets.mean(0)
    expected = moments_of(centred, about)
    for name in ("gram", "cross", "target_sq_norm"):
        torch.testing.assert_close(getattr(data, name), getattr(expected, name), atol=1e-12, rtol=1e-9)
    dense = code_sums(codes, targets).centred()
    np.testing.assert_allclose(dense.gram.numpy(), data.gram.numpy(), atol=1e-12)
    with pytest.raises(InputError, match="NaN or infinite"):
        code_sums(torch.full((2, 2), torch.nan))


PER_TARGET = ("strength", "strength_max", "iterations", "dead_targets")
SHARDED: dict[str, Callable[[], dict]] = {
    "weights": lambda: {"penalty": L1(_weights())},
    "box": lambda: {"penalty": L1(non_negative=True, upper=0.2)},
    "elastic net": lambda: {"penalty": ElasticNet(0.5)},
    "strengths": lambda: {"strength": torch.linspace(0.0, 1.0, 9)},
    "absolute": lambda: {"strength": 0.05, "strength_is": "absolute", "standardise": True},
    "rows": lambda: {"penalty": row_group(30, 9), "strength": 0.3},
    "uneven groups": lambda: {"penalty": Group(torch.arange(30) // 5, torch.tensor([0, 1, 0, 0, 2, 2, 1, 0, 2]))},
    "warm": lambda: {"init": torch.full((30, 9), 0.1), "solver": "fista"},
}


def _weights() -> torch.Tensor:
    weights = torch.rand(30, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    weights[::7, 4] = torch.inf
    return weights


def _worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    join_two(rank, store)
    problem = planted(targets=9)
    mine = slice(0, 50) if rank == 0 else slice(50, None)
    data = all_reduce_moments(moments_of(problem.features[mine], problem.targets[mine]))
    plain = lasso_sharded(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.1)
    penalty = Group(torch.arange(30) // 3, torch.arange(9) // 3)
    level = torch.full((9,), 0.2)
    blocks = lasso_sharded(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=level, penalty=penalty)
    stored = {"plain": plain.value, "blocks": blocks.value, "gap": plain.gap, "ok": plain.converged}
    for name, options in SHARDED.items():
        solution = lasso_sharded(**problem.matrices, **{"strength": 0.1, "tol": 1e-8, **options()})
        stored |= {f"{name}/value": solution.value, f"{name}/gap": solution.gap}
        stored |= {f"{name}/{key}": solution.stats[key] for key in PER_TARGET}
        stored[f"{name}/solved"] = torch.tensor(solution.status is Status.SOLVED)
    few = lasso_sharded(problem.gram, problem.cross[:, :1], target_sq_norm=problem.square[:1], strength=0.1)
    stored["few"] = few.value  # the second process has no target
    with warnings.catch_warnings(record=True), pytest.raises(CircuitLassoError) as missed:
        warnings.simplefilter("always")  # one target only is out of reach, so only its process knows at first
        level = torch.ones(9)
        level[1] = 0.001
        lasso_sharded(**problem.matrices, strength=level, tol=1e-12, max_iter=1, solver="fista", strict=True)
    stored["strict"] = torch.tensor([isinstance(missed.value, SolveError), "rank 1 of 2 failed" in str(missed.value)])
    save_file(stored, f"{results}{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_answer_of_one(tmp_path: Path) -> None:
    as_two(_worker, str(tmp_path / "store"), str(tmp_path / "r"))
    problem = planted(targets=9)
    alone = lasso_sharded(problem.gram, problem.cross, target_sq_norm=problem.square, strength=0.1)
    penalty = Group(torch.arange(30) // 3, torch.arange(9) // 3)
    blocks = lasso(**problem.matrices, strength=0.2, penalty=penalty)
    for rank in range(2):
        stored = load_file(tmp_path / f"r{rank}")
        torch.testing.assert_close(stored["plain"], alone.value, atol=1e-6, rtol=0)
        torch.testing.assert_close(stored["blocks"], blocks.value, atol=1e-6, rtol=0)
        assert bool(stored["ok"].all()) and float(stored["gap"].max()) <= 1e-4
        for name, options in SHARDED.items():
            expected = lasso(**problem.matrices, **{"strength": 0.1, "tol": 1e-8, **options()})
            torch.testing.assert_close(stored[f"{name}/value"], expected.value, atol=1e-6, rtol=0)
            assert float(stored[f"{name}/gap"].max()) <= 1e-8 and bool(stored[f"{name}/solved"])
            for key in PER_TARGET:
                assert stored[f"{name}/{key}"].shape == expected.stats[key].shape
            torch.testing.assert_close(stored[f"{name}/strength"], expected.stats["strength"])
        torch.testing.assert_close(stored["few"], alone.value[:, :1], atol=1e-6, rtol=0)
        assert stored["strict"].tolist() == [rank == 1, rank == 0]


def added_up(rows: slice) -> PairSums:
    generator = torch.Generator().manual_seed(0)
    codes, targets = (torch.rand(60, width, generator=generator) for width in (6, 7))
    some = codes.where(codes > 0.6, 0.0)[rows], targets.where(targets > 0.5, 0.0)[rows]
    return PairSums.empty(6, 7).add(*(part.to_sparse_csr() for part in some))


def _scattering(rank: int, store: str, results: str, size: int) -> None:
    torch.set_num_threads(1)
    join_two(rank, store, size)
    own = scatter_sums(added_up(slice(rank, None, size)), as_ranks("world"))
    held = {name: getattr(own, name).contiguous() for name in ("sums", "upper", "cross", "target_sums")}
    save_file({**held, "squares": own.target_squares, "count": torch.tensor(own.count)}, f"{results}{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_keeps_the_sums_of_its_own_targets_alone(size: int, tmp_path: Path) -> None:
    as_two(_scattering, str(tmp_path / "store"), str(tmp_path / "r"), size, size=size)
    whole = added_up(slice(None))
    for rank in range(size):
        stored, mine = load_file(tmp_path / f"r{rank}"), slice(rank, None, size)
        assert int(stored["count"]) == whole.count and len(stored["target_sums"]) == len(range(7)[mine])
        torch.testing.assert_close(stored["sums"], whole.sums)
        torch.testing.assert_close(stored["upper"].triu(), whole.upper.triu())
        torch.testing.assert_close(stored["cross"], whole.cross[:, mine])
        torch.testing.assert_close(stored["target_sums"], whole.target_sums[mine])
        torch.testing.assert_close(stored["squares"], whole.target_squares[mine])
