"""Every tutorial runs from top to bottom, away from the checkout, and ends with what to do when nothing is clear."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from tests.apart import apart

REAL = "6_real_model"  # SmolLM2-135M-Instruct: minutes, and a model that isn't bundled
TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
ENDS = r"^## When .*(no clear circuit|isn't faithful)"
PLACES = re.compile(r"site-packages|/home/|/root/|/tmp/ipykernel|[A-Z]:\\\\Users")


def test_there_are_tutorials() -> None:
    assert REAL in {path.stem for path in TUTORIALS}


@pytest.mark.parametrize("path", [path for path in TUTORIALS if path.stem != REAL], ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    _run(path, tmp_path)


@pytest.mark.slow
def test_the_tutorial_on_a_real_model_runs_where_the_model_is(tmp_path: Path) -> None:
    if not Path(os.environ.get("SMOLLM2", ""), "config.json").is_file():
        pytest.skip("SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    _run(next(path for path in TUTORIALS if path.stem == REAL), tmp_path)


def _run(path: Path, folder: Path) -> None:
    """Run it in an empty folder: what a tutorial needs comes with the package."""
    apart(
        run_cells, [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"], folder
    )


def run_cells(cells: list[str], folder: Path) -> None:
    """Run cells one after the other in a notebook's kernel, here in this process, where the libraries stand ready."""
    from ipykernel.inprocess.manager import InProcessKernelManager

    os.chdir(folder)
    manager = InProcessKernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    for cell in cells:
        client.execute(cell)
        reply = client.get_shell_msg(timeout=600)["content"]
        assert reply["status"] == "ok", "\n".join(reply["traceback"])


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_can_be_read_without_running_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "not executed"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not PLACES.search(path.read_text(encoding="utf-8")), "outputs name a place on somebody's machine"
    assert not any("benchmarks" in cell.source and "import" in cell.source for cell in code), "needs the checkout"
    last = notebook.cells[-1]
    assert last.cell_type == "markdown" and re.search(ENDS, last.source, re.MULTILINE), "doesn't say what to do else"
