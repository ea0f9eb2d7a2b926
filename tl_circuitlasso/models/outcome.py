"""What a sweep measures at its end: directions of the target, and the cost of moving along them.

| target          | directions of the final residual stream            | cost of a change                     |
|-----------------|-----------------------------------------------------|--------------------------------------|
| logits, <= 32   | every column of W_U, less their mean                | KL to the model's prediction, in nats |
| logits, more    | the token that loses most minus the one that gains, | the same between these two tokens,    |
|                 | and a random direction of the others                | and half its square                   |
| one logit       | the column of W_U                                   | absolute change                      |
| LogitDiff       | correct minus incorrect column                      | absolute change                      |
| Labels          | the columns of a linear probe, less their mean      | KL to the probe's prediction, in nats |
| Values          | a linear probe                                      | absolute change                      |

A component that moves all logits without moving the prediction costs nothing and gets no edge. Of a large vocabulary
the two tokens are those that contribute most to the divergence between the two prompts' predictions. What happens among
the others, and between them and the two, is seen to second order: with p the prediction, the two tokens one class of
mean column w, and signs s drawn at random,

    KL = (p_a + p_b) KL_ab + 1/2 E (sum_i s_i sqrt(p_i) (w_i - w_mean) . x)^2 + ...
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.targets import LogitDiff, Target, Values, answers_mean
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.metric import check_answers
from tl_circuitlasso.models.views import Pairing

FEW_LOGITS = 32  # up to so many logits are all followed; of a larger vocabulary, the two that the pair is about
AT_ONCE = 64  # predictions over a large vocabulary that are compared together


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear read-out of the normalised final residual stream: x @ weight + bias."""

    weight: Float[Tensor, "d_model column"]
    bias: Float[Tensor, " column"]


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of a batch: the target, the places of the batch's prompts among all, and the target's probe."""

    target: Target
    prompts: Int[Tensor, " batch"]
    probe: Probe | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The target's directions for every pair and its value at the pair's own prompt.

    base: logits at the own prompt before any soft cap; None where the cost is the absolute change. mass: the
    probability that the two tokens of a pair have between them; the last direction is then that of all others.
    """

    directions: Float[Tensor, "pair direction d_model"]
    base: Float[Tensor, "pair logit"] | None
    cap: float | None = None
    mass: Float[Tensor, " pair"] | None = None

    def reads(self, moved: Float[Tensor, "pair d_model"]) -> Float[Tensor, "pair direction"]:
        """How the target changes when the normalised final stream moves."""
        if self.directions.stride(0) == 0:  # the same directions for every pair, held once
            return moved @ self.directions[0].T
        return torch.einsum("skd,sd->sk", self.directions, moved)

    def cost(self, change: Float[Tensor, "pair direction *edges"]) -> Float[Tensor, "pair *edges"]:
        """What a change of the target costs each pair: KL(softmax(z) || softmax(z + change)) or |change|."""
        if self.base is None:
            return change.abs().sum(1)
        if self.mass is not None:
            mass = self.mass.view(-1, *[1] * (change.ndim - 2))
            return mass * self._divergence(change[:, :-1]) + change[:, -1].square() / 2
        return self._divergence(change)

    def judged(self, change: Float[Tensor, "pair direction *edges"]) -> Float[Tensor, "pair *edges"]:
        """What edges are chosen by: the cost, or the square of a number's change, which grows as nats do."""
        return change.square().sum(1) if self.base is None else self.cost(change)

    def _divergence(self, change: Float[Tensor, "pair logit *edges"]) -> Float[Tensor, "pair *edges"]:
        assert self.base is not None
        base = self.base.view(*self.base.shape, *[1] * (change.ndim - 2))
        before, after = (self._log_softmax(logits) for logits in (base, base + change))
        return (before.exp() * (before - after)).sum(1).clamp_min(0)

    def chances(self, total: Float[Tensor, "pair direction"]) -> Float[Tensor, "pair outcome"] | None:
        """The prediction, the mean of what it is before and after the `total` change; None where there is none."""
        if self.base is None:
            return None
        total = total if self.mass is None else total[:, :-1]
        return (self._log_softmax(self.base).exp() + self._log_softmax(self.base + total).exp()) / 2

    def in_nats(
        self,
        change: Float[Tensor, "pair direction head column"],
        chances: Float[Tensor, "pair outcome"] | None,
    ) -> Float[Tensor, "pair direction head column"]:
        """The change in coordinates whose squares add up to its cost, to second order; a number's stay as they are.

        KL(p || p + dp) = 1/2 sum_k p_k (dz_k - sum_j p_j dz_j)^2 + ...
        """
        if chances is None:
            return change
        if self.mass is not None:
            two, others = self._of_classes(change[:, :-1], chances), change[:, -1:] / 2**0.5
            return torch.cat([two * self.mass.sqrt().view(-1, 1, 1, 1), others], dim=1)
        return self._of_classes(change, chances)

    @staticmethod
    def _of_classes(change: Tensor, chances: Float[Tensor, "pair outcome"]) -> Tensor:
        if change.shape[1] == 1:
            return change * (chances.prod(1) / 2).sqrt().view(-1, 1, 1, 1)
        p = chances[:, :, None, None]
        return (p / 2).sqrt() * (change - (p * change).sum(1, keepdim=True))

    def _log_softmax(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:  # the difference of two logits: the second is 0
            logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)
        capped = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return capped.log_softmax(1)


