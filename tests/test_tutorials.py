"""Every tutorial runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import shared_folder

NEEDS = {"3_sae_features": ["sae_lens"], "5_neuron_circuits": []}  # and the reference data
TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path) -> None:
    if path.stem in NEEDS:
        for package in NEEDS[path.stem]:
            pytest.importorskip(package, reason=f"{package} is not installed")
        shared_folder("models", "stories260K")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
