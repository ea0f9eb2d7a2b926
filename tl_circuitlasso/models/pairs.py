"""Pairs of prompts, clean and corrupted: two `Prompts` of the same lengths, read side by side in the same batches.

A metric gets a batch's logits and its rows. Pads stand behind shorter prompts (in tensors, where the mask has them), so
the last column isn't every prompt's end; index -1 is the one place that everybody reads. The metric therefore sees, in
the last column, the logits at each prompt's last real token; every other column is that of the tokens as they were
given, and a metric that reads pads there is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.metric import Metric, as_metric
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tokens import Batch, Prompts

PAIR = 2  # prompts in a pair, so the fewest of a batch
NO_PAIRS = (
    "`tokens` gave no pairs of prompts, and two are compared at a time: give two or more in each batch, or their "
    "partners as `corrupted`"
)


class PairBatch(NamedTuple):
    """Some pairs: two batches of the same shape, mask and samples."""

    clean: Batch
    corrupted: Batch

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens, of both prompts of a pair."""
        return self.clean.mask

    @property
    def rows(self) -> Int[Tensor, " batch"]:
        """The pairs' numbers among all, on the CPU."""
        return torch.arange(self.clean.start, self.clean.start + len(self.clean.tokens))

    def shown(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos vocab"]:
        """Logits as a metric sees them."""
        return shown(logits, self.mask)


def shown(
    logits: Float[Tensor, "batch pos vocab"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits as a metric sees them: in the last column those at each prompt's last real token."""
    end = last_places(mask).to(logits.device)
    if bool((end == logits.shape[1] - 1).all()):
        return logits
    last = logits[torch.arange(len(logits), device=logits.device), end]
    return torch.cat([logits[:, :-1], last[:, None]], dim=1)


def last_places(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """The column of each prompt's last real token.

    >>> last_places(torch.tensor([[False, True, True], [True, True, False]])).tolist()
    [2, 1]
    """
    return mask.long().mul(torch.arange(mask.shape[1], device=mask.device)).amax(1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean prompts, each with a corrupted partner of its length; the positions that are samples are the clean ones'.

    `for clean, corrupted in pairs: ...` gives batches of the same window. Made by `pairs_of`.

    Raises
    ------
    InputError: streams, another number of prompts, or masks that differ.
    """

    clean: Prompts
    corrupted: Prompts

    def __post_init__(self) -> None:
        masks = self.clean.whole().mask, self.corrupted.whole().mask
        if masks[0].shape != masks[1].shape or not torch.equal(*masks):
            raise InputError(
                f"`{self.corrupted.name}` isn't aligned with `{self.clean.name}`: make pairs by `pairs_of`"
            )

    @property
    def adapter(self) -> Adapter:
        """The model behind both."""
        return self.clean.adapter

    @property
    def batch_size(self) -> int:
        """The most pairs of a batch."""
        return self.clean.batch_size

    @property
    def width(self) -> int:
        """The number of positions, pads included."""
        return self.clean.width

    def __len__(self) -> int:
        return self.clean.n_prompts or 0

    def __iter__(self) -> Iterator[PairBatch]:
        for own, other in zip(self.clean.parts(), self.corrupted.parts(), strict=True):
            yield PairBatch(own, replace(own, tokens=other.tokens))

    def take(self, rows: Int[Tensor, " row"]) -> "Pairs":
        """Some of the pairs, numbered anew."""
        return Pairs(self.clean.take(rows), self.corrupted.take(rows))

    def batched(self, size: int, *, fewest: int | None = None) -> "Pairs":
        """The same pairs in batches of at most `size`, as `Prompts.batched`."""
        return Pairs(self.clean.batched(size, fewest=fewest), self.corrupted.batched(size, fewest=fewest))

    def metric(self, given: Any) -> Metric:
        """A metric for these prompts, checked: a function of (logits, rows), or a LogitDiff.

        One that reads pads is found on made-up logits: its value for the shortest prompt changes with those at pads.

        Raises
        ------
        InputError: it can't be called, it reads pads, or it is a LogitDiff of another number of prompts.
        """
        metric = as_metric(given, self.adapter, len(self))
        self._refuse_pads(metric)
        return metric

    def _refuse_pads(self, metric: Metric) -> None:
        mask = self.clean.whole().mask
        pads = ~mask
        pads[:, -1] = False
        row = int(pads.sum(1).argmax())
        if not bool(pads[row].any()):
            return
        _refuse_place(metric)
        generator = torch.Generator().manual_seed(0)
        size = (1, mask.shape[1], self.adapter.shape.d_vocab_out)
        logits, others = (torch.randn(size, generator=generator).to(self._like) for _ in range(2))
        changed = torch.where(pads[row].to(logits.device)[None, :, None], others, logits)
        with torch.no_grad():
            values = [_number(metric(seen, torch.tensor([row]))) for seen in (logits, changed)]
        if not torch.allclose(values[0], values[1], equal_nan=True):
            raise InputError(
                f"`metric` reads pads: prompt {row} has {int(mask[row].sum())} of {mask.shape[1]} tokens. Index -1 is "
                "every prompt's last real token; for others name each prompt's column, and leave pads out of means"
            )

    @property
    def _like(self) -> Float[Tensor, ""]:
        return torch.zeros((), dtype=self.adapter.compute_dtype, device=self.adapter.device)


def _refuse_place(metric: Any) -> None:
    place = getattr(metric, "position", None)
    if isinstance(place, int) and place < -1:
        raise InputError(
            f"`metric` reads position {place}, which counts columns, but the prompts differ in length: give the column "
            "of each prompt, position=[...]"
        )


def _number(value: Any) -> Float[Tensor, "..."]:
    """A metric's value to be compared; whether it is one number is checked where it's measured."""
    known = torch.as_tensor(value) if isinstance(value, Tensor | int | float) else torch.zeros(())
    return known.detach().double().cpu()


def pairs_of(
    model: Any,
    clean: AnyPrompts | Prompts,
    corrupted: AnyPrompts | Prompts | None = None,
    *,
    attention_mask: Any = None,
    positions: Any = "all",
    batch_size: Any = 32,
    name: str = "clean",
) -> Pairs:
    """Check the prompts and pair them, in the order in which they are given; None stands for the clean prompts.

    `attention_mask` is that of `clean`, and of `corrupted` where that is a tensor of the same shape. A partner's tokens
    are put where the clean prompt's stand, so left- and right-padded prompts can be paired. Streams are read whole.

    Raises
    ------
    InputError: prompts that can't be read, another number of them, or a partner of another length.
    """
    adapter = model if isinstance(model, Adapter) else adapt(model, spread=True)
    if isinstance(clean, Prompts):
        own = clean.gathered()
    else:
        options = {"attention_mask": attention_mask, "positions": positions, "batch_size": batch_size}
        own = Prompts(adapter, clean, **options, name=name).gathered()
    if corrupted is None:
        return Pairs(own, own)
    other = corrupted if isinstance(corrupted, Prompts) else Prompts(adapter, corrupted, name="corrupted")
    return Pairs(own, _aligned(own, other.gathered()))


def _aligned(own: Prompts, other: Prompts) -> Prompts:
    """The corrupted prompts, their tokens where those of the clean ones stand."""
    clean, corrupted = own.whole(), other.whole()
    mask = corrupted.mask
    if not other.knows_pads and corrupted.tokens.shape == clean.tokens.shape:
        mask = clean.mask
    if len(mask) != len(clean.mask):
        raise InputError(
            f"`corrupted` has {len(mask)} prompts, `{own.name}` {len(clean.mask)}: give one partner for each"
        )
    lengths = mask.sum(1), clean.mask.sum(1)
    if bool((lengths[0] != lengths[1]).any()):
        prompt = int((lengths[0] != lengths[1]).nonzero()[0])
        theirs, ours = (int(length[prompt]) for length in lengths)
        raise InputError(
            f"`corrupted`: prompt {prompt} has {theirs} tokens, its partner in `{own.name}` {ours}: both prompts of a "
            "pair must have the same length"
        )
    return own.with_tokens(clean.tokens.masked_scatter(clean.mask, corrupted.tokens[mask]), other.name)
