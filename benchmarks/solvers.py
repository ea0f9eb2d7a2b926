"""The Lasso solver beside scikit-learn, celer, skglm and adelie: same objective, same strength, same required gap.

    pip install "tl-circuitlasso[bench]"
    python -m benchmarks.solvers --quick          # a minute or two
    python -m benchmarks.solvers                  # the sizes of the README's table
    python -m benchmarks.solvers --dense --codes --blocks --logistic --nonlinear --fallback --grams --cold

Every library gets the loosest of its own tolerances that reaches the required gap; the gap in a table
is that of the timed run, measured from the data by `families`, which shares no code with the library. A solver that
misses it keeps its time and gets a star. Libraries that take one target at a time are run on some targets and their
times scaled up to all; with `--threads 2` those targets are shared over two Python threads. Repetitions go round all
solvers in turn and the best counts: seconds of processor time on one thread (other load on the machine then counts
little), of the clock on more.
"""

# ruff: noqa: B023, E402, E731 - timed closures run inside their loop; thread counts are read at import

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

threads = argparse.ArgumentParser(add_help=False)
threads.add_argument("--threads", type=int, default=1)
THREADS = threads.parse_known_args()[0].threads
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = str(THREADS)

import numpy as np
import torch

from benchmarks.families import Family, bent, block_gap, blocks, codes, correlated, lasso_gap
from benchmarks.libraries import LOOSE_TO_TIGHT, Library, adelie_block, dense_libraries, sparse_libraries
from tl_circuitlasso import solve

