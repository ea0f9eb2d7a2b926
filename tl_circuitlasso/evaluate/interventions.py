"""Measuring circuits on a model: every edge outside a circuit carries what its source does in an ablated run.

An `Experiment` holds what stays the same over circuits (model, prompts, metric, ablation); `measure` runs any number of
circuits, several in one forward pass where memory allows, and gives each prompt's metric.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.baselines.means import for_batch, mean_written, zeros_written
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, as_circuits, prune
from tl_circuitlasso.evaluate.metrics import Metric, PromptMetric
from tl_circuitlasso.evaluate.optimal import fit
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated, from_run, from_values
from tl_circuitlasso.models.metric import as_number
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.patch import Circuits, run_circuits
from tl_circuitlasso.models.patching import Written
from tl_circuitlasso.progress import bar as counting

AT_ONCE = 256 << 20  # bytes of one forward pass over copies of the prompts, as estimated


@dataclass(frozen=True, eq=False)
class Measured:
    """Each prompt's metric: of the model, with every edge cut, and of each circuit; forward passes per prompt."""

    model: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    circuits: Float[Tensor, "circuit prompt"]
    forward_passes: float


def measure(setup: Experiment, kept: EdgeMatrix, what: str = "measure") -> Measured:
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
            model[batch.rows] = prompt_values(setup.objective, logits, batch, "the model")
            ablated[batch.rows] = prompt_values(setup.objective, cut.logits, batch, "the ablated model")
            bar.update(2 * len(batch.rows))
            # an empty tensor is split into one empty part, which isn't a pass
            for some in partly.split(_copies(setup.adapter, batch)) if len(partly) and setup.cut != "optimal" else ():
                made = run_circuits(setup.adapter, batch.clean.tokens, batch.mask, as_circuits(kept[some], layout), cut)
                for circuit, logits in zip(some.tolist(), made):
                    circuits[circuit, batch.rows] = prompt_values(setup.objective, logits, batch, "a circuit")
                bar.update(len(some) * len(batch.rows))
        for circuit in partly.tolist() if setup.cut == "optimal" else ():
            own = as_circuits(kept[circuit : circuit + 1], layout)
            circuits[circuit], evaluations = _with_own_constants(setup, own)
            spent += evaluations
            bar.update(len(setup.pairs))
    circuits[full], circuits[empty] = model, ablated
    return Measured(model, ablated, circuits, 1.0 + spent + len(partly))


def count_passes(setup: Experiment, passes: int, what: str) -> Any:
    """A progress bar over so many passes of every prompt."""
    return counting(total=passes * len(setup.pairs), progress=setup.progress, desc=what, unit="prompt run")


def _constants(setup: Experiment, circuits: Circuits | None) -> tuple[Written | None, float]:
    """What cut edges carry on all prompts (None where that's another prompt's activation), and the passes it took."""
    if setup.cut == "patch":
        return None, 1.0
    if setup.cut == "zero":
        return zeros_written(setup.adapter), 0.0
    everywhere = setup.cut == "mean-all" or (setup.cut == "optimal" and setup.optimal.positions == "shared")
    mean = mean_written(setup.pairs, over=setup.mean_over, input_node=setup.input_node, everywhere=everywhere)
    if setup.cut != "optimal":
        return mean, 1.0
    found = fit(setup, circuits, mean)
    return found.written, 1.0 + found.forward_passes


def _with_own_constants(setup: Experiment, circuits: Circuits) -> tuple[Float[Tensor, " prompt"], float]:
    """The metric of one circuit with the constants that suit it best, and the passes that finding them took."""
    constants, spent = _constants(setup, circuits)
    values = torch.zeros(len(setup.pairs), dtype=torch.float64)
    for batch in setup.pairs:
        (logits,) = run_circuits(
            setup.adapter, batch.clean.tokens, batch.mask, circuits, _ablated(setup, batch, constants)
        )
        values[batch.rows] = prompt_values(setup.objective, logits, batch, "a circuit")
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
    return as_number(metric(logits, rows), finite=False).double().cpu().reshape(1)


def _ablated(setup: Experiment, batch: PairBatch, constants: Written | None) -> Ablated:
    if constants is None:
        return from_run(setup.adapter, batch.corrupted.tokens, batch.mask)
    return from_values(setup.adapter, for_batch(setup.adapter, constants, batch.clean, setup.input_node))
