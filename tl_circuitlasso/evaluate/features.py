"""Faithfulness of circuits whose nodes are neurons, residual dimensions or SAE features.

A graph of features names what matters at some hooks; what reads what between them runs through the whole model. So a
feature circuit is tested by its nodes (Marks et al. 2024, arXiv 2403.19647): at every hook of the graph the features
that no kept edge touches carry ablated values, the kept ones what they do in the edited run. An SAE's error term is
kept, removed, or a node as the graph has it. Its edges are tested in `feature_edges`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import as_graph
from tl_circuitlasso.evaluate.interventions import Measured, count_passes, prompt_values
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.feature_patch import Carried, FeatureSite, Kept, hooks_of, run_features
from tl_circuitlasso.models.feature_wires import Wiring, run_wired
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.sae import SAEFeatures

ERROR = ".hook_sae_error"  # how the node of an SAE's error ends, behind its hook
Circuit = Mapping[str, Kept]  # by site name
Run = Circuit | Wiring  # by its nodes, or by its edges


def has_features(graph: AttributionGraph) -> bool:
    """Whether the graph's nodes are coordinates of sites, not whole components."""
    return any(block.features is not None for block in as_graph(graph).index.blocks)


# ---- where the features are -----------------------------------------------------------------------------------------


def feature_sites(graph: AttributionGraph, adapter: Adapter, saes: Mapping[str, Any] | None) -> list[FeatureSite]:
    """Every place whose features the graph names, and those of SAEs that it doesn't, with its number of features.

    Raises
    ------
    InputError: whole components among the nodes, a hook without an SAE, or features that aren't there.
    """
    saes = {} if saes is None else saes
    blocks = {str(block.site): block for block in graph.index.blocks}
    if whole := [name for name, block in blocks.items() if block.features is None and _is_component(block)]:
        raise InputError(f"`graph` mixes features with the whole component {whole[0]!r}: give a graph of one kind")
    inner = {name: block for name, block in blocks.items() if block.features is not None}
    own = graph.provenance.get("basis") == "mlp_out"
    plain = {name for name, block in inner.items() if name not in saes and _is_plain(block, own)}
    sites = [_own(name, inner[name], adapter) for name in inner if name in plain]
    if missing := [name for name in inner if name not in plain and name not in saes]:
        raise InputError(f"`saes` has no SAE for {missing[0]!r}, whose features `graph` names: give {{hook: sae}}")
    sites += [_learned(hook, sae, adapter) for hook, sae in saes.items()]
    for site in sites:
        highest = max(inner[site.name].features or (0,)) if site.name in inner else 0
        if highest >= site.features:
            raise InputError(
                f"`graph` belongs to another model or SAE: it has the node {site.name}#{highest}, but there are only "
                f"{site.features} features"
            )
    return sites


def _is_component(block: Block) -> bool:
    return block.site.kind in ("head", "mlp", "resid") or (block.site.kind == "hook" and not _is_error(str(block.site)))


def _is_plain(block: Block, own: bool) -> bool:
    """Whether a site's features are the activation's own coordinates, not those of an SAE; at a hook, whether the graph
    says so."""
    return block.site.kind != "hook" or own


def _is_error(name: str) -> bool:
    return name.endswith(ERROR)


def _own(name: str, block: Block, adapter: Adapter) -> FeatureSite:
    layer, shape = block.site.layer, adapter.shape
    if block.site.kind == "mlp":
        hook, width = f"blocks.{layer}.mlp.hook_post", shape.d_mlp
        known = layer < shape.n_layers and not shape.attn_only and not shape.moe
    elif block.site.kind == "hook":
        hook, width, known = name, shape.d_model, layer < shape.n_layers and not shape.attn_only
    else:
        end = layer == shape.n_layers
        hook = f"blocks.{layer - 1}.hook_resid_post" if end else f"blocks.{layer}.hook_resid_pre"
        width, known = shape.d_model, block.site.kind == "resid" and layer <= shape.n_layers
    if not known:
        raise InputError(f"`graph` belongs to another model: this one has no features at {name!r}")
    return FeatureSite(name, hook, hook, width, None)


def _learned(hook: str, sae: Any, adapter: Adapter) -> FeatureSite:
    if adapter.point(hook) is None:
        raise InputError(f"`saes` names the hook {hook!r}, which the model doesn't have")
    encoder = SAEFeatures({hook: sae}).encoders()[hook]
    return FeatureSite(hook, hook, encoder.hook_out, encoder.features, encoder)


