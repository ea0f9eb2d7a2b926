"""How long work tells that it's alive: a bar on a terminal, elsewhere a line every ten seconds.

Nothing is said of what takes less than a second on a terminal, or less than ten elsewhere. Steps that follow each other
are one piece of work: ten of nine seconds each aren't silent for ninety.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds from one line to the next, where there is no terminal
SHORT = 1.0  # seconds of work that a terminal isn't told of
FORM = "{l_bar}{bar}| {n:.0f}/{total_fmt} {unit} [{elapsed}<{remaining}]"  # counts may be fractions


def bar(
    items: Iterable[Any] | None = None, *, progress: bool, desc: str, unit: str = "it", total: int | None = None
) -> Any:
    """A bar over `items`, or one that counts to `total` by its `update`; silent without `progress`.

    >>> sum(bar([1, 2, 3], progress=False, desc="add"))
    6
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    unit = unit + ("es" if unit.endswith("ch") else "s")
    if not progress or sys.stderr.isatty():
        form = None if total is None else FORM
        options: Any = {"disable": not progress, "delay": SHORT, "leave": None, "bar_format": form}
        return _Bar(items, desc=desc, unit=unit, total=total, **options)
    return _Lines(items, desc, unit, total)


def counted(
    items: Iterable[Any], size: Callable[[Any], int], *, progress: bool, desc: str, unit: str = "prompt", total: int
) -> Iterator[Any]:
    """The items, while a bar counts what they hold: batches of prompts, say.

    >>> list(counted(["ab", "c"], len, progress=False, desc="read", total=3))
    ['ab', 'c']
    """
    with bar(total=total, progress=progress, desc=desc, unit=unit) as counting:
        for item in items:
            yield item
            counting.update(size(item))


class _Bar(tqdm):
    """A bar whose clock goes on while a single item takes long."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._turn, self._done, self._told = threading.Lock(), threading.Event(), False
        super().__init__(*arguments, **options)
        if not self.disable:
            threading.Thread(target=_watch, args=(weakref.ref(self), self._done, SHORT), daemon=True).start()

    def tell(self) -> None:
        """Drawn anew."""
        with self._turn:
            if not self._done.is_set():
                self._told = True
                self.refresh()

    def close(self) -> None:
        with self._turn:
            self._done.set()
        if self._told:  # tqdm takes a bar that it hasn't drawn by itself for one that was never seen
            self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
        super().close()


class _Quiet:
    """Since when nothing was said, over all lines of the process."""

    def __init__(self) -> None:
        self.since = self.ended = -float("inf")

    def begun(self, now: float) -> float:
        """Since when work that begins now is silent: with what ended just before it, or from now on."""
        if now - self.ended > SHORT:
            self.since = now
        return self.since


_QUIET = _Quiet()


class _Lines:
    """One line after the other on standard error, also while a single item takes long."""

    def __init__(self, items: Iterable[Any] | None, desc: str, unit: str, total: int | None) -> None:
        self._items, self._desc, self._unit, self._total = items, desc, unit, total
        self.n: int | float = 0
        self._began = time.monotonic()
        self._told = _QUIET.begun(self._began)
        self._lock, self._done = threading.Lock(), threading.Event()
        threading.Thread(target=_watch, args=(weakref.ref(self), self._done, EVERY / 10), daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items or ():
                yield item
                self.update(1)

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._done.set()

    def update(self, n: int | float = 1) -> None:
        self.n += n
        self.tell()

    def close(self) -> None:
        """The last line, where there was one before."""
        if not self._done.is_set() and self._told > self._began:
            self.tell(last=True)
        with self._lock:  # a line that was on its way is out, and none comes after this
            self._done.set()
            _QUIET.ended = time.monotonic()

    def tell(self, *, last: bool = False) -> None:
        """A line, where the last one is long enough ago."""
        with self._lock:
            now = time.monotonic()
            if last or (now - self._told >= EVERY and not self._done.is_set()):
                self._told = _QUIET.since = now
                sys.stderr.write(f"{self._line(now - self._began)}\n")
                sys.stderr.flush()

    def _line(self, gone: int | float) -> str:
        total = self._total
        count = f"{self.n:,.0f} {self._unit}" if total is None else f"{self.n:,.0f} of {total:,} {self._unit}"
        left = gone * (total - self.n) / self.n if total is not None and self.n else None
        to_go = "" if left is None else f", {clock(left)} to go"
        return f"{self._desc}: {count}, {clock(gone)} gone{to_go}"


def say(line: str) -> None:
    """A line of its own on standard error, above the bars that stand there."""
    _QUIET.since = time.monotonic()
    tqdm.write(line, file=sys.stderr)


def clock(seconds: int | float) -> str:
    """A duration for people.

    >>> clock(75.2)
    '0:01:15'
    """
    return str(timedelta(seconds=round(max(seconds, 0.0))))


def _watch(teller: "weakref.ref[_Bar | _Lines]", done: threading.Event, every: int | float) -> None:
    """Lets a bar or lines speak until they are done or forgotten."""
    while not done.wait(max(every, 0.05)):
        if (found := teller()) is None:
            return
        found.tell()
        del found  # so that it can be forgotten
