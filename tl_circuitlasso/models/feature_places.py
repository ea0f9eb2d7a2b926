"""Where hooks stand in a layer, as far as it is known what stands between two of them.

A *place* is the layer and one of

    stream     the residual stream, in front of attention (stage 0) or in front of the MLP (stage 1)
    normed     the same behind the norm of whoever reads it there
    z, attn    the heads' outputs; what they write to the stream together
    post, mlp  the MLP's neurons; what they write to the stream

The stream behind a layer is the one in front of the next. Whatever writes to the stream is, as a parent, part of it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter

Kind = Literal["stream", "normed", "z", "attn", "post", "mlp"]
_PLACES: dict[str, tuple[Kind, int]] = {
    "hook_resid_pre": ("stream", 0), "hook_resid_mid": ("stream", 1), "hook_resid_post": ("stream", 2),
    "hook_mlp_in": ("stream", 1), "ln1.hook_normalized": ("normed", 0), "ln2.hook_normalized": ("normed", 1),
    "attn.hook_z": ("z", 0), "hook_attn_out": ("attn", 0), "mlp.hook_post": ("post", 1), "hook_mlp_out": ("mlp", 1),
}  # fmt: skip
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\Z")
_EMBEDDINGS = ("hook_embed", "hook_pos_embed")


@dataclass(frozen=True)
class Place:
    """A hook's layer, what stands there, and for the stream in front of whom: attention (0) or the MLP (1)."""

    layer: int
    kind: Kind
    stage: int

    @property
    def step(self) -> int:
        """How many attentions and MLPs come before it."""
        return 2 * self.layer + self.stage


@dataclass(frozen=True)
class Step:
    """An attention or an MLP that what a parent writes passes on its way."""

    layer: int
    kind: Literal["attn", "mlp"]


def place_of(hook: str) -> Place:
    """The place of a hook.

    Raises
    ------
    ModelError: it isn't known what stands there.

    >>> place_of("blocks.2.hook_resid_post"), place_of("blocks.2.ln2.hook_normalized").step
    (Place(layer=3, kind='stream', stage=0), 5)
    """
    if hook in _EMBEDDINGS:
        return Place(0, "stream", 0)
    found = _BLOCK.match(hook)
    if found is None or found[2] not in _PLACES:
        raise ModelError(f"what {hook} reads or writes isn't known")
    kind, stage = _PLACES[found[2]]
    return Place(int(found[1]) + stage // 2, kind, stage % 2)


def written_place(hook: str) -> Place:
    """The place from which what is written at a hook goes on: neurons and heads stay what they are.

    Raises
    ------
    ModelError: it isn't known where that goes.
    """
    place = place_of(hook)
    if place.kind == "normed" or hook.endswith("hook_mlp_in"):
        raise ModelError(f"what is written at {hook} is read there and nowhere else")
    if place.kind in ("attn", "mlp"):
        return Place(place.layer + place.stage, "stream", 1 - place.stage)
    return place


def steps_between(adapter: Adapter, written: str, read: str) -> tuple[Step, ...]:
    """Attentions and MLPs between what is written at one hook and what is read at a later one, the last included
    where the hook shows what it writes. In parallel layers the MLP doesn't read what attention beside it writes.

    Raises
    ------
    ModelError: the places aren't known, or nothing leads from the one to the other.
    """
    start, end = written_place(written), place_of(read)
    if start.layer == end.layer and (start.kind, end.kind) in (("z", "attn"), ("post", "mlp")):
        return ()
    first = start.step + (start.kind in ("z", "post"))
    shape, writes = adapter.shape, end.kind in ("z", "attn", "post", "mlp")
    last = end.step + 1 if writes else end.step - (shape.parallel and end.stage == 1)
    steps = [step for step in _steps(first, last) if step.kind == "attn" or not shape.attn_only]
    if shape.parallel:
        beside = {Step(first // 2, "mlp")} if first % 2 else set()
        beside |= {Step(end.layer, "attn")} if writes and end.stage == 1 else set()
        steps = [step for step in steps if step not in beside]
    if first > last or (end.kind not in ("stream", "normed") and not steps):
        raise ModelError(f"nothing leads from {written} to {read}")
    return tuple(steps)


def _steps(first: int, last: int) -> Iterator[Step]:
    return (Step(number // 2, "mlp" if number % 2 else "attn") for number in range(first, last))
