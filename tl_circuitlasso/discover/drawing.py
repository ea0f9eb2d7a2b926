"""Which of many prompts are looked at: drawn by what the model says on them, so that what is rare is seen.

All prompts go through the model once, for their outputs alone. Prompts of one kind of output (the same likeliest token,
the same class, a similar number) form a stratum; each stratum gives some prompts, however small it is, and each drawn
prompt stands for size / drawn prompts of its stratum, so that means over the sample are means over all.
"""

from dataclasses import dataclass
from operator import itemgetter

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import Labels, LogitDiff, Target, Values, check_length
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.metric import answer_difference
from tl_circuitlasso.models.pairs import last_places
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.progress import bar as counting

AT_LEAST = 16  # prompts of each stratum, as far as there are so many and room for them
BINS = 8  # strata of a target that is a number, by its quantiles


@dataclass(frozen=True, eq=False)
class Drawn:
    """The numbers of the prompts that were drawn, ascending, and how many each stands for, 1 in the mean."""

    rows: Int[Tensor, " drawn"]
    weight: Float[Tensor, " drawn"]
    strata: int
    forward_passes: int


def draw_by_output(
    adapter: Adapter, prompts: Prompts, target: Target, count: int, seed: int, *, progress: bool, ranks: Ranks = ALONE
) -> Drawn:
    """`count` of the prompts, drawn at random within strata of equal or similar output.

    Raises
    ------
    InputError: a target of the wrong length.
    """
    assert prompts.n_prompts is not None
    check_length(target, prompts.n_prompts)
    said, passes = _outputs(adapter, prompts, target, progress, ranks)
    strata = said.unique(return_inverse=True)[1]
    sizes = strata.bincount()
    quota = _quotas(sizes, count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(strata), generator=generator)
    order = order[strata[order].argsort(stable=True)]
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[strata[order]]
    rows = order[place < quota[strata[order]]].sort().values
    weight = (sizes / quota.clamp_min(1))[strata[rows]].double()
    return Drawn(rows, weight / weight.mean(), len(sizes), passes)


def _quotas(sizes: Int[Tensor, " stratum"], count: int) -> Int[Tensor, " stratum"]:
    """How many of each stratum: the same small number of all where there's room, the rest in proportion.

    >>> _quotas(torch.tensor([990, 10]), 256).tolist()
    [246, 10]
    """
    least = sizes.clamp_max(max(1, min(AT_LEAST, count // len(sizes))))
    if int(least.sum()) >= count:  # more strata than prompts to draw: the largest give one each
        chosen = torch.zeros_like(sizes)
        chosen[sizes.argsort(descending=True, stable=True)[:count]] = 1
        return chosen
    share = (sizes - least).double() * (count - int(least.sum())) / max(int((sizes - least).sum()), 1)
    quota = least + share.floor().long()
    missing = count - int(quota.sum())
    quota[(share - share.floor()).argsort(descending=True, stable=True)[:missing]] += 1
    return quota


def _outputs(
    adapter: Adapter, prompts: Prompts, target: Target, progress: bool, ranks: Ranks
) -> tuple[Shaped[Tensor, " prompt"], int]:
    """A number per prompt that tells kinds of outputs apart, and the forward passes that it took."""
    if isinstance(target, Labels):
        return target.y, 0
    if isinstance(target, Values):
        return _binned(target.y), 0
    bar = counting(prompts, desc="outputs", unit="batch", progress=progress)
    found = ranks.map(bar, lambda batch: {"said": _said(adapter, batch, target)}, itemgetter("said"))
    said = torch.cat(found)
    numbers = isinstance(target, LogitDiff) or said.is_floating_point()
    return (_binned(said) if numbers else said), len(found)


def _said(adapter: Adapter, batch: Batch, target: Target) -> Shaped[Tensor, " batch"]:
    """The likeliest token, the logit difference or the one number at each prompt's last sample."""
    logits = adapter.run(batch.tokens, batch.mask, ["logits"])["logits"]
    keep = torch.where(batch.keep.any(1, keepdim=True), batch.keep, batch.mask)
    rows = torch.arange(len(logits), device=logits.device)
    last = logits[rows, last_places(keep)].cpu()
    if isinstance(target, LogitDiff):
        here = torch.arange(batch.start, batch.start + len(batch.tokens))
        return answer_difference(last[:, None], target, here)[:, 0]
    return last[:, 0] if last.shape[1] == 1 else last.argmax(-1)


def _binned(values: Float[Tensor, " prompt"]) -> Int[Tensor, " prompt"]:
    edges = values.double().quantile(torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    return torch.bucketize(values.double(), edges.unique())
