"""Baselines that only watch: information-flow routes, marginal correlation, sizes of changes, and random edges."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import as_seed
from tl_circuitlasso.baselines.edges import EdgeLayout, pieces_of, written_out
from tl_circuitlasso.baselines.gradient import Count, Setting, jobs
from tl_circuitlasso.experiment import Experiment, MethodOptions, PromptOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import FREE, record
from tl_circuitlasso.models import Adapter, Batch, adapt
from tl_circuitlasso.models.pairs import Pairs
from tl_circuitlasso.models.patching import Written, learned_positions, record_all
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import counted

SKETCH = 32  # dimensions to which what a component writes is projected before correlations are taken


@verb
def information_flow_routes(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Any = None,
    *,
    steps: int = 1,
    input_node: str = "embed",
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """Information-flow routes (Ferrando & Voita 2024, arXiv 2403.00824): how near each source is to what is read.

    importance(u -> v) = max(0, |x_v|_1 - |x_v - u|_1), divided by its sum over the sources of v, averaged over the
    positions of each prompt and over prompts; x_v is the residual stream that v reads. Scores are unsigned and the same
    for all heads and ports of a layer. One forward pass; corrupted prompts, the metric and steps aren't used.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> graph = information_flow_routes(demo.model, demo.tokens)
    >>> bool((graph.score >= 0).all())
    True
    """
    began = time.perf_counter()
    setup = Experiment.of(model, clean, input_node=input_node, **options).ready(metric=False, cut=False)
    data, layout = setup.pairs, EdgeLayout(setup.adapter.shape)
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64, device=data.adapter.device)
    for batch in _watched(data, "information_flow_routes", setup.progress):
        _add_nearness(layout, data.adapter, scores, batch, setup.input_node)
    made = _record("information_flow_routes", data, "share of what is read", began, input_node=setup.input_node)
    return layout.graph(scores / len(data), made)


def _add_nearness(layout: EdgeLayout, adapter: Adapter, scores: Tensor, batch: Batch, input_node: str) -> None:
    plain = record_all(adapter, batch.tokens, batch.mask)
    written, streams = plain.written, plain.streams
    if input_node == "embed" and (positions := learned_positions(adapter, batch.tokens, batch.mask)) is not None:
        written = Written(written.input - positions, written.heads, written.mlps)
    weight = 1 / batch.mask.sum(1, dtype=torch.float64)
    for chosen in pieces_of(layout, batch.mask, written.input.element_size()):
        sources = written_out(adapter, written, chosen)
        for layer, port in layout.readers():
            if port in ("k", "v"):
                continue
            stream = streams.logits if layer == layout.shape.n_layers else _stream(streams, layer, port)
            part = _nearness(sources[: layout.sources_of(layer, port)], stream[chosen]) @ weight[chosen[0]]
            for same in ("q", "k", "v") if port == "q" else ("",):
                scores[: len(part), layout.columns(layer, same)] += part[:, None]


def _stream(streams: Any, layer: int, port: str) -> Tensor:
    return streams.mlp[layer] if port == "" else streams.attn[layer]


def _nearness(
    sources: Float[Tensor, "source token d_model"], stream: Float[Tensor, "token d_model"]
) -> Float[Tensor, "source token"]:
    size = stream.abs().sum(-1)
    near = torch.stack([size - (stream - source).abs().sum(-1) for source in sources]).clamp_min(0).double()
    return near / near.sum(0).clamp_min(torch.finfo(torch.float64).tiny)


@verb
def correlation(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Any = None,
    *,
    steps: int = 1,
    seed: int = 0,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """Marginal correlation: how far what u writes and what v writes vary together at the same position.

    The RV coefficient |C_uv|^2 / (|C_uu| |C_vv|) of cross-covariances (Frobenius norms; Escoufier 1973), the squared
    correlation where both are numbers; between 0 and 1, without ports. Outputs wider than 32 dimensions are projected
    to 32 random ones first. One forward pass; corrupted prompts, the metric and steps aren't used.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> graph = correlation(demo.model, demo.tokens)
    >>> len(graph), 0 <= float(graph.score.min()) <= float(graph.score.max()) <= 1
    (118, True)
    """
    began = time.perf_counter()
    setup = Experiment.of(model, clean, **options).ready(metric=False, cut=False)
    data, layout = setup.pairs, EdgeLayout(setup.adapter.shape)
    rv = _rv(_covariance(data, layout, seed, setup.progress), len(layout.index)).cpu()
    made = _record("correlation", data, "squared correlation", began, seed=seed)
    allowed = layout.index.allowed()
    graph = AttributionGraph.from_adjacency(layout.index, torch.where(allowed, rv, 0.0), provenance=made)
    return graph.keep(torch.ones_like(graph.kept))


def _record(
    method: str, data: Pairs, unit: str, began: float, *, forward: int | float = 1, **own: Any
) -> dict[str, Any]:
    """The record of forward passes over the prompts."""
    spent: dict[str, Any] = {"forward": forward, "backward": 0, "seconds": {"scores": time.perf_counter() - began}}
    return record(method, data.adapter.facts(), prompts=len(data), unit=unit, **spent, **own)


def _watched(data: Pairs, method: str, progress: bool) -> Iterator[Batch]:
    """The clean prompts, while a bar counts them."""
    sized = {"progress": progress, "desc": method, "total": len(data)}
    for batch, _ in counted(data, lambda pair: len(pair.rows), **sized):
        yield batch


def _covariance(data: Pairs, layout: EdgeLayout, seed: int, progress: bool) -> Float[Tensor, "node sketch node sketch"]:
    adapter = data.adapter
    project = _Sketch(adapter, seed)
    columns = len(layout.index) * project.width
    total = torch.zeros(columns, dtype=torch.float64, device=adapter.device)
    gram, count, pilot = torch.zeros(columns, columns).to(total), 0, None
    for batch in _watched(data, "correlation", progress):
        values = _outputs(layout, adapter, batch, project)
        pilot = values.mean(0) if pilot is None else pilot  # centring before the products keeps their digits
        values = values - pilot
        count += len(values)
        total += values.sum(0)
        gram += values.T @ values
    covariance = gram / count - torch.outer(total, total) / count**2
    return covariance.view(len(layout.index), project.width, len(layout.index), project.width)


class _Sketch:
    """Fixed random orthonormal projections of the residual stream and of the logits to a few dimensions."""

    def __init__(self, adapter: Adapter, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.width = min(SKETCH, max(adapter.shape.d_model, adapter.shape.d_vocab_out))
        self.stream = self._directions(adapter.shape.d_model).to(adapter.device)
        self.logits = self._directions(adapter.shape.d_vocab_out).to(adapter.device)

    def _directions(self, wide: int) -> Tensor:
        if wide <= self.width:
            return torch.eye(wide, self.width, dtype=torch.float64)
        drawn = torch.randn(wide, self.width, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q


def _outputs(layout: EdgeLayout, adapter: Adapter, batch: Batch, project: _Sketch) -> Float[Tensor, "token column"]:
    plain = record_all(adapter, batch.tokens, batch.mask)
    pieces = []
    for chosen in pieces_of(layout, batch.mask, plain.written.input.element_size()):
        sources = written_out(adapter, plain.written, chosen).double() @ project.stream
        logits = plain.logits[chosen].double() @ project.logits
        pieces.append(torch.cat([sources, logits[None]]).transpose(0, 1).flatten(1))
    return torch.cat(pieces)


def _rv(covariance: Float[Tensor, "node sketch node sketch"], nodes: int) -> Float[Tensor, "source target"]:
    squared = covariance.square().sum((1, 3))
    own = squared.diagonal().sqrt()
    product = torch.outer(own, own)
    return torch.where(product > 0, squared / product.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


@verb
def magnitude(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Any = None,
    *,
    steps: int = 1,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """Every edge scored by how much its source alone changes: the mean over real positions of |u - ablated u|.

    It looks at nothing downstream, so a ranking that isn't better has learned nothing. Two forward passes per prompt,
    one where cut edges carry nothing; arguments as in `eap`, the metric and steps aren't used.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = magnitude(demo.model, demo.tokens, demo.corrupted)
    >>> bool((graph.score >= 0).all())
    True
    """
    began, setup = time.perf_counter(), Experiment.of(model, clean, corrupted, **options)
    setting, count = Setting("magnitude", setup, steps, metric=False, derivatives=False), Count()
    layout, positions = EdgeLayout(setup.adapter.shape), 0
    total = torch.zeros(layout.n_sources, dtype=torch.float64)
    sized = {"progress": setup.progress, "desc": "magnitude", "total": len(setup)}
    for job in counted(jobs(setting, count), lambda job: len(job.batch.rows), **sized):
        difference, real = job.clean().map(torch.sub, job.ablated()), job.batch.mask
        total += torch.cat([part[real].double().sum(0).cpu() for part in _norms(setup.adapter, difference)])
        positions += int(real.sum())
    spent: dict[str, Any] = {
        "forward": count.forward,
        "backward": 0,
        "seconds": {"scores": time.perf_counter() - began},
    }
    given = {"prompts": len(setup), "unit": "size of the change", "ablation": setup.cut}
    made = record("magnitude", setup.adapter.facts(), **given, **spent)
    return layout.graph((total / positions)[:, None].expand(-1, layout.n_readers) * layout.mask(), made)


def _norms(adapter: Adapter, parts: Written) -> Iterator[Float[Tensor, "batch pos source"]]:
    yield parts.input.norm(dim=-1, keepdim=True)
    for layer, heads in enumerate(parts.heads):
        weight = adapter.writer(layer)[0]
        grams = weight @ weight.transpose(1, 2)  # |z W| from z (W W') z, with no head written out
        yield torch.einsum("bphe,hef,bphf->bph", heads, grams, heads).clamp_min(0).sqrt()
        if parts.mlps:
            yield parts.mlps[layer].norm(dim=-1, keepdim=True)


@verb
def random_edges(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Any = None,
    *,
    steps: int = 1,
    seed: int = 0,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """A score drawn uniformly from (0, 1) for every edge: what chance finds. Only the model's shape is read.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> graph = random_edges(demo.model, seed=1)
    >>> graph.n_kept == len(graph.candidate_edges())
    True
    """
    seed = as_seed(seed)
    adapter = model.adapter if isinstance(model, Experiment) else adapt(model)
    layout = EdgeLayout(adapter.shape)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layout.n_sources, layout.n_readers, dtype=torch.float64, generator=generator)
    return layout.graph(scores, record("random_edges", adapter.facts(), seed=seed, **FREE))
