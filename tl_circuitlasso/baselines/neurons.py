"""Attribution of neurons, heads, MLP outputs or residual dimensions: RelP, gradient x activation, its integral, chance.

Each gives an `AttributionGraph` of edges from nodes to the logits; the score is the node's mean signed contribution to
the metric, so a positive one helps. `evaluate.curve` and `evaluate.faithfulness` say how good such a circuit is.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import truth, whole_number, whole_or_none
from tl_circuitlasso.baselines.gradient import unit_of
from tl_circuitlasso.baselines.relevance import relp_edges, rules_of
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, PromptOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.graph.provenance import FREE, question, record
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.neuron_scores import Batch, ByGradient, BySweep, Scoring, scores
from tl_circuitlasso.models.pairs import Metric, Pairs, shown
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import counted

MAX_NODES = 4096  # nodes that a graph keeps of those that are scored


@verb
def relp(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    basis: str = "neuron",
    reference: str | None = None,
    attention: str = "frozen",
    products: str = "half",
    by_position: bool = False,
    max_nodes: int | None = MAX_NODES,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """Relevance patching (Rezaei Jafari et al. 2025, arXiv 2508.21258; arXiv 2601.22594).

    Activation (less its reference) times a modified gradient on the clean prompt: norms keep their scale,
    act(x) = x (act(x) / x) with the ratio constant, gated products pass half to each factor, patterns are constant.
    One forward pass and one sweep per prompt, one forward pass more with a reference.

    Parameters
    ----------
    model, clean, corrupted, metric, options: as in `tcl.Experiment`, or an experiment in the model's place alone;
        `corrupted` may be None.
    basis: "neuron" (what goes into the down projection), "mlp_out", "head" or "residual"; "component" scores all edges
        between heads and MLPs instead, as `METHODS["relp"]` does.
    reference: what a node is compared with: "corrupted" (its partner; the default where there are corrupted prompts),
        "mean" (over prompts at the same position, the corrupted ones where there are any) or "zero" (the default else).
    attention: "frozen" holds attention patterns constant; "moving" lets them pass on what they do, by their derivative.
    products: a gated MLP's product passes "half" on to each factor, so that relevance is conserved, or the "whole" to
        both, as its derivative does: nearer to what patching a neuron does (docs/benchmarks.md).
    by_position: whether `graph.node_info[node]["by_position"]` has the parts of a score, from the first real token.
    max_nodes: only so many nodes of the largest |score| are kept in the graph; None keeps all.

    Raises
    ------
    InputError: arguments that can't be used; ModelError: no MLPs, or a mixture of experts.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    >>> graph = relp(demo.model, demo.tokens, demo.corrupted, metric, basis="head")
    >>> sorted(graph.kept_nodes())[:2]
    ['a0.h0', 'a0.h1']
    """
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    rules, chosen = rules_of(attention, products), _reference(reference, setup)
    if basis == "component":
        if truth("by_position", by_position):
            raise InputError("`by_position` is for nodes: edges of basis='component' are summed over positions")
        over = "clean" if setup.corrupted is None else "corrupted"
        own = replace(setup, ablation={"corrupted": "patch"}.get(chosen, chosen), mean_over=over)
        return relp_edges(own, attention=attention, products=products)
    return _graph("relp", setup, basis, chosen, BySweep(rules, alone=True), max_nodes, by_position)


@verb
def gradient_activation(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    basis: str = "neuron",
    reference: str | None = None,
    by_position: bool = False,
    max_nodes: int | None = MAX_NODES,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """Activation (less its reference) times the gradient on the clean prompt: attribution patching; as in `relp`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = gradient_activation(demo.model, demo.tokens, demo.corrupted, demo.target, basis="head")
    >>> sorted(graph.top_k(2).kept_nodes())
    ['a0.h0', 'a2.h0', 'logits']
    """
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return _graph(
        "gradient_activation", setup, basis, _reference(reference, setup), ByGradient(), max_nodes, by_position
    )


@verb
def integrated_gradients(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 10,
    basis: str = "neuron",
    reference: str | None = None,
    by_position: bool = False,
    max_nodes: int | None = MAX_NODES,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """Activation (less its reference) times the gradient's mean over a line of inputs; other arguments as in `relp`.

    The embeddings are r + k/steps (clean - r) with k = 0 .. steps - 1 (left Riemann sum), r being the corrupted
    prompt's embedding or, without one, zero. 1 or 2 + steps forward passes and `steps` backward ones per prompt.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = integrated_gradients(demo.model, demo.tokens, demo.corrupted, demo.target, basis="head", steps=5)
    >>> sorted(graph.top_k(2).kept_nodes())
    ['a0.h0', 'a2.h0', 'logits']
    """
    steps = whole_number("steps", steps, what="of integration steps")
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return _graph(
        "integrated_gradients", setup, basis, _reference(reference, setup), ByGradient(steps), max_nodes, by_position
    )


def random_nodes(
    model: Any, *, basis: str = "neuron", seed: int = 0, max_nodes: int | None = MAX_NODES
) -> AttributionGraph:
    """A score drawn uniformly from (0, 1) for every node: its k highest are k nodes drawn at random.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> graph = random_nodes(demo.model, basis="head")
    >>> len(graph)
    12
    """
    adapter = adapt(model)
    setup = Scoring(adapter, lambda logits, batch: logits.sum(), basis, "zero")
    generator = torch.Generator().manual_seed(seed)
    shape = adapter.shape
    width = {"neuron": shape.d_mlp, "head": shape.n_heads}.get(basis, shape.d_model)
    found = {key: torch.rand(width, dtype=torch.float64, generator=generator) for key in setup.keys}
    facts = record("random_nodes", adapter.facts(), seed=seed, **FREE)
    return score_graph(adapter, basis, found, Site("logits"), max_nodes, facts)


def _reference(given: str | None, setup: Experiment) -> str:
    if given is None:
        return "zero" if setup.corrupted is None else "corrupted"
    if given == "corrupted" and setup.corrupted is None:
        raise InputError("`corrupted` is missing: reference='corrupted' reads it; without it use 'mean' or 'zero'")
    return given


def _graph(
    method: str,
    setup: Experiment,
    basis: str,
    reference: str,
    way: BySweep | ByGradient,
    max_nodes: int | None,
    by_position: bool,
) -> AttributionGraph:
    places = setup.pairs.width if truth("by_position", by_position) else 1
    began, metric = time.perf_counter(), setup.ready(cut=False).objective
    goal = Scoring(setup.adapter, lambda logits, batch: metric(shown(logits, batch.mask), batch.rows), basis, reference)
    paired = setup.corrupted is not None
    found = scores(goal, lambda: batches(setup.pairs, paired, method, setup.progress), len(setup), way, places)
    facts = record(
        method,
        setup.adapter.facts(),
        question=question(setup.metric, "last"),
        prompts=len(setup),
        prompt_pairs=len(setup) if paired else None,
        unit=unit_of(setup.metric),
        forward=goal.count.forward,
        backward=goal.count.backward,
        seconds={"scores": time.perf_counter() - began},
        basis=basis,
        reference=reference,
        attention="frozen" if isinstance(way, BySweep) and way.rules.attention else "moving",
        steps=way.steps if isinstance(way, ByGradient) else 0,
    )
    summed = {key: part.sum(0) for key, part in found.items()}
    graph = score_graph(setup.adapter, basis, summed, Site("logits"), max_nodes, facts)
    return replace(graph, node_info=_parts(graph, list(found.values()))) if by_position else graph


def _parts(
    graph: AttributionGraph, found: Sequence[Float[Tensor, "pos node"]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of every node of the graph its contribution at each position where it has one."""
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for block in graph.index.blocks[:-1]:
        columns = [block.site.head] if block.features is None else list(block.features)
        own = found[block.site.layer][:, columns].T.tolist()
        for name, values in zip(block.names, own):
            parts[name] = {"by_position": {str(at): value for at, value in enumerate(values) if value}}
    return parts