# ---- circuits -------------------------------------------------------------------------------------------------------


def circuit_of(
    setup: Experiment, graph: AttributionGraph, sites: Sequence[FeatureSite], nodes: set[str], *, rest: bool = False
) -> Circuit:
    """What of each site stays where the circuit is `nodes`; with `rest` everything but the circuit stays."""
    blocks = {str(block.site): block for block in graph.index.blocks}
    return {site.name: _kept(site, blocks, setup, nodes, rest) for site in sites}


def _kept(site: FeatureSite, blocks: Mapping[str, Block], setup: Experiment, nodes: set[str], rest: bool) -> Kept:
    block = blocks.get(site.name)
    unnamed = rest or setup.rest == "keep"
    mask = torch.full((site.features,), unnamed, dtype=torch.bool)
    if block is not None and block.features is not None:
        inside = torch.tensor([name in nodes for name in block.names])
        mask[list(block.features)] = ~inside if rest else inside
    if setup.error != "graph":
        return Kept(mask, setup.error)
    error = site.name + ERROR
    stays = error not in blocks or (error in nodes) != rest
    return Kept(mask, "keep" if stays else "ablate")


def node_scores(graph: AttributionGraph) -> dict[str, float]:
    """How much each feature matters to the target, to rank features by.

    Where the graph knows what each node contributes in all (`node_info`), that. Else scores of neurons and residual
    dimensions say it of each edge already: the largest |score| out of a node. Those of SAE features are local, from
    feature to feature, so they're followed to the end of the graph (u's children v):

        relevance(u) = sum over v of |score(u -> v)| relevance(v),    relevance = 1 of the target, and without one
                                                                      of whatever feeds nothing.

    Where there is a target, a feature that feeds nothing matters to nothing.
    """
    named = {name for block in graph.index.blocks if block.features is not None for name in block.names}
    return {name: score for name, score in zip(graph.index.names, node_relevance(graph).tolist()) if name in named}


