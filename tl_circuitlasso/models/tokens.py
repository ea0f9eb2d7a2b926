"""Prompts: from whatever the user gives to batches of tokens, a mask of real tokens, and the positions to sample.

Which positions are samples (`positions`), always among the real tokens of a prompt:

- "all": every real token but the BOS token. BOS is the tokenizer's BOS id at a prompt's first real position. Without
  a tokenizer, a first token that is the same in every prompt and occurs nowhere else counts as BOS: in a causal model
  its activations are the same in every prompt, so no information is lost. (Of an iterable of batches, the first one
  decides.)
- "last": the last real token, under left or right padding.
- an int: the token at this index among the real tokens (0 is the first, BOS included; -1 the last).
- a slice: those of the real tokens, BOS included.
- a bool tensor of shape (pos,) or (batch, pos): its true places in `tokens`, pads left out.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.rotary import position_ids

Positions = str | int | slice | Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts: `mask` is True at real tokens, `keep` at the positions that are samples."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    start: int  # index of the first of these prompts among all prompts
    bos: int | None = None  # the token that tells nothing where it comes first

    @property
    def n_samples(self) -> int:
        """How many positions are samples."""
        return int(self.keep.sum())

    @property
    def words(self) -> Bool[Tensor, "batch pos"]:
        """The real tokens but BOS, samples or not."""
        return kept_positions(self.tokens, self.mask, "all", self.bos)


def first_prompts(batch: Batch, count: int) -> Batch:
    """The first `count` prompts of a batch."""
    return replace(batch, tokens=batch.tokens[:count], mask=batch.mask[:count], keep=batch.keep[:count])


class Prompts:
    """Checked prompts, to be read batch by batch: `for batch in Prompts(adapter, tokens): ...`.

    `tokens`: an int tensor (batch, pos), a list of strings, a mapping with "input_ids" and "attention_mask", or an
    iterable whose items are int tensors or pairs (tokens, mask). Tensors and lists can be read many times, an
    iterator once. `attention_mask` (batch, pos) is 1 at real tokens and goes with a tensor; without it all are real.

    Raises InputError: no prompts, an empty prompt, token ids that are no integers or outside the vocabulary, prompts
    longer than the model's context, a mask of another shape, and prompts without a single sample.
    """

    def __init__(
        self,
        adapter: Adapter,
        tokens: Any,
        *,
        attention_mask: Tensor | None = None,
        positions: Any = "all",
        batch_size: int = 32,
    ) -> None:
        _check_positions(positions)
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}; it must be at least 1")
        self._adapter, self._positions, self._batch_size = adapter, positions, batch_size
        self._whole, self._stream = _normalise(adapter, tokens, attention_mask)
        self._check_alignment()
        self._bos: int | None = None if self._whole is None else find_bos(adapter, *self._whole)
        self._digest = hashlib.sha256()
        self._finished = self._started = False

    @property
    def n_prompts(self) -> int | None:
        """The number of prompts; None for a stream, which doesn't know it beforehand."""
        return None if self._whole is None else len(self._whole[0])

    @property
    def width(self) -> int:
        """The number of positions, pads included; 0 for a stream."""
        return 0 if self._whole is None else self._whole[0].shape[1]

    def take(self, rows: Int[Tensor, " row"]) -> "Prompts":
        """Some of the prompts, where all are known beforehand; positions stay with their prompts.

        Raises
        ------
        InputError: the prompts are a stream.
        """
        if self._whole is None:
            raise InputError("`tokens` is a stream: prompts can't be picked from it")
        some = copy.copy(self)
        some._whole = (self._whole[0][rows], self._whole[1][rows])
        if isinstance(self._positions, Tensor) and self._positions.ndim == 2:
            some._positions = self._positions[rows.to(self._positions.device)]
        some._digest = hashlib.sha256()
        some._finished = some._started = False
        return some

    def draw(self, count: int | None, seed: int) -> Int[Tensor, " row"] | None:
        """The numbers of `count` prompts drawn at random, ascending; None where there are no more, or it's a stream."""
        if count is None or self.n_prompts is None or self.n_prompts <= count:
            return None
        return torch.randperm(self.n_prompts, generator=torch.Generator().manual_seed(seed))[:count].sort().values

    def whole(self) -> Batch:
        """All prompts as one batch on the CPU, where all are known beforehand; no column is left out.

        Raises
        ------
        InputError: the prompts are a stream.
        """
        if self._whole is None:
            raise InputError("`tokens` is a stream: its prompts are never held together")
        tokens, mask = (part.cpu() for part in self._whole)
        return Batch(tokens, mask, self._kept(tokens, mask, 0), 0, self._bos)

    def data_hash(self) -> str:
        """sha256 of the real tokens of every prompt, whatever the batches and the padding; known once all are read."""
        if not self._finished:
            raise InputError("the data hash is known only after all batches have been read")
        return self._digest.hexdigest()

    def hash_so_far(self) -> str:
        """The data hash of the batches that this pass has given out; tells whether a checkpoint saw the same."""
        return self._digest.hexdigest()

    @property
    def positions(self) -> Any:
        """Which positions are samples, as given."""
        return self._positions

    def __iter__(self) -> Iterator[Batch]:
        if self._started and isinstance(self._stream, Iterator):
            raise InputError("`tokens` is an iterator and has been read already; give a list or a tensor instead")
        self._started, self._finished = True, False
        self._digest = hashlib.sha256()
        samples = start = 0
        for tokens, mask in self._chunks():
            batch = self._batch(tokens, mask, start)
            _add_to(self._digest, tokens, mask)
            start += len(tokens)
            samples += batch.n_samples
            yield batch
        if start == 0:
            raise InputError("`tokens` has no prompts")
        if samples == 0:
            raise InputError(
                f"`positions` = {self._positions!r} leaves no sample in any prompt (all positions masked); choose "
                "others, or longer prompts"
            )
        self._finished = True

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, mask in self._pairs():
            for first in range(0, len(tokens), self._batch_size):
                part = slice(first, first + self._batch_size)
                yield tokens[part], mask[part]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._whole is not None:
            yield self._whole
            return
        for number, item in enumerate(self._stream):
            tokens, mask = checked_pair(self._adapter, *_split_item(item, number))
            if number == 0:
                self._bos = find_bos(self._adapter, tokens, mask)
            yield tokens, mask

    def _batch(self, tokens: Tensor, mask: Tensor, start: int) -> Batch:
        device, keep = self._adapter.device, self._kept(tokens, mask, start)
        used = mask.any(0).nonzero().flatten()
        window = slice(int(used[0]), int(used[-1]) + 1)  # columns of pads only cost time
        tokens, mask, keep = (part[:, window].to(device) for part in (tokens, mask, keep))
        return Batch(tokens, mask, keep, start, self._bos)

    def _kept(self, tokens: Tensor, mask: Tensor, start: int) -> Tensor:
        given = self._positions
        if not isinstance(given, Tensor):
            return kept_positions(tokens, mask, given, self._bos)
        chosen = given if given.ndim == 1 else given[start : start + len(tokens)]
        return chosen.to(mask.device).expand_as(mask) & mask

    def _check_alignment(self) -> None:
        given = self._positions
        if not isinstance(given, Tensor):
            return
        if self._whole is None:
            raise InputError("`positions` as a bool mask needs `tokens` as one tensor; use an int, a slice or 'last'")
        shape = tuple(self._whole[0].shape)
        if tuple(given.shape) not in (shape, shape[1:]):
            raise InputError(
                f"`positions` has shape {tuple(given.shape)}; it must be {shape} or {shape[1:]}, as tokens"
            )


