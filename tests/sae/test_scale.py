"""What the sizes of SAEs ask for: planted circuits, streaming sums, few samples, codes on disk, the benchmark."""

import gc
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

import tl_circuitlasso as tcl
from benchmarks import sae_scale
from tests.sae.training import PlainSAE
from tl_circuitlasso import solve
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.features.few import regress_samples
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.features.regression import Rule, needed_bytes, regress_pair
from tl_circuitlasso.features.samples import FOLDS, PairData, fold_of, to_torch
from tl_circuitlasso.models.codes import Codes, sparse_codes, stacked
from tl_circuitlasso.models.feature_codes import Chunk, joined
from tl_circuitlasso.models.feature_store import CodeStore
from tl_circuitlasso.models.feature_survey import EXAMPLES, strongest, survey
from tl_circuitlasso.solve import pairs
from tl_circuitlasso.synthetic.codes import PlantedCodes, planted_codes

AUTO = Rule("auto", "l1")


@pytest.fixture(scope="module")
def problem() -> PlantedCodes:
    return planted_codes(8000, 400, active=12, seed=1)


@pytest.fixture(scope="module")
def pair(problem: PlantedCodes) -> PairData:
    return sae_scale.pair_of(problem)


@pytest.fixture(scope="module")
def found(pair: PairData) -> Regressed:
    return regress_pair(pair, AUTO)


