"""The solver on CUDA at the sizes of SAE dictionaries: time, share of peak FLOP/s, share of bandwidth.

    python -m benchmarks.gpu                                  # D = 8k, 16k, 32k
    python -m benchmarks.gpu --sizes 2048
    python -m benchmarks.gpu --device cpu --sizes 256 --samples 4096   # a rehearsal: does it run, do gaps close?

Each size: planted codes on the card, their Gram (bfloat16 products and float64 sums; the same codes scattered
pair by pair in float64), one dense gradient, and the whole many-target Lasso with its certificate. Peak figures are
measured on the device by a large product and a large copy, not taken from a data sheet. Without CUDA it says so and
stops.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tl_circuitlasso import solve
from tl_circuitlasso.solve.sparse import Rows, dense_scatter, scatter_product


@dataclass(frozen=True)
class Device:
    """Where it runs, and what that reaches: FLOP/s in float32 and bfloat16, bytes/s of a copy."""

    name: str
    single: float
    half: float
    copy: float

    @classmethod
    def measured(cls, name: str, size: int) -> "Device":
        single = torch.randn(size, size, device=name)
        half, target, flops = single.bfloat16(), torch.empty_like(single), 2 * size**3
        return cls(
            name,
            flops / seconds(name, lambda: single @ single),
            flops / seconds(name, lambda: half @ half),
            2 * single.nbytes / seconds(name, lambda: target.copy_(single)),
        )


def drain(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, run: Callable[[], object], repeats: int = 5) -> float:
    """Best time of a computation, queue drained before and after."""
    run()
    best = float("inf")
    for _ in range(repeats):
        drain(device)
        clock = time.perf_counter()
        run()
        drain(device)
        best = min(best, time.perf_counter() - clock)
    return best


def codes(device: str, samples: int, sources: int, active: int = 48) -> torch.Tensor:
    """Sparse non-negative activations, dense in memory."""
    out = torch.zeros(samples, sources, device=device)
    at = torch.randint(sources, (samples, min(active, sources)), device=device)
    return out.scatter_(1, at, torch.empty(at.shape, device=device).exponential_())


def gram_of_batches(device: str, samples: int, sources: int, batch: int = 8192) -> tuple[torch.Tensor, float, float]:
    """The standardised Gram, streamed; the seconds spent on dense products, and on scattering the same codes."""
    total, sums, spent, scattering = torch.zeros(sources, sources, dtype=torch.float64, device=device), 0.0, 0.0, 0.0
    batch, other = min(batch, samples), torch.zeros_like(total)
    for _ in range(samples // batch):
        x = codes(device, batch, sources).bfloat16().float()
        rows = Rows.of(x.to_sparse_csr(), slice(0, batch), device)
        drain(device)
        clock = time.perf_counter()
        total += dense_scatter(x)
        sums = sums + x.double().sum(0)
        drain(device)
        between = time.perf_counter()
        scatter_product(other, rows, rows)
        drain(device)
        spent, scattering = spent + between - clock, scattering + time.perf_counter() - between
    assert torch.allclose(total, other, rtol=1e-3), "the two ways disagree"
    del other
    count = samples // batch * batch
    mean = sums / count
    gram = total / count - mean[:, None] * mean
    spread = gram.diagonal().clamp(min=1e-12).sqrt()
    return gram / spread[:, None] / spread, spent, scattering


def one_size(device: Device, sources: int, samples: int) -> str:
    """A row of the table."""
    gram, building, scattering = gram_of_batches(device.name, samples, sources)
    truth = torch.zeros(sources, sources, device=device.name)
    at = torch.randint(sources, (10, sources), device=device.name)
    truth.scatter_(0, at, torch.randn(10, sources, device=device.name))
    cross = gram @ truth.double()
    square = (truth.double() * cross).sum(0) + 0.25
    single = gram.float()
    dense = seconds(device.name, lambda: single @ truth)
    clock = time.perf_counter()
    solution = solve.lasso(gram, cross, target_sq_norm=square, strength=0.1, check=False)
    drain(device.name)
    solving = time.perf_counter() - clock
    kept = float((solution.value != 0).sum()) / sources
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.0f}" if device.name == "cuda" else "-"
    shares = (2 * samples * sources**2 / building / device.half, 2 * sources**3 / dense / device.single)
    return (
        f"| {sources} | {building:.2f} | {shares[0]:.0%} | {scattering:.2f} | {1e3 * dense:.0f} | {shares[1]:.0%} |"
        f" {solving:.2f} | {kept:.0f} | {float(solution.gap.max()):.1e} | {memory} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--samples", type=int, default=1 << 17)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    device = Device.measured(arguments.device, 8192 if arguments.device == "cuda" else 512)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "a rehearsal on the CPU"
    print(f"{name}: {device.single / 1e12:.2f} TFLOP/s float32, {device.half / 1e12:.2f} bfloat16,", end=" ")
    print(f"{device.copy / 1e12:.2f} TB/s, all measured; {arguments.samples} samples")
    print(
        "| D | Gram s | of peak | scattered s | gradient ms | of peak | Lasso s | nonzeros a target | worst gap | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        print(one_size(device, size, arguments.samples), flush=True)


if __name__ == "__main__":
    main()
