"""The device under test: what it is called, what it reaches, and a clock that waits for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Where it runs, and what that reaches: FLOP/s in float32 and bfloat16, bytes/s of a copy, all measured."""

    kind: str
    single: float
    half: float
    copy: float

    @classmethod
    def measured(cls, kind: str, size: int) -> "Device":
        """What a large product and a large copy reach."""
        single = torch.randn(size, size, device=kind)
        half, target, flops = single.bfloat16(), torch.empty_like(single), 2 * size**3
        return cls(
            kind,
            flops / seconds(kind, lambda: single @ single),
            flops / seconds(kind, lambda: half @ half),
            2 * single.nbytes / seconds(kind, lambda: target.copy_(single)),
        )

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name() if self.kind == "cuda" else "CPU (a rehearsal)"

    @property
    def facts(self) -> dict[str, object]:
        """The name and what was measured, for the first line of a file."""
        return {
            "device": self.name,
            "torch": torch.__version__,
            "TFLOP/s float32": round(self.single / 1e12, 3),
            "TFLOP/s bfloat16": round(self.half / 1e12, 3),
            "TB/s copy": round(self.copy / 1e12, 3),
        }


def drain(kind: str) -> None:
    """Wait until the device has done what it was given."""
    if kind == "cuda":
        torch.cuda.synchronize()


def once(kind: str, run: Callable[[], object]) -> float:
    """Seconds of one run, queue drained before and after."""
    drain(kind)
    clock = time.perf_counter()
    run()
    drain(kind)
    return time.perf_counter() - clock


def seconds(kind: str, run: Callable[[], object], repeats: int = 5) -> float:
    """The best of some runs after a first one."""
    run()
    return min(once(kind, run) for _ in range(repeats))


def peak_gib(kind: str) -> float | None:
    """The most that was allocated on the card since `forget_peak`, in GiB."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if kind == "cuda" else None


def forget_peak(kind: str) -> None:
    """Begin to look for the peak anew, from nothing that is only cached."""
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
