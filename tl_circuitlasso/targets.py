"""Targets: the behaviour that a circuit explains.

No target means the model's own prediction: the logits at the chosen positions. The three classes here hold one value
per prompt and are read at the last real position of each prompt unless `positions` says otherwise.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.errors import InputError


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """logit[correct] - logit[incorrect] of each prompt; token ids as a list, array or tensor, kept as int64 tensors.

    >>> LogitDiff([3, 5], [4, 6]).correct
    tensor([3, 5])

    Raises
    ------
    InputError: not token ids, or the two differ in length.
    """

    correct: Any
    incorrect: Any

    def __post_init__(self) -> None:
        for name in ("correct", "incorrect"):
            object.__setattr__(self, name, _integers(getattr(self, name), name))
        if len(self.correct) != len(self.incorrect):
            raise InputError(
                f"`correct` has {len(self.correct)} ids, `incorrect` {len(self.incorrect)}: give one of each per prompt"
            )

    def __len__(self) -> int:
        return len(self.correct)


@dataclass(frozen=True, eq=False)
class Labels:
    """A class number 0..C-1 for each prompt, explained by multinomial cross-entropy; kept as an int64 tensor.

    Raises
    ------
    InputError: not integers, negative, or only one class.
    """

    y: Any

    def __post_init__(self) -> None:
        labels = _integers(self.y, "y")
        if labels.numel() and int(labels.min()) < 0:
            raise InputError(f"`y` holds the label {int(labels.min())}: number the classes from 0")
        if labels.unique().numel() == 1:
            raise InputError(f"`y` holds one class only ({int(labels[0])}): a label needs at least two classes")
        object.__setattr__(self, "y", labels)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Values:
    """A number for each prompt, explained by squared error; kept as a float64 tensor.

    Raises
    ------
    InputError: not numbers, NaN or infinite.
    """

    y: Any

    def __post_init__(self) -> None:
        try:
            values = torch.as_tensor(self.y, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"`y` isn't numbers ({error}): give one number per prompt") from None
        if values.ndim != 1:
            raise InputError(f"`y` has shape {tuple(values.shape)}: give one number per prompt")
        if not bool(values.isfinite().all()):
            raise InputError(f"`y` is NaN or infinite at prompt {int((~values.isfinite()).nonzero()[0])}")
        object.__setattr__(self, "y", values)

    def __len__(self) -> int:
        return len(self.y)


Target: TypeAlias = LogitDiff | Labels | Values | None


def check_length(target: Target, prompts: int) -> None:
    """Raise an InputError unless a per-prompt target has one entry for each of `prompts` prompts."""
    if target is not None and len(target) != prompts:
        raise InputError(
            f"`target` {type(target).__name__} has {len(target)} entries for {prompts} prompts: give one per prompt"
        )


def take(target: Target, rows: Int[Tensor, " row"]) -> Target:
    """The target of some of the prompts."""
    match target:
        case LogitDiff():
            return LogitDiff(torch.as_tensor(target.correct)[rows], torch.as_tensor(target.incorrect)[rows])
        case Labels():
            return Labels(torch.as_tensor(target.y)[rows])
        case Values():
            return Values(torch.as_tensor(target.y)[rows])
        case None:
            return None


def _integers(values: object, name: str) -> Int[Tensor, " prompt"]:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` isn't a list of integers ({error})") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"`{name}` is {tensor.dtype}: give integers")
    if tensor.ndim != 1:
        raise InputError(f"`{name}` has shape {tuple(tensor.shape)}: give one integer per prompt")
    return tensor.long()
