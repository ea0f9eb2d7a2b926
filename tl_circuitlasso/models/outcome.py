"""What a sweep measures at its end: directions of the target, and the cost of moving along them.

| target          | directions of the final residual stream            | cost of a change                     |
|-----------------|-----------------------------------------------------|--------------------------------------|
| logits, <= 32   | every column of W_U                                 | KL to the model's prediction, in nats |
| logits, more    | own top token minus the partner's top token         | the same between these two tokens     |
| one logit       | the column of W_U                                   | absolute change                      |
| LogitDiff       | correct minus incorrect column                      | absolute change                      |
| Labels          | the columns of a linear probe on the final stream   | KL to the probe's prediction, in nats |
| Values          | a linear probe                                      | absolute change                      |

A component that moves all logits without moving the prediction costs nothing and gets no edge.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.metric import check_answers
from tl_circuitlasso.models.sweep import Pairs
from tl_circuitlasso.targets import LogitDiff, Target, Values, answers_mean

FEW_LOGITS = 32  # up to so many logits are all followed; of a larger vocabulary, the two that the pair is about


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear read-out of the normalised final residual stream: x @ weight + bias."""

    weight: Float[Tensor, "d_model column"]
    bias: Float[Tensor, " column"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The target's directions for every pair and its value at the pair's own prompt.

    base: logits at the own prompt before any soft cap; None where the cost is the absolute change.
    """

    directions: Float[Tensor, "pair direction d_model"]
    base: Float[Tensor, "pair direction"] | None
    cap: float | None = None

    def cost(self, change: Float[Tensor, "pair direction *edges"]) -> Float[Tensor, "pair *edges"]:
        """What a change of the target costs each pair: KL(softmax(z) || softmax(z + change)) or |change|."""
        if self.base is None:
            return change.abs().sum(1)
        base = self.base.view(*self.base.shape, *[1] * (change.ndim - 2))
        before, after = (self._log_softmax(logits) for logits in (base, base + change))
        return (before.exp() * (before - after)).sum(1).clamp_min(0)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:  # the difference of two logits: the second is 0
            logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)
        capped = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return capped.log_softmax(1)


def wanted(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """The activations that `outcome` reads beside the sweep's."""
    final = f"blocks.{adapter.shape.n_layers - 1}.hook_resid_post"
    return ("logits", final) if target is None else (final,)


def count(adapter: Adapter, target: Target, probe: Probe | None) -> int:
    """How many directions `outcome` follows, at most."""
    if target is None:
        vocabulary = adapter.unembed()[0].shape[1]
        return vocabulary if vocabulary <= FEW_LOGITS else 2
    return 1 if probe is None else probe.weight.shape[1]


def outcome(
    adapter: Adapter,
    acts: Mapping[str, Tensor],
    pairs: Pairs,
    target: Target,
    prompts: Int[Tensor, " batch"],
    probe: Probe | None,
) -> Outcome:
    """Directions and base values of the target for every pair."""
    weight, bias = adapter.unembed()
    if target is None:
        return _of_logits(adapter, acts, pairs, weight, bias)
    if isinstance(target, LogitDiff):
        check_answers(target, weight.shape[1])
        right, wrong = (_answer_column(weight, ids[pairs.own.cpu()]) for ids in target.ids(prompts))
        return Outcome((right - wrong)[:, None], None)
    assert probe is not None
    directions = probe.weight.T.to(weight).expand(len(pairs.own), -1, -1)
    if isinstance(target, Values):
        return Outcome(directions, None)
    stream = _final(adapter, acts, pairs)
    return Outcome(directions, stream @ probe.weight.to(stream) + probe.bias.to(stream))


def _answer_column(
    weight: Float[Tensor, "d_model vocab"], ids: Int[Tensor, "pair answer"]
) -> Float[Tensor, "pair d_model"]:
    """The unembedding's column of each pair's answer, of several their mean."""
    ids = ids.to(weight.device)
    return answers_mean(weight.T[ids.clamp_min(0)], ids)


def _final(adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairs) -> Float[Tensor, "pair d_model"]:
    stream = acts[f"blocks.{adapter.shape.n_layers - 1}.hook_resid_post"] / acts["scale.final"]
    return stream[pairs.own, pairs.position]


def _of_logits(adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairs, weight: Tensor, bias: Tensor) -> Outcome:
    if weight.shape[1] == 1:
        return Outcome(weight.T.expand(len(pairs.own), -1, -1), None)
    stream, cap = _final(adapter, acts, pairs), adapter.logit_soft_cap
    if weight.shape[1] <= FEW_LOGITS:
        return Outcome(weight.T.expand(len(pairs.own), -1, -1), stream @ weight + bias, cap)
    own, other = contrast(*(acts["logits"][rows, pairs.position] for rows in (pairs.own, pairs.partner)))
    tokens = torch.stack([own, other], dim=1)
    directions = weight.T[tokens]
    if cap is not None:
        return Outcome(directions, torch.einsum("skd,sd->sk", directions, stream) + bias[tokens], cap)
    difference = directions[:, :1] - directions[:, 1:]
    return Outcome(difference, torch.einsum("skd,sd->sk", difference, stream) + (bias[own] - bias[other])[:, None])


def contrast(
    own: Float[Tensor, "pair vocab"], partner: Float[Tensor, "pair vocab"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """The two tokens that a pair is about: the own top token and the partner's, or the own runner-up if they agree."""
    first, second = own.topk(2, dim=-1).indices.unbind(-1)
    theirs = partner.argmax(-1)
    return first, torch.where(theirs == first, second, theirs)
