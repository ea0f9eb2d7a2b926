"""Exact patching of neurons: some do what they do in the partner prompt, all else runs on from there.

Many patches in a layer share a forward pass, each in a copy of the prompts; layers in front of theirs aren't run again:
their blocks answer with what they put out in the plain run.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act


@dataclass(frozen=True, eq=False)
class Plain:
    """A run without edits: the logits, what every block put out, and the neurons in the partners' run."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    logits: Float[Tensor, "prompt pos vocab"]
    blocks: tuple[Any, ...]  # a tensor, or a tuple that begins with it
    other: Mapping[str, Tensor]


def plain_run(
    adapter: Adapter,
    tokens: Int[Tensor, "prompt pos"],
    partners: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    layers: Collection[int],
) -> Plain:
    """What patching neurons of some layers starts from. Two forward passes."""
    other = adapter.run(partners, mask, [act("mlp_post", layer) for layer in layers])
    heard: dict[int, Any] = {}
    edits = [(act("block", layer), partial(heard.__setitem__, layer)) for layer in range(adapter.shape.n_layers)]
    logits = adapter.run(tokens, mask, ["logits"], edits=edits)["logits"]
    blocks = tuple(heard[layer] for layer in range(adapter.shape.n_layers))
    return Plain(tokens, adapter.sound_mask(tokens, mask), logits, blocks, other)


def patched_neurons(
    adapter: Adapter, plain: Plain, layer: int, which: Bool[Tensor, "copy #pos neuron"], step: float = 1.0
) -> Float[Tensor, "copy prompt pos vocab"]:
    """The logits where the neurons of the layer that `which` marks do what they do in the partners, by copy.

    step: so far they go there from what they do themselves.
    """
    copies, prompts = len(which), len(plain.tokens)
    swapped = plain.mask[None, :, :, None] & which[:, None].to(plain.mask.device)
    other = plain.other[act("mlp_post", layer)]

    def swap(post: Tensor) -> Tensor:
        own = post.reshape(swapped.shape)
        return torch.where(swapped, torch.lerp(own, other.to(post).expand_as(own), step), own).view_as(post)

    many, real = plain.tokens.repeat(copies, 1), plain.mask.repeat(copies, 1)
    with _replayed(adapter, plain, layer, copies):
        logits = adapter.run(many, real, ["logits"], edits=[(act("mlp_post", layer), swap)])["logits"]
    return logits.unflatten(0, (copies, prompts))


@contextmanager
def _replayed(adapter: Adapter, plain: Plain, layer: int, copies: int) -> Iterator[None]:
    """The blocks in front of `layer` answer with what they put out in the plain run."""
    blocks = list(adapter.model.blocks)[:layer]
    before = [{name: block.__dict__[name] for name in ("forward",) if name in block.__dict__} for block in blocks]
    try:
        for block, out in zip(blocks, plain.blocks):
            block.__dict__["forward"] = _answer(out, copies)  # by setattr a bridge would pass it on to what it wraps
        yield
    finally:
        for block, own in zip(blocks, before):
            block.__dict__.pop("forward", None)
            block.__dict__.update(own)


def _answer(out: Any, copies: int) -> Any:
    def repeated(part: Any) -> Any:
        return part.repeat(copies, *[1] * (part.ndim - 1)) if isinstance(part, Tensor) else part

    made = tuple(map(repeated, out)) if isinstance(out, tuple) else repeated(out)
    return lambda *args, **kwargs: made