def node_relevance(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The same of all nodes of the index; of those that aren't features only where scores are followed."""
    named = [name for block in graph.index.blocks if block.features is not None for name in block.names]
    whole = {name: graph.node_info.get(name, {}).get("contribution") for name in named}
    known = {name: abs(value) for name, value in whole.items() if isinstance(value, int | float)}
    if len(known) == len(whole):
        return torch.tensor([known.get(name, 0.0) for name in graph.index.names], dtype=torch.float64)
    local = any(block.site.kind == "hook" for block in graph.index.blocks)
    return _followed(graph) if local else _largest(graph)


def target_nodes(graph: AttributionGraph) -> Bool[Tensor, " node"]:
    """Which nodes are the target's: neither features nor errors."""
    own = [block.features is None and not _is_error(str(block.site)) for block in graph.index.blocks]
    return torch.tensor(own)[graph.index.block_of]


def _largest(graph: AttributionGraph) -> Float[Tensor, " node"]:
    scores = torch.zeros(len(graph.index), dtype=torch.float64)
    return scores.scatter_reduce(0, graph.source, graph.score.abs(), "amax")


def _followed(graph: AttributionGraph) -> Float[Tensor, " node"]:
    ranks, relevance = graph.index.ranks, torch.zeros(len(graph.index), dtype=torch.float64)
    fed = torch.zeros(len(graph.index), dtype=torch.bool)
    fed[graph.target] = True
    last = target_nodes(graph) & fed
    if not bool(last.any()):
        last = fed.clone()
        last[graph.source] = False
    relevance[last] = 1.0
    for rank in ranks.unique().flip(0):
        rows = (ranks[graph.target] == rank).nonzero().flatten()
        relevance.index_add_(0, graph.source[rows], graph.score[rows].abs() * relevance[graph.target[rows]])
    return relevance


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_features(setup: Experiment, sites: Sequence[FeatureSite], circuits: Sequence[Run]) -> Measured:
    """The metric of the model, with everything outside of no circuit at all ablated, and of each circuit.

    The last circuit is the empty one. One forward pass for the model, one for the ablated values (none for "zero"),
    one for each circuit of nodes, and one for each set of edges that lead into features of a circuit of edges.

    Raises
    ------
    InputError: optimal ablation, which is for whole components.
    """
    setup.ready(fitted="whole components")
    values = torch.zeros(1 + len(circuits), len(setup.pairs), dtype=torch.float64)
    runs = [one.runs if isinstance(one, Wiring) else 1 for one in circuits]
    with count_passes(setup, 1 + sum(runs), "measure") as bar:
        carried = ablated_values(setup, sites)
        for batch in setup.pairs:
            logits = setup.adapter.run(batch.clean.tokens, batch.mask, ["logits"])["logits"]
            values[0, batch.rows] = prompt_values(setup.objective, logits, batch, "the model")
            instead = carried(batch)
            bar.update(len(batch.rows))
            for number, circuit in enumerate(circuits, 1):
                run: Any = run_wired if isinstance(circuit, Wiring) else run_features
                logits = run(setup.adapter, batch.clean.tokens, batch.mask, sites, circuit, instead)
                values[number, batch.rows] = prompt_values(setup.objective, logits, batch, "a circuit")
                bar.update(runs[number - 1] * len(batch.rows))
    passes = 1.0 + (setup.cut != "zero") + sum(runs)
    return Measured(values[0], values[-1], values[1:-1], passes)


def ablated_values(setup: Experiment, sites: Sequence[FeatureSite]) -> Callable[[PairBatch], Carried]:
    """What ablated features carry on a batch. One forward pass: here for means, or on each batch for partners."""
    if setup.cut.startswith("mean"):
        means = _means(setup, sites)
        return lambda batch: means
    if setup.cut == "patch":
        return lambda batch: Carried({}, {}, setup.adapter.run(batch.corrupted.tokens, batch.mask, hooks_of(sites)))
    zeros = {site.name: torch.zeros(1, 1, site.features, device=setup.adapter.device) for site in sites}
    widths = {site.name: site.encoder.width for site in sites if site.encoder is not None}
    errors = {name: torch.zeros(1, 1, width, device=setup.adapter.device) for name, width in widths.items()}
    return lambda batch: Carried(zeros, errors, {})


def _means(setup: Experiment, sites: Sequence[FeatureSite]) -> Carried:
    """The mean codes and errors over real positions, at each position or ("mean-all") at all."""
    sums = _Sums(setup.adapter, setup.pairs.width)
    for batch in setup.pairs:
        tokens = (batch.clean if setup.mean_over == "clean" else batch.corrupted).tokens
        acts = setup.adapter.run(tokens, batch.mask, hooks_of(sites))
        for site in sites:
            read, written = acts[site.reads], acts[site.writes]
            sums.add(site, _by_row(read, batch), _by_row(written, batch), batch.mask)
        sums.count += batch.mask.sum(0)
    return sums.means(everywhere=setup.cut == "mean-all")


def _by_row(activation: Tensor, batch: PairBatch) -> Float[Tensor, "row *width"]:
    return activation if len(activation) == batch.mask.numel() else activation.flatten(0, 1)


class _Sums:
    """Running sums of codes and errors by position, in float64."""

    def __init__(self, adapter: Adapter, positions: int) -> None:
        self.codes: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self.count = torch.zeros(positions, dtype=torch.float64, device=adapter.device)

    def add(self, site: FeatureSite, x: Tensor, out: Tensor, mask: Bool[Tensor, "batch pos"]) -> None:
        real = mask.flatten().nonzero().flatten()
        for rows in real.split(site.rows_at_once):
            self._add(self.codes, site.name, site.codes(x[rows]), rows % mask.shape[1])
            if (error := site.error(x[rows], out[rows])) is not None:
                self._add(self.errors, site.name, error, rows % mask.shape[1])

    def _add(self, sums: dict[str, Tensor], name: str, values: Tensor, positions: Tensor) -> None:
        if name not in sums:
            sums[name] = values.new_zeros(len(self.count), values.shape[1], dtype=torch.float64)
        sums[name].index_add_(0, positions, values.double())

    def means(self, *, everywhere: bool) -> Carried:
        count = self.count.sum(0, keepdim=True) if everywhere else self.count

        def mean(total: Tensor) -> Tensor:
            total = total.sum(0, keepdim=True) if everywhere else total
            return (total / count.clamp_min(1)[:, None]).float()[None]

        codes, errors = ({name: mean(total) for name, total in sums.items()} for sums in (self.codes, self.errors))
        return Carried(codes, errors, {})
