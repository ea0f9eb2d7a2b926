"""Edge attribution patching and its integrated-gradients relatives.

All four score an edge u -> v by sum over positions of <u_clean - u_ablated, d metric / d (input of v)>, averaged over
prompts: to first order, how much the metric falls when v alone stops seeing what u does on the clean prompt. They
differ in where the derivative is taken. Scores don't depend on the batch size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Unpack

from tl_circuitlasso._checks import warn
from tl_circuitlasso.baselines.edges import EdgeLayout, add_products, traced_derivative
from tl_circuitlasso.baselines.means import for_batch, mean_written, zeros_written
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question
from tl_circuitlasso.graph.provenance import record as record_of
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated, from_run, from_values
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.patching import Written, record
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tracing import Trace, trace
from tl_circuitlasso.progress import bar as counting


@verb
def eap(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 1,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """Edge attribution patching: the derivative is taken on the clean prompt (Syed et al. 2023, arXiv 2310.10348).

    Two forward passes and one backward pass per prompt.

    Parameters
    ----------
    model, clean, corrupted, metric, options: as in `tcl.Experiment`, but for constants that are fitted, or an
        experiment in the model's place alone. A positive score means that the edge helps.
    steps: not used; every method of this module takes the same arguments.

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
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return attribute(Setting("eap", setup, 1, spread=True), at_clean)


@verb
def eap_ig(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 5,
    **options: Unpack[MethodOptions],
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
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return attribute(Setting("eap_ig", setup, steps, spread=True), along_inputs)


@verb
def clean_corrupted(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 2,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """EAP with the mean of the derivatives at the clean and at the corrupted input; arguments as in `eap`.

    Two forward and two backward passes per prompt.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = clean_corrupted(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return attribute(Setting("clean_corrupted", setup, 2, spread=True), _at_ends)


@verb
def eap_ig_activations(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 5,
    **options: Unpack[MethodOptions],
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
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return attribute(Setting("eap_ig_activations", setup, steps), _along_activations)


# ---- one pass over the data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method on an experiment, checked.

    Raises
    ------
    InputError: `steps` < 1, no metric, no corrupted prompts though they are read, or constants that are to be fitted.
    """

    method: str
    experiment: Experiment
    steps: int
    metric: bool = True  # whether the method reads one
    derivatives: bool = True  # whether it takes any
    spread: bool = False  # whether it follows a model whose layers are on several devices

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f"`steps` is {self.steps!r}: the number of integration steps is an integer >= 1")
        fitted = "a circuit, and there's none here"
        self.experiment.ready(metric=self.metric, fitted=fitted, spread=self.spread)
        if self.derivatives:
            warn_of_attached_saes(self.experiment.adapter.model)


def warn_of_attached_saes(model: Any) -> None:
    """A warning where SAEs are attached to the model: its derivatives aren't those of the model.

    SAELens computes an attached SAE's error term without gradients. So the forward pass is the model's, but derivatives
    flow through what the SAE reconstructs alone, and scores differ (by some percent for a good SAE).
    """
    attached = list(getattr(model, "acts_to_saes", None) or ())
    if attached:
        warn(
            f"SAEs are attached at {', '.join(attached[:3])}: derivatives leave out what they miss, also with an error "
            "term, so these scores aren't the model's: detach them with model.reset_saes()"
        )


@dataclass
class Count:
    """Passes per prompt: each batch's passes weighted by its share of the prompts."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True, eq=False)
class Job:
    """One batch, and the passes that a method may ask for."""

    setting: Setting
    batch: PairBatch
    mean: Written | None
    count: Count
    outputs: bool = False  # whether derivatives at components' outputs are needed beside those at inputs

    @property
    def experiment(self) -> Experiment:
        """What the method works on."""
        return self.setting.experiment

    @property
    def adapter(self) -> Adapter:
        """The model."""
        return self.experiment.adapter

    @property
    def share(self) -> float:
        """The batch's part of the prompts."""
        return len(self.batch.rows) / len(self.experiment)

    def clean(self) -> Written:
        """What each component writes on the clean prompts."""
        self.count.forward += self.share
        return record(self.adapter, self.batch.clean.tokens, self.batch.mask)

    def ablated(self) -> Written:
        """What each component's cut edges carry."""
        adapter, batch = self.adapter, self.batch
        if self.experiment.cut == "patch":
            self.count.forward += self.share
            return record(adapter, batch.corrupted.tokens, batch.mask)
        values = zeros_written(adapter) if self.mean is None else self.mean
        return for_batch(adapter, values, batch.clean, self.experiment.input_node)

    def cut(self) -> Ablated:
        """The run in which every edge is cut."""
        if self.experiment.cut == "patch":
            self.count.forward += self.share
            return from_run(self.adapter, self.batch.corrupted.tokens, self.batch.mask)
        return from_values(self.adapter, self.ablated())

    def trace(self, *, corrupted: bool = False, **replaced: Any) -> Trace:
        """The metric's derivatives on the clean (or corrupted) prompts, with some activations replaced."""
        self.count.forward += self.share
        self.count.backward += self.share
        batch, rows = self.batch, self.batch.rows
        tokens = (batch.corrupted if corrupted else batch.clean).tokens
        return trace(
            self.adapter,
            tokens,
            batch.mask,
            lambda logits: self.experiment.objective(batch.shown(logits), rows),
            outputs=self.outputs,
            **replaced,
        )


Step = tuple[Written, Trace, float]  # clean - ablated, derivatives, and the step's weight
Path = Callable[[Job], Iterator[Step]]


def attribute(setting: Setting, path: Path) -> AttributionGraph:
    """The graph of a method that is known by where it takes the derivative."""
    began = time.perf_counter()
    adapter, count = setting.experiment.adapter, Count()
    layout = EdgeLayout(adapter.shape)
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64, device=adapter.device)
    for job, (difference, traced, weight) in walked(setting, count, path):
        part = torch.zeros_like(scores)
        add_products(layout, adapter, part, difference, traced_derivative(adapter, traced), job.batch.mask)
        scores += weight * part
    return layout.graph(scores / len(setting.experiment), facts(setting, count, began))


