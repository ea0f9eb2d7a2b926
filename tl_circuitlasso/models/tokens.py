"""Prompts: from whatever the user gives to batches of tokens, a mask of real tokens, and the positions to sample.

This is the only door for prompts: what is accepted is said in prompt_forms.py, which positions are samples in
positions.py, and pairs of clean and corrupted prompts are two of these (pairs.py).
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.positions import Checked, as_positions, check_alignment, find_bos, kept_positions, of_rows
from tl_circuitlasso.models.positions import Positions as Positions
from tl_circuitlasso.models.prompt_forms import AnyPrompts, Held, held_or_stream, joined, pieces


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts: `mask` is True at real tokens, `keep` at the positions that are samples; `partners` are the
    prompts' counterparts where they have some, of the same lengths."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    start: int  # index of the first of these prompts among all prompts
    bos: int | None = None  # the token that tells nothing where it comes first
    partners: Int[Tensor, "batch pos"] | None = None

    @property
    def run(self) -> tuple[Int[Tensor, "both pos"], Bool[Tensor, "both pos"]]:
        """Tokens and mask of all that a model is to read: the prompts, then their counterparts."""
        if self.partners is None:
            return self.tokens, self.mask
        return torch.cat([self.tokens, self.partners]), torch.cat([self.mask, self.mask])

    @property
    def n_samples(self) -> int:
        """How many positions are samples."""
        return int(self.keep.sum())

    @property
    def words(self) -> Bool[Tensor, "batch pos"]:
        """The real tokens but BOS, samples or not."""
        return kept_positions(self.tokens, self.mask, "all", self.bos)

    def trimmed(self) -> "Batch":
        """Without the columns that are pads in every prompt: they only cost time."""
        used = self.mask.any(0).nonzero().flatten()
        window = slice(int(used[0]), int(used[-1]) + 1)
        return self.each(lambda part: part[:, window])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With everything that has a row a prompt changed alike."""
        parts = {name: getattr(self, name) for name in ("tokens", "mask", "keep", "partners")}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


def first_prompts(batch: Batch, count: int) -> Batch:
    """The first `count` prompts of a batch."""
    return batch.each(lambda part: part[:count])


