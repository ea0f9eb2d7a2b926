"""Measuring circuits on a model: every edge outside a circuit carries what its source does in an ablated run.

`Intervention` holds what stays the same over circuits (model, prompts, metric, ablation); `measure` runs any number of
circuits, several in one forward pass where memory allows, and gives each prompt's metric.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.data import Batch, Pairs, Prompts, pairs
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, as_circuits, prune
from tl_circuitlasso.evaluate.metrics import Metric, PromptMetric
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated, from_run, from_values
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.patching import Written, learned_positions, record

ABLATIONS = ("patch", "zero", "mean", "mean-all")
AT_ONCE = 256 << 20  # bytes of one forward pass over copies of the prompts, as estimated


@dataclass(frozen=True, eq=False)
class Intervention:
    """A model, prompts and a metric, and what cut edges carry.

    Attributes
    ----------
    ablation: "patch" (what the source does on the paired corrupted prompt), "zero", "mean" (its mean over prompts at
        the same position) or "mean-all" (its mean over prompts and positions).
    mean_over: whether means are over the "clean" prompts or the "corrupted" ones.
    input_node: whether `input` is the token embedding alone ("embed", as in EAP-IG), so that learned positions are
        never ablated, or everything in front of the first layer ("resid"). The same for ablation="patch".
    """

    pairs: Pairs
    metric: Metric
    ablation: str
    mean_over: str
    input_node: str

    @property
    def adapter(self) -> Adapter:
        return self.pairs.adapter


def intervention(
    model: Any,
    clean: Prompts,
    corrupted: Prompts | None,
    metric: Metric,
    ablation: str = "patch",
    *,
    attention_mask: Tensor | None = None,
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
) -> Intervention:
    """The checked arguments of every function that measures by intervention.

    Raises
    ------
    InputError: unknown names, missing corrupted prompts, prompts of unequal length, no prompts, no callable metric.
    """
    _one_of("ablation", ablation, ABLATIONS)
    _one_of("mean_over", mean_over, ("clean", "corrupted"))
    _one_of("input_node", input_node, ("embed", "resid"))
    if not callable(metric):
        raise InputError(
            f"`metric` is a {type(metric).__name__}: give a function metric(logits, rows) -> sum over rows"
        )
    if corrupted is None and (ablation == "patch" or (ablation.startswith("mean") and mean_over == "corrupted")):
        raise InputError("`corrupted` is missing: without corrupted prompts use ablation='mean' or 'zero'")
    data = pairs(model, clean, corrupted, attention_mask=attention_mask, batch_size=batch_size)
    return Intervention(data, metric, ablation, mean_over, input_node)


def _one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise InputError(f"`{name}` is {given!r}: write one of {', '.join(map(repr, known))}")


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """Each prompt's metric: of the model, with every edge cut, and of each circuit; forward passes per prompt."""

    model: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    circuits: Float[Tensor, "circuit prompt"]
    forward_passes: float


def measure(setup: Intervention, kept: EdgeMatrix) -> Measured:
    """The metric of the model, of the ablated model and of every circuit, pruned first.

    One forward pass for the model, one for the ablated activations (none for "zero"), one for each circuit; the full
    and the empty circuit cost nothing more.

    Raises
    ------
    InputError: a metric that isn't one finite number.
    """
    layout = EdgeLayout(setup.adapter.shape)
    kept = prune(kept, layout)
    full, empty = (kept == prune(layout.mask()[None], layout)).flatten(1).all(1), ~kept.flatten(1).any(1)
    partly = (~full & ~empty).nonzero().flatten()
    mean = None if not setup.ablation.startswith("mean") else _means(setup)
    model, ablated = torch.zeros(2, len(setup.pairs), dtype=torch.float64)
    circuits = torch.zeros(len(kept), len(setup.pairs), dtype=torch.float64)
    for batch in setup.pairs:
        cut = _ablated(setup, batch, mean)
        logits = setup.adapter.run(batch.clean, batch.mask, ["logits"])["logits"]
        model[batch.rows] = prompt_values(setup.metric, logits, batch, "the model")
        ablated[batch.rows] = prompt_values(setup.metric, cut.logits, batch, "the ablated model")
        for some in partly.split(_copies(setup.adapter, batch)):
            made = run_circuits(setup.adapter, batch.clean, batch.mask, as_circuits(kept[some], layout), cut)
            for circuit, logits in zip(some.tolist(), made):
                circuits[circuit, batch.rows] = prompt_values(setup.metric, logits, batch, "a circuit")
    circuits[full], circuits[empty] = model, ablated
    return Measured(model, ablated, circuits, 1.0 + (setup.ablation != "zero") + len(partly))


