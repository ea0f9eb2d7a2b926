"""What several test files share: the folder of reference data, small models, tolerances."""

import os
from pathlib import Path

import pytest


def shared_folder(*parts: str) -> Path:
    """A path in the folder of reference models and data sets, or a skip that says how to supply it."""
    root = Path(os.environ.get("TL_CIRCUITLASSO_DATA", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no reference data at {path}: set TL_CIRCUITLASSO_DATA to the folder that holds it")
    return path
