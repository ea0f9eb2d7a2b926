"""What a source whose edges are cut carries in place of its activation, where that isn't another prompt's: means.

One convention for everything that ablates, so that a graph scored by means and a circuit run with means agree: averages
are over the clean prompts unless the corrupted ones are asked for, pads are left out, and with `input_node="embed"`
learned positions aren't part of the input, so they stay.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tl_circuitlasso.models import Adapter, Batch
from tl_circuitlasso.models.pairs import Pairs
from tl_circuitlasso.models.patching import Written, learned_positions, record


def mean_written(data: Pairs, *, over: str, input_node: str, everywhere: bool = False) -> Written:
    """The mean of what each component writes, at each position (1, pos, ...) or, `everywhere`, at all (1, 1, ...).

    `over` is "clean" or "corrupted"; learned positions are part of the input only with input_node="resid". One forward
    pass per prompt.
    """
    total, count = None, torch.zeros(1, data.width, dtype=torch.float64, device=data.adapter.device)
    for batch in _over(data, over):
        written = record(data.adapter, batch.tokens, batch.mask)
        if (positions := kept_positions(data.adapter, batch, input_node)) is not None:
            written = replace(written, input=written.input - positions)
        summed = written.map(partial(_masked_sum, mask=batch.mask))
        total = summed if total is None else total.map(torch.add, summed)
        count += batch.mask.sum(0, keepdim=True)
    assert total is not None  # an empty data set is refused
    if everywhere:
        total, count = total.map(lambda part: part.sum(1, keepdim=True)), count.sum(1, keepdim=True)
    dtype = data.adapter.compute_dtype
    count = count.clamp_min(1)
    return total.map(lambda part: (part / count.to(part.device).view(1, -1, *[1] * (part.ndim - 2))).to(dtype))


def zeros_written(adapter: Adapter) -> Written:
    """Nothing, from every component."""
    shape = adapter.shape
    wide = torch.zeros(1, 1, shape.d_model, dtype=adapter.compute_dtype, device=adapter.device)
    heads = wide.new_zeros(1, 1, shape.n_heads, shape.d_head)
    of_heads, of_mlps = (tuple(part.to(place) for place in adapter.places) for part in (heads, wide))
    return Written(wide, of_heads, () if shape.attn_only else of_mlps)


def for_batch(adapter: Adapter, values: Written, batch: Batch, input_node: str) -> Written:
    """Values of `mean_written` or `zeros_written` for every prompt of a batch, learned positions put back."""
    values = values.map(lambda part: part.expand(*batch.tokens.shape, *part.shape[2:]))
    positions = kept_positions(adapter, batch, input_node)
    return values if positions is None else replace(values, input=values.input + positions)


def kept_positions(adapter: Adapter, batch: Batch, input_node: str) -> Tensor | None:
    """Learned positions where they aren't part of the input node and there are any, else None."""
    return learned_positions(adapter, batch.tokens, batch.mask) if input_node == "embed" else None


def _over(data: Pairs, over: str) -> Iterator[Batch]:
    for clean, corrupted in data:
        yield clean if over == "clean" else corrupted


def _masked_sum(part: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(part.device)
    return (part.double() * mask.view(*mask.shape, *[1] * (part.ndim - 2))).sum(0, keepdim=True)
