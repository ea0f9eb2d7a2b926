"""Parts of the measurement: each under a time limit, its figures written as they come, a table at the end."""

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the problems are.

    sources: of the Lassos; samples: of their codes; on_cpu: sources up to which the CPU solves the same.
    tokens, features, active: of the Gram of codes and of the pair of SAEs.
    shapes: names in graphs.SHAPES; prompts, length: of component graphs; shrink: divisor of every width.
    """

    sources: tuple[int, ...]
    samples: int
    on_cpu: int
    tokens: int
    features: int
    active: int
    shapes: tuple[str, ...]
    prompts: int
    length: int
    shrink: int = 1


FULL = Size(
    sources=(8192, 16_384, 32_768),
    samples=1 << 17,
    on_cpu=8192,
    tokens=1_000_000,
    features=32_768,
    active=50,
    shapes=("gpt2-small", "llama-3.2-1b", "gemma-2-2b", "llama-3.1-8b"),
    prompts=256,
    length=32,
)
TOY = Size(
    sources=(96,),
    samples=2000,
    on_cpu=0,
    tokens=2000,
    features=64,
    active=8,
    shapes=("gemma-2-2b",),
    prompts=4,
    length=5,
    shrink=48,
)


@dataclass(frozen=True)
class Part:
    """A part: its figures one by one, and its share of the time."""

    name: str
    share: float
    run: Callable[[Device, Size], Iterator[Figures]]


class OutOfTime(Exception):
    """A part has had its time."""


def run_all(parts: list[Part], device: Device, size: Size, seconds: float, out: Path) -> list[Figures]:
    """Every part, each in its share of what time is left; lines are written to `out` as they are measured."""
    end, found = time.monotonic() + seconds, []
    with out.open("w", encoding="utf-8") as file:

        def write(figures: Figures) -> None:
            found.append(figures)
            file.write(json.dumps(figures) + "\n")
            file.flush()

        write({"part": "device", **device.facts})
        for number, part in enumerate(parts):
            shares = sum(one.share for one in parts[number:])
            allowed = (end - time.monotonic()) * part.share / shares
            for figures in _figures(part, device, size, allowed):
                write(figures)
    return found


def _figures(part: Part, device: Device, size: Size, allowed: float) -> Iterator[Figures]:
    """A part's lines; the last says that it is done, or why it isn't."""
    began, end = time.monotonic(), "done"
    if allowed <= 1:
        yield {"part": part.name, "end": "no time left", "seconds": 0.0}
        return
    try:
        with at_most(allowed):
            for figures in part.run(device, size):
                yield {"part": part.name, **figures}
    except OutOfTime:
        end = f"out of time after {allowed:.0f} s"
    except Exception as error:  # one part's failure is a result, and the others are still to be measured
        where = traceback.extract_tb(error.__traceback__)[-1]
        end = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    yield {"part": part.name, "end": end, "seconds": round(time.monotonic() - began, 2)}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside the block when the time is up, as soon as Python is reached again.

    What is imported inside must have been imported before: a module that is stopped half-way stays broken.
    """

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(found: list[Figures]) -> str:
    """All lines as Markdown tables, one for each part."""
    text = []
    for name in dict.fromkeys(figures["part"] for figures in found):
        rows = [{k: v for k, v in figures.items() if k != "part"} for figures in found if figures["part"] == name]
        ends = [row for row in rows if "end" in row]
        rows = [row for row in rows if "end" not in row]
        text.append(f"\n{name}" + "".join(f": {row['end']}, {row['seconds']:.1f} s" for row in ends) + "\n")
        heads = list(dict.fromkeys(head for row in rows for head in row))
        if heads:
            text += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
            text += [f"| {' | '.join(_cell(row.get(head)) for head in heads)} |" for row in rows]
    return "\n".join(text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
