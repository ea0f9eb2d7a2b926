"""Edge attribution patching and its integrated-gradients relatives.

All four score an edge u -> v by sum over positions of <u_clean - u_ablated, d metric / d (input of v)>, averaged over
prompts: to first order, how much the metric falls when v alone stops seeing what u does on the clean prompt. They
differ in where the derivative is taken. Scores don't depend on the batch size.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tl_circuitlasso.baselines.edges import EdgeLayout, add_products, traced_derivative
from tl_circuitlasso.baselines.means import for_batch, mean_written, zeros_written
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question
from tl_circuitlasso.graph.provenance import record as record_of
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.pairs import PairBatch, Pairs, pairs_of
from tl_circuitlasso.models.patching import Written, record
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tracing import Trace, trace
from tl_circuitlasso.progress import bar as counting


def eap(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts,
    metric: Metric | LogitDiff,
    *,
    attention_mask: Any = None,
    ablation: str = "patch",
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    steps: int = 1,
    progress: bool = True,
) -> AttributionGraph:
    """Edge attribution patching: the derivative is taken on the clean prompt (Syed et al. 2023, arXiv 2310.10348).

    Two forward passes and one backward pass per prompt.

    Parameters
    ----------
    clean, corrupted: whatever `circuit_lasso` takes as prompts; both of a pair have the same length. `corrupted` may be
        None where it isn't read: for `ablation="zero"`, and for "mean" over the clean prompts.
    metric: `metric(logits, rows)` returns the sum over a batch of what the circuit should keep high (a logit
        difference; for a loss, its negative); `rows` are the prompts' numbers in the data set. Index -1 of the logits
        is each prompt's last real token, whatever the lengths. A positive score means that the edge helps.
    attention_mask: True at real positions; left and right padding are both right.
    ablation: what a cut edge carries: the corrupted activation ("patch"), nothing ("zero"), its mean over prompts at
        the same position ("mean"), or over prompts and positions ("mean-all"), as in `evaluate.faithfulness`.
    mean_over: whether means are over the "clean" or the "corrupted" prompts.
    input_node: whether `input` is the token embedding alone ("embed", as in EAP-IG) or everything in front of the
        first layer, learned positions included ("resid"). The same for `ablation="patch"`.
    steps: not used; every method of this module takes the same arguments.
    progress: a bar on a terminal, elsewhere a line every ten seconds, of what takes long.

    Raises
    ------
    InputError: pairs of unequal shape, tokens outside the vocabulary, or a metric that isn't one number.
    ModelError: a model that the adapter refuses.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = eap(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setting = Setting("eap", ablation, mean_over, input_node, 1, progress)
    data = setting.pairs(model, clean, corrupted, attention_mask, batch_size)
    return attribute(data, metric, setting, at_clean)


def eap_ig(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts,
    metric: Metric | LogitDiff,
    *,
    steps: int = 5,
    attention_mask: Any = None,
    ablation: str = "patch",
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    progress: bool = True,
) -> AttributionGraph:
    """EAP with integrated gradients over the inputs (Hanna et al. 2024, arXiv 2403.17806); arguments as in `eap`.

    The derivative is the mean over k = 0 .. steps - 1 of that with embeddings corrupted + k/steps (clean - corrupted).
    1 + steps forward and `steps` backward passes per prompt.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = eap_ig(demo.model, demo.tokens, demo.corrupted, demo.target, steps=5)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setting = Setting("eap_ig", ablation, mean_over, input_node, steps, progress)
    data = setting.pairs(model, clean, corrupted, attention_mask, batch_size)
    return attribute(data, metric, setting, along_inputs)


def clean_corrupted(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts,
    metric: Metric | LogitDiff,
    *,
    attention_mask: Any = None,
    ablation: str = "patch",
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    steps: int = 2,
    progress: bool = True,
) -> AttributionGraph:
    """EAP with the mean of the derivatives at the clean and at the corrupted input; arguments as in `eap`.

    Two forward and two backward passes per prompt.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = clean_corrupted(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setting = Setting("clean_corrupted", ablation, mean_over, input_node, 2, progress)
    data = setting.pairs(model, clean, corrupted, attention_mask, batch_size)
    return attribute(data, metric, setting, _at_ends)


def eap_ig_activations(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts,
    metric: Metric | LogitDiff,
    *,
    steps: int = 5,
    attention_mask: Any = None,
    ablation: str = "patch",
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    progress: bool = True,
) -> AttributionGraph:
    """EAP with integrated gradients over activations; arguments as in `eap`.

    On the clean prompt, the output of one group of sources (the input, all heads of a layer, or an MLP) is replaced by
    ablated + k/steps (clean - ablated), k = 1 .. steps; the derivative is the mean over steps and groups. Readers that
    see nothing but the replaced input have a derivative too (EAP-IG loses it on models without learned positions).
    2 + steps (1 + 2 layers) forward passes per prompt, and nearly as many backward.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = eap_ig_activations(demo.model, demo.tokens, demo.corrupted, demo.target, steps=1)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setting = Setting("eap_ig_activations", ablation, mean_over, input_node, steps, progress)
    data = setting.pairs(model, clean, corrupted, attention_mask, batch_size)
    return attribute(data, metric, setting, _along_activations)


# ---- one pass over the data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method's choices, checked.

    Raises
    ------
    InputError: an unknown `ablation`, `mean_over` or `input_node`, or `steps` < 1.
    """

    method: str
    ablation: str
    mean_over: str
    input_node: str
    steps: int
    progress: bool = True

    def __post_init__(self) -> None:
        if self.ablation not in ("patch", "zero", "mean", "mean-all"):
            raise InputError(f"`ablation` is {self.ablation!r}: write 'patch', 'zero', 'mean' or 'mean-all'")
        if self.mean_over not in ("clean", "corrupted"):
            raise InputError(f"`mean_over` is {self.mean_over!r}: write 'clean' or 'corrupted'")
        if self.input_node not in ("embed", "resid"):
            raise InputError(f"`input_node` is {self.input_node!r}: write 'embed' or 'resid'")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f"`steps` is {self.steps!r}: the number of integration steps is an integer >= 1")

    def pairs(
        self, model: Any, clean: AnyPrompts, corrupted: AnyPrompts, attention_mask: Any, batch_size: int
    ) -> Pairs:
        """The checked prompt pairs."""
        over_corrupted = self.ablation.startswith("mean") and self.mean_over == "corrupted"
        if corrupted is None and (self.ablation == "patch" or over_corrupted):
            raise InputError(
                f"`corrupted` is missing: ablation={self.ablation!r} reads it; 'zero' and clean means don't"
            )
        data = pairs_of(model, clean, corrupted, attention_mask=attention_mask, batch_size=batch_size)
        warn_of_attached_saes(data.adapter.model)
        return data


def warn_of_attached_saes(model: Any) -> None:
    """A warning where SAEs are attached to the model: its derivatives aren't those of the model.

    SAELens computes an attached SAE's error term without gradients. So the forward pass is the model's, but derivatives
    flow through what the SAE reconstructs alone, and scores differ (by some percent for a good SAE).
    """
    attached = list(getattr(model, "acts_to_saes", None) or ())
    if attached:
        warnings.warn(
            f"SAEs are attached at {', '.join(attached[:3])}: derivatives leave out what they miss, also with an error "
            "term, so these scores aren't the model's: detach them with model.reset_saes()",
            stacklevel=4,
        )


@dataclass
class Count:
    """Passes per prompt: each batch's passes weighted by its share of the prompts."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True, eq=False)
class Job:
    """One batch, and the passes that a method may ask for."""

    pairs: Pairs
    batch: PairBatch
    metric: Metric
    setting: Setting
    mean: Written | None
    count: Count
    outputs: bool = False  # whether derivatives at components' outputs are needed beside those at inputs

    @property
    def share(self) -> float:
        """The batch's part of the prompts."""
        return len(self.batch.rows) / len(self.pairs)

    def clean(self) -> Written:
        """What each component writes on the clean prompts."""
        self.count.forward += self.share
        return record(self.pairs.adapter, self.batch.clean.tokens, self.batch.mask)

    def ablated(self) -> Written:
        """What each component's cut edges carry."""
        adapter, batch = self.pairs.adapter, self.batch
        if self.setting.ablation == "patch":
            self.count.forward += self.share
            return record(adapter, batch.corrupted.tokens, batch.mask)
        values = zeros_written(adapter) if self.mean is None else self.mean
        return for_batch(adapter, values, batch.clean, self.setting.input_node)

    def trace(self, *, corrupted: bool = False, **replaced: Any) -> Trace:
        """The metric's derivatives on the clean (or corrupted) prompts, with some activations replaced."""
        self.count.forward += self.share
        self.count.backward += self.share
        batch, rows = self.batch, self.batch.rows
        tokens = (batch.corrupted if corrupted else batch.clean).tokens
        return trace(
            self.pairs.adapter,
            tokens,
            batch.mask,
            lambda logits: self.metric(batch.shown(logits), rows),
            outputs=self.outputs,
            **replaced,
        )


Step = tuple[Written, Trace, float]  # clean - ablated, derivatives, and the step's weight
Path = Callable[[Job], Iterator[Step]]


def attribute(data: Pairs, metric: Metric | LogitDiff, setting: Setting, path: Path) -> AttributionGraph:
    """The graph of a method that is known by where it takes the derivative."""
    began = time.perf_counter()
    layout, count = EdgeLayout(data.adapter.shape), Count()
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64, device=data.adapter.device)
    for job, (difference, traced, weight) in walked(data, metric, setting, count, path):
        part = torch.zeros_like(scores)
        add_products(layout, data.adapter, part, difference, traced_derivative(data.adapter, traced), job.batch.mask)
        scores += weight * part
    return layout.graph(scores / len(data), facts(data, setting, count, began, metric))


