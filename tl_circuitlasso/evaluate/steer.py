"""Steering: the nodes of a circuit turned up, down or off, and what else that changes."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.data import Pairs, Prompts, pairs
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import check_graph
from tl_circuitlasso.evaluate.faithfulness import mean_interval
from tl_circuitlasso.evaluate.interventions import prompt_values
from tl_circuitlasso.evaluate.metrics import Metric, next_token
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.sources import scaled_nodes
from tl_circuitlasso.sites import Site


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


def steer(
    model: Any,
    graph: AttributionGraph,
    nodes: Collection[str] | None,
    scale: int | float,
    prompts: Prompts,
    metric: Metric,
    *,
    other: Prompts | None = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Steered:
    """Multiply what heads and MLPs of a circuit write by `scale`: 0 turns them off, 2 doubles them.

    Parameters
    ----------
    nodes: heads and MLPs that the graph keeps; None takes all of them.
    metric: `metric(logits, rows)` as in `faithfulness`.
    other: prompts about something else, whose next-token loss shows how specific the steering is.

    Where a norm stands behind attention, a head's z is scaled in front of it. Two forward passes per prompt, and two
    per prompt of `other`.

    Raises
    ------
    InputError: a node that isn't a head or MLP of the circuit, a scale that isn't finite, and as in `faithfulness`.
    """
    if not isinstance(scale, (int, float)) or not -float("inf") < scale < float("inf"):
        raise InputError(f"`scale` is {scale!r}: give a finite factor, 0 to turn nodes off")
    data = pairs(model, prompts, None, attention_mask=attention_mask, batch_size=batch_size)
    adapter = data.adapter
    check_graph(graph, adapter)
    sites = _sites(graph, nodes)
    factor = float(scale)
    before, after = _measured(data, metric, sites, factor)
    (low, high), change = mean_interval((after - before)[None], seed)[0], float((after - before).mean())
    losses: tuple[float, float] | None = None
    if other is not None:
        text = pairs(adapter, other, None, batch_size=batch_size)
        losses = _losses(text, sites, factor)
    return Steered(
        nodes=tuple(map(str, sites)),
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


def _sites(graph: AttributionGraph, nodes: Collection[str] | None) -> list[Site]:
    if isinstance(nodes, str):
        raise InputError(f"`nodes` is one string; put it in a list: [{nodes!r}]")
    inside = {name for name in graph.kept_nodes() if graph.index.site(name).kind in ("head", "mlp")}
    chosen = inside if nodes is None else set(nodes)
    if outside := sorted(chosen - inside):
        raise InputError(f"`nodes` has {outside[0]!r}, which isn't a head or MLP that the graph keeps")
    if not chosen:
        raise InputError("`nodes` is empty: the graph keeps no head and no MLP, or none was named")
    return [graph.index.site(name) for name in sorted(chosen, key=graph.index.position)]


def _measured(data: Pairs, metric: Metric, sites: list[Site], scale: float) -> Float[Tensor, "state prompt"]:
    values = torch.zeros(2, len(data), dtype=torch.float64)
    for batch in data:
        for state, logits in enumerate(_both(data.adapter, batch.clean, batch.mask, sites, scale)):
            values[state, batch.rows] = prompt_values(metric, logits, batch, ("the model", "the steered model")[state])
    return values


def _losses(text: Pairs, sites: list[Site], scale: float) -> tuple[float, float]:
    metric = next_token(text.clean, text.mask)
    before, after = _measured(text, metric, sites, scale)
    weights = (text.mask[:, 1:] & text.mask[:, :-1]).sum(1).double()
    return tuple(-float((values * weights).sum() / weights.sum()) for values in (before, after))  # type: ignore[return-value]


def _both(adapter: Adapter, tokens: Tensor, mask: Tensor, sites: list[Site], scale: float) -> Iterator[Tensor]:
    yield adapter.run(tokens, mask, ["logits"])["logits"]
    with ExitStack() as stack:
        stack.enter_context(scaled_nodes(adapter, sites, scale))
        yield adapter.run(tokens, mask, ["logits"])["logits"]
