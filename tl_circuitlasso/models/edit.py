"""Features set, scaled or shifted while a model runs, and what that makes of others: one edit in, two readings out.

    from tl_circuitlasso.models import Edit, edit

    found = edit(model, saes, tokens, [Edit("blocks.1.hook_resid_post#7", value=0.0)], ["blocks.3.hook_resid_post#12"])
    found.after["blocks.3.hook_resid_post#12"] - found.before["blocks.3.hook_resid_post#12"]

At an edited hook with activation x and codes f the model goes on with x + d(f') - d(f): what the SAE misses stays. An
edit further down meets what earlier ones have made of its codes. With `freeze_attention` heads keep the patterns of the
run without edits, so that values, norms and MLPs alone pass on what was changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hooks import Observer
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Prompts

How = Literal["set", "scale", "add"]
LOGITS = "logits"


@dataclass(frozen=True, eq=False)
class Edit:
    """One feature's code: set to `value`, multiplied by it, or raised by it (`how`), never below zero.

    feature: "<hook>#<number>", whether a graph keeps it or not. value: a number, or one for each position, (pos) or
    (batch, pos). positions: a bool mask, (pos) or (batch, pos), of where; None: at every real position, BOS included.

    Raises
    ------
    InputError: a name without "#", an unknown `how`, values that aren't finite, or a mask that isn't bool.
    """

    feature: str
    value: float | Tensor = 0.0
    how: How = "set"
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        hook, mark, number = self.feature.rpartition("#") if isinstance(self.feature, str) else ("", "", "")
        if not (hook and mark and number.isdigit()):
            raise InputError(f"`feature` is {self.feature!r}: write '<hook>#<number>'")
        if self.how not in ("set", "scale", "add"):
            raise InputError(f"`how` is {self.how!r}: write 'set', 'scale' or 'add'")
        if not bool(torch.as_tensor(self.value, dtype=torch.float32).isfinite().all()):
            raise InputError(f"`value` of {self.feature} is NaN or infinite: give finite numbers")
        if self.positions is not None and self.positions.dtype != torch.bool:
            raise InputError(f"`positions` of {self.feature} is {self.positions.dtype}: give a bool mask")

    @property
    def hook(self) -> str:
        """The hook whose SAE the feature is of."""
        return self.feature.rpartition("#")[0]

    @property
    def number(self) -> int:
        """The feature's number there."""
        return int(self.feature.rpartition("#")[2])


