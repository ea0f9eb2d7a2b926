"""Targets: the behaviour that a circuit explains.

No target means the model's own prediction: the logits at the chosen positions. The three classes here hold one value
per prompt and are read at the last real position of each prompt unless `positions` says otherwise. They take lists,
tuples, tensors, arrays and columns of a table; a column of shape (n, 1) counts as n values.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.errors import InputError

MANY_CLASSES = 1000  # more than that, and more than there are prompts, is a label that isn't numbered from 0
Words = tuple[tuple[str, ...], ...]  # the answers of each prompt, as text
NO_ANSWER = -1  # fills the rows of prompts with fewer answers


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """logit(correct) - logit(incorrect) of each prompt; of several answers, the mean of their logits.

    The mean, not the log of the summed probabilities: it is linear in the logits, so edges add up to it exactly.

    Parameters
    ----------
    correct, incorrect: one answer for all prompts, or a list with an answer, or a list of answers, for each prompt. An
        answer is a token id or a word of one token, as the model's tokenizer has it (mostly with its leading space);
        words are looked up when the model is at hand. Ids are kept as int64 tensors (prompt,), or (prompt, answer) with
        -1 behind fewer answers.

    As the `metric` of `evaluate` and `baselines` it is read at each prompt's last real token.

    >>> LogitDiff([3, 5], [4, 6]).correct
    tensor([3, 5])
    >>> LogitDiff([[3, 4], [5]], [6, 6]).correct
    tensor([[ 3,  4],
            [ 5, -1]])
    >>> LogitDiff(" Mary", " John").everyone
    True

    Raises
    ------
    InputError: not token ids or words, negative ids, or the two differ in length.
    """

    correct: Any
    incorrect: Any
    everyone: bool = field(init=False, default=False)  # one pair of answers for all prompts

    def __post_init__(self) -> None:
        single = [_is_answer(getattr(self, name)) for name in ("correct", "incorrect")]
        for name, one in zip(("correct", "incorrect"), single):
            object.__setattr__(self, name, _answers([getattr(self, name)] if one else getattr(self, name), name))
        if any(single) and not all(single):
            self._spread("correct" if single[0] else "incorrect", len(self.incorrect if single[0] else self.correct))
        object.__setattr__(self, "everyone", all(single))
        if len(self.correct) != len(self.incorrect):
            raise InputError(
                f"`correct` has {len(self.correct)} answers, `incorrect` {len(self.incorrect)}: give one of each per "
                "prompt, or one for all"
            )

    def _spread(self, name: str, prompts: int) -> None:
        one = getattr(self, name)
        object.__setattr__(self, name, one * prompts if isinstance(one, tuple) else one.expand(prompts))

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def words(self) -> bool:
        """Whether answers are text that a tokenizer has yet to look up."""
        return isinstance(self.correct, tuple) or isinstance(self.incorrect, tuple)

    def looked_up(self, token_of: Callable[[str, str], int]) -> "LogitDiff":
        """The same with token ids in place of words: `token_of(word, argument's name)` gives each."""
        found = copy.copy(self)
        for name in ("correct", "incorrect"):
            if isinstance(given := getattr(self, name), tuple):
                known = {word: token_of(word, name) for word in dict.fromkeys(word for row in given for word in row)}
                object.__setattr__(found, name, _packed([[known[word] for word in row] for row in given]))
        return found

    def take(self, prompts: Int[Tensor, " row"]) -> "LogitDiff":
        """The answers of some prompts, in their order; one pair of answers for all stays as it is.

        >>> LogitDiff([3, 5], [4, 6]).take(torch.tensor([1, 1])).correct
        tensor([5, 5])
        """
        if self.everyone:
            return self
        taken, rows = copy.copy(self), prompts.cpu()
        for name in ("correct", "incorrect"):
            given = getattr(self, name)
            some = tuple(given[row] for row in rows.tolist()) if isinstance(given, tuple) else given[rows]
            object.__setattr__(taken, name, some)
        return taken

    def ids(self, prompts: Int[Tensor, " row"]) -> tuple[Int[Tensor, "row answer"], Int[Tensor, "row other"]]:
        """The correct and the incorrect answers of some prompts, -1 behind fewer; once words are looked up."""
        if self.words:
            raise InputError("`target` holds words, which need a tokenizer: give token ids")
        rows = torch.zeros_like(prompts.cpu()) if self.everyone else prompts.cpu()
        right, wrong = (part[rows] for part in (self.correct, self.incorrect))
        return tuple(part[:, None] if part.ndim == 1 else part for part in (right, wrong))  # type: ignore[return-value]


def answers_mean(
    values: Float[Tensor, "row answer *rest"], ids: Int[Tensor, "row answer"]
) -> Float[Tensor, "row *rest"]:
    """The mean over the answers that there are; `values` may hold anything where an id is -1."""
    there = (ids >= 0).to(values.device).view(*ids.shape, *[1] * (values.ndim - 2))
    return torch.where(there, values, 0.0).sum(1) / there.sum(1)


@dataclass(frozen=True, eq=False)
class Labels:
    """A class number 0..C-1 for each prompt, explained by multinomial cross-entropy; kept as an int64 tensor.

    Raises
    ------
    InputError: not integers, negative, not numbered from 0, or only one class.

    >>> Labels([0, 1, 1]).y.tolist()
    [0, 1, 1]
    """

    y: Any

    def __post_init__(self) -> None:
        labels = _integers(self.y, "y")
        if labels.numel() and int(labels.min()) < 0:
            raise InputError(f"`y` holds the label {int(labels.min())}: number the classes from 0")
        if labels.unique().numel() == 1:
            raise InputError(f"`y` holds one class only ({int(labels[0])}): a label needs at least two classes")
        if labels.numel() and int(labels.max()) >= max(MANY_CLASSES, len(labels)):
            raise InputError(
                f"`y` holds the label {int(labels.max())} for {len(labels)} prompts: number the classes 0, 1, ..., as "
                "`np.unique(y, return_inverse=True)[1]` does"
            )
        object.__setattr__(self, "y", labels)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Values:
    """A number for each prompt, explained by squared error; kept as a float64 tensor.

    Raises
    ------
    InputError: not numbers, NaN or infinite.

    >>> Values([0.5, -1]).y.tolist()
    [0.5, -1.0]
    """

    y: Any

    def __post_init__(self) -> None:
        try:
            values = torch.as_tensor(_plain(self.y)).double().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"`y` isn't numbers ({error}): give one number per prompt") from None
        values = _column(values)
        if values.ndim != 1:
            raise InputError(f"`y` has shape {tuple(values.shape)}: give one number per prompt")
        if not bool(values.isfinite().all()):
            raise InputError(f"`y` is NaN or infinite at prompt {int((~values.isfinite()).nonzero()[0])}")
        object.__setattr__(self, "y", values)

    def __len__(self) -> int:
        return len(self.y)


Target: TypeAlias = LogitDiff | Labels | Values | None


def as_target(given: Any) -> Target:
    """`given`, if it's a target.

    Raises
    ------
    InputError: it isn't; the message says how to make one.
    """
    if given is None or isinstance(given, LogitDiff | Labels | Values):
        return given
    raise InputError(
        f"`target` is {shortened(given)}: wrap it as tcl.Labels(y) for classes, tcl.Values(y) for numbers, or "
        "tcl.LogitDiff(correct, incorrect) for answers; None stands for the model's own logits"
    )


def check_length(target: Target, prompts: int, name: str = "target") -> None:
    """Raise an InputError unless a per-prompt target has one entry for each of `prompts` prompts."""
    if isinstance(target, LogitDiff) and target.everyone:
        return
    if target is not None and len(target) != prompts:
        raise InputError(
            f"`{name}` {type(target).__name__} has {len(target)} entries for {prompts} prompts: give one per prompt"
        )


def take(target: Target, rows: Int[Tensor, " row"]) -> Target:
    """The target of some of the prompts."""
    if target is None or isinstance(target, LogitDiff):
        return None if target is None else target.take(rows)
    some = copy.copy(target)
    object.__setattr__(some, "y", target.y[rows])
    return some


# ---- what people hold -----------------------------------------------------------------------------------------------

_COLUMNS = Tensor | np.ndarray


def _column(values: Tensor) -> Tensor:
    """(n, 1) as (n,)."""
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _plain(given: Any) -> Any:
    """Columns of a table as arrays, everything else as it is; arrays are copied, as tables give out read-only ones."""
    given = given.to_numpy() if hasattr(given, "to_numpy") else given
    return np.array(given) if isinstance(given, np.ndarray) else given


def _integers(values: object, name: str) -> Int[Tensor, " prompt"]:
    values = _plain(values)
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"`{name}` isn't a list of integers ({error})") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"`{name}` is {tensor.dtype}: give integers")
    tensor = _column(tensor)
    if tensor.ndim != 1:
        raise InputError(f"`{name}` has shape {tuple(tensor.shape)}: give one integer per prompt")
    return tensor.long()


def _is_answer(given: Any) -> bool:
    """Whether it's one answer and not a list of them."""
    if isinstance(given, str):
        return True
    single = isinstance(given, int | np.integer) or (isinstance(given, _COLUMNS) and given.ndim == 0)
    return single and not isinstance(given, bool)


