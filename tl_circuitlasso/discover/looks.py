"""Batches of a second look that are measured once: a run that was killed among them goes on behind the last."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.models.reread import Costs, Reading
from tl_circuitlasso.solve.checkpoint import fingerprint


@dataclass(frozen=True)
class Looks:
    """Where a process keeps what it measured, in a folder beside the `checkpoint` file of its collection, and of whom.

    identity: the model and the data; what is asked of a batch is told with it.
    """

    folder: Path
    identity: Mapping[str, Any]

    @classmethod
    def beside(cls, checkpoint: Path, identity: Mapping[str, Any]) -> "Looks":
        """Those of a run whose statistics are in `checkpoint`.

        >>> Looks.beside(Path("run.safetensors"), {}).folder.name
        'run-second-look'
        """
        return cls(checkpoint.with_name(f"{checkpoint.stem}-second-look"), identity)

    def known(self, numbers: Iterable[int], reading: Reading, *asked: Any) -> dict[int, Costs]:
        """By batch, what was said of a reading where this very thing was asked before; all else is made again."""
        kept = self._kept(reading, asked)
        found = {number: kept.read(_name(number), remade=True) for number in numbers}
        return {number: Costs.of(reading, *one) for number, one in found.items() if one is not None}

    def store(self, number: int, costs: Costs, reading: Reading, *asked: Any) -> None:
        """Write what batch `number` said."""
        tensors, data = costs.stored(reading)
        self._kept(reading, asked).write(_name(number), tensors, data)

    def _kept(self, reading: Reading, asked: tuple[Any, ...]) -> Checkpoint:
        name = "round-" + fingerprint(reading)[:12]  # every round asks of other edges
        identity = {**self.identity, "asked": fingerprint(reading, asked)}
        return Checkpoint(self.folder / name, "second look", "second look", identity)


def _name(number: int) -> str:
    return f"batch-{number:05d}.safetensors"
