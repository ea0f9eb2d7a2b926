"""Automatic circuit discovery (Conmy et al. 2023, arXiv 2304.14997): edges are cut for good, one after the other.

From the logits to the input, every edge into a reader is tried: with H the circuit so far and m the metric,

    cut u -> v for good   if   m(H) - m(H without u -> v) < threshold,

so what an edge is worth depends on what was cut before it, and the search takes about one forward pass per prompt and
edge. Readers come in reverse order of computation (logits, then per layer from the last its MLP, values, keys,
queries), and so do the sources of each. Edges into what nothing kept reads go without a pass.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits
from tl_circuitlasso.baselines.gradient import Count, Job, Metric, Setting, facts, jobs
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated, from_run, from_values
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar as counting

SHARE = 0.01  # of the metric's range: the threshold where none is given
AHEAD = 8  # edges tried at once, as if those before them were cut

Cell = tuple[int, int]  # source and reader


def acdc(
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts | None,
    metric: Metric | LogitDiff | None = None,
    *,
    threshold: int | float | None = None,
    attention_mask: Tensor | None = None,
    ablation: str = "patch",
    mean_over: str = "clean",
    input_node: str = "embed",
    batch_size: int = 32,
    steps: int = 1,
    progress: bool = True,
) -> AttributionGraph:
    """The circuit that the search leaves; other arguments as in `eap`.

    The graph keeps the circuit's edges that are on a path. An edge's weight is the metric's fall when it was tried (0
    where it wasn't), its score the same where that isn't negative. `forward_passes` in the provenance are per prompt
    and count every circuit that was run, also those tried ahead in vain.

    Parameters
    ----------
    metric: as in `eap`; None is minus the divergence KL(model || circuit) of the predictions at the last real position.
    threshold: in the metric's units per prompt; None is 1 % of |m(model) - m(everything cut)|.

    Raises
    ------
    InputError: a negative threshold, and as in `eap`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=2)
    >>> graph = acdc(demo.model, demo.tokens, demo.corrupted, demo.target, progress=False)
    >>> graph.n_kept < len(graph.candidate_edges())
    True
    """
    if threshold is not None and not threshold >= 0:
        raise InputError(f"`threshold` is {threshold!r}: give what an edge must be worth, in the metric's units, >= 0")
    began = time.perf_counter()
    setting = Setting("acdc", ablation, mean_over, input_node, steps, progress)
    data = setting.pairs(model, clean, corrupted, attention_mask, batch_size)
    count = Count()
    search = _Search.over(list(jobs(data, metric or _unused, setting, count)), metric)
    bar_value = SHARE * abs(search.model - search.ablated) if threshold is None else float(threshold)
    total = int(search.layout.mask().sum())
    with counting(total=total, progress=progress, desc="acdc", unit="edge") as bar:
        for tried in search.tries(bar_value):
            bar.update(tried)
    worth = search.worth
    found = facts(data, setting, count, began, metric) | {"threshold": bar_value, "tested": int(search.tested.sum())}
    graph = search.layout.graph(worth.clamp_min(0), found)
    source, column = search.layout.mask().nonzero(as_tuple=True)
    weight = worth[source, column]
    columns = {"weight": weight, "kept": search.kept[source, column]}
    return AttributionGraph(**{**_columns(graph), **columns}).prune()


def _columns(graph: AttributionGraph) -> dict[str, Any]:
    names = ("index", "source", "target", "port", "score", "weight", "kept", "provenance")
    return {name: getattr(graph, name) for name in names}


def _unused(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[:, -1].sum()  # the search has a metric of its own


@dataclass(frozen=True, eq=False)
class _Run:
    """One batch with what its cut edges carry."""

    batch: PairBatch
    ablated: Ablated
    metric: Metric


@dataclass(eq=False)
class _Search:
    adapter: Adapter
    layout: EdgeLayout
    runs: Sequence[_Run]
    count: Count
    prompts: int
    model: float
    ablated: float
    kept: Bool[Tensor, "source reader"] = field(init=False)
    tested: Bool[Tensor, "source reader"] = field(init=False)
    worth: Float[Tensor, "source reader"] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.layout.mask()
        self.tested = torch.zeros_like(self.kept)
        self.worth = torch.zeros(self.kept.shape, dtype=torch.float64)

    @classmethod
    def over(cls, batches: Sequence[Job], metric: Metric | LogitDiff | None) -> "_Search":
        """Run the model and the ablated model once."""
        runs, model, ablated = [], 0.0, 0.0
        adapter = batches[0].pairs.adapter
        for job in batches:
            share = len(job.batch.rows) / len(job.pairs)
            logits = adapter.run(job.batch.clean.tokens, job.batch.mask, ["logits"])["logits"].detach()
            job.count.forward += share
            own = _divergence(logits, job.batch) if metric is None else job.metric
            runs.append(_Run(job.batch, _cut(job), own))
            model += _value(own, logits, job.batch)
            ablated += _value(own, runs[-1].ablated.logits, job.batch)
        size = len(batches[0].pairs)
        layout = EdgeLayout(adapter.shape)
        return cls(adapter, layout, runs, batches[0].count, size, model / size, ablated / size)

    def tries(self, threshold: float) -> Iterator[int]:
        """Try all edges; yields how many were settled at a time."""
        cells = list(self._cells())
        value, place = self.model, 0
        while place < len(cells):
            some = self._ahead(cells, place)
            if not some:
                self.kept[cells[place]] = False
                place += 1
                yield 1
                continue
            settled = 0
            for cell, after in zip(some, self._without(some)):
                self.tested[cell], self.worth[cell] = True, value - after
                settled += 1
                if value - after >= threshold:
                    break  # it stays, so those behind it were tried without an edge that they have
                self.kept[cell] = False
                value = after
            place += settled
            yield settled

    def _cells(self) -> Iterator[Cell]:
        mask = self.layout.mask()
        for column in reversed(range(self.layout.n_readers)):
            for source in reversed(mask[:, column].nonzero().flatten().tolist()):
                yield source, column

    def _ahead(self, cells: Sequence[Cell], place: int) -> list[Cell]:
        """The next edges into nodes of one rank, all of which something reads; none if nothing reads the first."""
        nodes, ranks = self.layout.targets()[0], self.layout.index.ranks
        rank = ranks[nodes[cells[place][1]]]
        some: list[Cell] = []
        for cell in cells[place : place + AHEAD]:
            node = nodes[cell[1]]
            if ranks[node] != rank or not self._is_read(node):
                break
            some.append(cell)
        return some

    def _is_read(self, node: int) -> bool:
        return node == self.layout.n_sources or bool(self.kept[node].any())

    def _without(self, cells: Sequence[Cell]) -> list[float]:
        """The metric of the circuit without the first of the edges, without the first two, and so on."""
        circuits = self.kept.repeat(len(cells), 1, 1)
        for number, (source, column) in enumerate(cells):
            circuits[number:, source, column] = False
        totals = [0.0] * len(cells)
        for run in self.runs:
            cut = as_circuits(circuits, self.layout)
            made = run_circuits(self.adapter, run.batch.clean.tokens, run.batch.mask, cut, run.ablated)
            self.count.forward += len(cells) * len(run.batch.rows) / self.prompts
            totals = [total + _value(run.metric, logits, run.batch) for total, logits in zip(totals, made)]
        return [total / self.prompts for total in totals]


def _cut(job: Job) -> Ablated:
    adapter, batch = job.pairs.adapter, job.batch
    if job.setting.ablation == "patch":
        job.count.forward += len(batch.rows) / len(job.pairs)
        return from_run(adapter, batch.corrupted.tokens, batch.mask)
    return from_values(adapter, job.ablated())


def _value(metric: Metric, logits: Tensor, batch: PairBatch) -> float:
    with torch.no_grad():
        value = metric(batch.shown(logits), batch.rows)
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
        raise InputError("`metric` must return one finite number, the sum over the batch's rows")
    return float(value)


def _divergence(clean: Float[Tensor, "batch pos vocab"], batch: PairBatch) -> Metric:
    """Minus KL(model || circuit) at each prompt's last real position, summed over the batch."""
    place = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    last = torch.where(batch.mask, place, -1).amax(1)
    rows = torch.arange(len(last), device=last.device)
    wanted = clean[rows, last].log_softmax(-1)

    def metric(logits: Tensor, _: Tensor) -> Tensor:
        return (wanted.exp() * (logits[rows, last].log_softmax(-1) - wanted)).sum()

    return metric
