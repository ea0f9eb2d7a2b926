"""The solver at the sizes of SAE dictionaries: time, share of peak FLOP/s, the CPU beside it; and Grams of codes.

Planted codes, their Gram (bfloat16 products and float64 sums; the same codes scattered pair by pair in float64), one
dense gradient, and the whole many-target Lasso with its certificate, by every way of sweeping that the device has. No
Lasso is certified for less than one dense product of Gram and answer: that is the bound.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, drain, forget_peak, once, peak_gib, seconds
from benchmarks.gpu.parts import Figures, Size
from tl_circuitlasso import solve
from tl_circuitlasso.solve import torch_set
from tl_circuitlasso.solve.sparse import Rows, dense_scatter, scatter_product

BATCH = 8192  # samples that are multiplied at once
PLANTED = 10  # parents of a target
FEW = 64  # targets of the Lasso that compiles


def families(device: Device, size: Size) -> Iterator[Figures]:
    """Lassos of D targets on D sources, D growing; on the CPU, too, where that takes seconds."""
    for sources in size.sources:
        forget_peak(device.kind)
        gram, building, scattering = gram_of_batches(device.kind, size.samples, sources, size.active)
        cross, square, truth = planted(gram)
        single = gram.float()
        dense = seconds(device.kind, lambda single=single, truth=truth: single @ truth)
        about = {
            "D": sources,
            "Gram s": building,
            "of peak": 2 * size.samples * sources**2 / building / device.half,
            "scattered s": scattering,
            "bound s": dense,
            "bound of peak": 2 * sources**3 / dense / device.single,
        }
        for way in ways(device.kind):
            yield {**about, "way": way, **solved(device.kind, gram, cross, square, way), "GiB": peak_gib(device.kind)}
        if device.kind != "cpu" and sources <= size.on_cpu:
            yield {"D": sources, "way": "CPU", **solved("cpu", gram.cpu(), cross.cpu(), square.cpu(), "CPU")}


def grams(device: Device, size: Size) -> Iterator[Figures]:
    """The Gram of the codes of a whole SAE, by products and by scattering."""
    forget_peak(device.kind)
    _, building, scattering = gram_of_batches(device.kind, size.tokens, size.features, size.active)
    yield {
        "tokens": size.tokens,
        "features": size.features,
        "active": size.active,
        "products s": building,
        "scattered s": scattering,
        "of peak": 2 * size.tokens * size.features**2 / building / device.half,
        "GiB": peak_gib(device.kind),
    }


def gram_of_batches(kind: str, samples: int, sources: int, active: int) -> tuple[Tensor, float, float]:
    """The standardised Gram, streamed; the seconds spent on dense products, and on scattering the same codes."""
    total, spent, scattering = torch.zeros(sources, sources, dtype=torch.float64, device=kind), 0.0, 0.0
    sums = torch.zeros(sources, dtype=torch.float64, device=kind)
    batch, other = min(BATCH, samples), torch.zeros_like(total)
    for _ in range(samples // batch):
        x = codes(kind, batch, sources, active).bfloat16().float()
        rows = Rows.of(x.to_sparse_csr(), slice(0, batch), kind)
        drain(kind)

        def products(x: Tensor = x) -> None:
            total.add_(dense_scatter(x))

        spent += once(kind, products)
        scattering += once(kind, lambda rows=rows: scatter_product(other, rows, rows))
        sums = sums + x.double().sum(0)
    if not torch.allclose(total, other, rtol=1e-3):
        raise AssertionError("products and scattering give different Grams")
    del other
    count = samples // batch * batch
    mean = sums / count
    gram = total / count - mean[:, None] * mean
    spread = gram.diagonal().clamp(min=1e-12).sqrt()
    return gram / spread[:, None] / spread, spent, scattering


def codes(kind: str, samples: int, sources: int, active: int) -> Tensor:
    """Sparse non-negative activations, dense in memory."""
    out = torch.zeros(samples, sources, device=kind)
    at = torch.randint(sources, (samples, min(active, sources)), device=kind)
    return out.scatter_(1, at, torch.empty(at.shape, device=kind).exponential_())


def planted(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross moments and squares of targets that each have a few parents, and the coefficients."""
    sources = len(gram)
    truth = torch.zeros(sources, sources, device=gram.device)
    at = torch.randint(sources, (PLANTED, sources), device=gram.device)
    truth.scatter_(0, at, torch.randn(PLANTED, sources, device=gram.device))
    cross = gram @ truth.double()
    return cross, (truth.double() * cross).sum(0) + 0.25, truth


def ways(kind: str) -> tuple[str, ...]:
    """How the inner sweeps can be run on a device."""
    compiled = torch_set.sweeper(torch.device(kind)) is not torch_set.sweep_torch
    return ("Triton", "torch") if compiled else ("torch",)


def solved(kind: str, gram: Tensor, cross: Tensor, square: Tensor, way: str) -> Figures:
    """Seconds of the Lasso, after a small one that compiles, and what came of it."""
    found: list[solve.Solution] = []

    def run(count: int) -> None:
        part = slice(0, count)
        options = {"strength": 0.1, "check": False, "solver": "auto" if way == "CPU" else "torch"}
        found.append(solve.lasso(gram[part, part], cross[part, part], target_sq_norm=square[part], **options))

    with _sweeping(way):
        run(min(FEW, len(gram)))
        spent = once(kind, lambda: run(len(gram)))
    kept = float((found[-1].value != 0).sum()) / len(gram)
    return {"Lasso s": spent, "nonzeros a target": kept, "worst gap": float(found[-1].gap.max())}


@contextmanager
def _sweeping(way: str) -> Iterator[None]:
    """Sweeps by batched torch while it is open, if that is the way; else as the library chooses."""
    chosen = torch_set.sweeper
    try:
        if way == "torch":
            torch_set.sweeper = lambda device: torch_set.sweep_torch
        yield
    finally:
        torch_set.sweeper = chosen
