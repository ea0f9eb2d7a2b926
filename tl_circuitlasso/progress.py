"""How long work tells that it's alive: a bar on a terminal, elsewhere a line every ten seconds.

Nothing is said of what takes less than a second on a terminal, or less than ten elsewhere.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds from one line to the next, where there is no terminal


def bar(
    items: Iterable[Any] | None = None, *, progress: bool, desc: str, unit: str = "it", total: int | None = None
) -> Any:
    """A tqdm over `items`, or one that counts to `total` by its `update`; silent without `progress`.

    >>> sum(bar([1, 2, 3], progress=False, desc="add"))
    6
    """
    if not progress or sys.stderr.isatty():
        return tqdm(items, desc=desc, unit=unit, total=total, disable=not progress, delay=1)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} to go"
    lines: Any = _Lines()
    times: Any = {"mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY}
    return tqdm(items, desc=desc, unit=unit, total=total, file=lines, bar_format=form, miniters=1, **times)


class _Lines:
    """Standard error, where a bar that would be drawn over itself becomes one line after the other."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
