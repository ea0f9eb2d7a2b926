"""What a call costs: wall time and peak memory."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost(NamedTuple):
    """Wall seconds, processor seconds, and peak memory above where it stood before in MiB (None: not measurable)."""

    seconds: float
    cpu_seconds: float
    peak_mib: float | None


def measured(call: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, Cost]:
    """The call's result and cost: on CUDA the allocator's peak, elsewhere the peak of resident memory (Linux only)."""
    on_cuda = device is not None and device.type == "cuda"
    before = _cuda_start(device) if on_cuda else _resident_start()
    began, cpu = time.perf_counter(), time.process_time()
    result = call()
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    after = torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else _field("VmHWM")
    peak = None if before is None or after is None else max(0.0, after - before)
    return result, Cost(seconds, cpu_seconds, peak)


def _cuda_start(device: torch.device | None) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def _resident_start() -> float | None:
    if not _CLEAR.exists():
        return None
    _return_freed()
    try:
        _CLEAR.write_text("5")  # resets the high-water mark of resident memory
    except OSError:
        return None
    return _field("VmRSS")


def _return_freed() -> None:
    """Give freed memory back to the system: what the allocator holds on to would be reused by the call, uncounted."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


def _field(name: str) -> float | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)
