"""Circuits between two SAEs at any size: seconds and memory of the statistics and the solve, and the planted truth.

    python -m benchmarks.sae_scale --features 4096 --tokens 50000 --l0 50         the size that two CPU cores must do
    python -m benchmarks.sae_scale --planted --features 4096 --tokens 20000 --l0 40      F1 against a planted circuit
    python -m benchmarks.sae_scale --features 32768 --tokens 1000000 --l0 50 --device cuda   a whole SAE, on a GPU
    python -m benchmarks.sae_scale --penalty read           as circuits are by default: weights say what reads what
    python -m benchmarks.sae_scale ... --plan               what it will need, and no more

What a run will need in memory and arithmetic is printed before it begins. With --penalty read the SAEs get decoder
and encoder matrices of --width in which the planted edges can be read, among chance overlaps of 1 / sqrt(width).

Without --planted the children are codes of their own besides a few planted edges each, so the solve has something to
find and much to reject; codes of parent and child have the same size and number of active features. --quick is a size
for a smoke test. On a machine that does other work too, "processor seconds" (over all threads) is the figure to trust.
"""

import argparse
import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

_threads = argparse.ArgumentParser(add_help=False)
_threads.add_argument("--threads", type=int, default=2)
THREADS = _threads.parse_known_args()[0].threads
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, str(THREADS))

import numpy as np  # noqa: E402 - thread counts are read at import
import scipy.sparse  # noqa: E402
import torch  # noqa: E402

from tl_circuitlasso.features.fit import Regressed  # noqa: E402
from tl_circuitlasso.features.regression import Rule, needed_bytes, regress_pair  # noqa: E402
from tl_circuitlasso.features.samples import Column, PairData  # noqa: E402
from tl_circuitlasso.models.codes import Codes  # noqa: E402
from tl_circuitlasso.models.feature_codes import Chunk  # noqa: E402
from tl_circuitlasso.models.feature_store import CHUNK_SAMPLES, CodeStore  # noqa: E402
from tl_circuitlasso.models.feature_sums import Effects  # noqa: E402
from tl_circuitlasso.models.memory import free_bytes, in_words  # noqa: E402
from tl_circuitlasso.solve.sparse import SCATTER_BELOW  # noqa: E402
from tl_circuitlasso.synthetic.codes import PlantedCodes, planted_codes, sparse_codes  # noqa: E402

TYPICAL = 10  # edges of a child
SURE = 24  # prompts that tell of a feature


def main(arguments: list[str] | None = None) -> int:
    """Make the problem, time the pair, print one table (and write it as JSON)."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.quick:
        given.features, given.tokens, given.l0 = 256, 4000, 12
    for name, value in plan(given.tokens, given.features, given.l0, given.device, given.penalty).items():
        print(f"{name:34} {value}", flush=True)
    if given.plan:
        return 0
    print()
    problem = planted_codes(given.tokens, given.features, active=given.l0, seed=given.seed)
    if not given.planted:
        problem = _with_own_codes(problem, given.l0, given.seed)
    pair, reading = pair_of(problem), 0.0
    if given.penalty == "read":
        pair, reading = with_reads(problem, pair, given.width, given.seed, given.device)
    regress_pair(small_part(pair), Rule(given.strength, given.penalty), device=given.device)  # compiles the kernels
    clock, busy = time.perf_counter(), time.process_time()
    found = regress_pair(pair, Rule(given.strength, given.penalty), device=given.device)
    seconds = (time.perf_counter() - clock, time.process_time() - busy, reading)
    figures = _figures(given, problem, pair, found, seconds)
    for name, value in figures.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    return 0


def plan(tokens: int, features: int, active: int, device: str, penalty: str) -> dict[str, str]:
    """What a pair of this size needs: bytes, and multiply-adds of the statistics and of one certificate of the solve.

    On a CPU rows of codes are multiplied entry by entry. On CUDA very sparse ones are scattered pair by pair;
    others are made dense in slabs and multiplied as bfloat16 high and low parts, three products for the Gram and three
    for the cross moments.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda and active > SCATTER_BELOW * features:
        sums = f"{3 * tokens * 2 * features**2:.1e} (bfloat16)"
    else:
        pairs = active**2 if cuda else active * (active + 1) // 2
        sums = f"{tokens * (pairs + active**2):.1e}" + (" (scattered)" if cuda else "")
    free = free_bytes(device) if not cuda or torch.cuda.is_available() else None
    return {
        "plan: codes on the host": in_words(2 * 8 * tokens * active),
        "plan: sums and solve": f"{in_words(needed_bytes(features, features, reads=penalty == 'read'))} on {device}",
        "plan: free there now": "unknown" if free is None else in_words(free),
        "plan: statistics, multiply-adds": sums,
        "plan: one certificate, multiply-adds": f"{TYPICAL * features**2:.1e} at {TYPICAL} edges a child",
    }


