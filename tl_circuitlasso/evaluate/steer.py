"""Steering: the nodes of a circuit turned up, down or off, and what else that changes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import check_graph
from tl_circuitlasso.evaluate.faithfulness import mean_interval
from tl_circuitlasso.evaluate.features import feature_sites, has_features, node_scores
from tl_circuitlasso.evaluate.interventions import prompt_values
from tl_circuitlasso.evaluate.metrics import Metric, next_token
from tl_circuitlasso.experiment import Experiment, PromptOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.feature_patch import Carried, FeatureSite, Kept, run_features
from tl_circuitlasso.models.pairs import Pairs, pairs_of
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.sources import scaled_nodes
from tl_circuitlasso.progress import counted


@dataclass(frozen=True)
class Steered:
    """What scaling some nodes did.

    Attributes
    ----------
    nodes, scale: what was scaled, by which factor.
    before, after: the metric's mean per prompt; change = after - before, low and high its 95 % bootstrap interval.
    loss_before, loss_after: next-token loss in nats per token on other text, None without other text; loss_change =
        loss_after - loss_before: what the steering breaks elsewhere.
    """

    nodes: tuple[str, ...]
    scale: float
    before: float
    after: float
    change: float
    low: float
    high: float
    loss_before: float | None
    loss_after: float | None
    loss_change: float | None


@verb
def steer(
    model: Any,
    graph: AttributionGraph,
    nodes: Collection[str] | None,
    scale: int | float,
    prompts: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    saes: Mapping[str, Any] | None = None,
    other: AnyPrompts = None,
    seed: int = 0,
    **options: Unpack[PromptOptions],
) -> Steered:
    """Multiply what heads and MLPs of a circuit write, or its features' codes, by `scale`: 0 turns them off, 2 doubles.

    Parameters
    ----------
    nodes: heads and MLPs that the graph keeps, or features, kept or not; None takes all that it keeps.
    model, prompts, metric, saes, options: as in `tcl.Experiment` (prompts are its clean ones), or an experiment in the
        model's place. What SAEs miss stays as it is.
    other: prompts about something else, whose next-token loss shows how specific the steering is.

    Where a norm stands behind attention, a head's z is scaled in front of it. Two forward passes per prompt, and two
    per prompt of `other`.

    Raises
    ------
    InputError: a node that isn't a head or MLP of the circuit or a feature of `saes`, a scale that isn't finite, and as
        in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> found = steer(demo.model, demo.circuit, ["a2.h0"], 0, demo.tokens, demo.target)
    >>> found.after < found.before
    True
    """
    if not isinstance(scale, (int, float)) or not -float("inf") < scale < float("inf"):
        raise InputError(f"`scale` is {scale!r}: give a finite factor, 0 to turn nodes off")
    setup, factor = _experiment(model, prompts, metric, saes, options), float(scale)
    chosen, steered = _steering(setup, graph, nodes, factor)
    before, after = _measured(setup.pairs, setup.objective, steered, setup.progress)
    (low, high), change = mean_interval((after - before)[None], seed)[0], float((after - before).mean())
    losses: tuple[float, float] | None = None
    if other is not None:
        text = pairs_of(setup.adapter, other, None, batch_size=setup.batch_size, name="other")
        losses = _losses(text, steered, setup.progress)
    return Steered(
        nodes=chosen,
        scale=factor,
        before=float(before.mean()),
        after=float(after.mean()),
        change=change,
        low=low,
        high=high,
        loss_before=None if losses is None else losses[0],
        loss_after=None if losses is None else losses[1],
        loss_change=None if losses is None else losses[1] - losses[0],
    )


Run = Callable[[Tensor, Tensor], Tensor]  # (tokens, mask) -> logits


def _experiment(model: Any, prompts: AnyPrompts, metric: Any, saes: Any, options: PromptOptions) -> Experiment:
    """What is steered on; nothing is cut, so there are no partners."""
    if not isinstance(model, Experiment):
        mask, size = options.get("attention_mask"), options.get("batch_size", 32)
        prompts = pairs_of(model, prompts, None, attention_mask=mask, batch_size=size, name="prompts").clean
    return Experiment.of(model, prompts, None, metric, saes=saes, **options).ready(cut=False)


def _steering(
    setup: Experiment, graph: AttributionGraph, nodes: Collection[str] | None, scale: float
) -> tuple[tuple[str, ...], Run]:
    """What is steered, and the steered model."""
    adapter = setup.adapter
    if has_features(graph):
        sites = feature_sites(graph, adapter, setup.saes)
        chosen = _features(graph, nodes, sites)
        steady = {site.name: all_but(site, chosen) for site in sites}
        carried = Carried({}, {}, {}, scale)
        return chosen, lambda tokens, mask: run_features(adapter, tokens, mask, sites, steady, carried)
    check_graph(graph, adapter)
    whole = {name for name in graph.index.names if graph.index.site(name).kind in ("head", "mlp")}
    chosen = _chosen(graph, nodes, whole, "head or MLP")
    edits = scaled_nodes(adapter, (graph.index.site(name) for name in chosen), scale)
    return chosen, lambda tokens, mask: adapter.run(tokens, mask, ["logits"], edits=edits)["logits"]


def _features(graph: AttributionGraph, nodes: Collection[str] | None, sites: Sequence[FeatureSite]) -> tuple[str, ...]:
    """The features to steer, which the graph needn't keep, or even know."""
    if nodes is None or isinstance(nodes, str):
        return _chosen(graph, nodes, set(node_scores(graph)), "feature")
    sizes = {site.name: site.features for site in sites}
    for name in nodes:
        place, _, number = name.rpartition("#")
        if not number.isdigit() or int(number) >= sizes.get(place, 0):
            raise InputError(f"`nodes` has {name!r}, which isn't a feature of {', '.join(sizes) or 'the graph'}")
    if not nodes:
        raise InputError("`nodes` is empty: name a feature")
    return tuple(dict.fromkeys(nodes))


