"""What one SAE feature does to the features of a later hook: by editing it, and by its gradient.

A *trial* is one source feature on one prompt. At the positions where the feature fires, its contribution
c = decode(z) - decode(z without the feature) is taken out of the activation (ablate), added once more (amplify), or
used as the direction of a derivative (gradient); then the model runs on from there, and the target hook is encoded
again. Trials of many features share a forward pass, and where the source hook is a residual stream of a
HookedTransformer, only the layers between the two hooks run.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad

from tl_circuitlasso._checks import as_seed, whole_number
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hooks import Place, observe, resting
from tl_circuitlasso.models.run_on import run_on
from tl_circuitlasso.models.tokens import Prompts

Mode = Literal["ablate", "amplify", "gradient"]
Reading = Literal["firing", "elsewhere", "all"]
ENCODE_CHUNK = 4096  # positions encoded at once


@dataclass(frozen=True, eq=False)
class Trials:
    """Some trials, one row each, and what they did to the targets that were asked for.

    Attributes
    ----------
    source: the row's source feature, as a position in the list of sources. prompt: the row's prompt.
    mass: sum of the source's code z over the positions where it fires.
    code, pre: sum over positions of the change of the target's code, and of its pre-activation, signed as if the source
        had been turned up: z's share of it for "ablate", the change at twice z for "amplify", z times the derivative
        for "gradient". `pre` is None where the SAE doesn't show pre-activations.
    """

    source: Int[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    mass: Float[Tensor, " row"]
    code: Float[Tensor, "row target"]
    pre: Float[Tensor, "row target"] | None


@dataclass(frozen=True, eq=False)
class Recording:
    """What hooks hold on some prompts of a model, and the positions that count as samples."""

    adapter: Adapter
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    acts: dict[str, Tensor]


@dataclass(frozen=True)
class Trying:
    """How features are tried out.

    Attributes
    ----------
    prompts: the most prompts, drawn at random by `seed`, of those on which a source fires.
    batch_size: trials that share a forward pass.
    modes: what is done to a source.
    read: the samples of a prompt at which the targets are read: where the source fires, all others, or all.
    """

    prompts: int = 32
    batch_size: int = 64
    seed: int = 0
    modes: tuple[Mode, ...] = ("ablate",)
    read: Reading = "firing"

    def __post_init__(self) -> None:
        whole_number("prompts", self.prompts)
        whole_number("batch_size", self.batch_size)
        as_seed(self.seed)


def record(adapter: Adapter, prompts: Prompts, hooks: Sequence[str]) -> Recording:
    """Run the prompts once and hold the activations of `hooks`.

    Raises
    ------
    InputError: batches of different lengths.
    """
    batches, parts = [], []
    for batch in prompts:
        batches.append(batch)
        parts.append(adapter.run(batch.tokens, batch.mask, hooks))
    if len({batch.tokens.shape[1] for batch in batches}) > 1:
        raise InputError("`tokens` has batches of different lengths: pad them all to one length")
    tokens, mask, keep = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "mask", "keep"))
    return Recording(adapter, tokens, mask, keep, {hook: torch.cat([part[hook] for part in parts]) for hook in hooks})


def encode(
    encoder: Encoder, x: Float[Tensor, "sample *width"]
) -> tuple[Float[Tensor, "sample feature"], Tensor | None]:
    """An SAE's codes and, where it is SAELens', the pre-activations in front of its activation function."""
    heard: list[Tensor] = []
    point = getattr(encoder.sae, "hook_sae_acts_pre", None)
    listening = observe([(Place(point), heard.append)]) if isinstance(point, nn.Module) else nullcontext()
    with listening:
        codes = encoder.encode(x)
    return codes, heard[0] if heard else None


def contribution(
    encoder: Encoder, x: Float[Tensor, "sample *width"], feature: Int[Tensor, " sample"]
) -> Float[Tensor, "sample out"]:
    """decode(z) - decode(z with one feature at zero), for one feature per sample.

    Encoding goes first each time: SAEs that normalise their input decode with the statistics of the last encoding.
    """
    sae, ready = encoder.sae, encoder.ready(x)
    rows = torch.arange(len(x), device=ready.device)
    codes = sae.encode(ready)
    whole = encoder.decoded(codes)
    less = sae.encode(ready).index_put((rows, feature.to(ready.device)), codes.new_zeros(()))
    return (whole - encoder.decoded(less)).to(x)


class Segment:
    """The part of a model between two hooks, to be run on from an edited activation."""

    def __init__(self, adapter: Adapter, source: str, target: str) -> None:
        self.adapter, self.source, self.target = adapter, source, target
        for hook in (source, target):
            if adapter.point(hook) is None:
                raise InputError(f"`saes` has the hook {hook!r}, which this model doesn't have")

    def run(
        self, tokens: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"], activation: Float[Tensor, "row pos *width"]
    ) -> Float[Tensor, "row pos *width2"]:
        """The target hook's activation after `activation` has taken the place of the source hook's."""
        return run_on(self.adapter, tokens, mask, {self.source: activation}, [self.target])[self.target]


def trials(
    recording: Recording,
    ends: tuple[Encoder, Encoder],
    sources: Int[Tensor, " source"],
    targets: Int[Tensor, " target"] | None = None,
    how: Trying = Trying(),
) -> Iterator[dict[Mode, Trials]]:
    """Edit every source feature on some prompts on which it fires, and read the targets.

    ends: the SAEs of source and target. sources, targets: feature numbers (targets None: all of them).
    Yields the trials of one forward pass, per mode, in order of sources.
    """
    first, last = ends
    segment = Segment(recording.adapter, first.hook_out, last.hook)
    acts, written = recording.acts[first.hook], recording.acts[first.hook_out]
    with resting(recording.adapter.model):
        codes = _codes(first, acts, recording.keep, sources)
        rows = _choose(codes, how.prompts, how.seed)
        for some in rows.split(how.batch_size) if len(rows) else ():
            source, prompt = some.unbind(1)
            fired = codes[prompt, :, source]
            delta = _delta(first, acts[prompt], written[prompt], fired, sources[source])
            at = _positions(how.read, fired > 0, recording.keep[prompt])
            run = _Run(segment, recording.tokens[prompt], recording.mask[prompt], written[prompt], delta, at)
            base = None if set(how.modes) == {"gradient"} else run.encoded(last, targets, 0.0)
            found: dict[Mode, Any] = {mode: run.change(mode, base, last, targets) for mode in how.modes}
            mass = fired.sum(1).double()
            yield {mode: Trials(source, prompt, mass, *change) for mode, change in found.items()}


def _positions(read: Reading, fires: Bool[Tensor, "row pos"], keep: Bool[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
    return {"firing": fires, "elsewhere": keep & ~fires, "all": keep}[read]


@dataclass(frozen=True, eq=False)
class _Run:
    """One batch of trials: where it starts, what it edits, where it reads."""

    segment: Segment
    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    start: Float[Tensor, "row pos *width"]
    delta: Float[Tensor, "row pos *width"]
    read: Bool[Tensor, "row pos"]

    def change(
        self, mode: Mode, base: tuple[Tensor, Tensor | None] | None, encoder: Encoder, targets: Tensor | None
    ) -> Any:
        if mode == "gradient":
            return self._derivative(encoder, targets)
        assert base is not None
        sign = -1.0 if mode == "ablate" else 1.0
        edited = self.encoded(encoder, targets, sign)
        return tuple(None if e is None or b is None else sign * (e - b) for e, b in zip(edited, base))

    def encoded(self, encoder: Encoder, targets: Tensor | None, factor: float) -> tuple[Tensor, Tensor | None]:
        """Sums over the read positions of the targets' codes and pre-activations, at start + factor * delta."""
        return self._sums(self.segment.run(self.tokens, self.mask, self.start + factor * self.delta), encoder, targets)

    def _derivative(self, encoder: Encoder, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with forward_ad.dual_level():
            try:
                end = self.segment.run(self.tokens, self.mask, forward_ad.make_dual(self.start, self.delta))
                sums = self._sums(end, encoder, targets)
            except NotImplementedError as error:
                raise ModelError(f"this model or SAE has an operation without a forward derivative: {error}") from error
            return tuple(None if s is None else _tangent(s) for s in sums)  # type: ignore[return-value]

    def _sums(self, end: Tensor, encoder: Encoder, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        row = self.read.nonzero()[:, 0]
        parts = [_encode_some(encoder, x, targets) for x in end[self.read].split(ENCODE_CHUNK)]
        codes, pre = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
        assert codes is not None
        return _by_row(codes, row, len(end)), None if pre is None else _by_row(pre, row, len(end))


def _encode_some(encoder: Encoder, x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    codes, pre = encode(encoder, x)
    if targets is None:
        return codes, pre
    return codes[:, targets], None if pre is None else pre[:, targets]


def _by_row(values: Float[Tensor, "sample target"], row: Int[Tensor, " sample"], rows: int) -> Tensor:
    return torch.zeros(rows, values.shape[1], dtype=torch.float64, device=values.device).index_add(
        0, row, values.double()
    )


def _tangent(values: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(values).tangent
    return torch.zeros_like(values) if tangent is None else tangent


def _codes(
    encoder: Encoder,
    acts: Float[Tensor, "batch pos *width"],
    keep: Bool[Tensor, "batch pos"],
    sources: Int[Tensor, " source"],
) -> Float[Tensor, "batch pos source"]:
    """The sources' codes at the samples, zero elsewhere."""
    codes = torch.zeros(*keep.shape, len(sources), device=acts.device)
    parts = [encoder.encode(x)[:, sources] for x in acts[keep].split(ENCODE_CHUNK)]
    codes[keep] = torch.cat(parts).to(codes).clamp(min=0)
    return codes


def _choose(codes: Float[Tensor, "batch pos source"], prompts: int, seed: int) -> Int[Tensor, "row 2"]:
    """(source, prompt) for up to `prompts` prompts, drawn at random, on which each source fires."""
    fires = (codes > 0).any(1).T.cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.where(fires, torch.rand(fires.shape, generator=generator), 2.0)
    taken = order.argsort(1)[:, :prompts]
    return torch.stack([torch.arange(len(fires))[:, None].expand_as(taken), taken], -1)[fires.gather(1, taken)]


def _delta(
    encoder: Encoder, acts: Tensor, written: Tensor, fired: Float[Tensor, "row pos"], feature: Int[Tensor, " row"]
) -> Tensor:
    """The feature's contribution at the positions where it fires, zero elsewhere."""
    where = fired > 0
    features = feature[:, None].expand_as(fired)[where]
    chunks = zip(acts[where].split(ENCODE_CHUNK), features.split(ENCODE_CHUNK))
    delta = torch.zeros_like(written)
    parts = [contribution(encoder, x, chosen) for x, chosen in chunks if len(x)]
    if not parts:
        return delta
    return delta.index_put((where,), torch.cat(parts).to(delta).view(-1, *written.shape[2:]))