def with_reads(problem: PlantedCodes, pair: PairData, width: int, seed: int, device: str) -> tuple[PairData, float]:
    """The pair with what each parent does to each child, and the seconds of the product that says it here.

    Parents write in random directions; a child's encoder is the sum of those of its planted parents, times their
    coefficients, so that d_i . e_j is A_ij and chance.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(problem.truth.shape[0], width, generator=generator) / width**0.5
    encoder = torch.from_numpy(np.asarray(problem.truth.T @ decoder.numpy(), dtype=np.float32)).T.to(device)
    decoder, clock = decoder.to(device), time.perf_counter()
    reads = (decoder[pair.features.to(device)] @ encoder[:, pair.child_features.to(device)]).double().cpu()
    return replace(pair, effects=effects_of(reads)), time.perf_counter() - clock


def effects_of(reads: torch.Tensor) -> Effects:
    """A matrix of effects (source, target), all of them sure."""
    source, target = (reads != 0).nonzero(as_tuple=True)
    effect = reads[source, target]
    groups = torch.full((len(reads),), SURE)
    return Effects(source, target, effect, 0.01 * effect.abs(), groups, 1, reads.shape[1])


def pair_of(problem: PlantedCodes, *, held_out: float = 0.1, min_count: int = 20) -> PairData:
    """A planted problem as two hooks, one prompt a sample, without what a model would add."""
    store = CodeStore(None, 1 << 62, {})
    for first in range(0, problem.sources.shape[0], CHUNK_SAMPLES):
        rows = slice(first, first + CHUNK_SAMPLES)
        store.add(_chunk(problem.sources[rows], problem.children[rows], first), "")
    store.flush()
    alive = [
        torch.from_numpy(((counts >= min_count) & (counts < problem.sources.shape[0])).nonzero()[0])
        for counts in (problem.sources.getnnz(0), problem.children.getnnz(0))
    ]
    return PairData(store, "parent", "child", (Column("parent", ""),), *alive, 0, False, held_out)


def planted_f1(problem: PlantedCodes, pair: PairData, found: Regressed) -> dict[str, float]:
    """Precision, recall and F1 of the edges between features that fire often enough to be regressed."""
    rows = (found.lasso != 0).nonzero().flatten()  # others are there for their effect alone
    ends = pair.features[found.source[rows]], pair.child_features[found.target[rows]]
    edges = set(zip(*(end.tolist() for end in ends)))
    parents, children = set(pair.features.tolist()), set(pair.child_features.tolist())
    truth = {(i, j) for i, j in zip(*problem.truth.nonzero()) if i in parents and j in children}
    right = len(edges & truth)
    precision, recall = right / max(len(edges), 1), right / max(len(truth), 1)
    return {"precision": precision, "recall": recall, "f1": 2 * right / max(len(edges) + len(truth), 1)}


def _with_own_codes(problem: PlantedCodes, active: int, seed: int) -> PlantedCodes:
    """Children that fire about `active` at once: the strongest planted ones, and codes of their own."""
    samples, features = problem.children.shape
    own = sparse_codes(samples, features, active // 2, np.random.default_rng(seed + 1))
    planted = problem.children
    bar = np.partition(planted.data, -min(len(planted.data), samples * (active - active // 2)))[
        -min(len(planted.data), samples * (active - active // 2))
    ]
    planted = planted.copy()
    planted.data[planted.data < bar] = 0
    planted.eliminate_zeros()
    return PlantedCodes(problem.sources, (planted + own).tocsr().astype(np.float32), problem.truth)


def _chunk(sources: scipy.sparse.csr_matrix, children: scipy.sparse.csr_matrix, first: int) -> Chunk:
    samples = sources.shape[0]
    numbers = torch.arange(samples)
    return Chunk(
        codes={"parent": _codes(sources), "child": _codes(children)},
        errors={},
        target=torch.zeros(0, 1),
        target_rows=numbers[:0],
        prompt=numbers + first,
        position=torch.zeros(samples, dtype=torch.int32),
        tokens=torch.zeros(samples, dtype=torch.int32),
        ends=numbers + 1,
        numbers=numbers + first,
        batches=first // CHUNK_SAMPLES + 1,
    )


def _codes(matrix: scipy.sparse.csr_matrix) -> Codes:
    parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32))
    return Codes(*(torch.from_numpy(part) for part in parts), matrix.shape[1])


def small_part(pair: PairData) -> PairData:
    """Some features of a pair: a regression just large enough to compile what larger ones need."""
    few = min(128, len(pair.features), len(pair.child_features))
    some: dict[str, Any] = {"features": pair.features[:few], "child_features": pair.child_features[:few]}
    if pair.effects is not None:
        dense = pair.effects.dense(torch.arange(few))[:few]
        some |= {"effects": effects_of(dense)}
    return replace(pair, **some)


def _figures(
    given: argparse.Namespace,
    problem: PlantedCodes,
    pair: PairData,
    found: Regressed,
    seconds: tuple[float, float, float],
) -> dict[str, Any]:
    return {
        "device": str(given.device),
        "threads": given.threads,
        "penalty": given.penalty,
        "alive features": f"{len(pair.features)} -> {len(pair.child_features)}",
        "samples": given.tokens,
        "active per sample": f"{problem.sources.nnz / given.tokens:.1f} -> {problem.children.nnz / given.tokens:.1f}",
        "seconds, statistics": found.seconds["statistics"],
        "seconds, solve": found.seconds["solve"],
        "seconds, statistics + solve": found.seconds["statistics"] + found.seconds["solve"],
        "seconds, effects": found.seconds["effects"],
        "seconds, held-out R^2": found.seconds["held out"],
        "seconds, what reads what": seconds[2],
        "seconds, all": seconds[0],
        "processor seconds, all": seconds[1],
        "largest relative gap": float(found.gap.max()),
        "edges per child": len(found.source) / max(len(found.gap), 1),
        "held-out R^2": found.overall,
        "estimated memory": in_words(
            needed_bytes(pair.sources, len(pair.child_features), reads=pair.effects is not None)
        ),
        "peak memory of the process": in_words(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    } | (planted_f1(problem, pair, found) if given.planted else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sae_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--l0", type=int, default=50)
    parser.add_argument("--planted", action="store_true", help="children are made by planted edges only; print F1")
    parser.add_argument("--strength", default="auto", type=lambda text: text if text.isalpha() else float(text))
    parser.add_argument("--penalty", default="l1", choices=["l1", "adaptive", "read"])
    parser.add_argument("--width", type=int, default=1024, help="of the residual stream, for --penalty read")
    parser.add_argument("--plan", action="store_true", help="print what the run would need, and leave")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
