"""Edges between chosen neurons: direct effects through residual stream and attention, MLPs in between stopped.

    score(s -> t) = mean over prompts of g[s -> t],   weight = score over t's own mean contribution

with g from `models.neuron_edges`, so that all that flows into t adds up to what t contributes. Per target a certified
non-negative garrote min 1/2N sum (y - sum_s a_s g_s)^2 + lambda sum a_s, y = sum_s g_s, picks the parents: those that
together explain what the target contributes, prompt by prompt. Its coefficients stand in the column `garrote`; kept are
as many edges as have one, a tenth of the candidates at most, by coefficient x |score| and on whole paths.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph, selection
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.neuron_edges import direct_effects, memory
from tl_circuitlasso.models.neuron_scores import Batch, read_logits
from tl_circuitlasso.models.neuron_sweep import SECANT, Ends, unembedded, wanted
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.neurons.behaviour import Behaviour

logger = logging.getLogger(__name__)

SAMPLE = 64  # pairs of prompts that edges are looked for in
AUTO_STRENGTH = 0.01  # of lambda_max, as for circuits of components
MOST = 2 << 30  # bytes that what flows along the candidate edges may take
EDGE_SHARE = 0.1  # of the candidate edges: so many are kept at most


@dataclass(frozen=True, eq=False)
class Flows:
    """What flows along every candidate edge of `sources` to `targets` (node positions), prompt by prompt."""

    value: Float[Tensor, "prompt edge"]
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    forward_passes: float


def link(graph: AttributionGraph, adapter: Adapter, behaviour: Behaviour, *, strength: str | float) -> AttributionGraph:
    """The graph's neurons with the direct effects between them, from the input and to the target.

    The garrote picks the parents of each; a neuron stays kept only if a kept edge leads to it and one leads on.
    """
    index = _with_input(graph.index)
    flows = _flows(index, adapter, behaviour)
    score = flows.value.mean(0)
    own = torch.zeros(len(index), dtype=torch.float64).index_add(0, flows.target, score)
    weight = score / torch.where(own == 0, 1.0, own)[flows.target]
    garrote, certificates = _garrotes(index, flows, AUTO_STRENGTH if isinstance(strength, str) else float(strength))
    made = AttributionGraph(
        index=index,
        source=flows.source,
        target=flows.target,
        port=torch.zeros_like(flows.source),
        score=score,
        weight=weight,
        kept=garrote > 0,
        extras={"garrote": garrote},
        certificates=certificates,
        node_info=graph.node_info,
        provenance={**graph.provenance, "edge_pairs": len(flows.value), "edge_passes": flows.forward_passes},
    )
    count = min(made.n_kept, max(1, round(EDGE_SHARE * len(made))))
    edges = selection.Edges(made.source, made.target, index.ranks)
    return made.keep(selection.choose(edges, rank_by(made, "garrote").score, count, "top", None))


def _with_input(index: NodeIndex) -> NodeIndex:
    later = [Block(block.site, block.rank + 1, block.features) for block in index.blocks]
    return NodeIndex((Block(Site("input"), 0), *later))


def _flows(index: NodeIndex, adapter: Adapter, behaviour: Behaviour) -> Flows:
    chosen = {block.site.layer: list(block.features or ()) for block in index.blocks[1:-1]}
    neurons = sum(map(len, chosen.values()))
    allowed = index.allowed()
    source, target = allowed.nonzero(as_tuple=True)
    found: list[Tensor] = []
    passes = 0
    sample = behaviour.some(SAMPLE)
    if (size := 8 * len(source) * min(SAMPLE, behaviour.n_prompts)) > MOST:
        raise InputError(
            f"`linked` joins {neurons} neurons: what flows along {len(source)} candidate edges would take "
            f"{size / 2**30:.1f} GiB; join fewer"
        )
    for batch in sample.pairs():
        logger.info("edges of %d neurons: %d MiB a direction", neurons, _size(adapter, batch) >> 20)
        effects = _effects(adapter, sample, batch, chosen)
        found.append(effects[:, source, target - 1].double().cpu())
        passes += 2 * len(batch.rows)
    return Flows(torch.cat(found), source, target, passes / behaviour.n_prompts)


def _size(adapter: Adapter, batch: Batch) -> int:
    return memory(adapter, *batch.clean.shape)


def _effects(
    adapter: Adapter, behaviour: Behaviour, batch: Batch, chosen: dict[int, list[int]]
) -> Float[Tensor, "prompt source target"]:
    assert batch.corrupted is not None
    keys = {"logits", act("resid_pre", 0), *wanted(adapter)}
    own, other = (adapter.run(tokens, batch.mask, keys) for tokens in (batch.clean, batch.corrupted))
    ends = Ends(adapter, own, other, batch.mask, position_ids(batch.mask))
    at_logits, _ = read_logits(behaviour.reading, own["logits"], other["logits"], batch)
    start = unembedded(adapter, own["logits"], other["logits"], at_logits)
    return direct_effects(ends, start, chosen, SECANT).value


def _garrotes(
    index: NodeIndex, flows: Flows, strength: float
) -> tuple[Float[Tensor, " edge"], tuple[dict[str, Any], ...]]:
    """Each target's garrote over its parents: coefficients by edge, and the certificates."""
    coefficients = torch.zeros(len(flows.source), dtype=torch.float64)
    certificates = []
    for node in flows.target.unique().tolist():
        rows: Bool[Tensor, " edge"] = flows.target == node
        own = flows.value[:, rows]
        gram = own.T @ own / len(own)
        cross = gram.sum(1, keepdim=True)
        solution = solve.lasso(
            gram,
            cross,
            target_sq_norm=cross.sum().clamp_min(0)[None],
            strength=strength,
            penalty=solve.L1(non_negative=True),
            tol=1e-4,
        )
        coefficients[rows] = solution.value.flatten().double()
        certificates.append(
            {
                "target": index.names[node],
                "gap": float(solution.gap.max()),
                "iterations": int(solution.stats["iterations"].max()),
                "converged": bool(solution.converged.all()),
            }
        )
    return coefficients, tuple(certificates)


def rank_by(graph: AttributionGraph, how: str) -> AttributionGraph:
    """The same edges scored by |attribution| ("attribution"), by the attribution of those that help and then of those
    that work against the target ("signed"), or by garrote coefficient times |attribution| ("garrote"), those without a
    coefficient after all others, by |attribution|."""
    size, garrote = graph.score.abs(), graph.extras["garrote"]
    picked = torch.where(garrote > 0, size * garrote, 0.0)
    least = picked[picked > 0].min() if bool((picked > 0).any()) else size.new_ones(())
    score = {
        "attribution": size,
        "signed": graph.score - graph.score.min(),
        "garrote": torch.where(picked > 0, picked, least * size / (1 + size) / 2),
    }[how]
    return replace(graph, score=score)
