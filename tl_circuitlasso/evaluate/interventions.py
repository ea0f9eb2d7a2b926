"""Measuring circuits on a model: every edge outside a circuit carries what its source does in an ablated run.

`Intervention` holds what stays the same over circuits (model, prompts, metric, ablation); `measure` runs any number of
circuits, several in one forward pass where memory allows, and gives each prompt's metric.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.baselines.means import for_batch, mean_written, zeros_written
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, as_circuits, prune
from tl_circuitlasso.evaluate.metrics import Metric, PromptMetric
from tl_circuitlasso.evaluate.optimal import Optimal, fit
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated, from_run, from_values
from tl_circuitlasso.models.pairs import PairBatch, Pairs, pairs_of
from tl_circuitlasso.models.patch import Circuits, run_circuits
from tl_circuitlasso.models.patching import Written, record
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar as counting
from tl_circuitlasso.progress import counted

ABLATIONS = ("patch", "zero", "mean", "mean-all", "optimal")
Ablation = str | Optimal
AT_ONCE = 256 << 20  # bytes of one forward pass over copies of the prompts, as estimated


@dataclass(frozen=True, eq=False)
class Intervention:
    """A model, prompts and a metric, and what cut edges carry.

    Attributes
    ----------
    ablation: "patch" (what the source does on the paired corrupted prompt), "zero", "mean" (its mean over prompts at
        the same position), "mean-all" (its mean over prompts and positions) or "optimal" (the constants that hurt the
        metric least, fitted for each circuit as `optimal` says).
    mean_over: whether means are over the "clean" prompts or the "corrupted" ones.
    input_node: whether `input` is the token embedding alone ("embed", as in EAP-IG), so that learned positions are
        never ablated, or everything in front of the first layer ("resid"). The same for ablation="patch".
    progress: whether what takes long says how far it is.
    """

    pairs: Pairs
    metric: Metric
    ablation: str
    mean_over: str
    input_node: str
    optimal: Optimal
    progress: bool = True

    @property
    def adapter(self) -> Adapter:
        return self.pairs.adapter


def intervention(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts,
    metric: Metric | LogitDiff,
    ablation: Ablation = "patch",
    *,
    attention_mask: Any = None,
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    progress: bool = True,
) -> Intervention:
    """The checked arguments of every function that measures by intervention.

    Raises
    ------
    InputError: unknown names, missing corrupted prompts, prompts of unequal length, no prompts, no callable metric.
    """
    how = ablation if isinstance(ablation, Optimal) else Optimal()
    ablation = "optimal" if isinstance(ablation, Optimal) else ablation
    _one_of("ablation", ablation, ABLATIONS)
    _one_of("mean_over", mean_over, ("clean", "corrupted"))
    _one_of("input_node", input_node, ("embed", "resid"))
    if corrupted is None and (ablation == "patch" or (ablation != "zero" and mean_over == "corrupted")):
        raise InputError(
            f"`corrupted` is missing: ablation={ablation!r} reads it; without corrupted prompts use ablation='mean', "
            "'mean-all', 'optimal' or 'zero', and means over the clean prompts"
        )
    data = pairs_of(model, clean, corrupted, attention_mask=attention_mask, batch_size=batch_size)
    return Intervention(data, data.metric(metric), ablation, mean_over, input_node, how, progress)


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


def measure(setup: Intervention, kept: EdgeMatrix, what: str = "measure") -> Measured:
    """The metric of the model, of the ablated model and of every circuit, pruned first.

    One forward pass for the model, one for the ablated activations (none for "zero"), one for each circuit; the full
    and the empty circuit cost nothing more. Optimal constants take tens of forward and backward passes a circuit.
    `what` is the name of the progress bar, which counts runs of single prompts.

    Raises
    ------
    InputError: a metric that isn't one finite number.
    """
    layout = EdgeLayout(setup.adapter.shape)
    kept = prune(kept, layout)
    full, empty = (kept == prune(layout.mask()[None], layout)).flatten(1).all(1), ~kept.flatten(1).any(1)
    partly = (~full & ~empty).nonzero().flatten()
    model, ablated = torch.zeros(2, len(setup.pairs), dtype=torch.float64)
    circuits = torch.zeros(len(kept), len(setup.pairs), dtype=torch.float64)
    with count_passes(setup, 2 + len(partly), what) as bar:
        constants, spent = _constants(setup, None)
        for batch in setup.pairs:
            cut = _ablated(setup, batch, constants)
            logits = setup.adapter.run(batch.clean.tokens, batch.mask, ["logits"])["logits"]
            model[batch.rows] = prompt_values(setup.metric, logits, batch, "the model")
            ablated[batch.rows] = prompt_values(setup.metric, cut.logits, batch, "the ablated model")
            bar.update(2 * len(batch.rows))
            for some in partly.split(_copies(setup.adapter, batch)) if setup.ablation != "optimal" else ():
                made = run_circuits(setup.adapter, batch.clean.tokens, batch.mask, as_circuits(kept[some], layout), cut)
                for circuit, logits in zip(some.tolist(), made):
                    circuits[circuit, batch.rows] = prompt_values(setup.metric, logits, batch, "a circuit")
                bar.update(len(some) * len(batch.rows))
        for circuit in partly.tolist() if setup.ablation == "optimal" else ():
            own = as_circuits(kept[circuit : circuit + 1], layout)
            circuits[circuit], evaluations = _with_own_constants(setup, own)
            spent += evaluations
            bar.update(len(setup.pairs))
    circuits[full], circuits[empty] = model, ablated
    return Measured(model, ablated, circuits, 1.0 + spent + len(partly))


def count_passes(setup: Intervention, passes: int, what: str) -> Any:
    """A progress bar over so many passes of every prompt."""
    return counting(total=passes * len(setup.pairs), progress=setup.progress, desc=what, unit="prompt run")


def _constants(setup: Intervention, circuits: Circuits | None) -> tuple[Written | None, float]:
    """What cut edges carry on all prompts (None where that's another prompt's activation), and the passes it took."""
    if setup.ablation == "patch":
        return None, 1.0
    if setup.ablation == "zero":
        return zeros_written(setup.adapter), 0.0
    everywhere = setup.ablation == "mean-all" or (setup.ablation == "optimal" and setup.optimal.positions == "shared")
    mean = mean_written(setup.pairs, over=setup.mean_over, input_node=setup.input_node, everywhere=everywhere)
    if setup.ablation != "optimal":
        return mean, 1.0
    found = fit(setup.pairs, setup.metric, setup.optimal, circuits, mean, setup.input_node)
    return found.written, 1.0 + found.forward_passes


def _with_own_constants(setup: Intervention, circuits: Circuits) -> tuple[Float[Tensor, " prompt"], float]:
    """The metric of one circuit with the constants that suit it best, and the passes that finding them took."""
    constants, spent = _constants(setup, circuits)
    values = torch.zeros(len(setup.pairs), dtype=torch.float64)
    for batch in setup.pairs:
        (logits,) = run_circuits(
            setup.adapter, batch.clean.tokens, batch.mask, circuits, _ablated(setup, batch, constants)
        )
        values[batch.rows] = prompt_values(setup.metric, logits, batch, "a circuit")
    return values, spent


def _copies(adapter: Adapter, batch: PairBatch) -> int:
    shape = adapter.shape
    per_token = shape.d_vocab_out + shape.d_mlp + (6 + 3 * shape.n_heads // 4) * shape.d_model
    attention = shape.n_heads * batch.mask.shape[1]
    return max(1, AT_ONCE // (4 * batch.mask.numel() * (per_token + attention)))


def prompt_values(metric: Metric, logits: Tensor, batch: PairBatch, whose: str) -> Float[Tensor, " batch"]:
    """Each prompt's metric, asked for one prompt at a time; `whose` names the logits in messages.

    Raises
    ------
    InputError: not one finite number per prompt.
    """
    logits = batch.shown(logits)
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
    """The mean over real positions of the norm of what each source writes less what it writes when ablated.

    Raises
    ------
    InputError: optimal ablation, whose constants belong to a circuit.
    """
    if setup.ablation == "optimal":
        raise InputError("`ablation` 'optimal' fits constants to a circuit, and there's none here: use 'mean'")
    constants, _ = _constants(setup, None)
    total, count = torch.zeros(EdgeLayout(setup.adapter.shape).n_sources, dtype=torch.float64), 0
    sized = {"progress": setup.progress, "desc": "magnitude", "total": len(setup.pairs)}
    for batch in counted(setup.pairs, lambda pair: len(pair.rows), **sized):
        written = record(setup.adapter, batch.clean.tokens, batch.mask)
        difference = written.map(torch.sub, _ablated(setup, batch, constants).written)
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


def _ablated(setup: Intervention, batch: PairBatch, constants: Written | None) -> Ablated:
    if constants is None:
        return from_run(setup.adapter, batch.corrupted.tokens, batch.mask)
    return from_values(setup.adapter, for_batch(setup.adapter, constants, batch.clean, setup.input_node))
