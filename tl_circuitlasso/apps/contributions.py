"""One prompt seen through a graph of SAE features: which edges of the skeleton fire on it, where, and how strongly.

The graph's coefficients A_ij hold for the data it was learned from; on one prompt, edge i -> j brings A_ij z_i(p) to
feature j at position p. Through attention it brings B_ij times the mean over positions of z_i by the observed pattern,
B_ij its coefficient in the regression: the weight of such an edge is per unit of what fires, wherever that is.

What edges bring isn't all of z_j. Of every hook that feeds j there are three more rows (`apps.remainder`), with which

    z_j(p) = sum over i of A_ij z_i(p) + error + bias + unexplained
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.apps.remainder import KINDS, joined, parent_and_kind, remainder, with_errors
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.verbs import in_order
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.hook_order import attention_between
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Batch, Prompts


@dataclass(frozen=True, eq=False)
class Contributions:
    """What the kept edges do on one prompt.

    Attributes
    ----------
    tokens: the prompt's tokens as text (token ids without a tokenizer).
    table: one row per edge and position where source and target fire: position, token, source, target, port, weight
        (A_ij, or B_ij), source_code (z_i there, or its mean), contribution (the product of both), target_code (z_j
        there; NaN for the target node); and "<hook>.hook_sae_error", "<hook>.bias" and "<hook>.unexplained" as sources,
        in units of the target's code, too, without weight and source_code. Largest |contribution| first.
    graph: the active part. Kept are the edges that bring something to an active child (or to the target node); score is
        the sum of their contributions at those positions. What an SAE's error brings is an edge, too, where the graph
        has a node for it, so that `apps.influence` tells how much of the answer errors carry.
    """

    tokens: tuple[str, ...]
    table: pd.DataFrame
    graph: AttributionGraph

    def balance(self) -> pd.DataFrame:
        """By parent hook, target and position: what kept edges bring, error, bias, unexplained, and the target's code,
        which is the sum of the four. Targets that fire, largest code first.
        """
        rows: Any = self.table[self.table["target_code"].notna()]
        hooks, kinds = zip(*map(parent_and_kind, rows["source"])) if len(rows) else ((), ())
        rows = rows.assign(parent=list(hooks), kind=list(kinds))
        keys = ["parent", "target", "position"]
        parts: Any = rows.pivot_table("contribution", keys, "kind", "sum", fill_value=0.0)
        parts = parts.reindex(columns=["edges", *KINDS], fill_value=0.0)
        parts["code"] = rows.groupby(keys)["target_code"].first()
        parts.columns.name = None
        return parts.sort_values("code", ascending=False).reset_index()

    def at(self, position: int) -> pd.DataFrame:
        """The rows of one position."""
        if not 0 <= position < len(self.tokens):
            raise InputError(f"`position` is {position}: the prompt has the positions 0 to {len(self.tokens) - 1}")
        rows: Any = self.table[self.table["position"] == position]
        return rows.reset_index(drop=True)


def contributions(
    model: Any,
    graph: Any,
    basis: SAEFeatures | Mapping[str, Any],
    prompt: str | Sequence[int] | Tensor,
    *,
    positions: Any = "all",
) -> Contributions:
    """A_ij z_i(p) of every kept edge on one prompt. One forward pass, and two from each parent's hook to its child's.

    Edges from an SAE's error and edges of single heads are left out: they have no coefficient per code. What the error
    does is measured, and what heads bring is among what isn't explained.

    Raises
    ------
    InputError: more than one prompt, a prompt without samples, or a graph of other SAEs.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> view = contributions(demo.model, graph, basis, demo.tokens[0])
    >>> view.graph.n_kept <= graph.n_kept, list(view.table.columns[:4])
    (True, ['position', 'token', 'source', 'target'])
    """
    model, graph = in_order(model, graph)
    adapter = adapt(model)
    encoders = SAEFeatures.of(basis).encoders()
    rows = _rows(graph, set(encoders))
    (batch,) = Prompts(adapter, one_prompt(prompt), positions=positions)
    routes = _routes(graph, rows, adapter.shape.n_layers)
    hooks = {hook for encoder in encoders.values() for hook in (encoder.hook, encoder.hook_out)}
    acts = adapter.run(batch.tokens, batch.mask, [*hooks, *(act("pattern", layer) for layer in _layers(routes))])
    codes = {hook: encoder.encode(acts[hook][0]).double().cpu() for hook, encoder in encoders.items()}
    where = batch.keep[0].nonzero().flatten().cpu()
    weight = _coefficients(graph, rows)
    brought = weight[:, None] * _seen(graph, rows, codes, routes, acts, batch.words[0].cpu())[:, where]
    reached = _columns(graph, graph.target[rows], codes)[:, where]
    edges = _table(graph, rows, where, _texts(adapter, batch), weight, brought, reached)
    rest = [
        remainder(adapter, (encoders[pair[0]], encoders[pair[1]]), batch, acts).rows(edges, targets, where)
        for pair, targets in _fed(graph, rows).items()
    ]
    table = joined(edges, rest, _texts(adapter, batch))
    active = with_errors(_active(graph, rows, brought, reached), table)
    return Contributions(tuple(_texts(adapter, batch)), table, active)


def one_prompt(prompt: Any) -> Any:
    """A prompt as `Prompts` takes it.

    Raises
    ------
    InputError: more than one prompt.
    """
    if isinstance(prompt, str):
        return [prompt]
    tokens = torch.as_tensor(prompt)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or len(tokens) != 1:
        raise InputError(f"`prompt` has shape {tuple(tokens.shape)}: give one prompt, as text or token ids")
    return tokens


def _rows(graph: AttributionGraph, hooks: set[str]) -> Int[Tensor, " row"]:
    """Kept edges whose source is a feature of `hooks`, at the same position or through the mean pattern."""
    feature = torch.tensor(["#" in name and name.rpartition("#")[0] in hooks for name in graph.index.names])
    end = torch.tensor([name.rpartition("#")[0] in hooks or "#" not in name for name in graph.index.names])
    by_head = graph.extras.get("head", torch.full_like(graph.score, -1.0)) >= 0
    rows = (graph.kept & feature[graph.source] & end[graph.target] & ~by_head).nonzero().flatten()
    if not len(rows):
        raise InputError("`graph` keeps no edge from a feature of `basis`: give the SAEs that it was learned from")
    return rows


def _fed(graph: AttributionGraph, rows: Int[Tensor, " row"]) -> dict[tuple[str, str], list[str]]:
    """By pair of hooks, the features that are fed."""
    names, found = graph.index.names, {}
    for source, target in zip(graph.source[rows].tolist(), graph.target[rows].tolist()):
        if "#" in names[target]:
            pair = tuple(names[end].rpartition("#")[0] for end in (source, target))
            found.setdefault(pair, {})[names[target]] = None
    return {pair: list(targets) for pair, targets in found.items()}


def _routes(graph: AttributionGraph, rows: Int[Tensor, " row"], n_layers: int) -> dict[int, tuple[int, ...]]:
    """For every row that goes through attention, the layers between its ends."""
    names = graph.index.names
    through = [row for row in rows.tolist() if PORTS[int(graph.port[row])] == "v"]
    hooks = {row: [names[int(end[row])].rpartition("#")[0] for end in (graph.source, graph.target)] for row in through}
    return {row: tuple(attention_between(first, last, n_layers)) for row, (first, last) in hooks.items()}


def _layers(routes: Mapping[int, tuple[int, ...]]) -> list[int]:
    return sorted({layer for layers in routes.values() for layer in layers})


def _coefficients(graph: AttributionGraph, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """What each edge brings for a unit of its source where the target is: A_ij, and B_ij through attention."""
    through = graph.port[rows] == PORTS.index("v")
    return torch.where(through, graph.extras.get("regression", graph.weight)[rows], graph.weight[rows])


def _seen(
    graph: AttributionGraph,
    rows: Int[Tensor, " row"],
    codes: Mapping[str, Float[Tensor, "pos feature"]],
    routes: Mapping[int, tuple[int, ...]],
    acts: Mapping[str, Tensor],
    words: Bool[Tensor, " pos"],
) -> Float[Tensor, "row pos"]:
    """Each edge's source as its target sees it: at the same position, or through attention to all words."""
    source = _columns(graph, graph.source[rows], codes)
    for number, row in enumerate(rows.tolist()):
        if layers := routes.get(row):
            pattern = torch.stack([acts[act("pattern", layer)][0].double().cpu() for layer in layers]).mean((0, 1))
            source[number] = pattern @ (source[number] * words)
    return source


