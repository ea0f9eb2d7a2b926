"""The Lasso solver beside scikit-learn, celer, skglm and adelie: same objective, same strength, same required gap.

    pip install "tl-circuitlasso[bench]"
    python benchmarks/solvers.py --quick          # a minute or two
    python benchmarks/solvers.py                  # the sizes of the README's table
    python benchmarks/solvers.py --strength --nonlinear --logistic --fallback --sparse --groups

Every figure is the best of `--repeats` runs on `--threads` threads. The gap in the table is measured from X and Y by
`measured_gap`, which shares no code with the library; a solver that misses it keeps its time and gets a star. Libraries
that take one target at a time are run on `--sample` targets, and their times scaled up to all of them.
"""

# ruff: noqa: B023, E402, E731 - timed closures run inside their loop; thread counts are read at import

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

threads = argparse.ArgumentParser(add_help=False)
threads.add_argument("--threads", type=int, default=1)
THREADS = threads.parse_known_args()[0].threads
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = str(THREADS)

import numpy as np
import scipy.sparse
import torch

from tl_circuitlasso import solve

torch.set_num_threads(THREADS)
warnings.filterwarnings("ignore")


@dataclass(frozen=True, eq=False)
class Family:
    """Standardised data, the moments a Gram solver may use, and the truth they were made from."""

    name: str
    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray

    def moments(self) -> solve.Moments:
        return solve.moments_of(torch.from_numpy(self.x), torch.from_numpy(self.y))


def family_a(samples: int, sources: int, correlation: float = 0.9, seed: int = 0) -> Family:
    """A dense AR(1) design with ten parents per target."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, sources))
    for j in range(1, sources):
        x[:, j] = correlation * x[:, j - 1] + np.sqrt(1 - correlation**2) * x[:, j]
    return _with_targets(f"A: AR({correlation}) n={samples} p=T={sources}", x, rng)


def family_b(samples: int, sources: int, active: int = 40, seed: int = 0) -> Family:
    """SAE-like codes: `active` of the sources fire in a sample, some far more often than others."""
    rng = np.random.default_rng(seed)
    often = rng.uniform(0.2, 1, sources) ** 2
    often /= often.sum()
    x = np.zeros((samples, sources))
    for row in x:
        row[rng.choice(sources, active, replace=False, p=often)] = rng.exponential(size=active)
    return _with_targets(f"B: codes n={samples} p=T={sources} L0={active}", x, rng)


def family_c(samples: int, blocks: int, width: int, seed: int = 0) -> Family:
    """Blocks of sources; two parent blocks per target block."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, blocks * width))
    x = (x - x.mean(0)) / x.std(0)
    parents = np.zeros((blocks, blocks))
    for column in parents.T:
        column[rng.choice(blocks, 2, replace=False)] = 1
    truth = np.kron(parents, np.ones((width, width))) * rng.standard_normal((blocks * width, blocks * width))
    y = x @ truth
    y += 0.5 * y.std(0) * rng.standard_normal(y.shape)
    return Family("C", x, (y - y.mean(0)) / np.maximum(y.std(0), 1e-12), truth)


def _with_targets(name: str, x: np.ndarray, rng: np.random.Generator) -> Family:
    sources = x.shape[1]
    truth = np.where(rng.random((sources, sources)) < 10 / sources, rng.standard_normal((sources, sources)), 0)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    y = x @ truth
    y += 0.5 * y.std(0) * rng.standard_normal(y.shape)
    return Family(name, x, (y - y.mean(0)) / np.maximum(y.std(0), 1e-12), truth)


def measured_gap(family: Family, value: np.ndarray, strength: np.ndarray, targets: int) -> float:
    """The worst relative duality gap from X and Y: primal minus dual at the best feasible multiple of the residual."""
    y = family.y[:, :targets]
    residual = y - family.x @ value
    pull = np.abs(family.x.T @ residual).max(0) / len(y)
    square, dot = (residual**2).mean(0), (residual * y).mean(0)
    scale = np.clip(dot / np.maximum(square, 1e-300), 0, strength / np.maximum(pull, 1e-300))
    primal = square / 2 + strength * np.abs(value).sum(0)
    dual = scale * dot - scale**2 * square / 2
    null = (y**2).mean(0) / 2
    return float(((primal - dual) / np.where(null > 0, null, 1)).max())  # a target without parents is all 0