def wanted(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """The activations that `outcome` reads beside the sweep's."""
    final = adapter.final
    return ("logits", final) if target is None else (final,)


def is_number(adapter: Adapter, target: Target) -> bool:
    """Whether the target is one number a prompt, whose change has a sign."""
    return isinstance(target, LogitDiff | Values) or (target is None and adapter.shape.d_vocab_out == 1)


def count(adapter: Adapter, target: Target, probe: Probe | None) -> int:
    """How many directions `outcome` follows."""
    if target is None:
        vocabulary = adapter.shape.d_vocab_out
        return vocabulary if vocabulary <= FEW_LOGITS else 2 if adapter.logit_soft_cap is None else 3
    return 1 if probe is None else probe.weight.shape[1]


def outcome(
    adapter: Adapter,
    acts: Mapping[str, Tensor],
    pairs: Pairing,
    question: Question,
    *,
    few: int = FEW_LOGITS,
    generator: torch.Generator | None = None,
) -> Outcome:
    """Directions and base values of the target for every pair; all logits are followed if there are at most `few`,
    else `generator` draws a direction of those that aren't."""
    target, probe = question.target, question.probe
    if target is None:
        return _of_logits(adapter, acts, pairs, few, generator)
    stream = _of_own(adapter, acts, pairs)
    if isinstance(target, LogitDiff):
        check_answers(target, adapter.shape.d_vocab_out)
        right, wrong = (_answer_column(adapter, ids[pairs.own.cpu()]) for ids in target.ids(question.prompts))
        return Outcome((right - wrong)[:, None], None)
    assert probe is not None
    directions = probe.weight.T.to(stream).expand(len(pairs.own), -1, -1)
    if isinstance(target, Values):
        return Outcome(directions, None)
    directions = directions - directions.mean(1, keepdim=True)
    return Outcome(directions, stream @ probe.weight.to(stream) + probe.bias.to(stream))


def _answer_column(adapter: Adapter, ids: Int[Tensor, "pair answer"]) -> Float[Tensor, "pair d_model"]:
    """The unembedding's column of each pair's answer, of several their mean."""
    used, places = ids.clamp_min(0).unique(return_inverse=True)
    columns = adapter.unembed(used)[0].T
    return answers_mean(columns[places.to(columns.device)], ids.to(columns.device))


def _of_own(adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing) -> Float[Tensor, "pair d_model"]:
    return _final(adapter, acts, pairs.own, pairs.position)


def _final(
    adapter: Adapter, acts: Mapping[str, Tensor], rows: Int[Tensor, " pair"], places: Int[Tensor, " pair"]
) -> Float[Tensor, "pair d_model"]:
    """The normalised final residual stream."""
    return acts[adapter.final][rows, places] / acts["scale.final"][rows, places]


def _of_logits(
    adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing, few: int, generator: torch.Generator | None
) -> Outcome:
    weight, bias = adapter.unembed()
    if weight.shape[1] == 1:
        return Outcome(weight.T.expand(len(pairs), -1, -1), None)
    stream, cap = _of_own(adapter, acts, pairs), adapter.logit_soft_cap
    if weight.shape[1] <= few:
        columns = weight if cap is not None else weight - weight.mean(1, keepdim=True)
        return Outcome(columns.T.expand(len(pairs), -1, -1), stream @ weight + bias, cap)
    own, partner = (acts["logits"][rows, pairs.position] for rows in (pairs.own, pairs.partner))
    loses, gains = contrast(own, partner)
    tokens = torch.stack([loses, gains], dim=1)
    chances = own.softmax(-1)
    others = direction_of_others(weight, own, chances, tokens, cap, generator)
    directions = weight.T[tokens]
    mass = chances.gather(1, tokens).sum(1)
    if cap is not None:
        base = torch.einsum("skd,sd->sk", directions, stream) + bias[tokens]
        return Outcome(torch.cat([directions, others], dim=1), base, cap, mass)
    difference = directions[:, :1] - directions[:, 1:]
    base = torch.einsum("skd,sd->sk", difference, stream) + (bias[loses] - bias[gains])[:, None]
    return Outcome(torch.cat([difference, others], dim=1), base, mass=mass)


def direction_of_others(
    weight: Float[Tensor, "d_model vocab"],
    logits: Float[Tensor, "pair vocab"],
    chances: Float[Tensor, "pair vocab"],
    tokens: Int[Tensor, "pair two"],
    cap: float | None,
    generator: torch.Generator | None,
) -> Float[Tensor, "pair 1 d_model"]:
    """A random direction whose squared change is in the mean twice the divergence of all but the two `tokens`, which
    count as one class."""
    two = chances.gather(1, tokens)
    signs = torch.randint(0, 2, (len(logits), logits.shape[1] + 1), generator=generator).to(logits) * 2 - 1
    share = chances.sqrt() * signs[:, :-1]
    share = share.scatter(1, tokens, signs[:, -1:] * two / two.sum(1, keepdim=True).sqrt())
    total = (share.scatter(1, tokens, 0.0)).sum(1, keepdim=True) + signs[:, -1:] * two.sum(1, keepdim=True).sqrt()
    share = share - total * chances
    if cap is not None:
        share = share * (1 - (logits / cap).square())
    return (share @ weight.T).unsqueeze(1)


def apart(adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing, question: Question) -> Float[Tensor, " pair"]:
    """How far the target differs between the two prompts of each pair, in the unit of its cost."""
    if question.target is None and adapter.shape.d_vocab_out > FEW_LOGITS:
        found = []
        for own, partner, place in zip(*(rows.split(AT_ONCE) for rows in (*pairs.sides, pairs.position))):
            found.append(_kl(acts["logits"][own, place], acts["logits"][partner, place]))
        return torch.cat(found)
    goal = outcome(adapter, acts, pairs, question)
    return goal.cost(goal.reads(_final(adapter, acts, pairs.partner, pairs.position) - _of_own(adapter, acts, pairs)))


def divergence(
    logits: Float[Tensor, "batch pos vocab"], own: Int[Tensor, " pair"], partner: Int[Tensor, " pair"]
) -> Float[Tensor, "pair pos"]:
    """KL(own || partner) of the predictions of two prompts at every position, in nats."""
    # row by row: a batch's logits may fill the memory already
    found = [_kl(logits[one], logits[other]) for one, other in zip(own.tolist(), partner.tolist())]
    return torch.stack(found) if found else logits.new_zeros(0, logits.shape[1])


def _kl(own: Float[Tensor, "place vocab"], partner: Float[Tensor, "place vocab"]) -> Float[Tensor, " place"]:
    before, after = own.log_softmax(-1), partner.log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp_min(0)


def contrast(
    own: Float[Tensor, "pair vocab"], partner: Float[Tensor, "pair vocab"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """The two tokens that a pair is about: the largest p log(p / p') and the largest p' log(p' / p); the two likeliest
    where the predictions agree.

    >>> own, partner = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log(), torch.tensor([[0.6, 0.2, 0.02, 0.18]]).log()
    >>> [part.tolist() for part in contrast(own, partner)]
    [[2], [3]]
    """
    before, after = own.log_softmax(-1), partner.log_softmax(-1)
    change = before - after
    loses, gains = (before.exp() * change).argmax(-1), (after.exp() * -change).argmax(-1)
    likeliest = before.topk(2, dim=-1).indices
    alike = loses == gains
    top, second = likeliest.unbind(-1)
    return torch.where(alike, top, loses), torch.where(alike, second, gains)
