"""What of a circuit's regressions is finished: files of a checkpoint folder, from which a killed run goes on.

    pair-0003.safetensors             a pair's regression: then the others of the pair are gone
    effects-0003.safetensors          what its features do to each other, from when all pairs were replayed
    pair-0003-blocks/, replay/        blocks of its children; how far a replay has come
                                      (of several processes in rank-R-of-N, as each has its own)

A part belongs to one regression; where another is asked for it is passed over, and written again.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.features.samples import PairData
from tl_circuitlasso.features.shared import first_of
from tl_circuitlasso.models.feature_replay import GROUPS
from tl_circuitlasso.models.feature_setup import TARGET, own_folder
from tl_circuitlasso.models.feature_sums import Effects

VERSION = 5  # of the form of regressions
PARTS = ("source", "target", "effect", "error", "groups")  # of `Effects`


@dataclass(frozen=True)
class Kept:
    """The files of one pair, which of the process's own folder too; none without a folder.

    samples: what its samples are; rule: what decides the regression beside them.
    """

    folder: Path | None
    number: int
    samples: Mapping[str, Any]
    rule: Mapping[str, Any]
    ranks: Ranks

    @classmethod
    def of(
        cls, folder: Path | None, number: int, data: PairData, origin: str, rule: Mapping[str, Any], ranks: Ranks
    ) -> "Kept":
        """Those of a pair in a folder, `origin` being the hash of the data that were collected."""
        digest = hashlib.sha256()
        for part in (data.features, data.child_features):
            digest.update(part.numpy().tobytes())
        columns = [column.key for column in data.columns]
        pair = [data.parent, data.child or TARGET]
        samples = {"origin": origin, "pair": pair, "features": digest.hexdigest(), "columns": columns}
        plain = json.loads(json.dumps(dict(rule)))
        return cls(folder, number, samples, {"rule": plain, "held_out": data.held_out, "pooled": data.pooled}, ranks)

    # -- the regression --------------------------------------------------------------------------------------------

    def regression(self) -> Regressed | None:
        """The finished regression that process 0 finds, or None."""
        found = None if self.folder is None or self.ranks.rank else self._whole.read(self._name, remade=True)
        return first_of(None if found is None else Regressed.of(*found), self.ranks)

    def finish(self, done: Regressed) -> None:
        """Write the regression (process 0 does it), and take away what led to it."""
        if self.folder is None:
            return
        if self.ranks.rank == 0:
            self._whole.write(self._name, done.tensors(), done.plain())
            (self.folder / self._effects_name).unlink(missing_ok=True)
        shutil.rmtree(self._blocks_folder, ignore_errors=True)

    # -- effects ---------------------------------------------------------------------------------------------------

    def effects(self) -> Effects | None:
        """What process 0 finds of the features' effects, or None."""
        if self.folder is None:
            return None
        found = self._effects.read(self._effects_name, remade=True) if self.ranks.rank == 0 else None
        tensors, data = ({}, None) if found is None else found
        if self.ranks.size > 1:
            tensors, data = self.ranks.gather(tensors)[0], self.ranks.gather_data(data)[0]
        return None if data is None else _effects_of(tensors, data)

    def keep_effects(self, effects: Effects) -> None:
        """Write them (process 0 does it)."""
        if self.folder is not None and self.ranks.rank == 0:
            tensors, data = _stored_effects(effects)
            self._effects.write(self._effects_name, tensors, data)

    # -- blocks of children ----------------------------------------------------------------------------------------

    def block(self, number: int, children: Tensor) -> Regressed | None:
        """A block of this process's children that is solved, or None."""
        kept = self._blocks(children)
        found = None if kept is None else kept.read(_block_name(number), remade=True)
        return None if found is None else Regressed.of(*found)

    def keep_block(self, number: int, children: Tensor, done: Regressed) -> None:
        """Write a block."""
        kept = self._blocks(children)
        if kept is not None:
            kept.write(_block_name(number), done.tensors(), done.plain())

    # -- where they are --------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"pair-{self.number:04d}.safetensors"

    @property
    def _effects_name(self) -> str:
        return f"effects-{self.number:04d}.safetensors"

    @property
    def _home(self) -> Path:
        assert self.folder is not None
        return self.folder

    @property
    def _blocks_folder(self) -> Path:
        return (own_folder(self.folder, self.ranks) or self._home) / f"pair-{self.number:04d}-blocks"

    @property
    def _whole(self) -> Checkpoint:
        return Checkpoint(self._home, "feature pair", "regression", {**self.samples, **self.rule}, version=VERSION)

    @property
    def _effects(self) -> Checkpoint:
        return Checkpoint(self._home, "feature effects", "regression", {**self.samples, "groups": GROUPS})

    def _blocks(self, children: Tensor) -> Checkpoint | None:
        if self.folder is None:
            return None
        mine = hashlib.sha256(children.numpy().tobytes()).hexdigest()
        identity = {**self.samples, **self.rule, "children": mine}
        return Checkpoint(self._blocks_folder, "feature block", "regression", identity, version=VERSION)


def replay_kept(waiting: Iterable[Kept], ranks: Ranks) -> Checkpoint | None:
    """Where this process keeps how far the replay of some pairs has come; None without a folder."""
    pairs = [kept.samples for kept in waiting]
    first = next((kept.folder for kept in waiting), None)
    own = own_folder(first, ranks)
    if own is None:
        return None
    told = hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()
    return Checkpoint(own / "replay", "feature replay", "replay", {"pairs": told, "groups": GROUPS})


def _block_name(number: int) -> str:
    return f"block-{number:05d}.safetensors"


def _stored_effects(effects: Effects) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {name: getattr(effects, name) for name in PARTS}
    data: dict[str, Any] = {"copies": effects.copies, "children": effects.children, "together": None}
    if effects.together is not None:
        inner, data["together"] = _stored_effects(effects.together)
        tensors |= {f"together/{name}": tensor for name, tensor in inner.items()}
    return tensors, data


def _effects_of(tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Effects:
    plain = Effects(*(tensors[name] for name in PARTS), copies=data["copies"], children=data["children"])
    if data["together"] is None:
        return plain
    inner = {name.removeprefix("together/"): x for name, x in tensors.items() if name.startswith("together/")}
    return replace(plain, together=_effects_of(inner, data["together"]))
