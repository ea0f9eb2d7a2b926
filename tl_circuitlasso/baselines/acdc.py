"""Automatic circuit discovery (Conmy et al. 2023, arXiv 2304.14997): edges are cut for good, one after the other.

From the logits to the input, every edge into a reader is tried: with H the circuit so far and m the metric,

    cut u -> v for good   if   m(H) - m(H without u -> v) < threshold,

so what an edge is worth depends on what was cut before it, and the search takes at most one forward pass per prompt and
edge. The order is that of the paper's package: readers in reverse order of computation (logits, then per layer from the
last its MLP, then values, keys and queries of its heads, the last head first), and so the sources of each, but heads of
a layer from the first. In front of a layer's q, k and v edges each port of each head is tried as a whole: where
it may go, all edges into it go without a pass of their own, and so do edges into what nothing kept reads.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits
from tl_circuitlasso.baselines.gradient import Count, Job, Metric, Setting, facts, jobs
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.ablation import Ablated
from tl_circuitlasso.models.attention import PORTS
from tl_circuitlasso.models.metric import as_number
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar as counting

SHARE = 0.01  # of the metric's range: the threshold where none is given
AHEAD = 8  # tries at once, as if what was tried before were cut

Cell = tuple[int, int]  # source and reader
Try = tuple[Cell, ...]  # edges that are cut together: one, or all into a head's port


@verb
def acdc(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 1,
    threshold: int | float | None = None,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """The circuit that the search leaves; other arguments as in `eap`.

    The graph keeps the circuit's edges that are on a path. An edge's weight is the metric's fall when it alone was
    tried (0 where it wasn't), its score the same where that isn't negative. `forward_passes` in the provenance are per
    prompt and count every circuit that was run, also those tried ahead in vain.

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
    setup, count = Experiment.of(model, clean, corrupted, metric, **options), Count()
    setting = Setting("acdc", setup, steps, metric=False, derivatives=False)
    search = _Search.over(list(jobs(setting, count)))
    bar_value = SHARE * abs(search.model - search.ablated) if threshold is None else float(threshold)
    with counting(total=search.total, progress=setup.progress, desc="acdc", unit="edge") as bar:
        for tried in search.tries(bar_value):
            bar.update(tried)
    worth = search.worth
    found = facts(setting, count, began) | {"threshold": bar_value, "tested": search.tested}
    graph = search.layout.graph(worth.clamp_min(0), found)
    source, column = search.layout.mask().nonzero(as_tuple=True)
    weight = worth[source, column]
    columns = {"weight": weight, "kept": search.kept[source, column]}
    return AttributionGraph(**{**_columns(graph), **columns}).prune()


def _columns(graph: AttributionGraph) -> dict[str, Any]:
    names = ("index", "source", "target", "port", "score", "weight", "kept", "provenance")
    return {name: getattr(graph, name) for name in names}


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
    worth: Float[Tensor, "source reader"] = field(init=False)
    tested: int = 0

    def __post_init__(self) -> None:
        self.kept = self.layout.mask()
        self.worth = torch.zeros(self.kept.shape, dtype=torch.float64)

    @classmethod
    def over(cls, batches: Sequence[Job]) -> "_Search":
        """Run the model and the ablated model once."""
        runs, model, ablated = [], 0.0, 0.0
        adapter, setup = batches[0].adapter, batches[0].experiment
        for job in batches:
            share = job.share
            logits = adapter.run(job.batch.clean.tokens, job.batch.mask, ["logits"])["logits"].detach()
            job.count.forward += share
            own = _divergence(logits, job.batch) if setup.metric is None else setup.objective
            runs.append(_Run(job.batch, job.cut(), own))
            model += _value(own, logits, job.batch)
            ablated += _value(own, runs[-1].ablated.logits, job.batch)
        size = len(setup)
        layout = EdgeLayout(adapter.shape)
        return cls(adapter, layout, runs, batches[0].count, size, model / size, ablated / size)

    def tries(self, threshold: float) -> Iterator[int]:
        """Try all edges; yields how many were settled at a time."""
        tries = list(self._order())
        value, place = self.model, 0
        while place < len(tries):
            some = self._ahead(tries, place)
            if not some:
                self._drop(tries[place])
                yield self._settled(tries[place])
                place += 1
                continue
            for one, after in zip(some, self._without(some)):
                self.tested += 1
                place += 1
                if len(one) == 1:
                    self.worth[one[0]] = value - after
                yield self._settled(one)
                if value - after >= threshold:
                    break  # it stays, so those behind it were tried without an edge that they have
                self._drop(one)
                value = after

    @property
    def total(self) -> int:
        """What `tries` yields in all: every edge once, and ports of a single edge again."""
        return sum(map(self._settled, self._order()))

    @staticmethod
    def _settled(one: Try) -> int:
        return 1 if len(one) == 1 else 0  # a port's edges come again, each for itself

    def _drop(self, one: Try) -> None:
        for cell in one:
            self.kept[cell] = False

    def _order(self) -> Iterator[Try]:
        """Edges into the logits, and per layer from the last into its MLP; then its heads' ports as wholes, and one by
        one."""
        n_layers = self.layout.shape.n_layers
        yield from self._single(n_layers, "")
        for layer in reversed(range(n_layers)):
            if not self.layout.shape.attn_only:
                yield from self._single(layer, "")
            for port in reversed(PORTS):
                yield from (tuple(self._cells(column)) for column in self._columns(layer, port))
            for port in reversed(PORTS):
                yield from self._single(layer, port)

    def _single(self, layer: int, port: str) -> Iterator[Try]:
        for column in self._columns(layer, port):
            yield from ((cell,) for cell in self._cells(column))

    def _columns(self, layer: int, port: str) -> list[int]:
        columns = self.layout.columns(layer, port)
        return list(range(columns.start, columns.stop))[::-1]

    def _cells(self, column: int) -> list[Cell]:
        sources = self.layout.mask()[:, column].nonzero().flatten().tolist()
        ranks = self.layout.index.ranks
        return [(source, column) for source in sorted(sources, key=lambda source: (-int(ranks[source]), source))]

    def _ahead(self, tries: Sequence[Try], place: int) -> list[Try]:
        """The next tries of one kind into nodes of one rank that something reads; none if the first has no effect."""
        nodes, ranks = self.layout.targets()[0], self.layout.index.ranks
        first = tries[place][0]
        rank, kind = ranks[nodes[first[1]]], len(tries[place]) == 1
        some: list[Try] = []
        for one in tries[place : place + AHEAD]:
            node = nodes[one[0][1]]
            if ranks[node] != rank or (len(one) == 1) != kind or not self._is_read(node) or not self._is_there(one):
                break
            some.append(one)
        return some

    def _is_there(self, one: Try) -> bool:
        return any(bool(self.kept[cell]) for cell in one)

    def _is_read(self, node: int) -> bool:
        return node == self.layout.n_sources or bool(self.kept[node].any())

    def _without(self, tries: Sequence[Try]) -> list[float]:
        """The metric of the circuit less the first of the tries, less the first two, and so on."""
        circuits = self.kept.repeat(len(tries), 1, 1)
        for number, one in enumerate(tries):
            for source, column in one:
                circuits[number:, source, column] = False
        totals = [0.0] * len(tries)
        for run in self.runs:
            cut = as_circuits(circuits, self.layout)
            made = run_circuits(self.adapter, run.batch.clean.tokens, run.batch.mask, cut, run.ablated)
            self.count.forward += len(tries) * len(run.batch.rows) / self.prompts
            totals = [total + _value(run.metric, logits, run.batch) for total, logits in zip(totals, made)]
        return [total / self.prompts for total in totals]


def _value(metric: Metric, logits: Tensor, batch: PairBatch) -> float:
    with torch.no_grad():
        return float(as_number(metric(batch.shown(logits), batch.rows)))


def _divergence(clean: Float[Tensor, "batch pos vocab"], batch: PairBatch) -> Metric:
    """Minus KL(model || circuit) at each prompt's last real position, summed over the batch."""
    place = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    last = torch.where(batch.mask, place, -1).amax(1)
    rows = torch.arange(len(last), device=last.device)
    wanted = clean[rows, last].log_softmax(-1)

    def metric(logits: Tensor, _: Tensor) -> Tensor:
        return (wanted.exp() * (logits[rows, last].log_softmax(-1) - wanted)).sum()

    return metric
