"""What a bare install brings, package by package: `python -m benchmarks.installed` prints sizes on disk.

Beside a package's own size stands what an install without it would save: itself, unless another one of the list brings
it anyway, and what it alone brings.
"""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "tl-circuitlasso"


def direct(name: str = PROJECT) -> list[str]:
    """The packages that one asks for, extras left out, as this environment has them."""
    asked = (Requirement(line) for line in metadata.requires(name) or ())
    return sorted({_plain(need.name) for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})})


def closure(names: Iterable[str]) -> set[str]:
    """The packages and all that they ask for; what isn't installed isn't needed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and size(name) is not None:
            found.add(name)
            waiting += direct(name)
    return found


def size(name: str) -> int | None:
    """Bytes of a package's files; None where it isn't installed."""
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        return None
    paths = {Path(str(file.locate())) for file in files}
    return sum(path.stat().st_size for path in paths if path.is_file())


def sizes(project: str = PROJECT) -> dict[str, tuple[int, int]]:
    """By package that the project asks for: bytes of its own, and bytes saved without it; the largest first."""
    asked = direct(project)
    found = {}
    for name in asked:
        alone = closure([name]) - closure(other for other in asked if other != name)
        found[name] = (size(name) or 0, sum(size(one) or 0 for one in alone))
    return dict(sorted(found.items(), key=lambda entry: -max(entry[1])))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    print(f"{'package':18}{'own MB':>8}{'saved without it':>18}")
    for name, (own, alone) in sizes().items():
        print(f"{name:18}{own / 1e6:8.1f}{alone / 1e6:18.1f}")
    together = closure(direct())
    print(f"{len(together)} packages, {sum(size(name) or 0 for name in together) / 1e6:,.0f} MB in all")


if __name__ == "__main__":
    main()