def _answers(given: Any, name: str) -> Words | Tensor:
    """Each prompt's answers: ids as a tensor, or words."""
    given = _plain(given)
    if isinstance(given, np.ndarray) and given.dtype.kind in "OUT":
        given = given.tolist()
    if isinstance(given, _COLUMNS):
        return _checked_ids(torch.as_tensor(given), name)
    if not isinstance(given, list | tuple):
        raise InputError(f"`{name}` is {shortened(given)}: give token ids or words, one for all prompts or one each")
    rows = [[row] if _is_answer(row) else _listed(row) for row in given]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise InputError(f"`{name}` has no answer for prompt {empty[0]}")
    flat = [answer for row in rows for answer in row]
    if flat and all(isinstance(answer, str) for answer in flat):
        return tuple(map(tuple, rows))
    if not all(_is_answer(answer) and not isinstance(answer, str) for answer in flat):
        odd = next(answer for answer in flat if not _is_answer(answer) or isinstance(answer, str))
        raise InputError(f"`{name}` holds {shortened(odd)}: give token ids only, or words only")
    if (low := min(map(int, flat), default=0)) < 0:
        raise InputError(f"`{name}` holds {low}: the ids of tokens are 0 or more")
    return _packed([[int(answer) for answer in row] for row in rows])


def _listed(row: Any) -> list[Any]:
    row = _plain(row)
    return row.tolist() if isinstance(row, _COLUMNS) else list(row) if isinstance(row, list | tuple) else [row]


def _packed(rows: list[list[int]]) -> Tensor:
    """Rows of ids as (prompt,) where each has one, else (prompt, answer) filled up."""
    width = max(map(len, rows), default=1)
    table = torch.tensor([row + [NO_ANSWER] * (width - len(row)) for row in rows], dtype=torch.long)
    return table.view(-1) if width == 1 else table


def _checked_ids(ids: Tensor, name: str) -> Int[Tensor, "prompt *answer"]:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"`{name}` is {ids.dtype}: give integers, the ids of tokens")
    if ids.ndim not in (1, 2):
        raise InputError(f"`{name}` has shape {tuple(ids.shape)}: give one token id per prompt, or a row of them")
    if ids.numel() and int(ids.min()) < 0:
        raise InputError(f"`{name}` holds {int(ids.min())}: the ids of tokens are 0 or more")
    ids = ids.long().cpu()
    return _column(ids)
