"""What a user relies on: true certificates on any data, exact ends of the range, and solves that survive a kill."""

import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tests.apart import FORKED
from tests.solve.judge import Data, Terms, conic_optimum
from tests.solve.problems import Planted, planted
from tests.solve.test_certificate import FLAWS, SHAPES, awkward
from tests.solve.test_cross import ENTRYWISE, GROUPED, penalty_of, terms_of
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.solve import (
    L1,
    Fista,
    Group,
    Layout,
    ProxNewton,
    Status,
    Sweeps,
    TorchSet,
    block_lasso,
    checkpoint,
    code_sums,
    cross_entropy_garrote,
    fit_dictionary,
    lasso,
    logistic_lasso,
    moments_of,
    multinomial_lasso,
    regress,
    row_group,
    select,
    stability,
    working_set,
)

PACKAGE = Path(__file__).parents[2]


def judged(problem: Planted, terms: Terms, solution: Any) -> float:
    """The worst relative gap of a solution, from the data, by the second certificate."""
    data = Data("quadratic", problem.features.numpy(), problem.targets.numpy())
    return data.gap(solution.value.numpy(), terms, solution.stats["strength"].numpy())


def sparse(dense: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        return dense.to_sparse_csr()


# ---- certificates on any data ---------------------------------------------------------------------------------------


def honest(solution: Any, problem: Planted, terms: Terms, tol: float, caught: list) -> None:
    """Every certificate holds by the second one; a target that missed the tolerance is reported, once."""
    assert terms.feasible(solution.value.numpy())
    assert judged(problem, terms, solution) <= 1.05 * max(tol, float(solution.gap.max()))
    solved = bool(solution.converged.all())
    assert solved == (solution.status is Status.SOLVED) and len(caught) == (not solved)


@settings(max_examples=50)
@given(
    SHAPES,
    FLAWS.map(tuple),
    st.sampled_from(ENTRYWISE),
    st.sampled_from([0.9, 0.3, 0.03]),
    st.sampled_from(["auto", "working_set"]),  # what small problems get, and what large ones do
)
def test_entrywise_certificates_are_true_on_any_data(shape, flaws, penalty, strength, solver) -> None:
    problem = awkward(shape, flaws)
    terms = terms_of(penalty, tuple(problem.truth.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"strength": strength, "penalty": penalty_of(terms), "tol": 1e-6, "solver": solver}
        solution = lasso(**problem.matrices, **options)
    honest(solution, problem, terms, 1e-6, caught)
    boxed = "box" in penalty or penalty == "all at once"
    assert solution.status is Status.SOLVED or (boxed and "units" in flaws)  # a bound of 1e6 magnifies rounding
    assert not bool(solution.value[solution.stats["dead_sources"]].any())
    assert not bool(solution.value[:, solution.stats["dead_targets"]].any())


@settings(max_examples=10)
@given(SHAPES, FLAWS.map(tuple), st.sampled_from(ENTRYWISE), st.sampled_from(["torch", "fista"]))
@example((2, 18, 2, 1), (), "elastic net", "fista")  # whose best dual point is the residual made larger
def test_solvers_without_a_compiler_are_honest_on_any_data(shape, flaws, penalty, solver) -> None:
    problem = awkward(shape, flaws)
    terms = terms_of(penalty, tuple(problem.truth.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = lasso(
            **problem.matrices, strength=0.1, penalty=penalty_of(terms), tol=1e-5, solver=solver, max_iter=200
        )
    honest(solution, problem, terms, 1e-5, caught)


@settings(max_examples=30)
@given(SHAPES, FLAWS.map(tuple), st.sampled_from(GROUPED), st.sampled_from([0.9, 0.3, 0.05]))
@example((7, 3, 2, 220), ("low rank", "dead source"), "group non-negative", 0.05)  # columns of very unlike dual scales
def test_group_certificates_are_true_on_any_data(shape, flaws, penalty, strength) -> None:
    flaws = tuple(flaw for flaw in flaws if flaw != "units")  # no Frobenius norm over columns in wild units means much
    problem = awkward(shape, flaws)
    terms = terms_of(penalty, tuple(problem.truth.shape))
    solution = lasso(**problem.matrices, strength=strength, penalty=penalty_of(terms), tol=1e-5)
    assert solution.status is Status.SOLVED and terms.feasible(solution.value.numpy())
    assert judged(problem, terms, solution) <= 1.05e-5


@settings(max_examples=10)
@given(SHAPES, st.sampled_from(GROUPED))
def test_groups_in_wild_units_are_solved_or_reported(shape, penalty) -> None:
    problem = awkward(shape, ("units",))
    terms = terms_of(penalty, tuple(problem.truth.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = lasso(**problem.matrices, strength=0.3, penalty=penalty_of(terms), tol=1e-4, max_iter=300)
    honest(solution, problem, terms, 1e-4, caught)


@settings(max_examples=25)
@given(SHAPES, st.sampled_from(ENTRYWISE), st.sampled_from(["gram", "residual"]), st.booleans(), st.floats(0.03, 0.9))
def test_data_dense_or_sparse_in_either_form_are_certified(shape, penalty, form, csr, strength) -> None:
    problem = planted(*shape)
    mask = torch.rand(problem.features.shape, generator=torch.Generator().manual_seed(shape[3])) < 0.4
    codes = Planted(problem.features.abs() * mask, problem.targets, problem.truth)
    terms = terms_of(penalty, tuple(problem.truth.shape))
    features = sparse(codes.features) if csr else codes.features
    options = {"strength": strength, "penalty": penalty_of(terms), "tol": 1e-6, "form": form}
    solution = regress(features, codes.targets, **options)
    assert solution.status is Status.SOLVED and terms.feasible(solution.value.numpy())
    assert judged(codes, terms, solution) <= 1.05e-6


@settings(max_examples=25)
@given(SHAPES, st.integers(1, 4), st.floats(0, 1))
def test_sums_of_sparse_codes_are_those_of_dense_ones(shape, parts, density) -> None:
    problem = planted(*shape)
    mask = torch.rand(problem.features.shape, generator=torch.Generator().manual_seed(shape[3])) < density
    codes, targets = problem.features * mask, problem.targets + 3.0  # rows and columns without an entry among them
    size = -(-len(codes) // parts)
    sums = [code_sums(sparse(x), y) for x, y in zip(codes.split(size), targets.split(size))]
    whole = sums[0]
    for part in sums[1:]:
        whole = whole + part
    expected = moments_of(codes - codes.mean(0), targets - targets.mean(0))
    for name in ("gram", "cross", "target_sq_norm"):
        torch.testing.assert_close(getattr(whole.centred(), name), getattr(expected, name), atol=1e-11, rtol=1e-8)


@settings(max_examples=20)
@given(SHAPES, st.sampled_from(["logistic", "multinomial"]), st.sampled_from(ENTRYWISE), st.sampled_from([0.5, 0.05]))
def test_certificates_of_likelihoods_are_true_on_any_data(shape, loss, penalty, strength) -> None:
    problem = planted(*shape)
    sources, outcomes = problem.truth.shape[0], problem.truth.shape[1] + 1
    terms = terms_of(penalty, (sources * outcomes, 1) if loss == "multinomial" else (sources, 1))
    x, logits = problem.features, torch.nn.functional.pad(problem.targets, (0, 1))
    if loss == "logistic":
        y = torch.sigmoid(logits[:, :1])
        solution = logistic_lasso(x, y[:, 0], strength=strength, penalty=penalty_of(terms), tol=1e-6)
    else:
        y = torch.softmax(logits, 1)
        weights = torch.from_numpy(terms.weights).view(sources, outcomes)
        shaped = L1(weights, terms.non_negative, None if np.isinf(terms.upper) else terms.upper, terms.squared or None)
        solution = multinomial_lasso(x, y, strength=strength, penalty=shaped, tol=1e-6)
    data = Data(loss, x.numpy(), y.numpy(), solution.stats["intercept"].numpy()[None])
    nothing = Data(loss, x.numpy(), y.numpy(), null_intercept(loss, y)).null()
    coef = solution.value.reshape(-1, 1).numpy()
    assert solution.status is Status.SOLVED and terms.feasible(coef)
    gap = data.gap(coef, terms, solution.stats["strength"].numpy()) * data.null()
    assert gap <= 1.05e-6 * nothing + 1e-12


def null_intercept(loss: str, y: torch.Tensor) -> np.ndarray:
    """The intercept that fits best without sources."""
    mean = y.mean(0, keepdim=True)
    return (torch.logit(mean) if loss == "logistic" else mean.log()).numpy()


@settings(max_examples=25)
@given(SHAPES, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.sampled_from(["gram", "residual"]))
def test_low_precision_data_are_solved_as_they_are(shape, dtype, form) -> None:
    problem = planted(*shape)
    low = Planted(problem.features.to(dtype), problem.targets.to(dtype), problem.truth)
    solution = regress(low.features, low.targets, strength=0.2, tol=1e-6, form=form)
    exact = Planted(low.features.double(), low.targets.double(), problem.truth)
    assert solution.value.dtype == torch.float64 and solution.status is Status.SOLVED
    assert judged(exact, terms_of("l1", tuple(problem.truth.shape)), solution) <= 1.05e-6


# ---- the ends of the range ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [*ENTRYWISE, *GROUPED])
def test_the_largest_strength_is_exact(penalty: str) -> None:
    problem = planted(seed=11)
    terms = terms_of(penalty, (30, 6))
    shape = penalty_of(terms)
    empty = lasso(**problem.matrices, strength=1.0, penalty=shape, tol=1e-9)
    assert not bool(empty.value.any()) and float(empty.gap.max()) < 1e-12 and empty.status is Status.SOLVED
    above = lasso(**problem.matrices, strength=3.0, penalty=shape, tol=1e-9)
    assert not bool(above.value.any())
    below = lasso(**problem.matrices, strength=0.999, penalty=shape, tol=1e-9)
    assert below.status is Status.SOLVED
    assert all(bool(below.value[:, own.tolist()].any()) for own in terms.problems(6))


@pytest.mark.parametrize("penalty", [*ENTRYWISE, *GROUPED])
def test_strength_zero_is_the_best_fit_that_the_penalty_allows(penalty: str) -> None:
    problem = planted(samples=60, sources=12, targets=4, seed=12)
    terms = terms_of(penalty, (12, 4))
    solution = lasso(**problem.matrices, strength=0, penalty=penalty_of(terms), tol=1e-7)
    data = Data("quadratic", problem.features.numpy(), problem.targets.numpy())
    best = conic_optimum(data, terms, np.zeros(4))
    fit = data.fit(solution.value.numpy(), np.arange(4))
    assert terms.feasible(solution.value.numpy()) and abs(fit - best) <= 1e-6 * data.null()
    assert bool(solution.converged.all())


def test_the_largest_strength_of_likelihoods_is_exact() -> None:
    problem = planted(samples=80, sources=8, targets=3, seed=13)
    labels = problem.targets.argmax(1)
    parts, prediction = problem.features[:, None] * torch.randn(1, 3, 8).double(), torch.softmax(problem.targets, 1)
    verbs = [
        lambda strength: logistic_lasso(problem.features, (labels == 0).long(), strength=strength, tol=1e-8),
        lambda strength: multinomial_lasso(problem.features, labels, strength=strength, tol=1e-8),
        lambda strength: cross_entropy_garrote(parts, prediction, strength=strength, tol=1e-8),
    ]
    for verb in verbs:
        assert not bool(verb(1.0).value.any()) and bool(verb(0.99).value.any())
    for verb in verbs[:2]:
        with pytest.warns(RuntimeWarning, match="strength of 0"):
            assert verb(0.0).status is Status.UNCERTIFIED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = verbs[2](0.0)  # pulls that rounding has left at or below 0 certify a bounded fit after all
    assert free.status in (Status.SOLVED, Status.UNCERTIFIED)
    costs = [cross_entropy(parts @ one.value[:, 0], prediction) for one in (free, verbs[2](0.001))]
    assert costs[0] <= costs[1] + 1e-9


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_one_source_one_target(samples: int) -> None:
    x, y = torch.tensor([[2.0], [-2.0]][:samples]), torch.tensor([[1.0], [-1.0]][:samples])
    for form in ("gram", "residual"):
        solution = regress(x, y, strength=0.5, form=form)
        assert solution.value.item() == pytest.approx(0.25, abs=1e-3) and solution.status is Status.SOLVED


# ---- wrong input is named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_samples_name_their_row_and_column(bad: float, csr: bool) -> None:
    problem = planted(samples=20, sources=6)
    features, targets = problem.features.clone(), problem.targets.clone()
    features[13, 4] = bad
    with pytest.raises(InputError, match=r"`features` holds (nan|inf|-inf) at row 13, column 4"):
        regress(sparse(features) if csr else features, targets, strength=0.1)
    targets[3, 1] = bad
    with pytest.raises(InputError, match=r"`targets` holds (nan|inf|-inf) at row 3, column 1"):
        regress(problem.features, targets, strength=0.1)


def test_a_bad_entry_of_a_block_gram_names_block_and_row() -> None:
    gram = torch.eye(6, dtype=torch.float64)
    gram[1, 4] = gram[4, 1] = torch.nan
    with pytest.raises(InputError, match=r"`gram` holds nan at row 1 \(block 0\), column 4"):
        block_lasso(gram, Layout([2, 2, 2], [0, 1, 2]), strength=0.1)
    with pytest.raises(InputError, match=r"row 1 \(m0\), column 4"):
        block_lasso(gram, Layout([2, 2, 2], [0, 1, 2]), strength=0.1, names=["input", "m0", "m1", "m2", "m3", "m4"])
    square = torch.tensor([1.0, float("nan")])
    with pytest.raises(InputError, match="`target_sq_norm` holds nan at row 1"):
        lasso(torch.eye(2), torch.zeros(2, 2), target_sq_norm=square, strength=0.1)


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0])
def test_a_bad_weight_is_named_with_its_place(bad: float) -> None:
    problem = planted(sources=6, targets=4)
    weights = torch.ones(6, 4)
    weights[5, 2] = bad
    with pytest.raises(InputError, match=r"`weights` must be > 0.*entry \[5, 2\] is"):
        lasso(**problem.matrices, strength=0.1, penalty=L1(weights))
    blocks = torch.ones(3, 2)
    blocks[2, 1] = bad
    group = Group(torch.arange(6) // 2, torch.arange(4) // 2, blocks)
    with pytest.raises(InputError, match=r"`weights` must be > 0.*block \[2, 1\] is"):
        lasso(**problem.matrices, strength=0.1, penalty=group)


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_an_indefinite_gram_is_never_solved(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    eigenvalues[0] = -0.5
    gram = basis * eigenvalues @ basis.T
    gram = (gram + gram.T) / 2
    with pytest.raises(InputError, match="isn't positive semidefinite"):
        lasso(gram, gram[:, :1], target_sq_norm=torch.ones(1), strength=0.1)


# ---- the same answer again ------------------------------------------------------------------------------------------


def every_verb() -> dict[str, Callable[[], torch.Tensor]]:
    """All solvers and choices of strength, each on a small problem."""
    problem = planted(samples=100, sources=30, targets=12, seed=21)
    labels = problem.targets[:, 0] > 0
    parts = [moments_of(problem.features[k::10], problem.targets[k::10]) for k in range(10)]
    features = problem.features[:, :, None].expand(-1, -1, 3).movedim(1, 2) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    return {
        "sweeps": lambda: lasso(**problem.matrices, strength=0.05, solver=Sweeps()).value,
        "working_set": lambda: lasso(**problem.matrices, strength=0.05, solver="working_set").value,
        "single": lambda: lasso(**problem.matrices, strength=0.05, dtype=torch.float32).value,
        "torch": lambda: lasso(**problem.matrices, strength=0.05, solver=TorchSet()).value,
        "fista": lambda: lasso(**problem.matrices, strength=0.05, solver=Fista()).value,
        "group": lambda: lasso(**problem.matrices, strength=0.2, penalty=row_group(30, 12)).value,
        "residual": lambda: regress(problem.features, problem.targets, strength=0.1, form="residual").value,
        "sparse": lambda: code_sums(sparse(problem.features), problem.targets).centred().gram,
        "logistic": lambda: logistic_lasso(problem.features, labels, strength=0.1).value,
        "garrote": lambda: cross_entropy_garrote(features, torch.full((100, 3), 1 / 3), strength=0.1).value,
        "curved": lambda: fit_dictionary(problem.features, size=3).moments(problem.features, problem.targets).gram,
        "stability": lambda: stability(parts, draws=4, seed=5),
        "ebic": lambda: select(parts[0] + parts[1], rule="ebic", strengths=[0.5, 0.2]).solution.value,
    }


def test_every_verb_repeats_itself_and_does_not_hang_on_threads() -> None:
    for name, verb in every_verb().items():
        once, again = verb(), verb()
        assert torch.equal(once, again), name
        if name in ("group", "garrote"):  # thousands of tiny products: two threads would mostly wait for each other
            continue
        torch.set_num_threads(2)
        try:
            threaded = verb()
        finally:
            torch.set_num_threads(1)
        close = 1e-6 if name in ("single", "curved") else 1e-9
        torch.testing.assert_close(threaded, once, atol=close, rtol=close, msg=name)


def test_what_fresh_memory_holds_doesn_t_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = every_verb()
    clean = {name: verb() for name, verb in verbs.items()}
    empty = np.empty

    def littered(shape: Any, dtype: Any = float, **options: Any) -> np.ndarray:
        fresh = empty(shape, dtype, **options)
        fresh.view(np.uint8).fill(0x7F)  # 1e306 in double precision
        return fresh

    monkeypatch.setattr(np, "empty", littered)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills its own with NaN
    try:
        for name, verb in verbs.items():
            assert torch.equal(verb(), clean[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


# ---- interrupts and checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "working_set", "torch", "fista", "newton"])
def test_an_interrupt_comes_through_at_once_and_corrupts_nothing(solver: str, monkeypatch) -> None:
    problem = planted(samples=200, sources=30, targets=8, correlation=0.95, seed=5)
    matrices, features = problem.matrices, problem.features
    before = {name: matrix.clone() for name, matrix in {**matrices, "features": features}.items()}

    def solve() -> torch.Tensor:
        if solver == "newton":
            return logistic_lasso(features, problem.targets[:, 0] > 0, strength=0.01, tol=1e-8).value
        return lasso(**matrices, strength=0.01, tol=1e-8, solver=solver).value

    undisturbed, calls = solve(), []
    home = {"auto": "sweeps._swept", "working_set": "working_set.in_slices", "torch": "torch_set.sweep_torch"}
    home["fista"] = "fista._step"
    place = f"tl_circuitlasso.solve.{home.get(solver, 'newton._newton_point')}"
    module, name = place.rsplit(".", 1)
    ordinary = getattr(sys.modules[module], name)

    def interrupted(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ordinary(*arguments)

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        solve()
    assert len(calls) == 2
    monkeypatch.undo()
    for name, matrix in {**matrices, "features": features}.items():
        assert torch.equal(matrix, before[name])
    assert torch.equal(solve(), undisturbed)


def stuck_at_the_third_part(folder: Path, arrived: Event) -> None:
    """A solve in parts of four targets that sleeps in the third: killed there."""
    checkpoint.PART = 4
    ordinary, calls = working_set.WorkingSet.solve, []

    def slow(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            arrived.set()
            time.sleep(600)
        return ordinary(*arguments, **options)

    working_set.WorkingSet.solve = slow
    lasso(**planted(targets=18).matrices, strength=0.1, checkpoint=folder, solver="working_set")


def test_a_killed_solve_goes_on_behind_its_finished_targets(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "solve"
    arrived = FORKED.Event()
    process = FORKED.Process(target=stuck_at_the_third_part, args=(folder, arrived))
    process.start()
    try:
        assert arrived.wait(120)
    finally:
        process.kill()
        process.join()
    names = [f"part-{number:06d}.safetensors" for number in range(5)]
    assert sorted(file.name for file in folder.iterdir()) == names[:2]
    monkeypatch.setattr("tl_circuitlasso.solve.checkpoint.PART", 4)
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    problem = planted(targets=18)
    resumed = lasso(**problem.matrices, strength=0.1, checkpoint=folder, solver="working_set")
    assert sorted(file.name for file in folder.iterdir()) == names
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times  # not solved again
    whole = lasso(**problem.matrices, strength=0.1, solver="working_set")
    assert torch.equal(resumed.value, whole.value) and torch.equal(resumed.gap, whole.gap)
    assert resumed.status is Status.SOLVED


@pytest.mark.parametrize("grouped", [False, True])
def test_a_checkpoint_changes_nothing_and_is_refused_for_another_problem(tmp_path: Path, grouped: bool) -> None:
    problem = planted(targets=6)
    penalty = Group(torch.arange(30) // 3, torch.tensor([0, 1, 0, 2, 1, 2])) if grouped else L1()
    plain = lasso(**problem.matrices, strength=0.2, penalty=penalty)
    for _ in range(2):
        stored = lasso(**problem.matrices, strength=0.2, penalty=penalty, checkpoint=tmp_path)
        torch.testing.assert_close(stored.value, plain.value, atol=1e-10, rtol=0)
        assert torch.equal(stored.converged, plain.converged)
    with pytest.raises(FormatError, match="belongs to another problem"):
        lasso(**problem.matrices, strength=0.3, penalty=penalty, checkpoint=tmp_path)
    weights = L1(torch.full((30,), 2.0))
    with pytest.raises(FormatError, match="belongs to another problem"):
        lasso(**problem.matrices, strength=0.2, penalty=weights, checkpoint=tmp_path)
    none = lasso(
        problem.gram,
        problem.cross[:, :0],
        target_sq_norm=problem.square[:0],
        strength=0.1,
        checkpoint=tmp_path / "none",
    )
    assert none.value.shape == (30, 0)


def test_a_block_checkpoint_knows_its_penalty(tmp_path: Path) -> None:
    gram = torch.corrcoef(planted(sources=12).features.T)
    layout, file = Layout([6, 6], [0, 1]), tmp_path / "blocks.safetensors"
    block_lasso(gram, layout, strength=0.2, penalty=L1(torch.ones(12, 12)), checkpoint=file)
    with pytest.raises(FormatError, match="belongs to another problem"):
        block_lasso(gram, layout, strength=0.2, penalty=L1(torch.full((12, 12), 2.0)), checkpoint=file)


@pytest.mark.slow  # its clock is the wall
@pytest.mark.parametrize("solver", ["working_set", "torch", "fista"])
def test_ctrl_c_is_answered_within_seconds(solver: str) -> None:
    code = (
        "import torch; from tests.solve.problems import planted; from tl_circuitlasso.solve import lasso\n"
        "p = planted(samples=400, sources=300, targets=300, correlation=0.99)\n"
        "lasso(**p.matrices, strength=0.5, solver='SOLVER')\n"
        "print('solving', flush=True)\n"
        "while True: lasso(**p.matrices, strength=1e-5, tol=1e-13, check=False, solver='SOLVER')\n"
    ).replace("SOLVER", solver)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=PACKAGE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"solving\n"
    time.sleep(1.0)
    clock = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors and time.perf_counter() - clock < 6


def test_newton_alone_stands_for_a_long_likelihood() -> None:
    problem = planted(samples=60, sources=10, targets=1)
    labels = problem.targets[:, 0] > 0
    named = logistic_lasso(problem.features, labels, strength=0.1, solver=ProxNewton())
    assert torch.equal(named.value, logistic_lasso(problem.features, labels, strength=0.1).value)