def walked(
    data: Pairs, metric: Metric | LogitDiff, setting: Setting, count: Count, path: Path, *, outputs: bool = False
) -> Iterator[tuple[Job, Step]]:
    """Every step of a path on every batch. A batch's steps weigh 1 in all, so they count its prompts."""
    with counting(total=len(data), progress=setting.progress, desc=setting.method, unit="prompt") as bar:
        for job in jobs(data, metric, setting, count, outputs=outputs):
            for step in path(job):
                yield job, step
                bar.update(step[2] * len(job.batch.rows))


def jobs(
    data: Pairs, metric: Metric | LogitDiff, setting: Setting, count: Count, *, outputs: bool = False
) -> Iterator[Job]:
    """The batches of a data set, ready for the passes of a method."""
    metric = data.metric(metric)
    mean = None
    if setting.ablation.startswith("mean"):
        everywhere = setting.ablation == "mean-all"
        mean = mean_written(data, over=setting.mean_over, input_node=setting.input_node, everywhere=everywhere)
        count.forward += 1
    for batch in data:
        yield Job(data, batch, metric, setting, mean, count, outputs)


def facts(
    data: Pairs, setting: Setting, count: Count, began: float, metric: Metric | LogitDiff | None
) -> dict[str, Any]:
    """The provenance of a graph: how it was made, and at what cost."""
    return record_of(
        setting.method,
        data.adapter.facts(),
        question=question(metric, "last"),
        prompts=len(data),
        prompt_pairs=len(data) if setting.ablation == "patch" else None,
        unit=unit_of(metric),
        forward=count.forward,
        backward=count.backward,
        seconds={"scores": time.perf_counter() - began},
        ablation=setting.ablation,
        mean_over=setting.mean_over,
        input_node=setting.input_node,
        steps=setting.steps,
    )


