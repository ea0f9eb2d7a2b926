"""Files of work that goes on: whole, of this very work, or refused with what differs."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.solve.problems import planted
from tl_circuitlasso.data import storage
from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.errors import FormatError, InputError, StaleCheckpoint
from tl_circuitlasso.solve import lasso

NAME = "part.safetensors"
TENSORS = {"x": torch.arange(3.0)}


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "run", "thing", "collection", {"model": "a", "rule": {"draws": (1, 2)}}, version=2)


def test_a_part_comes_back_with_its_data(kept: Checkpoint) -> None:
    assert kept.read(NAME) is None
    kept.write(NAME, TENSORS, {"batches": 3})
    tensors, data = kept.read(NAME) or ({}, {})
    assert torch.equal(tensors["x"], TENSORS["x"]) and data["batches"] == 3
    assert [path.name for path in kept.folder.iterdir()] == [NAME]


def test_other_work_is_refused_with_what_differs(kept: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    kept.write(NAME, TENSORS)
    other = replace(kept, identity={"model": "b", "rule": {"draws": (1, 3)}})
    with pytest.raises(
        StaleCheckpoint, match=rf"{NAME} belongs to another collection \(it differs in model, rule\): del"
    ):
        other.read(NAME)
    assert issubclass(StaleCheckpoint, InputError) and issubclass(StaleCheckpoint, FormatError)
    with caplog.at_level(logging.INFO):
        assert other.read(NAME, remade=True) is None
    assert "differs in model, rule" in caplog.text
    assert replace(kept, identity={"model": "a"}).read(NAME) is not None  # what isn't asked for may differ


@pytest.mark.parametrize("data", [{"version": 1, "identity": {"model": "a"}}, {"key": "0123"}])
def test_files_of_another_form_are_refused(kept: Checkpoint, data: dict) -> None:
    storage.write_tensors(kept.folder / NAME, TENSORS, {"kind": "thing", **data})
    with pytest.raises(FormatError, match="form of another version of the library: delete it"):
        kept.read(NAME)
    assert kept.read(NAME, remade=True) is None


def test_what_is_no_such_file_is_refused(kept: Checkpoint) -> None:
    kept.write(NAME, TENSORS)
    with pytest.raises(FormatError, match="'thing', not 'other'"):
        replace(kept, kind="other").read(NAME)
    (kept.folder / NAME).write_bytes(b"not tensors")
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        kept.read(NAME, remade=True)


def test_a_solve_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """Its files say which problem they belong to beside everything else."""
    problem = planted(targets=2)
    whole = lasso(**problem.matrices, strength=0.2, checkpoint=tmp_path)
    (file,) = tmp_path.iterdir()
    tensors, data = storage.read_tensors(file, "solve")
    early = {name: data[name] for name in ("kind", "shape", "stalled")} | data["identity"]
    storage.write_tensors(file, tensors, early)
    written = file.stat().st_mtime_ns
    assert torch.equal(lasso(**problem.matrices, strength=0.2, checkpoint=tmp_path).value, whole.value)
    assert file.stat().st_mtime_ns == written
    with pytest.raises(StaleCheckpoint, match="another problem"):
        lasso(**problem.matrices, strength=0.3, checkpoint=tmp_path)
