"""Prompts with a counterpart each, on which the model is right: what circuits are found and judged on.

indirect objects  "When Mary and John went to the store, John gave a drink to" -> Mary rather than John; in the
                  counterpart the second John is Mary, or a third name
agreement         "The authors behind the guard" -> have rather than has; the counterpart's subject has the other number
capitals          "The capital city of Texas is" -> Austin rather than the capital of the counterpart's state
stories           the next token of a story; the counterpart is another story

All prompts of a task, counterparts included, have one length in tokens, and answers are single tokens. Templates,
names and texts are "seen" or "held-out": figures that something was tuned on can be told from those on new ones. What
prompts are made of: makers.py.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.real import wording
from benchmarks.real.makers import TASKS, Pair
from tl_circuitlasso import evaluate
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.metrics import PromptMetric
from tl_circuitlasso.models.adapter import Adapter, adapt

BATCH = 32  # prompts per forward pass
USUAL = ("ioi", "agreement", "capitals", "stories")  # tasks that are measured where none is named
TRIES = 20  # pairs that may be looked at for each prompt that is wanted


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts on which the model is right.

    Attributes
    ----------
    correct, incorrect: the right next token of each prompt, and that of its counterpart.
    reference: the model's own logits behind the last token, where the behaviour is its whole prediction; else None.
    looked_at: pairs that were tried to find these.
    note: what the prompts are made of.

    Raises
    ------
    InputError: prompts and counterparts of unequal length or equal to each other, or two answers that are the same.
    """

    name: str
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    correct: Int[Tensor, " prompt"]
    incorrect: Int[Tensor, " prompt"]
    reference: Float[Tensor, "prompt vocab"] | None
    looked_at: int
    note: str

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupted.shape:
            raise InputError(
                f"`{self.name}`: prompts have shape {tuple(self.clean.shape)}, counterparts "
                f"{tuple(self.corrupted.shape)}: they must be equal"
            )
        if bool((same := (self.clean == self.corrupted).all(1)).any()):
            raise InputError(f"`{self.name}`: prompt {int(same.nonzero()[0])} and its counterpart are the same")
        if bool((same := self.correct == self.incorrect).any()):
            raise InputError(f"`{self.name}`: both answers to prompt {int(same.nonzero()[0])} are the same token")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def target(self) -> LogitDiff | None:
        """The behaviour as `circuit_lasso` takes it."""
        return LogitDiff(self.correct, self.incorrect) if self.reference is None else None

    @property
    def metric(self) -> PromptMetric:
        """What a circuit should keep high: the difference of two logits, or minus the divergence from the model."""
        return self.contrast if self.reference is None else evaluate.kl(self.reference)

    @property
    def contrast(self) -> PromptMetric:
        """A metric whose derivative on the clean prompt isn't zero, as that of the divergence is."""
        return evaluate.logit_diff(self.correct, self.incorrect)

    def take(self, rows: Int[Tensor, " row"]) -> "Task":
        """Some of the prompts."""
        parts = (self.clean[rows], self.corrupted[rows], self.correct[rows], self.incorrect[rows])
        reference = None if self.reference is None else self.reference[rows]
        return Task(self.name, *parts, reference, self.looked_at, self.note)

    def others(self, seed: int) -> Int[Tensor, "prompt pos"]:
        """The prompts in another order, so that none stays in its place: what resampling takes activations from."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        moved = torch.empty_like(order)
        moved[order] = order.roll(1)
        return self.clean[moved]


def task(model: Any, name: str, *, prompts: int, split: str = "seen", seed: int = 0, third: bool = False) -> Task:
    """`prompts` prompts of the task `name` that the model gets right.

    Parameters
    ----------
    split: "seen" or "held-out" templates, names and texts; third: whether the counterpart of an indirect object has a
        third name in the subject's place instead of the indirect object's.

    Raises
    ------
    InputError: an unknown task or split, a tokenizer that cuts its answers up, or too few prompts.
    """
    if name not in TASKS:
        raise InputError(f"`name` is {name!r}: there are {', '.join(TASKS)}")
    if split not in wording.SPLITS:
        raise InputError(f"`split` is {split!r}: write {' or '.join(map(repr, wording.SPLITS))}")
    adapter = adapt(model)
    if not adapter.has_tokenizer:
        raise InputError("`model` has no tokenizer: prompts are made of words")
    drawn, note = TASKS[name](adapter, split, random.Random(seed), third)
    return gathered(adapter, name, drawn, prompts, note)


# ---- which prompts the model gets right -----------------------------------------------------------------------------


def gathered(adapter: Adapter, name: str, pairs: Iterable[Pair], prompts: int, note: str) -> Task:
    """The first `prompts` of the pairs that the model gets right.

    Right is, of stories, that the next token is the likeliest of all; else that the right answer is likelier than the
    counterpart's.

    Raises
    ------
    InputError: fewer than two such prompts, or prompts of more than one length.
    """
    whole, found, logits, looked_at = name == "stories", [], [], 0
    stream = iter(pairs)
    while len(found) < prompts and looked_at < TRIES * prompts:
        some = list(itertools.islice(stream, min(BATCH, TRIES * prompts - looked_at)))
        if not some:
            break
        last = _last_logits(adapter, name, some)
        right = _right(last, some, whole).tolist()
        wanted = prompts - len(found)
        rows = [row for row, fine in enumerate(right) if fine][:wanted]
        looked_at += rows[-1] + 1 if len(rows) == wanted else len(some)
        found += [some[row] for row in rows]
        logits.append(last[rows] if whole else last[:0])
    if len(found) < 2:
        raise InputError(f"`{name}`: the model gets {len(found)} of {looked_at} prompts right, and it takes two")
    reference = torch.cat(logits) if whole else None
    return _task(name, found, reference, looked_at, note)


def _last_logits(adapter: Adapter, name: str, pairs: Sequence[Pair]) -> Float[Tensor, "prompt vocab"]:
    tokens = _tokens(name, [pair.clean for pair in pairs])
    with torch.no_grad():
        return adapter.run(tokens.to(adapter.device), None, ["logits"])["logits"][:, -1].float().cpu()


def _right(last: Float[Tensor, "prompt vocab"], pairs: Sequence[Pair], whole: bool) -> Bool[Tensor, " prompt"]:
    correct, incorrect = (torch.tensor([getattr(pair, side) for pair in pairs]) for side in ("correct", "incorrect"))
    if whole:
        return last.argmax(1) == correct
    picked = (last.gather(1, ids[:, None])[:, 0] for ids in (correct, incorrect))
    return next(picked) > next(picked)


def _task(name: str, pairs: Sequence[Pair], reference: Tensor | None, looked_at: int, note: str) -> Task:
    clean, corrupted = (_tokens(name, [getattr(pair, side) for pair in pairs]) for side in ("clean", "corrupted"))
    correct, incorrect = (torch.tensor([getattr(p, side) for p in pairs], dtype=torch.long) for side in _ANSWERS)
    if reference is not None:  # another story whose next token is another one
        partner = _partners(correct.tolist())
        corrupted, incorrect = clean[partner], correct[partner]
    return Task(name, clean, corrupted, correct, incorrect, reference, looked_at, note)


_ANSWERS = ("correct", "incorrect")


def _partners(answers: Sequence[int]) -> list[int]:
    """For each prompt the next one, around the end, that has another answer."""
    count = len(answers)
    around = ([(i + step) % count for step in range(1, count)] for i in range(count))
    return [next((j for j in order if answers[j] != answers[i]), i) for i, order in enumerate(around)]


def _tokens(name: str, rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt pos"]:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(f"`{name}` has prompts of {lengths[0]} and of {lengths[-1]} tokens: give them one length")
    return torch.tensor([list(row) for row in rows], dtype=torch.long).view(len(rows), -1)