torch.set_num_threads(THREADS)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    gap: float
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A solver ready to be timed: `run` gives coefficients, `scale` brings its seconds to all targets."""

    name: str
    run: Callable[[], np.ndarray]
    gap: Callable[[np.ndarray], float]
    scale: float = 1.0
    note: str = ""


def now() -> float:
    return time.process_time() if THREADS == 1 else time.perf_counter()


def raced(entries: list[Entry], repeats: int) -> list[Row]:
    """Best times, the repetitions of all solvers interleaved."""
    best, value = dict.fromkeys((entry.name for entry in entries), np.inf), {}
    for _ in range(repeats):
        for entry in entries:
            clock = now()
            value[entry.name] = entry.run()
            best[entry.name] = min(best[entry.name], now() - clock)
    return [Row(e.name, best[e.name] * e.scale, e.gap(value[e.name]), e.note) for e in entries]


def table(title: str, rows: list[Row], tol: float) -> None:
    print(f"\n{title}, {THREADS} thread(s)\n| solver | seconds | ratio | measured gap | note |\n|---|---|---|---|---|")
    for row in rows:
        star = "*" if row.gap > 1.05 * tol else ""
        ratio = row.seconds / rows[0].seconds
        print(f"| {row.name} | {row.seconds:.3f} | {ratio:.1f} | {row.gap:.1e}{star} | {row.note} |", flush=True)


def ours(family: Family, strength: np.ndarray, tol: float, **options: object) -> np.ndarray:
    data, level = family.moments, torch.from_numpy(strength)
    return solve.lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=level, strength_is="absolute", tol=tol,
        **options,
    ).value.numpy()  # fmt: skip


def shared(library: Library, family: Family, strength: np.ndarray, own: float) -> np.ndarray:
    """Targets over `--threads` Python threads, for libraries that release the interpreter."""
    if THREADS == 1:
        return library.fit(family, strength, own)
    parts = np.array_split(np.arange(len(strength)), THREADS)
    few = [Family(family.name, family.x, family.y[:, part], family.truth) for part in parts]
    for part, own_family in zip(parts, few):
        data = family.moments
        moments = solve.Moments(data.gram, data.cross[:, part], data.target_sq_norm[part], data.count)
        vars(own_family).update(moments=moments, gram=family.gram, by_column=family.by_column)
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(lambda k: library.fit(few[k], strength[parts[k]], own), range(THREADS))
        return np.concatenate(list(done), 1)


def entry(library: Library, family: Family, strength: np.ndarray, tol: float) -> Entry | Row:
    """The library at the loosest tolerance that does, or the row that says how it failed."""
    count, own = min(library.targets, len(strength)), library.tolerances[-1]
    some = strength[:count]
    try:
        for own in library.tolerances:
            if lasso_gap(family, library.fit(family, some, own), some) <= tol:
                break
    except Exception as error:
        return Row(library.name, np.nan, np.nan, f"failed: {type(error).__name__}: {str(error)[:60]}")
    note = f"its tolerance {own:.0e}" + ("" if count == len(strength) else f", scaled from {count} targets")
    gap = lambda value: lasso_gap(family, value, some)
    return Entry(library.name, lambda: shared(library, family, some, own), gap, len(strength) / count, note)


def compare(family: Family, level: float, tol: float, libraries: list[Library], repeats: int) -> None:
    """One table: every solver on one family at one strength and one required gap."""
    strength = level * family.strength_max()
    ours(family, 3 * strength, 1e-2)  # compile and warm up
    gap = lambda value: lasso_gap(family, value, strength)
    found = [Entry("working set (ours)", lambda: ours(family, strength, tol), gap)]
    found += [entry(library, family, strength, tol) for library in libraries]
    rows = raced([item for item in found if isinstance(item, Entry)], repeats)
    rows += [item for item in found if isinstance(item, Row)]
    table(f"{family.name}, {level} lambda_max, gap {tol:g}", rows, tol)


def dense(arguments: argparse.Namespace) -> None:
    """Family A: many dense correlated sources."""
    family = correlated(1000, 200) if arguments.quick else correlated(2000, 500)
    for level in (0.1, 0.02):
        for tol in (1e-4,) if arguments.quick else (1e-4, 1e-6):
            compare(family, level, tol, dense_libraries(arguments.sample), arguments.repeats)


def sparse(arguments: argparse.Namespace) -> None:
    """Family B: SAE-like codes, every source also a target."""
    for samples, sources in [(4000, 512)] if arguments.quick else [(20_000, 2048), (20_000, 4096)]:
        family = codes(samples, sources)
        clock = now()
        family.moments  # noqa: B018 - computed once, here
        print(f"\nGram of {family.name}: {now() - clock:.2f} s, shared by all Gram solvers and left out below")
        for level in (0.1, 0.02):
            for tol in (1e-4,) if arguments.quick else (1e-4, 1e-6):
                compare(family, level, tol, sparse_libraries(arguments.sample), arguments.repeats)


def grouped(arguments: argparse.Namespace) -> None:
    """Family C: one Frobenius norm per pair of blocks."""
    count, width, samples = (10, 8, 1000) if arguments.quick else (40, 32, 5000)
    family, tol = blocks(samples, count, width), 1e-4
    member = torch.arange(count * width) // width
    penalty = solve.Group(member, member)
    top = penalty.strength_max(family.moments.cross).numpy()
    for level in (0.3, 0.1):
        strength = level * top
        of_block = strength[::width]
        gap = lambda value: block_gap(family, value, of_block[: value.shape[1] // width], width)
        entries = [
            Entry(name, lambda s=s: ours(family, strength, tol, penalty=penalty, solver=s), gap)
            for name, s in (
                ("group set (ours)", solve.GroupSet()),
                ("row set, FISTA inside (ours)", solve.RowSet()),
                ("FISTA (ours)", "fista"),
            )
        ]
        entries[0].run()
        entries.append(_adelie(family, float(of_block[0]), width, tol, gap))
        table(
            f"{family.name}, block-Frobenius, {level} lambda_max, gap {tol:g}", raced(entries, arguments.repeats), tol
        )


def _adelie(family: Family, strength: float, width: int, tol: float, gap: Callable[[np.ndarray], float]) -> Entry:
    """adelie at its best: the number of steps and the tolerance that reach the gap soonest."""
    tried = []
    for steps in (1, 3, 5):
        for own in LOOSE_TO_TIGHT[1:7]:
            clock = now()
            reached = gap(adelie_block(family, strength, width, own, steps))
            if reached <= tol:
                tried.append((now() - clock, own, steps))
                break
    _, own, steps = min(tried, default=(0.0, LOOSE_TO_TIGHT[6], 5))
    note = f"its tolerance {own:.0e}, path of {steps}, scaled from 1 block"
    run = lambda: adelie_block(family, strength, width, own, steps)
    return Entry("adelie grpnet, Kronecker samples", run, gap, family.y.shape[1] / width, note)


def logistic(arguments: argparse.Namespace) -> None:
    """One binary target: ours, saga and liblinear to the same gap."""
    from sklearn.linear_model import LogisticRegression

    tol, sizes = 1e-4, [(1000, 200)] if arguments.quick else [(1000, 200), (5000, 1000), (20_000, 500), (1000, 3000)]
    for samples, sources in sizes:
        family = correlated(samples, sources, 0.5)
        x, labels = torch.from_numpy(family.x), (torch.from_numpy(family.y[:, 0]) > 0).long()
        observed = labels.numpy().astype(float)
        top = np.abs(family.x.T @ (observed - 0.5)).max() / samples
        for level in (0.1, 0.02):
            strength = level * top
            gap = lambda value: logistic_gap(family.x, observed, value[:, 0], strength)
            fit = lambda: solve.logistic_lasso(x, labels, strength=level, intercept=False, tol=tol).value.numpy()
            fit()
            entries = [Entry("prox Newton (ours)", fit, gap)]
            for name in ("liblinear", "saga"):

                def run(own: float, name: str = name) -> np.ndarray:
                    model = LogisticRegression(
                        solver=name, penalty="l1", C=1 / (strength * samples), tol=own, max_iter=5000,
                        fit_intercept=False, random_state=0,
                    )  # fmt: skip
                    return model.fit(family.x, observed).coef_.T

                own = next((t for t in LOOSE_TO_TIGHT[:8] if gap(run(t)) <= tol), LOOSE_TO_TIGHT[7])
                note = f"its tolerance {own:.0e}"
                entries.append(Entry(f"scikit-learn {name}", lambda own=own, run=run: run(own), gap, note=note))
            rows = raced(entries, arguments.repeats)
            table(f"D: logistic n={samples} p={sources}, {level} lambda_max, gap {tol:g}", rows, tol)


def logistic_gap(x: np.ndarray, observed: np.ndarray, value: np.ndarray, strength: float) -> float:
    """Primal minus dual over the objective at 0, the dual point a feasible multiple of the residual."""
    z = x @ value
    rest = observed - 1 / (1 + np.exp(-z))
    primal = (np.logaddexp(0, z) - observed * z).mean() + strength * np.abs(value).sum()
    s = min(1.0, strength / max(np.abs(x.T @ rest).max() / len(z), 1e-300))
    share = np.clip(observed - s * rest, 0, 1)
    entropy = np.where((share > 0) & (share < 1), -share * np.log(np.maximum(share, 1e-300)), 0)
    other = np.where((share > 0) & (share < 1), -(1 - share) * np.log(np.maximum(1 - share, 1e-300)), 0)
    return float((primal - (entropy + other).mean()) / np.log(2))


def nonlinear(arguments: argparse.Namespace) -> None:
    """Dictionaries of functions of each parent beside the linear fit: recovery and time, moments included."""
    sizes = [(1000, 40, 20)] if arguments.quick else [(4000, 100, 50), (20_000, 500, 500)]
    kinds = [("linear", 1), *((kind, size) for size in (2, 3, 5) for kind in ("hinge", "spline", "fourier"))]
    for samples, sources, targets in sizes:
        family = bent(samples, sources, targets)
        x, y, truth = torch.from_numpy(family.x), torch.from_numpy(family.y), family.truth != 0
        runs = {f"{kind} {size}": lambda k=kind, s=size: _curved(x, y, k, s, 0.3) for kind, size in kinds}
        best = dict.fromkeys(runs, np.inf)
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                clock = now()
                run()
                best[name] = min(best[name], now() - clock)
        print(f"\n{family.name}, {THREADS} thread(s): support F1 at the best of nine strengths; seconds at .3")
        print("| dictionary | F1 | at | seconds | ratio |\n|---|---|---|---|---|")
        for (kind, size), name in zip(kinds, runs):
            scores = [(_f1(_curved(x, y, kind, size, level), truth), level) for level in np.arange(1, 10) / 10]
            f1, level = max(scores)
            print(
                f"| {name} | {f1:.3f} | {level:.1f} | {best[name]:.3f} | {best[name] / best['linear 1']:.2f} |",
                flush=True,
            )


def _curved(x: torch.Tensor, y: torch.Tensor, kind: str, size: int, level: float) -> np.ndarray:
    if kind == "linear":
        data, penalty = solve.moments_of(x - x.mean(0), y), solve.L1()
    else:
        dictionary = solve.fit_dictionary(x[:500], kind=kind, size=size)
        data, penalty = dictionary.moments(x, y), dictionary.groups(y.shape[1])
    fit = solve.lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=level, penalty=penalty)
    return fit.value.view(x.shape[1], size, -1).norm(dim=1).numpy() > 0


def _f1(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def grams(arguments: argparse.Namespace) -> None:
    """The Gram of sparse codes: row gather, scipy, dense."""
    family = codes(10_000, 1024, 48) if arguments.quick else codes(50_000, 4096, 48)
    rows = family.x.tocsr()
    tensor = torch.sparse_csr_tensor(
        *(torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data)), rows.shape
    )
    single = tensor.to_dense().float()
    runs = {
        "row gather (ours)": lambda: solve.code_sums(tensor).scatter.numpy(),
        "scipy": lambda: (rows.T @ rows).toarray(),
        "dense float32": lambda: (single.T @ single).numpy(),
    }
    exact = runs["scipy"]()
    solve.code_sums(tensor)
    entries = [
        Entry(name, run, lambda value: float(np.abs(value - exact).max() / exact.max())) for name, run in runs.items()
    ]
    table(f"Gram of {family.name} (gap: largest relative error)", raced(entries, arguments.repeats), 1e-4)


def fallback(arguments: argparse.Namespace) -> None:
    """The pure-torch working set and FISTA beside the compiled one."""
    family = correlated(1000, 200) if arguments.quick else correlated(2000, 500)
    for level in (0.1, 0.02):
        strength = level * family.strength_max()
        gap = lambda value: lasso_gap(family, value, strength)
        entries = [
            Entry(name, lambda s=s: ours(family, strength, 1e-4, solver=s), gap)
            for name, s in (("compiled", "working_set"), ("torch", "torch"), ("FISTA", "fista"))
        ]
        entries[0].run()
        table(f"without a compiler, {family.name}, {level} lambda_max", raced(entries, arguments.repeats), 1e-4)


COLD = """
import time, torch
from tl_circuitlasso import solve
torch.set_num_threads(1)
x = torch.randn(200, {p}, dtype=torch.float64)
y = torch.randn(200, {t}, dtype=torch.float64)
data = solve.moments_of(x - x.mean(0), y - y.mean(0))
penalty = solve.Group(torch.arange({p}) // 4, torch.arange({t}) // 4) if {grouped} else None
clock = time.perf_counter(), time.process_time()
solve.lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=0.5, penalty=penalty)
print(time.perf_counter() - clock[0], time.process_time() - clock[1])
"""


def cold(arguments: argparse.Namespace) -> None:
    """The first call on a machine, kernels not compiled yet, and the first call of a later process."""
    del arguments
    print(
        "\nfirst calls: seconds by the clock (of the processor)\n| problem | on a machine | in a process |",
        "\n|---|---|---|",
        sep="",
    )
    cases = {
        "40 x 8, elementwise": (40, 8, 0),
        "400 x 200, elementwise": (400, 200, 0),
        "400 x 200, groups": (400, 200, 1),
    }
    for name, (p, t, group) in cases.items():
        script = COLD.format(p=p, t=t, grouped=bool(group))
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, "NUMBA_CACHE_DIR": cache}
            cells = []
            for _ in range(2):
                output = subprocess.run(
                    [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
                )
                cells.append("{:.1f} ({:.1f})".format(*map(float, output.stdout.split())))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


SECTIONS = {
    "dense": dense,
    "codes": sparse,
    "blocks": grouped,
    "logistic": logistic,
    "nonlinear": nonlinear,
    "grams": grams,
    "fallback": fallback,
    "cold": cold,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        parents=[threads], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=32, help="targets given to solvers that take one at a time")
    for name, section in SECTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=(section.__doc__ or "").splitlines()[0])
    arguments = parser.parse_args()
    wanted = [name for name in SECTIONS if getattr(arguments, name)]
    for name in wanted or list(SECTIONS):
        SECTIONS[name](arguments)


if __name__ == "__main__":
    main()