def walked(setting: Setting, count: Count, path: Path, *, outputs: bool = False) -> Iterator[tuple[Job, Step]]:
    """Every step of a path on every batch. A batch's steps weigh 1 in all, so they count its prompts."""
    sized = {"total": len(setting.experiment), "progress": setting.experiment.progress, "desc": setting.method}
    with counting(**sized, unit="prompt") as bar:
        for job in jobs(setting, count, outputs=outputs):
            for step in path(job):
                yield job, step
                bar.update(step[2] * len(job.batch.rows))


def jobs(setting: Setting, count: Count, *, outputs: bool = False) -> Iterator[Job]:
    """The batches of a data set, ready for the passes of a method."""
    setup, mean = setting.experiment, None
    if setup.cut.startswith("mean"):
        everywhere = setup.cut == "mean-all"
        mean = mean_written(setup.pairs, over=setup.mean_over, input_node=setup.input_node, everywhere=everywhere)
        count.forward += 1
    for batch in setup.pairs:
        yield Job(setting, batch, mean, count, outputs)


def facts(setting: Setting, count: Count, began: float) -> dict[str, Any]:
    """The provenance of a graph: how it was made, and at what cost."""
    setup = setting.experiment
    return record_of(
        setting.method,
        setup.adapter.facts(),
        question=question(setup.metric, "last"),
        prompts=len(setup),
        prompt_pairs=len(setup) if setup.cut == "patch" else None,
        unit=unit_of(setup.metric),
        forward=count.forward,
        backward=count.backward,
        seconds={"scores": time.perf_counter() - began},
        ablation=setup.cut,
        mean_over=setup.mean_over,
        input_node=setup.input_node,
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
    if job.experiment.cut == "patch":  # the corrupted run gives its activations and its derivatives at once
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
    if job.experiment.cut == "patch":
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
