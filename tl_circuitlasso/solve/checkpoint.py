"""Long solves that go on where they were killed: finished targets are stored, and never solved again.

A checkpoint is a folder with one file per part, a part being about a thousand targets. What identifies a problem is a
fingerprint of all its numbers, and a file of another problem is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.solve.base import Answer

PART = 1024  # targets that are solved, and stored, together


@dataclass(frozen=True)
class Parts:
    """The parts of one solve, each stored when it is finished."""

    kept: Checkpoint

    @classmethod
    def of(cls, folder: Path, *problem: Any) -> "Parts":
        """The parts in `folder` of the problem that these matrices and options pose."""
        return cls(Checkpoint(folder, "solve", "problem", {"key": fingerprint(*problem)}))

    def answer(
        self,
        solve: Callable[[Int[Tensor, " _some"]], Answer],
        parts: list[Int[Tensor, " _some"]],
        device: torch.device | str = "cpu",
    ) -> Answer:
        """All targets' answers: parts that are stored are read, the others solved by `solve(targets)` and stored."""
        found = [self._stored(number) or self._solved(number, solve(part)) for number, part in enumerate(parts)]
        order = torch.cat(parts).argsort().to(device)
        return Answer(
            torch.cat([one.value.to(device) for one in found], dim=1)[:, order],
            torch.cat([one.gap.to(device) for one in found])[order],
            torch.cat([one.iterations.to(device) for one in found])[order],
            any(one.stalled for one in found),
        )

    def _solved(self, number: int, answer: Answer) -> Answer:
        entries = answer.value.nonzero()
        tensors = {"gap": answer.gap, "iterations": answer.iterations}
        tensors |= {"entries": entries, "values": answer.value[entries[:, 0], entries[:, 1]]}
        self.kept.write(_name(number), tensors, {"shape": list(answer.value.shape), "stalled": answer.stalled})
        return answer

    def _stored(self, number: int) -> Answer | None:
        found = self.kept.read(_name(number))
        if found is None:
            return None
        tensors, data = found
        value = torch.zeros(data["shape"], dtype=tensors["values"].dtype)
        value[tensors["entries"][:, 0], tensors["entries"][:, 1]] = tensors["values"]
        return Answer(value, tensors["gap"], tensors["iterations"], data["stalled"])


def _name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def parts_of(targets: int, coupled: Int[Tensor, " target"] | None) -> list[Int[Tensor, " _some"]]:
    """Targets in parts of about `PART`; coupled targets stay together.

    >>> [len(part) for part in parts_of(2500, None)]
    [1024, 1024, 452]
    """
    problems = torch.arange(targets) if coupled is None else coupled.cpu()
    _, member, size = problems.unique(return_inverse=True, return_counts=True)
    part = ((size.cumsum(0) - size) // PART)[member]
    return [(part == number).nonzero()[:, 0] for number in part.unique().tolist() or [0]]


def fingerprint(*parts: Any) -> str:
    """A hash of matrices, penalties and options: of every number in them, not of how they are printed."""
    digest = sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: Any, part: Any) -> None:
    digest.update(type(part).__name__.encode())
    if isinstance(part, Tensor):
        digest.update(repr((part.dtype, tuple(part.shape))).encode())
        flat = part.detach().cpu().contiguous().reshape(-1)
        flat = flat.as_strided(flat.shape, (1,), flat.storage_offset())  # one number, expanded, has a stride of 0
        digest.update(flat.view(torch.uint8).numpy().data)
    elif is_dataclass(part):
        for entry in fields(part):
            _feed(digest, getattr(part, entry.name))
    elif isinstance(part, Mapping):
        for name in sorted(part):
            digest.update(str(name).encode())
            _feed(digest, part[name])
    elif isinstance(part, list | tuple):
        for entry in part:
            _feed(digest, entry)
    else:
        digest.update(repr(part).encode())
