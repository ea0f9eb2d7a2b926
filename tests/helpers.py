"""What several test files share: the folder of reference data, small models, tolerances."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tl_circuitlasso.errors import CircuitLassoError


def shared_folder(*parts: str) -> Path:
    """A path in the folder of reference models and data sets, or a skip that says how to supply it."""
    root = Path(os.environ.get("TL_CIRCUITLASSO_DATA", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no reference data at {path}: set TL_CIRCUITLASSO_DATA to the folder that holds it")
    return path


@contextmanager
def message_of(folder: Path, name: str, rank: int) -> Iterator[None]:
    """Write down what was raised in one of several processes, for the parent to look at."""
    try:
        yield
    except CircuitLassoError as error:
        (folder / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
