"""Exact edge patching: cut one edge at a time and measure. The yardstick of every cheaper method."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.baselines.edges import EdgeLayout, written_out
from tl_circuitlasso.baselines.gradient import Count, Job, Metric, Setting, facts, jobs
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.metric import as_number
from tl_circuitlasso.models.patching import Edit, Record, record_all, run_edited, unembed
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar as counting


@verb
def exact(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 1,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """The metric's fall when one edge alone carries its ablated activation, for every edge; arguments as in `eap`.

    score(u -> v) = mean over prompts of metric(clean run) - metric(clean run in which v alone sees u's ablated output).
    One forward pass per prompt and edge (edges into the logits need none): hundreds to hundreds of thousands.
    `batch_size` is the number of rows run at once, prompts times edges.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=2)
    >>> graph = exact(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    6
    """
    began = time.perf_counter()
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    setting, count = Setting("exact", setup, steps, derivatives=False), Count()
    layout = EdgeLayout(setup.adapter.shape)
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64)
    total = int(layout.mask().sum()) * len(setup)
    with counting(total=total, progress=setup.progress, desc="exact", unit="edge run") as bar:
        for job in jobs(setting, count):
            _one_batch(job, layout, scores, bar.update)
    return layout.graph(scores / len(setup), facts(setting, count, began))


def _one_batch(job: Job, layout: EdgeLayout, scores: Tensor, done: Callable[[int], object]) -> None:
    adapter, batch = job.adapter, job.batch
    plain = record_all(adapter, batch.clean.tokens, batch.mask)
    job.count.forward += job.share
    ablated = job.ablated()
    difference = plain.written.map(torch.sub, ablated)
    everywhere = torch.ones_like(batch.mask).nonzero(as_tuple=True)
    deltas = written_out(adapter, difference, everywhere).unflatten(1, batch.mask.shape)
    before = _value(job, plain.logits)
    for cut, after in _cuts(job, layout, plain, deltas):
        for (source, column), value in zip(cut, after):
            scores[source, column] += before - value
        done(len(cut) * len(batch.rows))


Cell = tuple[int, int]  # source row and reader column of the matrix of edges


def _cuts(
    job: Job, layout: EdgeLayout, plain: Record, deltas: Float[Tensor, "source batch pos d_model"]
) -> Iterator[tuple[list[Cell], list[float]]]:
    """Every edge, some at a time, with the metric's sum over the batch when it's cut."""
    for layer, port in layout.readers():
        columns = layout.columns(layer, port)
        cells = [(s, c) for s in range(layout.sources_of(layer, port)) for c in range(columns.start, columns.stop)]
        size = max(1, job.experiment.batch_size // len(job.batch.rows))
        for first in range(0, len(cells), size):
            some = cells[first : first + size]
            reader = _Reader(layer, port, columns.start)
            yield some, [_value(job, logits) for logits in _patched(job, layout, plain, deltas, reader, some)]


@dataclass(frozen=True)
class _Reader:
    layer: int
    port: str
    first_column: int


def _patched(job: Job, layout: EdgeLayout, plain: Record, deltas: Tensor, reader: _Reader, cells: list[Cell]) -> Tensor:
    adapter, batch, layer = job.adapter, job.batch, reader.layer
    if layer == layout.shape.n_layers:
        return torch.stack([unembed(adapter, plain.streams.logits - deltas[source]) for source, _ in cells])
    stream = plain.streams.mlp[layer] if reader.port == "" else plain.streams.attn[layer]
    edits = [
        Edit(reader.port, column - reader.first_column, stream - deltas[source])  # type: ignore[arg-type]
        for source, column in cells
    ]
    job.count.forward += len(cells) * job.share
    return run_edited(adapter, batch.clean.tokens, batch.mask, layer, edits, plain.streams.attn[layer])


def _value(job: Job, logits: Tensor) -> float:
    with torch.no_grad():
        return float(as_number(job.experiment.objective(job.batch.shown(logits), job.batch.rows)))