def _check_positions(positions: Any) -> None:
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool:
            raise InputError(f"`positions` is a tensor of {positions.dtype}; as a tensor it must be a bool mask")
    elif isinstance(positions, bool) or not (isinstance(positions, int | slice) or positions in ("all", "last")):
        raise InputError(f"`positions` is {positions!r}; it must be 'all', 'last', an int, a slice or a bool mask")


def _normalise(
    adapter: Adapter, tokens: Any, attention_mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor] | None, Iterable[Any]]:
    """Either one checked pair (tokens, mask), or a stream of unchecked items."""
    if isinstance(tokens, str):
        raise InputError("`tokens` is one string; put it in a list")
    if isinstance(tokens, Tensor):
        return checked_pair(adapter, tokens, attention_mask), ()
    if attention_mask is not None:
        raise InputError("`attention_mask` goes with `tokens` as one tensor; in an iterable give pairs (tokens, mask)")
    if isinstance(tokens, Mapping):
        return checked_pair(adapter, *_split_item(tokens, 0)), ()
    if not isinstance(tokens, Iterable):
        raise InputError(f"`tokens` is a {type(tokens).__name__}; give an int tensor, a list of strings, or batches")
    if isinstance(tokens, list | tuple):
        if not tokens:
            raise InputError("`tokens` is empty; give at least one prompt")
        if all(isinstance(prompt, str) for prompt in tokens):
            return checked_pair(adapter, *_tokenise(adapter, list(tokens))), ()
    return None, tokens


