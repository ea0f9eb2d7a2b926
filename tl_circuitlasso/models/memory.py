"""How much memory is free, so that an estimate can be compared before anything is allocated."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on a device; None where the system doesn't say."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_available(), _container()) if limit is not None]
    return min(limits) if limits else None


def in_words(count: int | float) -> str:
    """A number of bytes for people.

    >>> in_words(3.2e9), in_words(5e5)
    ('3.2 GB', '0.5 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _container() -> int | None:
    """What its control group leaves to this process: files that are only cached make room when it is needed."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else int(limit) - int(used) + _cached()
    except (OSError, ValueError):
        return None


def _cached() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