class Prompts:
    """Checked prompts, to be read batch by batch: `for batch in Prompts(adapter, tokens): ...`.

    Parameters
    ----------
    tokens: what prompt_forms.py accepts. Tensors and lists can be read many times, an iterator once.
    attention_mask: (batch, pos), 1 at real tokens; goes with a tensor, without it all are real.
    positions: which are samples, as in positions.py.
    batch_size: the most prompts of a batch. fewest: the least, where there are as many: of the last two batches one
        may be smaller so that the other isn't too small.
    name: what the caller calls the prompts, for messages.

    Raises
    ------
    InputError: no prompts, an empty prompt, token ids that are no integers or outside the vocabulary, prompts
        longer than the model's context, a mask of another shape, and prompts without a single sample.
    """

    def __init__(
        self,
        adapter: Adapter,
        tokens: AnyPrompts,
        *,
        attention_mask: Any = None,
        positions: Any = "all",
        batch_size: Any = 32,
        fewest: int = 1,
        name: str = "tokens",
    ) -> None:
        self.adapter, self.name, self.fewest = adapter, name, fewest
        self.batch_size = max(fewest, whole_number("batch_size", batch_size, what="of prompts"))
        self._positions: Checked = as_positions(positions)
        self._whole, self._stream, self.knows_pads = held_or_stream(adapter, tokens, attention_mask, name)
        check_alignment(self._positions, None if self._whole is None else tuple(self._whole[0].shape))  # type: ignore[arg-type]
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

    @property
    def positions(self) -> Checked:
        """Which positions are samples, in one of the forms of positions.py."""
        return self._positions

    def gathered(self) -> "Prompts":
        """The same prompts, a stream read to its end first: token ids alone take little room, and what draws prompts
        or pairs at random has to know them all, so that a stream and a tensor of the same prompts give the same.

        Raises
        ------
        InputError: the stream has no prompts, or is an iterator that has been read already.
        """
        if self._whole is not None:
            return self
        self._begin()
        return self._with(joined(self._pairs(), self.name))

    def take(self, rows: Int[Tensor, " row"]) -> "Prompts":
        """Some of the prompts, where all are known beforehand; positions stay with their prompts.

        Raises
        ------
        InputError: the prompts are a stream.
        """
        tokens, mask = self._held()
        some = self._with((tokens[rows], mask[rows]))
        some._positions = of_rows(self._positions, rows, len(tokens))
        return some

    def with_tokens(self, tokens: Int[Tensor, "prompt pos"], name: str) -> "Prompts":
        """Other prompts of the same lengths in these prompts' places; positions and BOS stay as they are."""
        other = self._with((tokens, self._held()[1].to(tokens.device)))
        other.name = name
        return other

    def batched(self, size: int, *, fewest: int | None = None) -> "Prompts":
        """The same prompts in batches of at most `size`, and at least `fewest` (None: as many as before)."""
        other = self._with(self._held())
        other.fewest = self.fewest if fewest is None else fewest
        other.batch_size = max(other.fewest, size)
        return other

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
        tokens, mask = (part.cpu() for part in self._held())
        return self._batch(tokens, mask, 0)

    def parts(self) -> Iterator[Batch]:
        """The batches of prompts that are all known beforehand, on the model's device; no column is left out.

        Raises
        ------
        InputError: the prompts are a stream.
        """
        yield from self._batches(*self._held(), 0)

    def data_hash(self) -> str:
        """sha256 of the real tokens of every prompt, whatever the batches and the padding; known once all are read."""
        if not self._finished:
            raise InputError("the data hash is known only after all batches have been read")
        return self._digest.hexdigest()

    def hash_so_far(self) -> str:
        """The data hash of the batches that this pass has given out; tells whether a checkpoint saw the same."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        self._begin()
        samples = start = 0
        for tokens, mask in self._pairs():
            for batch in self._batches(tokens, mask, start):
                _add_to(self._digest, batch.tokens, batch.mask)
                samples += batch.n_samples
                yield batch.trimmed()
            start += len(tokens)
        if start == 0:
            raise InputError(f"`{self.name}` has no prompts")
        if samples == 0:
            raise InputError(
                f"`positions` = {self._positions!r} leaves no sample in any prompt (all positions masked); choose "
                "others, or longer prompts"
            )
        self._finished = True

    def _begin(self) -> None:
        if self._started and isinstance(self._stream, Iterator):
            raise InputError(f"`{self.name}` is an iterator and has been read already; give a list or a tensor instead")
        self._started, self._finished = True, False
        self._digest = hashlib.sha256()

    def _with(self, held: Held) -> "Prompts":
        other = copy.copy(self)
        other._whole, other._stream = held, ()
        if self._whole is None:
            other._bos = find_bos(self.adapter, *held)
        other._digest = hashlib.sha256()
        other._finished = other._started = False
        return other

    def _held(self) -> Held:
        if self._whole is None:
            raise InputError(
                f"`{self.name}` is a stream, whose prompts are never held together: give a tensor or a list"
            )
        return self._whole

    def _pairs(self) -> Iterator[Held]:
        if self._whole is not None:
            yield self._whole
            return
        for number, held in enumerate(pieces(self.adapter, self._stream, self.batch_size, self.name)):
            if number == 0:
                self._bos = find_bos(self.adapter, *held)
            yield held

    def _batches(self, tokens: Tensor, mask: Tensor, start: int) -> Iterator[Batch]:
        device = self.adapter.device
        for part in cuts(len(tokens), self.batch_size, self.fewest):
            yield self._batch(tokens[part].to(device), mask[part].to(device), start + part.start)

    def _batch(self, tokens: Tensor, mask: Tensor, start: int) -> Batch:
        rows = slice(start, start + len(tokens))
        chosen = of_rows(self._positions, rows, self.n_prompts or 0)
        return Batch(tokens, mask, kept_positions(tokens, mask, chosen, self._bos), start, self._bos)


def cuts(count: int, size: int, fewest: int = 1) -> Iterator[slice]:
    """`count` things in parts of at most `size`, the last two evened out so that none has fewer than `fewest`.

    >>> [(part.start, part.stop) for part in cuts(7, 3, fewest=2)]
    [(0, 3), (3, 5), (5, 7)]
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        missing = fewest - (count - stop) if stop < count else 0
        if missing > 0:
            stop = stop - missing if stop - missing - start >= fewest else count
        yield slice(start, stop)
        start = stop


def _add_to(digest: Any, tokens: Tensor, mask: Tensor) -> None:
    for row, real in zip(tokens.cpu(), mask.cpu(), strict=True):
        ids = row[real]
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().tobytes())