@dataclass(frozen=True, eq=False)
class Edited:
    """What was read with and without the edits, by name, one row a prompt: codes (batch, pos) of features "<hook>#<i>",
    activations (batch, pos, ...) of hooks, and "logits" (batch, pos, vocab)."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def change(self, name: str) -> Tensor:
        """after - before of one reading."""
        return self.after[name] - self.before[name]


def edit(
    model: Any,
    saes: SAEFeatures | Mapping[str, Any],
    tokens: Any,
    edits: Sequence[Edit],
    read: Sequence[str] = (LOGITS,),
    *,
    attention_mask: Tensor | None = None,
    freeze_attention: bool = False,
    batch_size: int = 32,
) -> Edited:
    """Run prompts with features edited, and read other features, activations and logits. Two forward passes.

    Parameters
    ----------
    saes: {hook: SAE} of all features that are edited or read. read: "<hook>#<number>", hook names, or "logits". A hook
        that is edited is read as it flows on. freeze_attention: whether heads keep the patterns of the unedited run.

    Raises
    ------
    InputError: nothing to edit or read, a hook without an SAE or that the model doesn't have, a feature that isn't
        there, masks or values of another shape, or batches of different lengths.
    """
    adapter = adapt(model)
    encoders = SAEFeatures.of(saes).encoders()
    _check(adapter, encoders, edits, read)
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    lengths: set[int] = set()
    for batch in Prompts(adapter, tokens, attention_mask=attention_mask, batch_size=batch_size):
        rows = slice(batch.start, batch.start + len(batch.tokens))
        lengths.add(batch.tokens.shape[1])
        if len(lengths) > 1:
            raise InputError("`tokens` has batches of different lengths: pad them all to one length")
        plain = _Run(adapter, encoders, batch.tokens, batch.mask, read)
        before, patterns = plain.run([], rows, {}, keeps_patterns=freeze_attention)
        parts.append((before, plain.run(edits, rows, patterns)[0]))
    joined = [{name: torch.cat([part[end][name] for part in parts]) for name in read} for end in (0, 1)]
    return Edited(*joined)


def _check(adapter: Adapter, encoders: Mapping[str, Encoder], edits: Sequence[Edit], read: Sequence[str]) -> None:
    if isinstance(read, str):
        raise InputError(f"`read` is one string; put it in a list: [{read!r}]")
    for name, given in (("edits", edits), ("read", read)):
        if not len(given):
            raise InputError(f"`{name}` is empty: give at least one")
    for feature in [*(one.feature for one in edits), *(name for name in read if "#" in name)]:
        hook, _, number = feature.rpartition("#")
        if hook not in encoders:
            raise InputError(f"`saes` has no SAE for {feature}: there are {', '.join(encoders)}")
        if not number.isdigit() or int(number) >= encoders[hook].features:
            raise InputError(f"{feature} isn't there: the SAE at {hook} has {encoders[hook].features} features")
    hooks = {name.rpartition("#")[0] or name for name in read if name != LOGITS} | {one.hook for one in edits}
    if missing := sorted(hook for hook in hooks if adapter.point(hook) is None):
        raise InputError(f"the model doesn't have the hook {missing[0]!r}")


@dataclass(frozen=True, eq=False)
class _Run:
    """One batch of prompts and what is read of it."""

    adapter: Adapter
    encoders: Mapping[str, Encoder]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    read: Sequence[str]

    def run(
        self, edits: Sequence[Edit], rows: slice, patterns: Mapping[str, Tensor], *, keeps_patterns: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is read with these edits, and the patterns if they are to be kept for another run."""
        hooks = dict.fromkeys(name.rpartition("#")[0] or name for name in self.read)
        keys = [act("pattern", layer) for layer in range(self.adapter.shape.n_layers if keeps_patterns else 0)]
        changes = [*self._changes(edits, rows), *((key, self._instead(was)) for key, was in patterns.items())]
        acts = self.adapter.run(self.tokens, self.mask, [*hooks, *keys], edits=changes)
        return {name: self._reading(name, acts) for name in self.read}, {key: acts[key] for key in keys}

    def _changes(self, edits: Sequence[Edit], rows: slice) -> Iterator[tuple[str, Observer]]:
        """What transcoders read is noted in front of all edits of their hook."""
        heard: dict[str, Tensor] = {}
        for hook in dict.fromkeys(one.hook for one in edits):
            encoder, some = self.encoders[hook], [one for one in edits if one.hook == hook]
            if encoder.is_transcoder:
                yield hook, partial(heard.__setitem__, hook)
            yield encoder.hook_out, self._editor(encoder, some, rows, heard)

    def _instead(self, pattern: Tensor) -> Observer:
        return lambda activation: pattern.to(activation.dtype)

    def _editor(self, encoder: Encoder, edits: Sequence[Edit], rows: slice, heard: Mapping[str, Tensor]) -> Observer:
        def change(activation: Tensor) -> Tensor:
            read = heard[encoder.hook] if encoder.is_transcoder else activation
            x, flat = (one.to(self.adapter.compute_dtype).flatten(0, 1) for one in (read, activation))
            plain, edited = encoder.edited(x, lambda codes: self._changed(codes, edits, rows))
            out = flat + (edited - plain).view(flat.shape).to(flat)
            return out.to(activation.dtype).view(activation.shape)

        return change

    def _changed(self, codes: Tensor, edits: Sequence[Edit], rows: slice) -> Tensor:
        codes = codes.clone()
        for one in edits:
            now = codes[:, one.number].view(self.mask.shape)
            value = self._aligned(torch.as_tensor(one.value), rows, one.feature).to(now)
            new = {"set": value, "scale": now * value, "add": now + value}[one.how].clamp(min=0)
            where = self.mask if one.positions is None else self._aligned(one.positions, rows, one.feature) & self.mask
            codes[:, one.number] = torch.where(where.to(now.device), new, now).flatten()
        return codes

    def _aligned(self, given: Tensor, rows: slice, feature: str) -> Tensor:
        """A number, or one for each position, for this batch's prompts."""
        some = given[rows] if given.ndim == 2 and len(given) > 1 else given
        try:
            return some.to(self.mask.device).broadcast_to(self.mask.shape)
        except RuntimeError as error:
            shape = tuple(given.shape)
            raise InputError(
                f"`edits`: {feature} has values or positions of shape {shape}: give (batch, pos)"
            ) from error

    def _reading(self, name: str, acts: Mapping[str, Tensor]) -> Tensor:
        hook, mark, number = name.rpartition("#")
        if not mark:
            return acts[name]
        return self.encoders[hook].encode(acts[hook].flatten(0, 1))[:, int(number)].view(self.mask.shape)
