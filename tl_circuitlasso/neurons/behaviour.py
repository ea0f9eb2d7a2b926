"""A behaviour as neuron circuits see it: pairs of prompts, and the target as a function of the logits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.targets import LogitDiff, Target, check_length, take
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.graph import Text
from tl_circuitlasso.models import outcome, readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.collect import left_aligned
from tl_circuitlasso.models.neuron_scores import Batch, Reading
from tl_circuitlasso.models.pairing import make_pairs
from tl_circuitlasso.models.pairs import PairBatch, Pairs
from tl_circuitlasso.models.tokens import Batch as PromptBatch
from tl_circuitlasso.models.tokens import Prompts


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What is explained, and in which prompts.

    partners: a corrupted partner of the same shape for each prompt, or None for partners drawn at random. last: whether
    the target is read at each prompt's last position only.
    """

    adapter: Adapter
    prompts: Prompts
    target: Target
    partners: Pairs | None
    last: bool
    seed: int

    def __post_init__(self) -> None:
        if not (self.target is None or isinstance(self.target, LogitDiff)):
            raise InputError(
                f"`target` {type(self.target).__name__} is read by a probe, neurons by design 'read' explain logits: "
                "give a LogitDiff or None, or use design='activation'"
            )
        check_length(self.target, self.n_prompts)

    def pairs(self) -> Iterator[Batch]:
        """The pairs, batch by batch, with the places where the target is read."""
        for batch in self._random_pairs() if self.partners is None else map(_given_pair, self.partners):
            if len(batch.rows):
                assert batch.keep is not None
                yield replace(batch, keep=readout.last_only(batch.keep)) if self.last else batch

    def _random_pairs(self) -> Iterator[Batch]:
        for number, given in enumerate(self.prompts):
            yield _with_random_partners(left_aligned(given), torch.Generator().manual_seed(self.seed + number))

    def some(self, count: int) -> "Behaviour":
        """The same in at most `count` of the prompts, drawn at random."""
        rows = self.prompts.draw(count, self.seed)
        if rows is None:
            return self
        partners = None if self.partners is None else self.partners.take(rows)
        return replace(self, prompts=self.prompts.take(rows), target=take(self.target, rows), partners=partners)

    @property
    def n_prompts(self) -> int:
        return self.prompts.n_prompts or 0

    def context(self, row: int, position: int, value: float, text: Text) -> dict[str, Any]:
        """A place as `explain` shows it; `position` counts from the first real token."""
        batch = self.whole
        ids = batch.tokens[row][batch.mask[row]].tolist()
        return {"value": value, "tokens": [text.of(token) for token in ids], "at": position, "prompt": row}

    @cached_property
    def whole(self) -> PromptBatch:
        return self.prompts.whole()

    @property
    def reading(self) -> Reading:
        """The target as what it reads of the logits."""
        return Reading(self.contrast, oriented=self.partners is None)

    def contrast(
        self, own: Float[Tensor, "batch pos vocab"], other: Float[Tensor, "batch pos vocab"], batch: Batch
    ) -> Float[Tensor, "batch pos vocab"]:
        """Plus one at one token and minus one at another, shared among the positions where the target is read.

        Without a target these are the tokens that the two runs differ most about (`outcome.contrast`).
        """
        assert batch.keep is not None
        if self.target is None:
            plus, minus = outcome.contrast(own.flatten(0, 1), other.flatten(0, 1))
            tokens = [token.view(*own.shape[:2], 1) for token in (plus, minus)]
            shares = [torch.ones_like(token, dtype=own.dtype) for token in tokens]
        else:
            tokens, shares = self._answers(batch.rows, own)
        share = batch.keep.to(own) / batch.keep.sum(1, keepdim=True).clamp_min(1)
        at_logits = torch.zeros_like(own)
        at_logits.scatter_add_(2, tokens[0], share[..., None] * shares[0])
        return at_logits.scatter_add_(2, tokens[1], -share[..., None] * shares[1])

    def _answers(
        self, rows: Int[Tensor, " batch"], logits: Float[Tensor, "batch pos vocab"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The correct and the incorrect answers at every position, (batch, pos, answer), and what each counts."""
        assert isinstance(self.target, LogitDiff)
        tokens, shares = [], []
        for ids in self.target.ids(rows):
            if int(ids.max()) >= logits.shape[-1]:
                raise InputError(
                    f"`target` names token {int(ids.max())}, the model has logits 0 to {logits.shape[-1] - 1}"
                )
            given = (ids >= 0).to(logits)
            shares.append((given / given.sum(1, keepdim=True))[:, None])
            tokens.append(ids.clamp_min(0).to(logits.device)[:, None].expand(-1, logits.shape[1], -1))
        return tokens, shares


def _given_pair(pair: PairBatch) -> Batch:
    return Batch(pair.clean.tokens, pair.corrupted.tokens, pair.mask, pair.rows, pair.clean.keep)


def _with_random_partners(given: PromptBatch, generator: torch.Generator) -> Batch:
    """Each prompt with another of at least its length, cut to it; a prompt that has none is left out."""
    drawn = make_pairs(given.mask, given.keep, generator)
    own, other = drawn.own, drawn.partner
    mask = given.mask[own]
    tokens = torch.where(mask, given.tokens[other], given.tokens[own])
    return Batch(given.tokens[own], tokens, mask, given.start + own.cpu(), given.keep[own])
