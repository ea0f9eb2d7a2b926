"""`method="lasso+confirm"`: the skeleton that the regressions found, each kept edge then measured by intervention.

A search by intervention costs a forward pass for every edge that the model has; this costs one for every edge that was
kept, or, where a `size` is asked for, one for each of a few circuits. The metric is the behaviour that was asked for,
unless the user gives another.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import LogitDiff, Target, check_length
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.confirm import confirm
from tl_circuitlasso.evaluate.smallest import SHARE, smallest
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.metric import Metric, PromptMetric, answer_difference, as_metric
from tl_circuitlasso.models.pairs import Pairs, pairs_of
from tl_circuitlasso.models.positions import kept_positions
from tl_circuitlasso.models.tokens import Batch, Prompts

METHODS = ("lasso", "lasso+confirm")


@dataclass(frozen=True, eq=False)
class Confirmation:
    """What `method="lasso+confirm"` needs beside the graph: prompts with their corrupted partners, the metric, and the
    most edges to test, or, in place of testing edges, the share of the behaviour that the circuit is to keep."""

    pairs: Pairs
    metric: Metric
    budget: int | None = None
    share: float | None = None

    def apply(
        self, graph: AttributionGraph, adapter: Adapter, *, seed: int, progress: bool, ranks: Ranks = ALONE
    ) -> AttributionGraph:
        """The graph with measured effects, less the refuted edges and what no longer lies on a path; `ranks` share the
        edges."""
        if not bool(graph.prune().kept.any()):  # no path was found, so there's nothing to measure
            return graph
        told = progress and ranks.rank == 0
        pairs, options = self.pairs, {"batch_size": self.pairs.batch_size, "progress": told}
        experiment = Experiment(adapter, pairs.clean, pairs.corrupted, self.metric, **options)
        if self.share is not None:  # each process measures all circuits: they are few, and each needs the answer
            return smallest(experiment, graph, share=self.share)
        return confirm(experiment, graph, seed=seed, process_group=ranks, budget=self.budget).prune()


def check_method(
    method: str,
    corrupted: Any,
    metric: Metric | None,
    basis: str,
    target: Target,
    *,
    paired: bool,
    budget: int | None = None,
    size: Any = None,
) -> None:
    """Raise an InputError for a method that there isn't, or arguments that don't go with it; `paired` says whether the
    design compares prompts in pairs."""
    if method not in METHODS:
        raise InputError(f"`method` {method!r} is unknown: use one of {', '.join(map(repr, METHODS))}")
    if method == "lasso":
        if metric is not None:
            raise InputError("`metric` is used by method='lasso+confirm' only: ask for that, or leave it out")
        for name, given in {"budget": budget, "size": size}.items():
            if given is not None:
                raise InputError(f"`{name}` is used by method='lasso+confirm' only: ask for that, or leave it out")
        if corrupted is not None and not paired:
            raise InputError(
                "`corrupted` is compared with the prompts in design 'read' only: use that, or leave `corrupted` out"
            )
        return
    if budget is not None and size is not None:
        raise InputError("`budget` is of edges to test, and with a `size` circuits are measured: give one of the two")
    if basis != "component":
        raise InputError(
            f"`method` 'lasso+confirm' cuts edges between whole components: with basis={basis!r} use method='lasso'"
        )
    if corrupted is None:
        raise InputError(
            "`corrupted` is missing: method='lasso+confirm' patches edges from corrupted prompts. Give one for each "
            "prompt, or confirm without them: `tcl.evaluate.confirm(model, graph, tokens, None, metric, 'mean')`"
        )
    if metric is None and target is not None and not isinstance(target, LogitDiff):
        raise InputError(
            f"`metric` is missing: a {type(target).__name__} target isn't a function of the logits, so say what the "
            "circuit should keep high as metric(logits, rows)"
        )


def prepare(
    adapter: Adapter,
    prompts: Prompts,
    corrupted: Any,
    target: Target,
    metric: Metric | None,
    *,
    count: int | None,
    seed: int,
    budget: int | None = None,
    size: str | int | float | None = None,
) -> Confirmation:
    """The pairs and the metric, checked; of more than `count` pairs, so many drawn at random; at most `budget` edges.

    Raises
    ------
    InputError: corrupted prompts of another number or other lengths, or a `size` that isn't a share.
    """
    share = _share(size)
    pairs = pairs_of(adapter, prompts, corrupted)
    check_length(target, len(pairs))
    clean = pairs.clean.whole()
    if target is not None and isinstance(prompts.positions, str) and prompts.positions == "all":
        clean = replace(clean, keep=kept_positions(clean.tokens, clean.mask, "last", None))
    rows = pairs.clean.draw(count, seed)
    behaviour = _behaviour(adapter, clean, target) if metric is None else as_metric(metric, adapter, len(pairs))
    if rows is None:
        return Confirmation(pairs, behaviour, budget, share)
    return Confirmation(pairs.take(rows), _by_row(behaviour, rows), budget, share)


def _share(size: str | int | float | None) -> float | None:
    """The share of the behaviour that is to be kept; None where edges are tested."""
    if size is None or size == "auto":
        return None if size is None else SHARE
    of = f"of the behaviour that the circuit is to keep ('auto': {SHARE}; graph.top_k(k, how='greedy') takes a number)"
    return fraction("size", size, of)


def _by_row(metric: Metric, rows: Int[Tensor, " row"]) -> Metric:
    """A metric that counts rows among all prompts, for those that were drawn."""
    if isinstance(metric, PromptMetric):
        return PromptMetric(lambda logits, some: metric.each(logits, rows[some]))
    return lambda logits, some: metric(logits, rows[some])


# ---- the behaviour that was asked for, as a metric ------------------------------------------------------------------


def _behaviour(adapter: Adapter, prompts: Batch, target: Target) -> PromptMetric:
    """Mean over the chosen positions: -KL(model || run) in nats, or a LogitDiff target's logit difference."""
    keep = prompts.keep
    if isinstance(target, LogitDiff):
        return PromptMetric(lambda logits, rows: _mean_over(keep[rows], answer_difference(logits, target, rows)))
    own = _Own(adapter, prompts)

    def divergence(logits: Tensor, rows: Tensor) -> Tensor:
        before, after = own.log_probabilities(rows), logits.log_softmax(-1)
        return _mean_over(keep[rows], (before.exp() * (after - before)).sum(-1))

    return PromptMetric(divergence)


def _mean_over(keep: Bool[Tensor, "batch pos"], values: Float[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    inside = keep.to(values)
    return (values * inside).sum(1) / inside.sum(1).clamp_min(1)


@dataclass(eq=False)
class _Own:
    """The model's own predictions, of one batch at a time: those of all prompts may not fit the memory."""

    adapter: Adapter
    prompts: Batch
    rows: Tensor | None = None
    held: Tensor = field(default_factory=lambda: torch.empty(0))

    def log_probabilities(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch pos vocab"]:
        if self.rows is None or not torch.equal(self.rows, rows):
            tokens, mask = self.prompts.tokens[rows], self.prompts.mask[rows]
            self.rows, self.held = rows, self.adapter.run(tokens, mask, ["logits"])["logits"].log_softmax(-1)
        return self.held