def _columns(
    graph: AttributionGraph, nodes: Int[Tensor, " row"], codes: Mapping[str, Float[Tensor, "pos feature"]]
) -> Float[Tensor, "row pos"]:
    """Each node's code at every position; NaN for nodes that aren't features."""
    length = len(next(iter(codes.values())))
    names = [graph.index.names[node] for node in nodes.tolist()]
    nothing = torch.full((length,), float("nan"), dtype=torch.float64)
    parts = [name.rpartition("#") for name in names]
    return torch.stack([codes[hook][:, int(number)].clone() if mark else nothing for hook, mark, number in parts])


def _table(
    graph: AttributionGraph,
    rows: Int[Tensor, " row"],
    where: Int[Tensor, " sample"],
    texts: Sequence[str],
    weights: Float[Tensor, " row"],
    brought: Float[Tensor, "row sample"],
    reached: Float[Tensor, "row sample"],
) -> pd.DataFrame:
    row, sample = torch.where(reached != 0, brought, 0.0).nonzero(as_tuple=True)
    order = brought[row, sample].abs().argsort(descending=True, stable=True)
    row, sample = row[order], sample[order]
    names, edge, position = np.array(graph.index.names, dtype=object), rows[row], where[sample].numpy()
    contribution, weight = brought[row, sample], weights[row]
    columns = {
        "position": position,
        "token": np.array(texts, dtype=object)[position],
        "source": names[graph.source[edge].numpy()],
        "target": names[graph.target[edge].numpy()],
        "port": np.array(PORTS, dtype=object)[graph.port[edge].numpy()],
        "weight": weight.numpy(),
        "source_code": (contribution / weight).numpy(),
        "contribution": contribution.numpy(),
        "target_code": reached[row, sample].numpy(),
    }
    return pd.DataFrame(columns)


def _active(
    graph: AttributionGraph,
    rows: Int[Tensor, " row"],
    brought: Float[Tensor, "row sample"],
    reached: Float[Tensor, "row sample"],
) -> AttributionGraph:
    total = torch.where(reached != 0, brought, 0.0).sum(1)
    score = torch.zeros_like(graph.score).index_put((rows,), total)
    return replace(graph, score=score, kept=score != 0, provenance={**graph.provenance, "view": "one prompt"})


def _texts(adapter: Adapter, batch: Batch) -> list[str]:
    ids = batch.tokens[0].tolist()
    tokenizer = getattr(adapter.model, "tokenizer", None)
    return [str(i) for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]
