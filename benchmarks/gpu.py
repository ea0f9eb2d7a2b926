"""The solver on CUDA at the sizes of SAE dictionaries: time, share of peak FLOP/s, share of bandwidth.

    python benchmarks/gpu.py                 # D = 8k, 16k, 32k
    python benchmarks/gpu.py --sizes 2048

Each size: planted codes on the card, their Gram (bfloat16 products, float64 sums), one dense gradient, and the whole
many-target Lasso with its certificate. Peak figures are measured on the card by a large product and a large copy, not
taken from a data sheet. Without CUDA it says so and stops.
"""

import argparse
import time
from collections.abc import Callable

import torch

from tl_circuitlasso import solve
from tl_circuitlasso.solve.sparse import dense_scatter


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Best time of a CUDA computation, queue drained before and after."""
    run()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - clock)
    return best


def peaks(size: int = 8192) -> tuple[float, float, float]:
    """FLOP/s in float32 and bfloat16, and bytes/s of a copy, as this card reaches them."""
    single = torch.randn(size, size, device="cuda")
    half = single.bfloat16()
    flops = 2 * size**3
    copy = torch.empty_like(single)
    return (
        flops / seconds(lambda: single @ single),
        flops / seconds(lambda: half @ half),
        2 * single.nbytes / seconds(lambda: copy.copy_(single)),
    )


def codes(samples: int, sources: int, active: int = 48) -> torch.Tensor:
    """Sparse non-negative activations, dense in memory."""
    out = torch.zeros(samples, sources, device="cuda")
    at = torch.randint(sources, (samples, active), device="cuda")
    return out.scatter_(1, at, torch.rand(samples, active, device="cuda").exponential_())


def gram_of_batches(samples: int, sources: int, batch: int = 8192) -> tuple[torch.Tensor, float]:
    """The standardised Gram, streamed; and the seconds spent on products."""
    total, sums, spent = torch.zeros(sources, sources, dtype=torch.float64, device="cuda"), 0.0, 0.0
    for _ in range(max(1, samples // batch)):
        x = codes(batch, sources).bfloat16().float()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        total += dense_scatter(x)
        sums = sums + x.double().sum(0)
        torch.cuda.synchronize()
        spent += time.perf_counter() - clock
    count = max(1, samples // batch) * batch
    mean = sums / count
    gram = total / count - mean[:, None] * mean
    spread = gram.diagonal().clamp(min=1e-12).sqrt()
    return gram / spread[:, None] / spread, spent


def one_size(sources: int, samples: int, peak: tuple[float, float, float]) -> None:
    gram, building = gram_of_batches(samples, sources)
    build_share = 2 * samples * sources**2 / building / peak[1]
    truth = torch.zeros(sources, sources, device="cuda")
    truth.scatter_(0, torch.randint(sources, (10, sources), device="cuda"), torch.randn(10, sources, device="cuda"))
    cross = gram @ truth.double()
    square = (truth.double() * cross).sum(0) + 0.25
    single = gram.float()
    dense = seconds(lambda: single @ truth)
    clock = time.perf_counter()
    solution = solve.lasso(gram, cross, target_sq_norm=square, strength=0.1, check=False)
    torch.cuda.synchronize()
    solving = time.perf_counter() - clock
    kept = float((solution.value != 0).sum()) / sources
    print(
        f"| {sources} | {building:.2f} | {100 * build_share:.0f} % | {1e3 * dense:.0f} |"
        f" {100 * 2 * sources**3 / dense / peak[0]:.0f} % | {solving:.2f} | {kept:.0f} |"
        f" {float(solution.gap.max()):.1e} | {torch.cuda.max_memory_allocated() / 2**30:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--samples", type=int, default=1 << 17)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    peak = peaks()
    print(
        f"{torch.cuda.get_device_name()}: {peak[0] / 1e12:.0f} TFLOP/s float32, {peak[1] / 1e12:.0f} bfloat16, ", end=""
    )
    print(f"{peak[2] / 1e12:.2f} TB/s, all measured; {arguments.samples} samples")
    print("| D | Gram s | of peak | dense gradient ms | of peak | Lasso s | nonzeros a target | worst gap | GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        one_size(size, arguments.samples, peak)


if __name__ == "__main__":
    main()
