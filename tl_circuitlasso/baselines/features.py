"""Other ways to find edges between SAE features, over the same features as a given graph and as many edges.

Both give every edge a *weight* in the units of a regression coefficient, target code per unit of source code, and the
score weight * std(source) / std(target), so that rankings and sizes can be compared with those of CircuitLasso.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import record as record_of
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import ENCODE_CHUNK, Recording, Trying, record, trials
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.progress import bar as counting

HookPair = tuple[str, str]


def feature_correlation(
    model: Any, basis: SAEFeatures | Mapping[str, Any], tokens: Any, like: AttributionGraph, *,
    positions: Any = "all", attention_mask: Tensor | None = None, batch_size: int = 32,
    progress: bool = True,
) -> AttributionGraph:  # fmt: skip
    """The most correlated pairs of features at the same position: weight = cov(z_i, z_j) / var(z_i).

    like: the graph that gives the features, the pairs of hooks and how many edges to keep. The score is Pearson's r.
    One forward pass per batch.

    Raises
    ------
    InputError: `like` has no edge between features of `basis`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> rival = feature_correlation(demo.model, basis, demo.tokens, graph)
    >>> rival.n_kept <= graph.n_kept
    True
    """
    began = time.perf_counter()
    adapter, encoders, pairs = _setup(model, basis, like)
    prompts = Prompts(adapter, tokens, attention_mask=attention_mask, positions=positions, batch_size=batch_size)
    moments = _Moments(pairs, features_of(like))
    for batch in counting(prompts, progress=progress, desc="feature_correlation", unit="batch"):
        acts = adapter.run(batch.tokens, batch.mask, list(encoders))
        moments.add({hook: encoder.encode(acts[hook][batch.keep]).cpu() for hook, encoder in encoders.items()})
    weights = {pair: moments.slope(pair) for pair in pairs}
    scores = {pair: moments.standardised(pair, weight) for pair, weight in weights.items()}
    made = _record("feature_correlation", adapter, prompts, began, forward=1, backward=0)
    return _strongest(like, weights, scores, made)


def feature_gradient(
    model: Any, basis: SAEFeatures | Mapping[str, Any], tokens: Any, like: AttributionGraph, *,
    positions: Any = "all", attention_mask: Tensor | None = None, prompts: int = 16, batch_size: int = 64,
    seed: int = 0, progress: bool = True,
) -> AttributionGraph:  # fmt: skip
    """Gradient times activation between features, as in sparse feature circuits (Marks et al. 2024, section 3).

    weight_ij = sum over positions where i fires of (d z_j / d x) . c_i, divided by the sum of z_i, where c_i is what
    feature i writes; of each source, over up to `prompts` prompts on which it fires. One forward-mode derivative
    gives all targets of a source.

    Raises
    ------
    InputError: `like` has no edge between features of `basis`. ModelError: an operation without forward derivative.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> rival = feature_gradient(demo.model, basis, demo.tokens, graph, prompts=2)
    >>> rival.n_kept <= graph.n_kept
    True
    """
    began = time.perf_counter()
    adapter, encoders, pairs = _setup(model, basis, like)
    walk = Prompts(adapter, tokens, attention_mask=attention_mask, positions=positions)
    hooks = list(dict.fromkeys(h for e in encoders.values() for h in (e.hook, e.hook_out)))
    recording, features = record(adapter, walk, hooks), features_of(like)
    moments = _Moments((), features)
    for codes in _encoded(recording, encoders):
        moments.add(codes)
    weights = {}
    for pair in pairs:
        ends, (sources, targets) = (encoders[pair[0]], encoders[pair[1]]), (features[hook] for hook in pair)
        how = Trying(prompts, batch_size, seed, modes=("gradient",))
        found = torch.zeros(len(sources), len(targets), dtype=torch.float64)
        mass = torch.zeros(len(sources), dtype=torch.float64)
        made = trials(recording, ends, sources, targets, how)
        for batch in counting(made, progress=progress, desc=f"feature_gradient {pair[0]}", unit="batch"):
            some = batch["gradient"]
            found.index_add_(0, some.source, some.code.cpu())
            mass.index_add_(0, some.source, some.mass.cpu())
        weights[pair] = found / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    scores = {pair: moments.standardised(pair, weight) for pair, weight in weights.items()}
    made = _record("feature_gradient", adapter, walk, began, forward=None, backward=None)
    return _strongest(like, weights, scores, made)


def features_of(graph: AttributionGraph) -> dict[str, Int[Tensor, " feature"]]:
    """The feature numbers of each hook of the graph."""
    blocks = [block for block in graph.index.blocks if block.site.kind == "hook" and block.features is not None]
    return {str(block.site): torch.tensor(block.features, dtype=torch.long) for block in blocks}


def hook_pairs(graph: AttributionGraph) -> tuple[HookPair, ...]:
    """The pairs of hooks between whose features the graph has edges, in the order of its blocks."""
    blocks, block_of = graph.index.blocks, graph.index.block_of
    ends = torch.stack([block_of[graph.source], block_of[graph.target]], 1).unique(dim=0).tolist()
    inner = [
        (blocks[s], blocks[t]) for s, t in ends if blocks[s].features is not None and blocks[t].features is not None
    ]
    return tuple((str(s.site), str(t.site)) for s, t in inner if s.site.kind == t.site.kind == "hook")


def _setup(model: Any, basis: SAEFeatures | Mapping[str, Any], like: AttributionGraph):
    adapter = adapt(model)
    whole = SAEFeatures.of(basis)
    encoders = whole.encoders()
    pairs = tuple(pair for pair in hook_pairs(like) if set(pair) <= set(encoders))
    if not pairs:
        raise InputError(
            "`like` has no edge between features of `basis`: give the graph that was learned from these SAEs"
        )
    return adapter, {hook: encoders[hook] for pair in pairs for hook in pair}, pairs


class _Moments:
    """Sums of codes and of their products, for the kept features only."""

    def __init__(self, pairs: tuple[HookPair, ...], features: Mapping[str, Tensor]) -> None:
        self._features, self._pairs = features, pairs
        self._count = 0
        self._sum: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}
        self._cross: dict[HookPair, Tensor] = {}

    def add(self, codes: Mapping[str, Float[Tensor, "sample feature"]]) -> None:
        kept = {hook: values[:, self._features[hook]] for hook, values in codes.items()}
        self._count += len(next(iter(kept.values())))
        for hook, values in kept.items():
            self._sum[hook] = self._sum.get(hook, 0) + values.double().sum(0)
            self._square[hook] = self._square.get(hook, 0) + values.double().square().sum(0)
        for pair in self._pairs:
            source, target = kept[pair[0]], kept[pair[1]]
            self._cross[pair] = self._cross.get(pair, 0) + (source.T @ target).double()

    def variance(self, hook: str) -> Float[Tensor, " feature"]:
        mean = self._sum[hook] / self._count
        return (self._square[hook] / self._count - mean.square()).clamp(min=0)

    def slope(self, pair: HookPair) -> Float[Tensor, "source target"]:
        means = [self._sum[hook] / self._count for hook in pair]
        covariance = self._cross[pair] / self._count - torch.outer(*means)
        variance = self.variance(pair[0])[:, None]
        return torch.where(variance > 0, covariance / variance, 0.0)

    def standardised(self, pair: HookPair, weight: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
        source, target = (self.variance(hook).sqrt() for hook in pair)
        return torch.where(target > 0, weight * source[:, None] / target, 0.0)


def _encoded(recording: Recording, encoders: Mapping[str, Encoder]) -> Iterator[dict[str, Tensor]]:
    samples = {hook: recording.acts[hook][recording.keep].split(ENCODE_CHUNK) for hook in encoders}
    for chunks in zip(*samples.values()):
        yield {hook: encoder.encode(x).cpu() for (hook, encoder), x in zip(encoders.items(), chunks)}


def _strongest(
    like: AttributionGraph, weights: Mapping[HookPair, Tensor], scores: Mapping[HookPair, Tensor], made: dict[str, Any]
) -> AttributionGraph:
    """The graph of the edges with the largest |score|, as many as `like` keeps between these hooks."""
    slices = {block.site: part for block, part in zip(like.index.blocks, like.index.slices)}
    starts = {hook: slices[_site(like, hook)].start for pair in weights for hook in pair}
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = min(_kept_between(like, set(weights)), int((flat != 0).sum()))
    ends = torch.cat([_grid(starts[s], starts[t], *scores[s, t].shape) for s, t in weights])
    rows = flat.abs().topk(count).indices
    source, target = ends[rows].unbind(1)
    weight = torch.cat([weight.flatten() for weight in weights.values()])[rows]
    port, kept = torch.zeros_like(source), torch.ones(count, dtype=torch.bool)
    info = {"node_info": like.node_info, "provenance": made}
    return AttributionGraph(like.index, source, target, port, flat[rows], weight, kept, **info)


def _grid(first_source: int, first_target: int, sources: int, targets: int) -> Int[Tensor, "edge 2"]:
    source = first_source + torch.arange(sources).repeat_interleave(targets)
    return torch.stack([source, first_target + torch.arange(targets).repeat(sources)], 1)


def _kept_between(graph: AttributionGraph, pairs: set[HookPair]) -> int:
    sites = [str(block.site) for block in graph.index.blocks]
    ends = zip(
        graph.index.block_of[graph.source[graph.kept]].tolist(), graph.index.block_of[graph.target[graph.kept]].tolist()
    )
    return sum((sites[s], sites[t]) in pairs for s, t in ends)


def _site(graph: AttributionGraph, hook: str) -> Site:
    return next(block.site for block in graph.index.blocks if str(block.site) == hook)


def _record(method: str, adapter: Adapter, prompts: Prompts, began: float, **passes: Any) -> dict[str, Any]:
    seconds = {"scores": time.perf_counter() - began}
    unit = "standard deviations"
    return record_of(method, adapter.facts(), prompts=prompts.n_prompts, unit=unit, seconds=seconds, **passes)