def _tokenise(adapter: Adapter, prompts: list[str]) -> tuple[Tensor, Tensor]:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"`tokens`: prompt {index} is empty; leave it out")
    return adapter.to_tokens(prompts)


def _split_item(item: Any, number: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(item, Mapping) and isinstance(item.get("input_ids"), Tensor):
        return item["input_ids"], item.get("attention_mask")
    if isinstance(item, Tensor):
        return item, None
    if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, Tensor) for part in item):
        return item[0], item[1]
    raise InputError(
        f"`tokens`: item {number} is a {type(item).__name__}; each batch must be an int tensor (batch, pos) or a pair "
        "(tokens, mask), a list of prompts must hold strings only"
    )


def checked_pair(adapter: Adapter, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens as int64 and mask as bool; raises InputError for what can't be run."""
    tokens = _checked_tokens(adapter, tokens)
    if mask is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    if tuple(mask.shape) != tuple(tokens.shape):
        raise InputError(
            f"`attention_mask` has shape {tuple(mask.shape)}, tokens have {tuple(tokens.shape)}; they must be equal"
        )
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("`attention_mask` must hold 1 at real tokens and 0 at pads only")
    mask = mask.to(tokens.device).bool()
    empty = (~mask.any(1)).nonzero().flatten()
    if len(empty):
        raise InputError(f"`attention_mask`: all positions of prompt {int(empty[0])} are masked; leave the prompt out")
    return tokens, mask


def _checked_tokens(adapter: Adapter, tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(
            f"`tokens` are {tokens.dtype}; they must be integer token ids (a mask goes to `attention_mask`)"
        )
    if tokens.ndim != 2:
        raise InputError(f"`tokens` has {tokens.ndim} axes; it needs two, (batch, pos): one prompt is `tokens[None]`")
    if tokens.numel() == 0:
        raise InputError(f"`tokens` has shape {tuple(tokens.shape)}: there are no prompts or they are empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= adapter.shape.d_vocab:
        raise InputError(
            f"`tokens` run from {low} to {high}, outside the vocabulary of {adapter.shape.d_vocab}; were they made by "
            "another tokenizer?"
        )
    if tokens.shape[1] > adapter.n_ctx:
        raise InputError(f"`tokens` are {tokens.shape[1]} long, the model reads {adapter.n_ctx}; shorten the prompts")
    return tokens.long()


def find_bos(adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> int | None:
    """The id that counts as BOS at a prompt's first real position; see the module's text for the rule."""
    if adapter.has_tokenizer:
        return adapter.special_ids()[0]
    firsts = tokens[mask & (position_ids(mask) == 0)]
    if len(firsts) < 2 or bool((firsts != firsts[0]).any()):
        return None
    later = tokens[mask & (position_ids(mask) > 0)]
    return None if bool((later == firsts[0]).any()) else int(firsts[0])


def kept_positions(
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: str | int | slice,
    bos: int | None,
) -> Bool[Tensor, "batch pos"]:
    """Which positions are samples.

    >>> mask = torch.tensor([[False, True, True], [True, True, False]])
    >>> kept_positions(torch.zeros(2, 3, dtype=torch.long), mask, "last", None).int().tolist()
    [[0, 0, 1], [0, 1, 0]]
    """
    rank, length = position_ids(mask), mask.sum(1, keepdim=True)
    if positions == "all":
        return mask if bos is None else mask & ~((rank == 0) & (tokens == bos))
    if positions == "last":
        return mask & (rank == length - 1)
    if isinstance(positions, slice):
        return mask & _in_slice(rank, length, positions)
    assert isinstance(positions, int)
    wanted = length + positions if positions < 0 else torch.full_like(length, positions)
    outside = ((wanted < 0) | (wanted >= length)).flatten().nonzero().flatten()
    if len(outside):
        short = int(length[outside[0]])
        raise InputError(f"`positions` is {positions}, but one of the prompts has {short} tokens only; use a slice")
    return mask & (rank == wanted)


def _in_slice(rank: Tensor, length: Tensor, chosen: slice) -> Tensor:
    table = torch.zeros(int(length.max()) + 1, rank.shape[1], dtype=torch.bool, device=rank.device)
    for size in length.unique().tolist():
        table[size, list(range(size)[chosen])] = True
    return table[length.expand_as(rank), rank]


def _add_to(digest: Any, tokens: Tensor, mask: Tensor) -> None:
    for row, real in zip(tokens.cpu(), mask.cpu(), strict=True):
        ids = row[real]
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().tobytes())
