"""Chunks of codes, kept in memory while there's room and on disk from then on; a checkpoint keeps them all on disk.

Files are safetensors with JSON, written under another name and renamed, so a killed run leaves whole chunks only, and
the next one goes on behind the last of them.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.models.codes import Codes
from tl_circuitlasso.models.feature_codes import Chunk, joined

CHUNK_SAMPLES = 1 << 16  # samples that are put into one chunk
_DENSE = ("target", "target_rows", "prompt", "position", "tokens", "ends", "numbers")


class CodeStore:
    """The chunks of one data set, in order.

    folder: where every chunk is written, and looked for when a run resumes; None: memory, and a temporary folder for
    what exceeds `limit` bytes. identity: what must agree before chunks of an earlier run are used.

    Raises
    ------
    InputError: the folder is a file, lacks a chunk, or holds those of another collection.
    """

    def __init__(self, folder: Path | None, limit: int, identity: Mapping[str, Any]) -> None:
        self._limit = limit
        self._kept = None if folder is None else _checkpoint(folder, identity)
        self._places: list[Chunk | Path] = []
        self._held = 0
        self._pending: list[Chunk] = []
        self._spill: Checkpoint | None = None
        self.origin = ""
        self.batches = self.samples = 0
        if self._kept is not None:
            self._find(self._kept)

    def add(self, chunk: Chunk, origin: str) -> None:
        """Take in the next batch; `origin` is the hash of the data up to it."""
        self._pending.append(chunk)
        self.origin, self.batches = origin, chunk.batches
        if sum(part.samples for part in self._pending) >= CHUNK_SAMPLES:
            self.flush()

    def flush(self) -> None:
        """Put what is pending into a chunk of its own."""
        if not self._pending:
            return
        chunk, self._pending = joined(self._pending), []
        number = len(self._places)
        fits = self._held + chunk.bytes <= self._limit
        if self._kept is not None or not fits:
            home, name = self._home(), f"codes-{number:05d}.safetensors"
            _write(home, name, chunk, self.origin)
            self._places.append(chunk if fits else home.folder / name)
        else:
            self._places.append(chunk)
        self._held += chunk.bytes if fits else 0
        self.samples += chunk.samples

    def __iter__(self) -> Iterator[Chunk]:
        for place in self._places:
            yield place if isinstance(place, Chunk) else _read(self._home(), place.name)[0]

    @property
    def on_disk(self) -> int:
        """How many chunks are read from disk each time."""
        return sum(isinstance(place, Path) for place in self._places)

    def _home(self) -> Checkpoint:
        if self._kept is not None:
            return self._kept
        if self._spill is None:
            self._spill = _checkpoint(Path(tempfile.mkdtemp(prefix="circuitlasso-codes-")), {})
            folder = self._spill.folder
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # a TemporaryDirectory would warn
        return self._spill

    def _find(self, kept: Checkpoint) -> None:
        folder = kept.folder
        if folder.exists() and not folder.is_dir():
            raise InputError(f"`checkpoint` {folder} is a file: SAE circuits keep theirs in a folder; name a new one")
        for number, path in enumerate(sorted(folder.glob("codes-*.safetensors"))):
            if path.name != f"codes-{number:05d}.safetensors":
                raise InputError(f"`checkpoint` {folder} lacks chunk {number}: delete the folder, or name another one")
            chunk, data = _read(kept, path.name)
            fits = self._held + chunk.bytes <= self._limit
            self._places.append(chunk if fits else path)
            self._held += chunk.bytes if fits else 0
            self.batches, self.origin = chunk.batches, data["origin"]
            self.samples += chunk.samples


def _checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(folder, "feature codes", "collection", identity, version=2)


def _write(home: Checkpoint, name: str, chunk: Chunk, origin: str) -> None:
    tensors: dict[str, Tensor] = {name: getattr(chunk, name) for name in _DENSE}
    tensors |= {f"error/{hook}": value for hook, value in chunk.errors.items()}
    for key, codes in chunk.codes.items():
        parts = {"starts": codes.starts, "columns": codes.columns, "values": codes.values}
        tensors |= {f"codes/{key}/{name}": part for name, part in parts.items()}
    widths = {key: codes.width for key, codes in chunk.codes.items()}
    home.write(name, tensors, {"batches": chunk.batches, "widths": widths, "origin": origin})


def _read(home: Checkpoint, name: str) -> tuple[Chunk, dict[str, Any]]:
    found = home.read(name)
    if found is None:
        raise FormatError(f"{home.folder / name}: no such file; it was there when this run began")
    tensors, data = found
    codes = {
        key: Codes(
            tensors[f"codes/{key}/starts"], tensors[f"codes/{key}/columns"], tensors[f"codes/{key}/values"], width
        )
        for key, width in data["widths"].items()
    }
    errors = {name.removeprefix("error/"): value for name, value in tensors.items() if name.startswith("error/")}
    dense = {name: tensors[name] for name in _DENSE}
    return Chunk(codes=codes, errors=errors, batches=data["batches"], **dense), data