def all_but(site: FeatureSite, nodes: Collection[str]) -> Kept:
    """Everything of a site stays but some features."""
    parts = (name.rpartition("#") for name in nodes)
    mask = torch.ones(site.features, dtype=torch.bool)
    mask[[int(number) for place, _, number in parts if place == site.name]] = False
    return Kept(mask, "keep")


def _chosen(graph: AttributionGraph, nodes: Collection[str] | None, able: set[str], kind: str) -> tuple[str, ...]:
    if isinstance(nodes, str):
        raise InputError(f"`nodes` is one string; put it in a list: [{nodes!r}]")
    inside = graph.kept_nodes() & able
    chosen = inside if nodes is None else set(nodes)
    if outside := sorted(chosen - inside):
        raise InputError(f"`nodes` has {outside[0]!r}, which isn't a {kind} that the graph keeps")
    if not chosen:
        raise InputError(f"`nodes` is empty: the graph keeps no {kind}, or none was named")
    return tuple(sorted(chosen, key=graph.index.position))


def _measured(data: Pairs, metric: Metric, steered: Run, progress: bool) -> Float[Tensor, "state prompt"]:
    values = torch.zeros(2, len(data), dtype=torch.float64)
    sized = {"progress": progress, "desc": "steer", "total": len(data)}
    for batch in counted(data, lambda batch: len(batch.rows), **sized):
        plain = data.adapter.run(batch.clean.tokens, batch.mask, ["logits"])["logits"]
        values[0, batch.rows] = prompt_values(metric, plain, batch, "the model")
        values[1, batch.rows] = prompt_values(
            metric, steered(batch.clean.tokens, batch.mask), batch, "the steered model"
        )
    return values


def _losses(text: Pairs, steered: Run, progress: bool) -> tuple[float, float]:
    whole = text.clean.whole()
    metric = next_token(whole.tokens, whole.mask)
    before, after = _measured(text, metric, steered, progress)
    weights = (whole.mask[:, 1:] & whole.mask[:, :-1]).sum(1).double()
    return tuple(-float((values * weights).sum() / weights.sum()) for values in (before, after))  # type: ignore[return-value]
