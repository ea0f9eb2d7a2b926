"""Prompt pairs for the methods that compare clean with corrupted runs: checked once, walked in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, adapt

Prompts = Tensor | Sequence[str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts: tokens, the mask of real positions, and `rows`, their numbers in the data set (on the CPU)."""

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """A model with checked prompt pairs."""

    adapter: Adapter
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    batch_size: int

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.arange(len(self)).split(self.batch_size):
            clean, corrupted, mask = (
                part[rows].to(self.adapter.device) for part in (self.clean, self.corrupted, self.mask)
            )
            yield Batch(clean, corrupted, mask, rows)


def pairs(
    model: Any,
    clean: Prompts,
    corrupted: Prompts | None,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
) -> Pairs:
    """Check the prompts and pair them; `corrupted=None` stands for the clean prompts.

    Raises
    ------
    InputError: no prompts, tokens that aren't integers or outside the vocabulary, pairs or a mask of another shape.
    """
    adapter = model if isinstance(model, Adapter) else adapt(model)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size!r}: it must be a whole number of prompts, 1 or more")
    clean_tokens, clean_mask = _tokens(adapter, clean, "clean")
    other = clean if corrupted is None else corrupted
    other_tokens, other_mask = _tokens(adapter, other, "corrupted")
    if clean_tokens.shape != other_tokens.shape or not torch.equal(clean_mask, other_mask):
        raise InputError(
            f"`corrupted` has shape {tuple(other_tokens.shape)} and `clean` {tuple(clean_tokens.shape)}: both prompts "
            "of a pair must have the same length"
        )
    return Pairs(adapter, clean_tokens, other_tokens, _mask(attention_mask, clean_mask), batch_size)


def _tokens(adapter: Adapter, prompts: Prompts, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(prompts, Tensor):
        if not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"`{name}` must be a tensor of token ids (batch, pos) or a non-empty list of strings")
        tokens, mask = adapter.to_tokens(list(prompts))
        return tokens.cpu(), mask.cpu()
    if prompts.dtype.is_floating_point or prompts.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise InputError(f"`{name}` has dtype {prompts.dtype}: token ids are integers")
    if prompts.ndim != 2 or not prompts.numel():
        raise InputError(f"`{name}` has shape {tuple(prompts.shape)}: give at least one prompt as (batch, pos)")
    low, high = int(prompts.min()), int(prompts.max())
    if low < 0 or high >= adapter.shape.d_vocab:
        token = low if low < 0 else high
        raise InputError(f"`{name}` has token {token}: the vocabulary is 0 to {adapter.shape.d_vocab - 1}")
    return prompts.detach().long().cpu(), torch.ones(prompts.shape, dtype=torch.bool)


def _mask(given: Tensor | None, default: Tensor) -> Tensor:
    if given is None:
        return default
    if given.shape != default.shape:
        raise InputError(
            f"`attention_mask` has shape {tuple(given.shape)}, the tokens {tuple(default.shape)}: they must be equal"
        )
    mask = given.detach().bool().cpu()
    if not bool(mask.any(1).all()):
        raise InputError(f"`attention_mask` hides all of prompt {int((~mask.any(1)).nonzero()[0])}: drop empty prompts")
    return mask