def unit_of(metric: Metric | LogitDiff | None) -> str:
    """Of a fall of the metric; None is the divergence from the model's prediction."""
    return "nats" if metric is None else "logits" if isinstance(metric, LogitDiff) else "metric"


# ---- where the derivative is taken --------------------------------------------------------------------------------


def at_clean(job: Job) -> Iterator[Step]:
    traced = job.trace()
    yield traced.values.map(torch.sub, job.ablated()), traced, 1.0


def _at_ends(job: Job) -> Iterator[Step]:
    traced = job.trace()
    if job.setting.ablation == "patch":  # the corrupted run gives its activations and its derivatives at once
        other = job.trace(corrupted=True)
        ablated = other.values
    else:
        ablated = job.ablated()
        other = job.trace(start=ablated.input)
    difference = traced.values.map(torch.sub, ablated)
    yield difference, traced, 0.5
    yield difference, other, 0.5


def along_inputs(job: Job) -> Iterator[Step]:
    clean, steps = job.clean(), job.setting.steps
    if job.setting.ablation == "patch":
        first = job.trace(corrupted=True)
        ablated = first.values
    else:
        ablated = job.ablated()
        first = job.trace(start=ablated.input)
    difference = clean.map(torch.sub, ablated)
    yield difference, first, 1 / steps
    for k in range(1, steps):
        yield difference, job.trace(start=ablated.input + k / steps * difference.input), 1 / steps


def _along_activations(job: Job) -> Iterator[Step]:
    clean, steps = job.clean(), job.setting.steps
    ablated = job.ablated()
    difference = clean.map(torch.sub, ablated)
    weight = 1 / (steps * (1 + len(clean.heads) + len(clean.mlps)))
    for k in range(1, steps + 1):
        between = ablated.map(lambda low, change, share=k / steps: low + share * change, difference)
        yield difference, job.trace(start=between.input), weight
        for layer in range(len(clean.heads)):
            yield difference, job.trace(heads={layer: between.heads[layer]}), weight
        for layer in range(len(clean.mlps)):
            yield difference, job.trace(mlps={layer: between.mlps[layer]}), weight