def _copies(adapter: Adapter, batch: Batch) -> int:
    shape = adapter.shape
    per_token = shape.d_vocab_out + shape.d_mlp + (6 + 3 * shape.n_heads // 4) * shape.d_model
    attention = shape.n_heads * batch.clean.shape[1]
    return max(1, AT_ONCE // (4 * batch.clean.numel() * (per_token + attention)))


def prompt_values(metric: Metric, logits: Tensor, batch: Batch, whose: str) -> Float[Tensor, " batch"]:
    """Each prompt's metric, asked for one prompt at a time; `whose` names the logits in messages.

    Raises
    ------
    InputError: not one finite number per prompt.
    """
    with torch.no_grad():
        if isinstance(metric, PromptMetric):
            values = metric.each(logits, batch.rows).double().cpu()
        else:
            values = torch.cat([_single(metric, logits[i : i + 1], batch.rows[i : i + 1]) for i in range(len(logits))])
    if not bool(values.isfinite().all()):
        prompt = int(batch.rows[int((~values.isfinite()).nonzero()[0])])
        raise InputError(
            f"`metric` is NaN or infinite for {whose} on prompt {prompt}: check the prompts and the metric"
        )
    return values


def _single(metric: Metric, logits: Tensor, rows: Tensor) -> Float[Tensor, "1"]:
    value: Any = metric(logits, rows)
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"`metric` returned {got} for one prompt: it must return one number, the sum over the rows")
    return value.double().cpu().reshape(1)


def changes(setup: Intervention) -> Float[Tensor, " source"]:
    """The mean over real positions of the norm of what each source writes less what it writes when ablated."""
    mean = None if not setup.ablation.startswith("mean") else _means(setup)
    total, count = torch.zeros(EdgeLayout(setup.adapter.shape).n_sources, dtype=torch.float64), 0
    for batch in setup.pairs:
        written = record(setup.adapter, batch.clean, batch.mask)
        difference = written.map(torch.sub, _ablated(setup, batch, mean).written)
        total += torch.cat([part[batch.mask].double().sum(0).cpu() for part in _norms(setup.adapter, difference)])
        count += int(batch.mask.sum())
    return total / count


def _norms(adapter: Adapter, parts: Written) -> Iterator[Float[Tensor, "batch pos source"]]:
    yield parts.input.norm(dim=-1, keepdim=True)
    for layer, heads in enumerate(parts.heads):
        weight = adapter.writer(layer)[0]
        grams = weight @ weight.transpose(1, 2)  # |z W| from z (W W') z, with no head written out
        yield torch.einsum("bphe,hef,bphf->bph", heads, grams, heads).clamp_min(0).sqrt()
        if parts.mlps:
            yield parts.mlps[layer].norm(dim=-1, keepdim=True)


# ---- what cut edges carry -------------------------------------------------------------------------------------------


def _ablated(setup: Intervention, batch: Batch, mean: Written | None) -> Ablated:
    if setup.ablation == "patch":
        return from_run(setup.adapter, batch.corrupted, batch.mask)
    values = _zeros(setup.adapter, batch) if mean is None else mean
    values = values.map(lambda part: part.expand(*batch.clean.shape, *part.shape[2:]))
    if (positions := _positions(setup, batch)) is not None:
        values = replace(values, input=values.input + positions)
    return from_values(setup.adapter, values)


def _zeros(adapter: Adapter, batch: Batch) -> Written:
    shape = adapter.shape
    wide = torch.zeros(1, 1, shape.d_model, dtype=adapter.compute_dtype, device=adapter.device)
    heads = wide.new_zeros(1, 1, shape.n_heads, shape.d_head)
    return Written(wide, (heads,) * shape.n_layers, () if shape.attn_only else (wide,) * shape.n_layers)


def _positions(setup: Intervention, batch: Batch) -> Tensor | None:
    return learned_positions(setup.adapter, batch.clean, batch.mask) if setup.input_node == "embed" else None


def _means(setup: Intervention) -> Written:
    """The mean of what each component writes, pads left out; learned positions only with input_node="resid"."""
    total, count = None, torch.zeros(1, setup.pairs.clean.shape[1], dtype=torch.float64, device=setup.adapter.device)
    for batch in _reference(setup):
        written = record(setup.adapter, batch.clean, batch.mask)
        if (positions := _positions(setup, batch)) is not None:
            written = replace(written, input=written.input - positions)
        summed = written.map(partial(_masked_sum, mask=batch.mask))
        total = summed if total is None else total.map(torch.add, summed)
        count += batch.mask.sum(0, keepdim=True)
    assert total is not None  # `pairs` refuses an empty data set
    if setup.ablation == "mean-all":
        total, count = total.map(lambda part: part.sum(1, keepdim=True)), count.sum(1, keepdim=True)
    dtype = setup.adapter.compute_dtype
    return total.map(lambda part: (part / count.clamp_min(1).view(1, -1, *[1] * (part.ndim - 2))).to(dtype))


def _reference(setup: Intervention) -> Iterator[Batch]:
    data = setup.pairs
    yield from data if setup.mean_over == "clean" else replace(data, clean=data.corrupted)


def _masked_sum(part: Tensor, mask: Tensor) -> Tensor:
    return (part.double() * mask.view(*mask.shape, *[1] * (part.ndim - 2))).sum(0, keepdim=True)
