"""How much memory is free or allowed, so that an estimate can be compared before anything is allocated."""

import re
from pathlib import Path
from typing import Any

import torch

from tl_circuitlasso._checks import shortened, whole_number
from tl_circuitlasso.errors import InputError

MEMINFO = Path("/proc/meminfo")  # the file in which Linux says what is available
CGROUP = Path("/sys/fs/cgroup")  # the folder in which a container says what it allows
UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
UNITS |= {unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)}


def free_bytes(device: torch.device | str = "cpu", *, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can still be allocated on a device; None where the system doesn't say."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_available(meminfo), _container(cgroup)) if limit is not None]
    return min(limits) if limits else None


def as_bytes(memory: Any) -> int | None:
    """A `memory` argument as bytes: a whole number, or a number with a unit; None stays None.

    >>> as_bytes("8GB"), as_bytes("1.5 GiB"), as_bytes("4096"), as_bytes(4096)
    (8000000000, 1610612736, 4096, 4096)

    Raises
    ------
    InputError: something else, or nothing at all.
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        unit = UNITS.get(found[2].upper() or "B") if found else None
        if found is None or unit is None or int(float(found[1]) * unit) < 1:
            raise InputError(f"`memory` is {shortened(memory)}: give bytes, or a number with a unit such as '8GB'")
        return int(float(found[1]) * unit)
    return whole_number("memory", memory, what="of bytes, or text such as '8GB'")


def in_words(count: int | float) -> str:
    """A number of bytes for people.

    >>> in_words(3.2e9), in_words(5e5)
    ('3.2 GB', '0.5 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _container(cgroup: Path) -> int | None:
    """What its control group leaves to this process: files that are only cached make room when it is needed."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else int(limit) - int(used) + _cached(cgroup)
    except (OSError, ValueError):
        return None


def _cached(cgroup: Path) -> int:
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