def batches(data: Pairs, paired: bool, method: str, progress: bool) -> Iterator[Batch]:
    """The prompts as scoring takes them, while a bar counts them."""
    sized = {"progress": progress, "desc": method, "total": len(data)}
    for batch in counted(data, lambda pair: len(pair.rows), **sized):
        yield Batch(batch.clean.tokens, batch.corrupted.tokens if paired else None, batch.mask, batch.rows)


# ---- from scores to a graph -----------------------------------------------------------------------------------------


def score_graph(
    adapter: Adapter,
    basis: str,
    found: Mapping[str, Float[Tensor, " node"]],
    target: Site,
    max_nodes: int | None,
    facts: Mapping[str, Any],
) -> AttributionGraph:
    """Edges from the nodes of largest |score| to the target, all kept; the others are left out.

    Raises
    ------
    InputError: `max_nodes` isn't a whole number above 0, or a score isn't finite.
    """
    max_nodes = whole_or_none("max_nodes", max_nodes, what="of nodes at most")
    everything = torch.cat(list(found.values()))
    if not bool(everything.isfinite().all()):
        raise InputError("`metric` gives NaN or infinite contributions: check the prompts, the metric and the weights")
    count = len(everything) if max_nodes is None else min(max_nodes, len(everything))
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[everything.abs().argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([len(part) for part in found.values()])
    nodes = {layer: own.nonzero().flatten().tolist() for layer, own in enumerate(parts)}
    return node_graph(adapter, basis, nodes, everything[chosen], target, {**facts, "nodes_scored": len(everything)})


def node_graph(
    adapter: Adapter,
    basis: str,
    nodes: Mapping[int, Sequence[int]],
    score: Float[Tensor, " node"],
    target: Site,
    facts: Mapping[str, Any],
) -> AttributionGraph:
    """Edges from some nodes, by layer, to the target, all kept; `score` in the order of the nodes."""
    blocks = [block for layer, own in nodes.items() for block in _blocks(basis, layer, list(own))]
    index, count = NodeIndex((*blocks, Block(target, adapter.shape.n_layers))), len(score)
    return AttributionGraph(
        index=index,
        source=torch.arange(count),
        target=torch.full((count,), count),
        port=torch.zeros(count, dtype=torch.long),
        score=score,
        weight=score.clone(),
        kept=torch.ones(count, dtype=torch.bool),
        provenance=dict(facts),
    )


def _blocks(basis: str, layer: int, chosen: list[int]) -> list[Block]:
    if basis == "head":
        return [Block(Site("head", layer, head), layer) for head in chosen]
    site = {
        "neuron": Site("mlp", layer),
        "residual": Site("resid", layer),
        "mlp_out": Site("hook", layer, hook=f"blocks.{layer}.hook_mlp_out"),
    }[basis]
    return [Block(site, layer, tuple(chosen))] if chosen else []
