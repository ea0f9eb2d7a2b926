"""How cost grows with samples, nodes and processes: the measured tables of docs/scaling.md.

    python -m benchmarks.scaling                    all five tables, one thread
    python -m benchmarks.scaling --only nodes       one of samples, nodes, processes, saes, plans
    python -m benchmarks.scaling --most 8192        up to so many nodes (a Gram of 8 n^2 bytes)

Codes are those of a sparse autoencoder in miniature: 40 of the sources are active in a sample, some of them together.
Seconds are those of the processor, so that other work on the machine doesn't count; of several processes, those of the
busiest.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.cost import Problem
from tl_circuitlasso import solve
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.solve import CodeSums, code_sums

FEATURES = 512
ACTIVE, BATCH, STRENGTH = 40, 2000, 0.4  # strong enough to leave out what only noise makes of 20,000 samples


def codes(samples: int, sources: int, seed: int) -> Tensor:
    """CSR codes: a tenth of the active ones are drawn by their left neighbour."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(sources, (samples, ACTIVE), generator=generator)
    linked = torch.rand(samples, ACTIVE - 1, generator=generator) < 0.1
    columns[:, 1:] = torch.where(linked, (columns[:, :-1] + 1) % sources, columns[:, 1:])
    rows = torch.arange(samples)[:, None].expand_as(columns)
    values = torch.rand(samples, ACTIVE, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        whole = torch.sparse_coo_tensor(torch.stack([rows.flatten(), columns.flatten()]), values.flatten())
        return torch.sparse_coo_tensor(whole._indices(), whole._values(), (samples, sources)).to_sparse_csr()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of `work`, and what it returned."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def gram(samples: int, sources: int) -> tuple[float, CodeSums]:
    """Seconds for the sums of all batches (making the data not counted), and the sums."""
    spent, total = 0.0, None
    for number in range(samples // BATCH):
        batch = codes(BATCH, sources, number)
        took, part = seconds(lambda batch=batch: code_sums(batch))
        spent, total = spent + took, part if total is None else total + part
    assert total is not None
    return spent, total


def solved(sums: CodeSums) -> tuple[float, int, float]:
    """Seconds to regress every source on all others, the targets that were certified, and nonzeros a target."""
    data = sums.centred()
    forbidden = torch.ones_like(data.gram).fill_diagonal_(torch.inf)
    spent, solution = seconds(
        lambda: solve.lasso(
            data.gram,
            data.gram,
            target_sq_norm=data.gram.diagonal().clone(),
            strength=STRENGTH,
            penalty=solve.L1(forbidden),
        )
    )
    return spent, int(solution.converged.sum()), float((solution.value != 0).sum(0).double().mean())


def by_samples(most: int) -> None:
    """More samples, the same nodes: collection grows in proportion, the Gram and the solve don't grow."""
    sources = min(1024, most)
    print(f"\n{sources} nodes\n\n| samples | Gram, s | solve, s | Gram, MB |\n|---|---|---|---|")
    for samples in (10_000, 20_000, 40_000, 80_000):
        spent, sums = gram(samples, sources)
        print(f"| {samples:,} | {spent:.2f} | {solved(sums)[0]:.2f} | {8 * sources**2 / 1e6:.0f} |", flush=True)


def by_nodes(most: int) -> None:
    """More nodes, the same samples."""
    print("\n20,000 samples\n\n| nodes | Gram, s | solve of all, s | certified | nonzeros a target | Gram, MB |")
    print("|---|---|---|---|---|---|")
    sources = 512
    while sources <= most:
        spent, sums = gram(20_000, sources)
        took, certified, nonzeros = solved(sums)
        figures = f"{spent:.2f} | {took:.2f} | {certified:,} | {nonzeros:.1f} | {8 * sources**2 / 1e6:.0f}"
        print(f"| {sources:,} | {figures} |", flush=True)
        sources *= 2


def by_processes(most: int) -> None:
    """More processes, the same prompts of the bundled model."""
    del most
    print("\nbundled model, 512 prompts in batches of 32, all used")
    _by_processes(circuit_of_components, 512)


def by_processes_of_saes(most: int) -> None:
    """More processes, the same prompts and SAEs."""
    del most
    print(f"\nbundled model, 4096 prompts in batches of 32, SAEs of {FEATURES} features behind each of three layers")
    _by_processes(circuit_of_features, 4096)


GROWN = {"layers": (2, 4, 8), "heads": (4, 16), "length": (12, 48), "batch_size": (8,), "prompts": (128,)}


def by_plan(most: int) -> None:
    """What `tcl.plan` says beside what is measured, while one size of a random model or of its prompts grows."""
    del most
    base = Problem(layers=4, heads=8, d_model=256, vocab=2000, prompts=32, length=24, batch_size=32)
    circuit_of(base)  # loads what is compiled
    print(f"\n{base}, one size changed at a time; statistics and solve, beside the weights\n")
    print("| changed | planned, MB | measured, MB | planned, s | measured, s | forward-equivalents planned |")
    print("|---|---|---|---|---|---|")
    for name, values in GROWN.items():
        for value in values:
            ahead, spent, peak = circuit_of(replace(base, **{name: value}))
            measured_mb = "-" if peak is None else f"{peak * 2**20 / 1e6:.0f}"
            times = f"{ahead.seconds:.2f} | {spent:.2f} | {ahead.forwards:.1f}"
            print(f"| {name} {value} | {ahead.bytes / 1e6:.0f} | {measured_mb} | {times} |", flush=True)


def circuit_of(problem: Problem) -> tuple[Any, float, float | None]:
    """The plan of a circuit of a random model, the seconds that it took by the clock, and its peak in MiB."""
    from tl_circuitlasso.discover.run import circuit_lasso, plan

    model, (clean, _) = problem.model(), problem.pairs()
    options = {"positions": "last", "refined": False, "batch_size": problem.batch_size, "progress": False}
    ahead = plan(model, clean, **options)
    _, cost = measured(lambda: circuit_lasso(model, clean, **options))
    return ahead, cost.seconds, cost.peak_mib


def _by_processes(circuit: Callable[[Any, Any], Any], prompts: int) -> None:
    print("\n| processes | busiest one, s | forward passes | largest difference of a score |\n|---|---|---|---|")
    alone: list[float] = []
    for size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_rank, (size, folder, circuit, prompts), nprocs=size, start_method="spawn")
            reports = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
        busiest = max(report["seconds"] for report in reports)
        scores = reports[0]["scores"]
        alone = alone or scores
        differ = max(abs(one - other) for report in reports for one, other in zip(report["scores"], alone))
        differ = differ if all(len(report["scores"]) == len(alone) for report in reports) else math.inf
        print(f"| {size} | {busiest:.2f} | {reports[0]['passes']} | {differ:.1e} |", flush=True)


def _rank(rank: int, size: int, folder: str, circuit: Callable[[Any, Any], Any], prompts: int) -> None:
    from tl_circuitlasso.demo import load_demo

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    demo = load_demo(prompts=prompts)
    circuit(load_demo(prompts=128), "world")  # whatever is compiled or loaded once is by now
    spent, graph = seconds(lambda: circuit(demo, "world"))
    report = {"seconds": spent, "scores": graph.score.tolist(), "passes": graph.provenance["forward_passes"]}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def circuit_of_components(demo: Any, group: Any) -> Any:
    """The default circuit of the bundled model."""
    from tl_circuitlasso.discover.run import circuit_lasso

    options = {"positions": "last", "max_prompts": None, "progress": False, "process_group": group}
    return circuit_lasso(demo.model, demo.tokens, **options)


def circuit_of_features(demo: Any, group: Any) -> Any:
    """The default circuit among the features of `random_saes`."""
    from tl_circuitlasso.discover.run import circuit_lasso
    from tl_circuitlasso.models.sae import SAEFeatures

    options = {"basis": SAEFeatures(random_saes()), "progress": False, "process_group": group}
    return circuit_lasso(demo.model, demo.tokens, **options)


@cache
def random_saes() -> "dict[str, PlainSAE]":
    """Features with random directions that fire on a twentieth of the samples."""
    from tl_circuitlasso.demo import load_demo
    from tl_circuitlasso.models import adapt

    demo, hooks = load_demo(prompts=128), [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    acts = adapt(demo.model).run(demo.tokens, torch.ones_like(demo.tokens, dtype=torch.bool), hooks)
    return {hook: PlainSAE.random(acts[hook][:, 1:].flatten(0, 1), seed) for seed, hook in enumerate(hooks)}


@dataclass(frozen=True, eq=False)
class PlainSAE:
    """The least that an SAE is."""

    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor

    @classmethod
    def random(cls, x: Tensor, seed: int, features: int = FEATURES) -> "PlainSAE":
        """Random directions in the space of the activations `x`."""
        drawn = torch.randn(features, x.shape[1], generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(drawn, dim=1)
        return cls(unit.T.contiguous(), unit, -(x @ unit.T).quantile(0.95, dim=0))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.bias)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"samples": by_samples, "nodes": by_nodes, "processes": by_processes, "saes": by_processes_of_saes}
    tables["plans"] = by_plan
    parser.add_argument("--only", choices=list(tables), help="print one table (default: all)")
    parser.add_argument("--most", type=int, default=4096, help="nodes of the largest problem (default: 4096)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    code = codes(BATCH, 128, 0)
    solved(code_sums(code))  # compiles what large problems need
    for name, table in tables.items():
        if arguments.only in (None, name):
            table(arguments.most)


if __name__ == "__main__":
    main()