Fit = Callable[[Family, solve.Moments, np.ndarray, float, int], np.ndarray]


def ours(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    solution = solve.lasso(
        data.gram,
        data.cross[:, :targets],
        target_sq_norm=data.target_sq_norm[:targets],
        strength=torch.from_numpy(strength),
        strength_is="absolute",
        tol=tol,
    )
    return solution.value.numpy()


def our_fista(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    loss = solve.QuadraticGram(data.gram, data.cross[:, :targets], data.target_sq_norm[:targets])
    return solve.Fista().solve(loss, solve.L1(), torch.from_numpy(strength), tol=tol).value.numpy()


def scikit_learn(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    from sklearn.linear_model import _cd_fast

    gram, count = data.gram.numpy() * data.count, int(data.count)
    cross, square = data.cross.numpy() * count, data.target_sq_norm.numpy() * count
    out = np.zeros((len(gram), targets))
    for j in range(targets):
        coef, y = np.zeros(len(gram)), family.y[:, j].copy()
        coef, *_ = _cd_fast.enet_coordinate_descent_gram(
            coef, strength[j] * count, 0.0, gram, np.ascontiguousarray(cross[:, j]), y, 100_000, tol / 2,
            np.random.RandomState(0), False, False,
        )  # fmt: skip
        out[:, j] = coef
    del square
    return out


def celer(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    from celer import Lasso

    design = np.asfortranarray(family.x)
    fits = [
        Lasso(alpha=s, fit_intercept=False, tol=tol / 2).fit(design, y).coef_
        for s, y in zip(strength, family.y.T[:targets])
    ]
    return np.stack(fits, 1)


def skglm(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    from skglm.datafits import QuadraticHessian
    from skglm.penalties import L1
    from skglm.solvers import AndersonCD
    from skglm.utils.jit_compilation import compiled_clone

    gram, out = np.asfortranarray(data.gram.numpy()), np.zeros((len(data.gram), targets))
    fit, solver = compiled_clone(QuadraticHessian()), AndersonCD(tol=1e-3 * tol**0.5, fit_intercept=False, max_iter=200)
    for j in range(targets):
        penalty = compiled_clone(L1(strength[j]))
        out[:, j] = solver.solve(gram, -data.cross[:, j].numpy(), fit, penalty)[0]
    return out


def adelie(family: Family, data: solve.Moments, strength: np.ndarray, tol: float, targets: int) -> np.ndarray:
    import adelie as ad

    gram, out = np.asfortranarray(data.gram.numpy()), np.zeros((len(data.gram), targets))
    for j in range(targets):
        state = ad.gaussian_cov(
            A=gram,
            v=data.cross[:, j].numpy(),
            lmda_path=[strength[j]],
            tol=1e-3 * tol,
            progress_bar=False,
            early_exit=False,
        )
        out[:, j] = state.betas.toarray()[0]
    return out


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    gap: float
    note: str = ""


def timed(run: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    best, value = np.inf, np.empty(0)
    for _ in range(repeats):
        clock = time.perf_counter()
        value = run()
        best = min(best, time.perf_counter() - clock)
    return best, value


def compare(family: Family, level: float, tol: float, fits: dict[str, tuple[Fit, int]], repeats: int) -> None:
    """One table: every solver on one family at one strength and one required gap."""
    data = family.moments()
    full = level * np.abs(data.cross.numpy()).max(0)
    rows, targets = [], family.y.shape[1]
    for name, (fit, limit) in fits.items():
        count = min(limit, targets)
        try:
            fit(family, data, 3 * full[:1], 1e-2, 1)  # compile and warm up
            seconds, value = timed(lambda: fit(family, data, full[:count], tol, count), repeats)
            gap = measured_gap(family, value, full[:count], count)
            note = "" if count == targets else f"scaled from {count} targets"
            rows.append(Row(name, seconds * targets / count, gap, note))
        except Exception as error:
            rows.append(Row(name, np.nan, np.nan, f"failed: {type(error).__name__}: {str(error)[:60]}"))
    print(f"\n{family.name}, {level} lambda_max, gap {tol:g}, {THREADS} thread(s)")
    _table(rows, tol)


def _table(rows: list[Row], tol: float) -> None:
    print(f"| {'solver':24} | seconds | ratio | measured gap | note |\n|---|---|---|---|---|")
    for row in rows:
        star = "*" if row.gap > 1.05 * tol else ""
        ratio = row.seconds / rows[0].seconds
        print(f"| {row.name:24} | {row.seconds:.3f} | {ratio:.1f} | {row.gap:.1e}{star} | {row.note} |", flush=True)


def libraries(arguments: argparse.Namespace) -> dict[str, tuple[Fit, int]]:
    sample, every = arguments.sample, 10**9
    fits: dict[str, tuple[Fit, int]] = {"working set (ours)": (ours, every)}
    fits |= {"scikit-learn, Gram": (scikit_learn, sample), "skglm AndersonCD, Gram": (skglm, sample)}
    fits |= {"celer, X": (celer, min(sample, 32)), "adelie, covariance": (adelie, min(sample, 32))}
    return fits | {"FISTA (ours)": (our_fista, every if arguments.quick else sample)}


def groups(arguments: argparse.Namespace) -> None:
    """Block-Frobenius: one norm per pair of blocks."""
    blocks, width, samples = (10, 8, 1000) if arguments.quick else (40, 32, 5000)
    family = family_c(samples, blocks, width)
    data = family.moments()
    member = torch.arange(blocks * width) // width
    penalty = solve.Group(member, member)
    for level in (0.3, 0.1):
        run = lambda: solve.lasso(
            data.gram,
            data.cross,
            target_sq_norm=data.target_sq_norm,
            strength=level,
            penalty=penalty,
        )
        run()
        clock = time.perf_counter()
        solution = run()
        seconds = time.perf_counter() - clock
        rows = [Row("row set (ours)", seconds, float(solution.gap.max()))]
        clock = time.perf_counter()
        plain = solve.lasso(
            data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=level, penalty=penalty, solver="fista"
        )
        rows.append(Row("FISTA (ours)", time.perf_counter() - clock, float(plain.gap.max())))
        rows.append(_adelie_block(family, width, solution, penalty, blocks))
        print(f"\nC: {blocks} blocks x {width}, n={samples}, block-Frobenius, {level} lambda_max, gap 1e-4")
        _table(rows, 1e-4)


def _adelie_block(family: Family, width: int, solution: solve.Solution, penalty: solve.Group, blocks: int) -> Row:
    """adelie's multi-response group Lasso on the first target block, scaled up to all blocks.

    adelie groups rows of a multi-response fit one source at a time; a (source block x target block) norm needs the
    Kronecker form, which is what is timed.
    """
    try:
        import adelie as ad

        y, level = family.y[:, :width], float(solution.stats["strength"][0])
        kron = ad.matrix.kronecker_eye(np.asfortranarray(family.x), width, n_threads=THREADS)
        # columns of the Kronecker form run over (source, response): a source block is contiguous
        starts = np.arange(blocks) * width * width
        clock = time.perf_counter()
        ad.grpnet(
            kron,
            ad.glm.gaussian(y.ravel()),
            groups=starts,
            penalty=np.ones(blocks),
            lmda_path=[level / width],  # adelie divides the squared error by samples times responses
            intercept=False,
            tol=1e-7,
            progress_bar=False,
            n_threads=THREADS,
            early_exit=False,
        )
        seconds = time.perf_counter() - clock
        return Row("adelie grpnet", seconds * blocks, np.nan, "scaled from 1 block; gap not measured")
    except Exception as error:
        return Row("adelie grpnet", np.nan, np.nan, f"failed: {type(error).__name__}: {str(error)[:60]}")


def logistic(arguments: argparse.Namespace) -> None:
    """One binary target: ours, saga and liblinear to the same gap, found by tightening their tolerances."""
    from sklearn.linear_model import LogisticRegression

    samples, sources = (1000, 200) if arguments.quick else (5000, 1000)
    family = family_a(samples, sources, 0.5)
    x = torch.from_numpy(family.x)
    labels = (torch.from_numpy(family.y[:, 0]) > 0).long()
    loss = solve.Logistic(x, labels[:, None].double(), torch.zeros(1, 1, dtype=torch.float64), intercept=False)
    for level in (0.1, 0.02):
        solve.logistic_lasso(x, labels, strength=0.5, intercept=False)
        seconds, _ = timed(lambda: solve.logistic_lasso(x, labels, strength=level, intercept=False).value.numpy(), 3)
        solution = solve.logistic_lasso(x, labels, strength=level, intercept=False)
        rows = [Row("prox Newton (ours)", seconds, float(solution.gap))]
        strength = solution.stats["strength"]
        for name, options in (("liblinear", {"penalty": "l1"}), ("saga", {"penalty": "l1"})):
            for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
                cost = 1 / (float(strength) * samples)
                model = LogisticRegression(solver=name, C=cost, tol=tol, max_iter=5000, fit_intercept=False, **options)
                seconds, _ = timed(lambda: model.fit(family.x, labels.numpy()).coef_, 1)
                value = torch.from_numpy(model.coef_.T.copy())
                gap = float(solve.relative_gap(loss, solve.L1(), value, strength))
                if gap <= 1e-4:
                    break
            rows.append(Row(f"scikit-learn {name}", seconds, gap))
        print(f"\nD: logistic n={samples} p={sources}, {level} lambda_max, gap 1e-4")
        _table(rows, 1e-4)


def strength(arguments: argparse.Namespace) -> None:
    """Which rule finds the planted support, and at what cost?"""
    samples, sources = (600, 80) if arguments.quick else (2000, 200)
    print("\nstrength: mean support F1 (seconds)\n| rule | AR .5 | AR .9 | codes |\n|---|---|---|---|")
    families = [family_a(samples, sources, 0.5), family_a(samples, sources, 0.9), family_b(2 * samples, sources, 10)]
    parts = [
        [solve.moments_of(torch.from_numpy(f.x[k::10]), torch.from_numpy(f.y[k::10])) for k in range(10)]
        for f in families
    ]

    def run(rule: str, folds: list[solve.Moments]) -> torch.Tensor:
        if rule == "stability":
            return (solve.stability(folds) >= 0.8).double()
        return solve.select(solve.total(folds), rule=rule, folds=folds[:5]).solution.value

    for rule in ("fixed", "ebic", "adaptive", "stability", "cv", "cv-1se"):
        cells = []
        for family, folds in zip(families, parts):
            run(rule, folds)
            clock = time.perf_counter()
            found = run(rule, folds).numpy() != 0
            seconds, true = time.perf_counter() - clock, family.truth != 0
            both = (found & true).sum(0)
            cells.append(f"{np.mean(2 * both / np.maximum(found.sum(0) + true.sum(0), 1)):.3f} ({seconds:.2f})")
        print(f"| {rule} | " + " | ".join(cells) + " |", flush=True)


def nonlinear(arguments: argparse.Namespace) -> None:
    """Dictionaries of functions of each parent against the linear fit: recovery and time, moments included."""
    samples, sources, targets = (1000, 40, 20) if arguments.quick else (4000, 100, 50)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((samples, sources)))
    truth = rng.random((sources, targets)) < 3 / sources
    shapes = [torch.abs, torch.square, torch.relu, torch.tanh, lambda v: v]
    y = torch.zeros(samples, targets, dtype=torch.float64)
    for i, j in zip(*np.nonzero(truth)):
        part = shapes[(i + j) % 5](x[:, i])
        y[:, j] += (part - part.mean()) / part.std()
    y = y - y.mean(0) + 0.5 * torch.from_numpy(rng.standard_normal(y.shape))
    print(f"\nnonlinear parents, n={samples} p={sources} T={targets}")
    print("| dictionary | F1 | seconds | ratio |\n|---|---|---|---|")
    base = 0.0
    for kind, size in (("linear", 1), ("hinge", 3), ("spline", 3), ("fourier", 3), ("hinge", 5), ("spline", 5)):
        best = np.inf
        for _ in range(3):
            clock = time.perf_counter()
            dictionary = solve.fit_dictionary(x[:500], kind="hinge" if kind == "linear" else kind, size=size)
            features = dictionary.transform(x)
            data = solve.moments_of(features - features.mean(0), y)
            penalty = solve.L1() if size == 1 else dictionary.groups(targets)
            solution = solve.lasso(
                data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.25, penalty=penalty
            )
            best = min(best, time.perf_counter() - clock)
        base = base or best
        found = dictionary.parent_scores(solution.value).numpy() > 0
        f1 = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        print(f"| {kind} {size} | {f1:.3f} | {best:.3f} | {best / base:.1f} |", flush=True)


def sparse(arguments: argparse.Namespace) -> None:
    """The Gram of sparse codes: row gather, scipy, dense."""
    samples, sources = (10_000, 1024) if arguments.quick else (50_000, 4096)
    codes = scipy.sparse.random(samples, sources, 48 / sources, format="csr", random_state=0)
    tensor = torch.sparse_csr_tensor(
        torch.from_numpy(codes.indptr), torch.from_numpy(codes.indices), torch.from_numpy(codes.data), codes.shape
    )
    dense = tensor.to_dense().float()
    runs = {
        "row gather (ours)": lambda: solve.code_sums(tensor).scatter.numpy(),
        "scipy": lambda: (codes.T @ codes).toarray(),
        "dense float32": lambda: (dense.T @ dense).numpy(),
    }
    print(f"\nGram of codes, n={samples} p={sources} L0=48\n| form | seconds | ratio |\n|---|---|---|")
    base = 0.0
    for name, run in runs.items():
        run()
        seconds, _ = timed(run, arguments.repeats)
        base = base or seconds
        print(f"| {name} | {seconds:.3f} | {seconds / base:.1f} |", flush=True)


def fallback(arguments: argparse.Namespace) -> None:
    """The pure-torch working set beside the compiled one."""
    family = family_a(1000, 200) if arguments.quick else family_a(2000, 500)
    data = family.moments()
    for level in (0.1, 0.02):
        rows = []
        for name, solver in (("compiled", "working_set"), ("torch", "torch"), ("FISTA", "fista")):
            run = lambda: solve.lasso(
                data.gram,
                data.cross,
                target_sq_norm=data.target_sq_norm,
                strength=level,
                solver=solver,
            )
            run()
            seconds, _ = timed(lambda: run().value.numpy(), arguments.repeats)
            rows.append(Row(name, seconds, float(run().gap.max())))
        print(f"\nfallback, {family.name}, {level} lambda_max")
        _table(rows, 1e-4)


def lassos(arguments: argparse.Namespace) -> None:
    a = family_a(1000, 200) if arguments.quick else family_a(2000, 500)
    b = family_b(4000, 512) if arguments.quick else family_b(20_000, 4096)
    for family in (a, b):
        for level in (0.1, 0.02):
            for tol in (1e-4,) if arguments.quick else (1e-4, 1e-6):
                compare(family, level, tol, libraries(arguments), arguments.repeats)


SECTIONS = {
    "lassos": lassos,
    "groups": groups,
    "logistic": logistic,
    "strength": strength,
    "nonlinear": nonlinear,
    "sparse": sparse,
    "fallback": fallback,
}


def main() -> None:
    parser = argparse.ArgumentParser(parents=[threads], description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=64, help="targets given to solvers that take one at a time")
    for name, section in SECTIONS.items():
        parser.add_argument(
            f"--{name}", action="store_true", help=(section.__doc__ or "the Lasso tables").splitlines()[0]
        )
    arguments = parser.parse_args()
    wanted = [name for name in SECTIONS if getattr(arguments, name)]
    for name in wanted or list(SECTIONS):
        SECTIONS[name](arguments)


if __name__ == "__main__":
    main()
