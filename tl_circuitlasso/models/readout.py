"""The target's columns: what each kept sample says of the behaviour to be explained."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.targets import LogitDiff, Target
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import principal_directions
from tl_circuitlasso.models.metric import answer_difference

_CHUNK = 4096  # vocabulary entries whose Gram is formed at once


def target_site(target: Target) -> Site:
    """The node that stands for the target: `logits` where the model's own logits are read, else `target`."""
    return Site("logits") if target is None or isinstance(target, LogitDiff) else Site("target")


def wanted(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """The activations that `columns` reads."""
    if target is None:
        return (adapter.final, "scale.final")
    return ("logits",) if isinstance(target, LogitDiff) else ()


def last_only(keep: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Of each prompt's kept positions the last: where a per-prompt target is read by default."""
    return keep & (keep.flip(1).cumsum(1).flip(1) == 1)


def logit_metric(adapter: Adapter) -> Float[Tensor, "d_model coord"]:
    """A d_model-wide stand-in for the logits: x -> x L keeps every distance between logits, up to a shift of all.

    Logits enter a prediction only by their differences over the vocabulary, so the Gram of the centred unembedding
    C = W_U (I - 11'/V) says it all: L L' = C C'.
    """
    weight, _ = adapter.unembed()
    centre = weight.double().mean(1, keepdim=True)
    one_output = weight.shape[1] == 1  # a regression model: its single number is not defined up to a shift
    gram = torch.zeros(weight.shape[0], weight.shape[0], dtype=torch.float64, device=weight.device)
    for part in weight.split(_CHUNK, dim=1):
        block = part.double() if one_output else part.double() - centre
        gram += block @ block.T
    values, vectors = torch.linalg.eigh(gram)
    useful = values > 1e-12 * values.max().clamp(min=1e-300)
    return (vectors[:, useful] * values[useful].sqrt()).flip(1).float()


def fit(
    adapter: Adapter, acts: Mapping[str, Tensor], keep: Bool[Tensor, "batch pos"], directions: int = 32
) -> Float[Tensor, "d_model column"]:
    """The leading directions of the logits over the pilot, as a map from the normalised residual stream."""
    metric = logit_metric(adapter)
    seen = columns(adapter, acts, keep, None, torch.arange(keep.shape[0]), metric)
    return metric @ principal_directions(seen, directions).to(metric)


def columns(
    adapter: Adapter,
    acts: Mapping[str, Tensor],
    keep: Bool[Tensor, "batch pos"],
    target: Target,
    prompts: Int[Tensor, " batch"],
    metric: Float[Tensor, "d_model coord"] | None,
) -> Float[Tensor, "sample column"]:
    """The target's value at every kept sample; `prompts` are the batch's prompt numbers in the data set."""
    if target is None:
        assert metric is not None
        final = acts[adapter.final] / acts["scale.final"]
        return final[keep] @ metric.to(final)
    if isinstance(target, LogitDiff):
        return answer_difference(acts["logits"], target, prompts)[keep][:, None]
    values = target.y[prompts.cpu()].to(keep.device)
    return values.double()[:, None].expand(keep.shape)[keep][:, None]
