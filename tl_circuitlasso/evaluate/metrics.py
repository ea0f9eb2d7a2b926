"""What a circuit should keep high: metrics as `metric(logits, rows)`, for `evaluate` and for `baselines`.

A metric returns the sum over the batch's rows; `rows` are the prompts' numbers in the data set. Higher is better, so
losses and divergences are negative. Those made here read each prompt's last real token unless told otherwise.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.metric import Metric as Metric
from tl_circuitlasso.models.metric import PromptMetric as PromptMetric

Ids = Tensor | Sequence[int]
Places = int | Tensor | Sequence[int]


def logit_diff(correct: Ids, incorrect: Ids, *, position: Places = -1) -> PromptMetric:
    """logit[correct] - logit[incorrect] of each prompt.

    Parameters
    ----------
    correct, incorrect: one token id per prompt.
    position: the column where it is read: one for all prompts (-1 is each one's last real token), or one per prompt.

    >>> metric = logit_diff([1], [0])
    >>> float(metric(torch.tensor([[[1.0, 3.0]]]), torch.tensor([0])))
    2.0

    Raises
    ------
    InputError: ids that aren't one integer per prompt.
    """
    right, wrong, place = _ids(correct, "correct"), _ids(incorrect, "incorrect"), _place(position)
    _same_length(right, wrong)

    def each(logits: Tensor, rows: Tensor) -> Tensor:
        last = place(logits, rows)
        return _pick(last, right[rows]) - _pick(last, wrong[rows])

    return PromptMetric(each, _single(position))


def prob_diff(correct: Ids, incorrect: Ids, *, position: Places = -1) -> PromptMetric:
    """P(correct) - P(incorrect) of each prompt; arguments as in `logit_diff`.

    >>> metric = prob_diff([1], [0])
    >>> float(metric(torch.tensor([[[0.0, 0.0]]]), torch.tensor([0])))
    0.0
    """
    right, wrong, place = _ids(correct, "correct"), _ids(incorrect, "incorrect"), _place(position)
    _same_length(right, wrong)

    def each(logits: Tensor, rows: Tensor) -> Tensor:
        probability = place(logits, rows).softmax(-1)
        return _pick(probability, right[rows]) - _pick(probability, wrong[rows])

    return PromptMetric(each, _single(position))


def cross_entropy(correct: Ids, *, position: Places = -1) -> PromptMetric:
    """log P(correct), the negative cross-entropy in nats, of each prompt; arguments as in `logit_diff`.

    >>> metric = cross_entropy([1])
    >>> round(float(metric(torch.tensor([[[0.0, 0.0]]]), torch.tensor([0]))), 3)
    -0.693
    """
    right, place = _ids(correct, "correct"), _place(position)
    return PromptMetric(lambda logits, rows: _pick(place(logits, rows).log_softmax(-1), right[rows]), _single(position))


def accuracy(correct: Ids, *, position: Places = -1) -> PromptMetric:
    """1 where the largest logit is the correct one's, else 0. It has no derivative: not for `baselines`.

    >>> metric = accuracy([1])
    >>> float(metric(torch.tensor([[[1.0, 3.0]]]), torch.tensor([0])))
    1.0
    """
    right, place = _ids(correct, "correct"), _place(position)

    def each(logits: Tensor, rows: Tensor) -> Tensor:
        return (place(logits, rows).argmax(-1) == right[rows].to(logits.device)).float()

    return PromptMetric(each, _single(position))


def kl(reference: Float[Tensor, "prompt vocab"], *, position: Places = -1) -> PromptMetric:
    """-KL(reference || run) in nats, from the reference's logits (those of the whole model) at the same position.

    >>> metric = kl(torch.tensor([[1.0, 3.0]]))
    >>> float(metric(torch.tensor([[[1.0, 3.0]]]), torch.tensor([0])))
    0.0
    """
    if reference.ndim != 2:
        raise InputError(f"`reference` has shape {tuple(reference.shape)}: give logits (prompt, vocab) at one position")
    place, expected = _place(position), reference.detach().log_softmax(-1)

    def each(logits: Tensor, rows: Tensor) -> Tensor:
        mine, own = place(logits, rows).log_softmax(-1), expected[rows.to(expected.device)].to(logits.device)
        return (own.exp() * (mine - own)).sum(-1)

    return PromptMetric(each, _single(position))


def next_token(tokens: Int[Tensor, "prompt pos"], mask: Bool[Tensor, "prompt pos"] | None = None) -> PromptMetric:
    """Mean log P(next token) in nats over a prompt's real positions: the negative language-modelling loss.

    >>> metric = next_token(torch.tensor([[0, 1]]))
    >>> round(float(metric(torch.zeros(1, 2, 2), torch.tensor([0]))), 3)
    -0.693
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()

    def each(logits: Tensor, rows: Tensor) -> Tensor:
        wanted, counts = tokens[rows, 1:].to(logits.device), (real[rows, 1:] & real[rows, :-1]).to(logits)
        found = logits[:, :-1].log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        return (found * counts).sum(1) / counts.sum(1).clamp_min(1)

    return PromptMetric(each)


def _single(position: Places) -> int | None:
    return position if isinstance(position, int) else None


def _place(position: Places) -> Metric:
    if isinstance(position, int):
        return lambda logits, rows: logits[:, position]
    places = _ids(position, "position")
    return lambda logits, rows: logits[torch.arange(len(logits)), places[rows]]


def _pick(values: Float[Tensor, "batch vocab"], ids: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    return values.gather(1, ids[:, None].to(values.device))[:, 0]


def _ids(given: Ids, name: str) -> Int[Tensor, " prompt"]:
    try:
        ids = torch.as_tensor(given).cpu()
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` isn't a list of integers ({error}): give one per prompt") from None
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"`{name}` has shape {tuple(ids.shape)} and dtype {ids.dtype}: give one integer per prompt")
    return ids.long()


def _same_length(correct: Tensor, incorrect: Tensor) -> None:
    if len(correct) != len(incorrect):
        raise InputError(f"`correct` has {len(correct)} ids, `incorrect` {len(incorrect)}: give one of each per prompt")
