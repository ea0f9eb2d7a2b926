"""What a circuit should keep high, as every measurement asks for it: `metric(logits, rows)`, summed over the rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso._checks import function
from tl_circuitlasso.data.targets import LogitDiff, Target, answers_mean, check_length
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter

Metric = Callable[[Tensor, Tensor], Tensor]  # (logits of a batch, its rows in the data set) -> sum over the rows


@dataclass(frozen=True, eq=False)
class PromptMetric:
    """A metric that also gives one value per prompt, `each(logits, rows)`; called, it returns their sum.

    position: the one column that it reads of every prompt, where it reads one.
    """

    each: Metric
    position: int | None = None

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], rows: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        return self.each(logits, rows).sum()


def as_number(value: Any, *, finite: bool = True) -> Float[Tensor, ""]:
    """What a metric returned, which is to be one number.

    >>> as_number(2.5), as_number(torch.ones(1, 1))
    (tensor(2.5000), tensor(1.))

    Raises
    ------
    InputError: something else, or (where it must be `finite`) NaN or infinity.
    """
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"`metric` returned {got}: it must return one number, the sum over the rows that it is given")
    if finite and not bool(value.isfinite()):
        raise InputError("`metric` returned NaN or infinity: check the prompts and the metric")
    return value.reshape(())


def as_objective(value: Any) -> Float[Tensor, ""]:
    """What a metric returned, which is to be one finite number with a derivative by the logits.

    Raises
    ------
    InputError: it is something else.
    """
    number = as_number(value, finite=False)
    if not number.requires_grad:
        raise InputError("`metric` doesn't depend on the logits: compute it from `logits` with torch operations")
    return as_number(number)


def as_metric(given: Any, adapter: Adapter, prompts: int) -> Metric:
    """A metric as it can be called: a function as it is, a `LogitDiff` at each prompt's last real token.

    Raises
    ------
    InputError: neither, or a LogitDiff of another number of prompts.
    """
    if not isinstance(given, LogitDiff):
        return function(
            "metric", given, "metric(logits, rows) -> sum over rows, or a tcl.LogitDiff(correct, incorrect)"
        )
    check_length(given, prompts, "metric")
    target = with_tokens(given, adapter)
    assert isinstance(target, LogitDiff)
    return PromptMetric(
        lambda logits, rows: answer_difference(logits[:, -1:], target, rows, "metric")[:, 0], position=-1
    )


def answer_difference(
    logits: Float[Tensor, "batch pos vocab"], target: LogitDiff, prompts: Int[Tensor, " batch"], name: str = "target"
) -> Float[Tensor, "batch pos"]:
    """The mean logit of each prompt's correct answers less that of its incorrect ones, at every position.

    Raises
    ------
    InputError: an answer that isn't in the vocabulary.
    """
    check_answers(target, logits.shape[-1], name)

    def mean(ids: Int[Tensor, "batch answer"]) -> Float[Tensor, "batch pos"]:
        ids = ids.to(logits.device)
        chosen = logits.gather(2, ids.clamp_min(0)[:, None].expand(-1, logits.shape[1], -1))
        return answers_mean(chosen.transpose(1, 2), ids)

    right, wrong = target.ids(prompts)
    return mean(right) - mean(wrong)


def check_answers(target: LogitDiff, vocabulary: int, name: str = "target") -> None:
    """Raise an InputError for an answer behind the last logit."""
    for part in (target.correct, target.incorrect):
        if isinstance(part, Tensor) and part.numel() and int(part.max()) >= vocabulary:
            raise InputError(f"`{name}` names token {int(part.max())}, the model has logits 0 to {vocabulary - 1}")


def with_tokens(target: Target, adapter: Adapter) -> Target:
    """The target with its words looked up by the model's tokenizer.

    Raises
    ------
    InputError: a word that isn't one token; the message has its pieces.
    """
    if not isinstance(target, LogitDiff) or not target.words:
        return target
    return target.looked_up(lambda word, name: token_of(adapter, word, name))


def token_of(adapter: Adapter, word: str, name: str) -> int:
    """The id of a word of one token.

    Raises
    ------
    InputError: no tokenizer, or a word of more or less than one token, or one that it doesn't know.
    """
    if not adapter.has_tokenizer:
        raise InputError(f"`{name}` has the word {word!r}, but the model has no tokenizer; give token ids")
    tokens = _tokens(adapter, word)
    tokenizer: Any = adapter.model.tokenizer
    if tokens == [getattr(tokenizer, "unk_token_id", None)]:
        raise InputError(f"`{name}` has {word!r}, which the tokenizer doesn't know: give another word, or a token id")
    if len(tokens) != 1:
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        other = word.lstrip() if word[:1].isspace() else f" {word}"
        fits = bool(other) and len(_tokens(adapter, other)) == 1
        general = "give a word of one token, with its leading space, or a token id"
        raise InputError(
            f"`{name}` has {word!r}, which is {len(tokens)} tokens to the tokenizer ({' '.join(map(repr, pieces))}): "
            f"{f'{other!r} is one token: give that' if fits else general}"
        )
    return int(tokens[0])


def _tokens(adapter: Adapter, word: str) -> list[int]:
    """The token ids of a word, without BOS."""
    tokens = [] if not word else adapter.to_tokens([word])[0][0].tolist()
    return tokens[1:] if tokens and tokens[0] == adapter.special_ids()[0] else tokens
