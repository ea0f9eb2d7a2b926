"""Work that goes on where it was killed: finished parts are files that say which work they belong to.

Every file is written under another name and renamed when it is whole, so a kill at any moment leaves whole files only.
In it stand its kind, the version of its form, and the identity of the work: the facts that must agree before it is used
again. What belongs to other work is refused, with the facts in which it differs.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import FormatError, StaleCheckpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The files of one piece of work.

    Attributes
    ----------
    folder: where they are; it is made with the first of them.
    kind: what they hold; work: what an error calls the whole ("problem", "collection").
    identity: plain data (`storage.plain`) that must agree; version: of the form of the files.
    """

    folder: Path
    kind: str
    work: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1

    def write(self, name: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any] | None = None) -> None:
        """Write a part, with plain `data` beside its tensors."""
        own = {"kind": self.kind, "version": self.version, "identity": dict(self.identity)}
        storage.write_tensors(self.folder / name, tensors, {**(data or {}), **own})

    def read(self, name: str, *, remade: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A part's tensors and data, or None where it isn't there yet.

        With `remade` a part of other work is passed over, to be written again: where the folder's other files stay
        good.

        Raises
        ------
        StaleCheckpoint: it belongs to other work. FormatError: it's no such file, or has the form of another version.
        """
        path = self.folder / name
        if not path.exists():
            return None
        tensors, data = storage.read_tensors(path, self.kind)
        try:
            self._check(path, data)
        except FormatError as error:
            if not remade:
                raise
            logger.info("made again: %s", error)
            return None
        return tensors, data

    def _check(self, path: Path, data: Mapping[str, Any]) -> None:
        if data.get("version", 1) != self.version:
            raise FormatError(
                f"`checkpoint` {path} has the form of another version of the library: delete it, or name another one"
            )
        check_identity(path, self.work, data.get("identity", data), self.identity)  # early files have no part for it


def check_identity(path: Path, work: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a StaleCheckpoint unless what a file says of its work agrees with all that is expected."""
    own = storage.plain(expected, "identity")
    differ = sorted(key for key, value in own.items() if found.get(key) != value)
    if differ:
        raise StaleCheckpoint(
            f"`checkpoint` {path} belongs to another {work} (it differs in {', '.join(differ)}): delete it, or name "
            "another one"
        )