def dense(problem: PlantedCodes, pair: PairData) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples that are regressed on, in float64."""
    x = torch.from_numpy(problem.sources.toarray()).double()[:, pair.features]
    y = torch.from_numpy(problem.children.toarray()).double()[:, pair.child_features]
    held = torch.zeros(len(x), dtype=torch.bool)
    held[torch.cat([part.prompt for part in pair.parts(held=True)])] = True
    return x[~held], y[~held]


@pytest.mark.parametrize("rectified", [False, True])
def test_planted_circuits_are_found(rectified: bool) -> None:
    planted = planted_codes(8000, 400, active=12, rectified=rectified, seed=2)
    pair = sae_scale.pair_of(planted)
    found = regress_pair(pair, AUTO)
    figures = sae_scale.planted_f1(planted, pair, found)
    assert figures["f1"] >= 0.95 and float(found.gap.max()) <= 1e-4
    own = planted.truth.toarray()[pair.features][:, pair.child_features][found.source, found.target]
    right = torch.from_numpy(own) != 0
    assert float((found.weight[right] / torch.from_numpy(own)[right] - 1).abs().median()) < (0.3 if rectified else 0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_that_have_nothing_to_do_with_each_other_give_no_edges(seed: int) -> None:
    one, other = (planted_codes(20_000, 100, active=10, seed=10 * seed + k).sources for k in (1, 2))
    pair = sae_scale.pair_of(PlantedCodes(one, other, scipy.sparse.csc_matrix((100, 100))))
    found = regress_pair(pair, AUTO)
    assert len(found.source) <= 1e-3 * pair.sources * len(pair.child_features)
    assert found.overall < 0.01


def test_the_strength_never_falls_below_noise(found: Regressed, pair: PairData) -> None:
    assert float(found.strength.min()) >= 0.2 - 1e-9
    few = regress_pair(sae_scale.pair_of(planted_codes(600, 60, active=6, seed=3), min_count=5), AUTO)
    assert float(few.strength.max()) > 0.2


def test_held_out_r2_as_from_dense_samples(problem: PlantedCodes, pair: PairData, found: Regressed) -> None:
    x, y = dense(problem, pair)
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    weight[found.source, found.target] = found.weight
    parts = list(pair.parts(held=True))
    held_x = torch.from_numpy(scipy.sparse.vstack([part.codes for part in parts]).toarray()).double()
    held_y = torch.from_numpy(scipy.sparse.vstack([part.child for part in parts]).toarray()).double()
    wrong = (held_y - y.mean(0) - (held_x - x.mean(0)) @ weight).square()
    total = (held_y - y.mean(0)).square()
    torch.testing.assert_close(found.r2, 1 - wrong.sum(0) / total.sum(0), rtol=1e-6, atol=1e-6)
    assert found.overall == pytest.approx(float(1 - wrong.sum() / total.sum()), rel=1e-6)


# ---- sums -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2**16))
def test_sums_of_any_chunks_are_those_of_dense_samples(
    samples: int, sources: int, targets: int, extra: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.relu(torch.randn(samples, sources, generator=generator)).double()
    y = torch.relu(torch.randn(samples, targets, generator=generator)).double()
    e = torch.randn(samples, extra, generator=generator).double()
    sums = solve.PairSums.empty(sources + extra, targets)
    cut = int(torch.randint(0, samples + 1, (), generator=generator))
    for rows in (slice(0, cut), slice(cut, None)):
        if len(x[rows]):
            sums = sums.add(to_torch(scipy.sparse.csr_matrix(x[rows].numpy())), y[rows], e[rows])
    both = torch.cat([x, e], 1)
    for about in (None, (both[0], y[0])):
        centre, target_centre = (both.mean(0), y.mean(0)) if about is None else about
        a, b = both - centre, y - target_centre
        moments = sums.centred(about)
        torch.testing.assert_close(moments.gram, a.T @ a / samples)
        torch.testing.assert_close(moments.cross, a.T @ b / samples)
        torch.testing.assert_close(moments.target_sq_norm, b.square().mean(0))


@pytest.mark.parametrize("way", ["_add_scattered", "_add_dense"])
def test_an_accelerator_adds_up_the_same_sums(way: str, problem: PlantedCodes) -> None:
    codes, child = to_torch(problem.sources[:500]), to_torch(problem.children[:500])
    extra = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = (problem.sources.shape[1] + 2, problem.children.shape[1])
    expected = solve.PairSums.empty(*shape).add(codes, child, extra).centred()
    there = solve.PairSums.empty(*shape)
    for rows in (slice(0, 200), slice(200, 500)):
        parts = (to_torch(matrix[rows]) for matrix in (problem.sources[:500], problem.children[:500]))
        getattr(pairs, way)(there, *parts, extra[rows])
    found = replace(there, count=500).centred()
    for name in ("gram", "cross", "target_sq_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_sums_are_what_dense_products_say(problem: PlantedCodes) -> None:
    codes, child = to_torch(problem.sources[:500]), to_torch(problem.children[:500])
    found = solve.PairSums.empty(problem.sources.shape[1], problem.children.shape[1]).add(codes, child).centred()
    expected = solve.moments_of(*(x - x.mean(0) for x in (codes.to_dense().double(), child.to_dense().double())))
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)
    source, target = (found.cross.abs() > found.cross.abs().quantile(0.99)).T.nonzero(as_tuple=True)[::-1]
    support = torch.zeros_like(found.cross).index_put((source, target), torch.ones(()).to(found.cross))
    slow = solve.refit_support(found, support)[source, target]
    torch.testing.assert_close(solve.refit_entries(found, source, target), slow, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("extra", [0, 3])
def test_codes_with_many_nonzeros_add_up_the_same(
    extra: int, monkeypatch: pytest.MonkeyPatch, problem: PlantedCodes
) -> None:
    codes, child = to_torch(problem.sources[:500]), to_torch(problem.children[:500])
    beside = torch.randn(500, extra, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = (problem.sources.shape[1] + extra, problem.children.shape[1])
    found = []
    for share in (1.1, 0.0):  # never and always by dense products
        monkeypatch.setattr(pairs, "DENSE_FROM", share)
        monkeypatch.setattr(pairs, "DENSE_ROWS", 192)
        monkeypatch.setattr(pairs, "DENSE_STRIP", 33)
        found.append(solve.PairSums.empty(*shape).add(codes, child, beside).centred())
    torch.testing.assert_close(found[1].gram, found[0].gram)
    assert torch.equal(found[1].cross, found[0].cross)


def test_sums_refuse_what_does_not_fit() -> None:
    sums = solve.PairSums.empty(3, 2)
    with pytest.raises(InputError, match="same samples"):
        sums.add(torch.ones(4, 3), torch.ones(5, 2))
    with pytest.raises(InputError, match="columns"):
        sums.add(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(InputError, match="no samples"):
        sums.centred()


def test_folds_are_even_and_have_nothing_to_do_with_what_is_held_out(pair: PairData) -> None:
    train = torch.cat([part.prompt for part in pair.parts(held=False)])
    counts = torch.bincount(fold_of(train), minlength=FOLDS)
    assert int(counts.min()) > 0.8 * len(train) / FOLDS
    assert pair.count(held=False) == len(train) and pair.count(held=True) == 8000 - len(train)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_edges(pair: PairData, found: Regressed) -> None:
    there = regress_pair(pair, AUTO, device="cuda")
    edges = [set(zip(one.source.tolist(), one.target.tolist())) for one in (found, there)]
    assert len(edges[0] ^ edges[1]) <= 0.01 * len(edges[0])
    assert there.overall == pytest.approx(found.overall, abs=1e-3)


# ---- few samples ----------------------------------------------------------------------------------------------------


def test_residuals_and_gram_agree(problem: PlantedCodes, pair: PairData, found: Regressed) -> None:
    by_residuals = regress_samples(pair, AUTO)
    edges = [set(zip(one.source.tolist(), one.target.tolist())) for one in (found, by_residuals)]
    assert len(edges[0] ^ edges[1]) <= 0.01 * len(edges[0])
    assert by_residuals.overall == pytest.approx(found.overall, abs=1e-4)
    assert float(by_residuals.gap.max()) <= 1e-4


def test_more_features_than_samples(demo: Demo, demo_saes: dict[str, PlainSAE]) -> None:
    tokens = demo.tokens[:20]
    options = {"mixing": "pooled", "min_count": 3, "held_out": 0.0, "penalty": "l1"}
    graph = tcl.circuit_lasso(
        demo.model, tokens, basis=tcl.SAEFeatures(demo_saes, **options), strength=0.3, progress=False
    )
    assert graph.provenance["pairs"][0]["samples"] == 20 and graph.n_kept > 0
    assert bool(graph.certificate.converged.all())
    with pytest.raises(InputError, match="needs more than half as many samples"):
        tcl.circuit_lasso(
            demo.model, tokens, basis=tcl.SAEFeatures(demo_saes, **options), strength="ebic", progress=False
        )


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_too_many_features_are_refused_before_allocating(pair: PairData) -> None:
    need = needed_bytes(pair.sources, len(pair.child_features))
    regress_pair(pair, AUTO, memory=need)
    with pytest.raises(InputError, match="`max_features` of about"):
        regress_pair(pair, AUTO, memory=need - 1)
    with pytest.raises(InputError, match="no `draws`"):
        regress_pair(pair, Rule("auto", "l1", draws=4), memory=need)
    with pytest.raises(InputError, match="use fewer prompts"):
        regress_samples(pair, AUTO, memory=1000)


def test_the_estimate_covers_what_is_used() -> None:
    """Measured as the largest number of bytes that tensors and arrays hold at once, at a size where they dominate."""
    import tracemalloc

    pair = sae_scale.pair_of(planted_codes(3000, 700, active=10, seed=4), min_count=1)
    regress_pair(pair, AUTO)
    tracemalloc.start()  # numpy reports to it; torch's buffers of the same size are of the same order
    regress_pair(pair, AUTO)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= needed_bytes(pair.sources, len(pair.child_features))


def test_codes_beyond_the_limit_go_to_disk_and_change_nothing(demo: Demo, demo_saes: Any) -> None:
    basis = tcl.SAEFeatures(demo_saes, held_out=0.0)
    free, tight = (
        tcl.circuit_lasso(demo.model, demo.tokens, basis=some, progress=False)
        for some in (basis, replace_memory(basis, 2_000_000))
    )
    assert free.provenance["chunks_on_disk"] == 0 and tight.provenance["chunks_on_disk"] == 1
    assert tight.kept_edges() == free.kept_edges()
    torch.testing.assert_close(tight.weight, free.weight)


def test_nothing_stays_on_disk_and_nobody_is_warned() -> None:
    """Codes beyond the limit, and a store that is forgotten."""
    store = CodeStore(None, 1, {})
    store.add(chunk_of(torch.ones(4, 3), 0), "")
    store.flush()
    (path,) = store._places
    assert isinstance(path, Path) and path.exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    assert not path.parent.exists() and not [one for one in caught if issubclass(one.category, ResourceWarning)]


def replace_memory(basis: tcl.SAEFeatures, limit: int) -> tcl.SAEFeatures:
    return tcl.SAEFeatures(basis.saes, held_out=basis.held_out, memory=limit)


# ---- chunks ---------------------------------------------------------------------------------------------------------


def chunk_of(values: torch.Tensor, first: int) -> Chunk:
    """One sample a prompt, tokens numbered like prompts."""
    numbers = torch.arange(len(values))
    return Chunk(
        codes={"hook": sparse_codes(values)},
        errors={"hook": values[:, :2] * 2},
        target=values[:, :1],
        target_rows=numbers,
        prompt=numbers + first,
        position=torch.zeros(len(values), dtype=torch.int32),
        tokens=(numbers + first).int(),
        ends=numbers + 1,
        numbers=numbers + first,
        batches=first + 1,
    )


def as_dense(codes: Codes) -> torch.Tensor:
    matrix = scipy.sparse.csr_matrix(
        (codes.values.numpy(), codes.columns.numpy(), codes.starts.numpy()), (codes.rows, codes.width)
    )
    return torch.from_numpy(matrix.toarray())


def test_chunks_join_and_come_back_from_disk(tmp_path: Path) -> None:
    values = torch.relu(torch.randn(30, 7) - 0.5)
    parts = [chunk_of(values[:10], 0), chunk_of(values[10:], 10)]
    whole = joined(parts)
    torch.testing.assert_close(as_dense(whole.codes["hook"]), values)
    torch.testing.assert_close(as_dense(stacked([part.codes["hook"] for part in parts])), values)
    torch.testing.assert_close(whole.errors["hook"], values[:, :2] * 2)
    store = CodeStore(tmp_path, 0, {"model": "a"})
    for number, part in enumerate(parts):
        store.add(part, f"hash {number}")
        store.flush()
    again = CodeStore(tmp_path, 1 << 40, {"model": "a"})
    assert again.samples == 30 and again.batches == 11 and again.origin == "hash 1" and again.on_disk == 0
    torch.testing.assert_close(torch.cat([as_dense(chunk.codes["hook"]) for chunk in again]), values)
    with pytest.raises(InputError, match="differs in model"):
        CodeStore(tmp_path, 0, {"model": "b"})
    (tmp_path / "codes-00000.safetensors").unlink()
    with pytest.raises(InputError, match="lacks chunk 0"):
        CodeStore(tmp_path, 0, {"model": "a"})


def test_a_truncated_chunk_is_named(tmp_path: Path) -> None:
    store = CodeStore(tmp_path, 0, {})
    store.add(chunk_of(torch.ones(3, 3), 0), "")
    store.flush()
    path = tmp_path / "codes-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="codes-00000"):
        CodeStore(tmp_path, 0, {})


def test_firing_and_examples_stream() -> None:
    values = torch.relu(torch.randn(300, 5) - 0.3)
    parts = [chunk_of(values[start : start + 70], start) for start in range(0, 300, 70)]
    firing = survey(parts, {"hook": 5})["hook"]
    torch.testing.assert_close(firing.count, (values > 0).sum(0).double())
    torch.testing.assert_close(firing.variance, values.double().var(0, correction=0))
    torch.testing.assert_close(firing.largest, values.double().amax(0))
    kept = torch.tensor([0, 3])
    examples = strongest(parts, {"hook": kept})["hook"]
    best = values[:, kept].topk(EXAMPLES, dim=0)
    torch.testing.assert_close(examples.value, best.values.T)
    assert examples.prompt.tolist() == best.indices.T.tolist()
    assert examples.tokens[0, 0].tolist().count(int(best.indices[0, 0])) == 1


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sae_scale.main(["--quick", "--planted", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "f1" in printed and "seconds, statistics + solve" in printed and (tmp_path / "out.json").exists()
    assert printed.index("plan: sums and solve") < printed.index("seconds, solve")
    assert sae_scale.main(["--quick", "--planted", "--penalty", "read", "--json", str(tmp_path / "read.json")]) == 0
    read = json.loads((tmp_path / "read.json").read_text())
    assert read["precision"] > 0.95 and read["f1"] > 0.7 and read["seconds, what reads what"] > 0


def test_the_benchmark_plans_what_no_machine_here_could_run(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["--features", "32768", "--tokens", "1000000", "--device", "cuda"]
    assert sae_scale.main([*huge, "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "58.0 GB on cuda" in printed and "5.0e+09 (scattered)" in printed and "seconds" not in printed


def test_planted_codes_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="no more active features"):
        planted_codes(10, 5, active=9)
    made = planted_codes(500, 50, active=5, seed=0)
    assert made.sources.nnz / 500 == pytest.approx(5, abs=1) and (np.diff(made.truth.indptr) >= 2).all()
    assert not math.isnan(float(made.children.data.sum()))


def test_a_pair_can_be_asked_for_fewer_features(pair: PairData) -> None:
    some = replace(pair, features=pair.features[:20], child_features=pair.child_features[:10])
    assert len(regress_pair(some, AUTO).gap) == 10
