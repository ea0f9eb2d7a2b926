"""The design `read`: what every child reads of every parent through its own weights, weighed by the target.

Prompts are compared in pairs: each with a partner drawn at random from its batch, or with its own counterpart where
there is one. A sweep (sweep.py) gives, for every edge u -> v and every pair, the part g[u -> v] of the target's
difference that runs through it. Two kinds of sums are kept, both additive, and some pairs whole:

- `cost/...`: the expected cost to the target (KL in nats, or absolute change) of each edge's contribution alone;
- `node`: the same for all of a component's contributions together, so that cancelling paths count as what they do;
- `effect/...`: the mean change, with its sign, where the target is a number and prompts have counterparts;
- rows: the contributions themselves, the data of every child's sparse regression y_v = sum_u a_u g[u -> v],
  0 <= a <= 1 (a garrote; Breiman 1995), with y_v = sum_u g[u -> v].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.data import schema
from tl_circuitlasso.data.schema import FOLDS
from tl_circuitlasso.data.statistics import Statistics, merge_rows
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.models import outcome, readout, sweep
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import Basis
from tl_circuitlasso.models.designs import Sample
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.outcome import Probe, Question
from tl_circuitlasso.models.pairing import compared, first_difference
from tl_circuitlasso.models.sweep import Read
from tl_circuitlasso.models.views import Pairing

PAIRS = 256  # pairs that fewer prompts are drawn into again and again, where that is
CHEAP = 2e10  # operations: what forward passes may take that are worth so many sweeps
DRAWS = 4  # how often the same prompts are paired anew, at most
MEMORY = 256 << 20  # bytes that the pairs swept at once may take
ON_CPU = 64 << 20  # the same on a CPU, where small parts cost nothing: they are cut closer to what they read
ROWS = 4096  # contributions kept whole, a row for each pair and direction
ROW_BYTES = 1 << 30  # at most so many bytes of them
FEWEST_ROWS = 64


@dataclass(frozen=True)
class ReadDesign:
    """Contributions of edges to the target, by secants between the prompts of a pair; component basis only."""

    basis: Basis
    probe: Probe | None = None
    draws: int = 1  # how often each batch is paired anew
    contrast: bool = False  # whether prompts have counterparts of their own
    weight: Float[Tensor, " prompt"] | None = None  # how many prompts of the data each stands for
    swept: int | None = None  # bytes that the pairs swept at once may take; None: `swept_bytes` of the device
    rows: int = ROWS  # contributions kept whole, at most
    name: str = "read"
    pilots: bool = False
    paired: bool = True
    functions: int = 1

    def wanted(self, adapter: Adapter, target: Target) -> tuple[str, ...]:
        return (*sweep.wanted(adapter), *outcome.wanted(adapter, target))

    def start(self, adapter: Adapter, pilot: Sample) -> Statistics:
        index = self.basis.index(adapter, {}, readout.target_site(pilot.target))
        number = outcome.is_number(adapter, pilot.target)
        sums = _empty_sums(adapter, len(index) - 1, pilot.keep.device, squares=number, effects=number and self.contrast)
        meta = {"index": index.to_json(), "cost_folds": FOLDS, "folds": pilot.folds, "contrast": self.contrast}
        meta |= {"number": number, "capacity": row_capacity(adapter, self.rows)}
        return Statistics(sums=sums, meta=meta)

    def add(self, statistics: Statistics, adapter: Adapter, sample: Sample) -> Statistics:
        """With one batch added. Consumes `statistics`: its sums are updated in place, as a stream needs."""
        acts, question = sample.acts, Question(sample.target, sample.prompts, self.probe)
        options: Any = {"contrast": self.contrast, "draws": self.draws, "generator": sample.generator}
        pairs = compared(adapter, acts, _mask(sample), sample.target_keep, question, **options)
        if self.weight is not None:
            own, partner = (self.weight[sample.prompts[rows.cpu() % len(sample.prompts)]] for rows in pairs.sides)
            pairs = pairs.standing_for(own if self.contrast else own * partner)
        sums, rows = dict(statistics.sums), dict(statistics.rows)
        directions = outcome.count(adapter, sample.target, self.probe)
        for part in in_parts(adapter, pairs, directions, acts, memory=self.swept):
            new = self._add_pairs(sums, adapter, acts, part, sample)
            rows = merge_rows(rows, new, int(statistics.meta["capacity"]))
        return replace(statistics, sums=sums, rows=rows)

    def _add_pairs(
        self, sums: dict[str, Tensor], adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing, sample: Sample
    ) -> dict[str, Tensor]:
        """Add a part's costs to the sums; its contributions as rows."""
        question = Question(sample.target, sample.prompts, self.probe)
        goal = outcome.outcome(adapter, acts, pairs, question, generator=sample.generator)
        fold = (sample.prompts.to(pairs.own.device)[pairs.own] % FOLDS).to(goal.directions.device)
        ones = torch.ones_like(goal.directions[:, 0, 0])
        weight, drawn_of = (ones if part is None else part.to(ones) for part in (pairs.weight, pairs.drawn_of))
        nodes = goal.directions.new_zeros(*goal.directions.shape[:2], sums[schema.NODE_COSTS].shape[1])
        rows: dict[str, Tensor] = {}
        chances: Tensor | None = None

        def add(name: str, cost: Float[Tensor, "pair *edges"]) -> None:
            sums[name].index_add_(0, fold, cost.double() * weight.view(-1, *[1] * (cost.ndim - 1)))

        for key, reads in _by_child(adapter, sweep.sweep(adapter, acts, pairs, goal.directions)):
            merged = torch.stack([read.value for read in reads]).sum(0)
            nodes[:, :, : merged.shape[-1]] += merged.sum(2)
            for name, part in ((read.port, read.value) for read in reads):
                add(schema.cost(key, name), goal.cost(part))
                if schema.effect(key, name) in sums:
                    add(schema.effect(key, name), part[:, 0])
            if len(reads) > 1:
                add(schema.cost(key), goal.cost(merged))
            if schema.square(key) in sums:
                add(schema.square(key), goal.judged(merged))
            if key == schema.TARGET:  # the first to come: its edges add up to the whole change
                chances = goal.chances(merged.sum((2, 3)))
            rows[key] = goal.in_nats(torch.cat([read.value for read in reads], dim=-1), chances).flatten(2)
        add(schema.NODE_COSTS, goal.judged(nodes))
        sums[schema.PAIRS].index_add_(0, fold, drawn_of.double())
        sums[schema.COUNT].index_add_(0, fold, ones.double())
        return _as_rows(adapter, rows, weight, sample.generator)


def _as_rows(
    adapter: Adapter,
    rows: Mapping[str, Float[Tensor, "pair direction column"]],
    weight: Float[Tensor, " pair"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Contributions as float32 on the CPU, children in the order of computation, a row a pair and direction."""
    values = torch.cat([rows[key] for key, _, _ in children(adapter)], dim=-1)
    repeats, root = values.shape[1], weight.sqrt().view(-1, 1, 1)
    priority = torch.rand(len(weight), generator=generator, dtype=torch.float64).repeat_interleave(repeats)
    return {
        schema.CONTRIBUTIONS: (values * root).flatten(0, 1).float().cpu(),
        schema.WEIGHT: (weight.double() / repeats).repeat_interleave(repeats).cpu(),
        "priority": priority,
    }


def row_capacity(adapter: Adapter, most: int = ROWS) -> int:
    """How many rows of contributions are kept whole."""
    return max(FEWEST_ROWS, min(most, ROW_BYTES // (4 * columns(adapter))))


def columns(adapter: Adapter) -> int:
    """How many contributions a pair has: one for each edge, ports told apart."""
    return sum(heads * sources * len(schema.ports(key)) for key, heads, sources in children(adapter))


def swept_bytes(adapter: Adapter) -> int:
    """How much the pairs swept at once take where nobody asks for less: on a CPU little, but in a large model a fifth
    of what the weights do, which have to be read again for every part."""
    if adapter.device.type != "cpu":
        return MEMORY
    return min(MEMORY, max(ON_CPU, adapter.weight_bytes // 5))


def operations(adapter: Adapter) -> tuple[float, float, float]:
    """Multiplications and additions per token, to the leading term: of one MLP, one head, and all layers."""
    shape = adapter.shape
    mlp = (3 if shape.gated else 2) * 2.0 * shape.d_model * shape.d_mlp
    head = 8.0 * shape.d_model * shape.d_head
    return mlp, head, shape.n_layers * (mlp + shape.n_heads * head)


def affordable_draws(adapter: Adapter, prompts: int, positions: int) -> int:
    """How often few prompts are paired anew: up to `PAIRS` pairs, but once where the model is large."""
    forward = operations(adapter)[2] * positions * prompts
    return max(1, min(-(-PAIRS // prompts), DRAWS, int(CHEAP / forward)))


def children(adapter: Adapter) -> list[tuple[str, int, int]]:
    """Every group of children: its key, how many there are, and how many sources may feed them."""
    parts = adapter.shape.components
    found = []
    for layer in range(parts.n_layers):
        found.append((schema.heads(layer), parts.n_heads, parts.sources_of(layer, "q")))
        if not parts.attn_only:
            found.append((schema.mlp(layer), 1, parts.sources_of(layer, "")))
    return [*found, (schema.TARGET, 1, parts.n_sources)]


def _empty_sums(
    adapter: Adapter, nodes: int, device: torch.device, *, squares: bool, effects: bool
) -> dict[str, Tensor]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    sums = {schema.NODE_COSTS: zeros(FOLDS, nodes), schema.PAIRS: zeros(FOLDS), schema.COUNT: zeros(FOLDS)}
    for key, heads, sources in children(adapter):
        ports = schema.ports(key)
        sums |= {schema.cost(key, port): zeros(FOLDS, heads, sources) for port in ("", *ports)}
        sums |= {schema.effect(key, port): zeros(FOLDS, heads, sources) for port in ports if effects}
        sums |= {schema.square(key): zeros(FOLDS, heads, sources) for _ in range(squares)}
    return sums


def _by_child(adapter: Adapter, reads: Iterator[Read]) -> Iterator[tuple[str, list[Read]]]:
    """A layer's q, k and v together, everything else alone, under the key of its children."""
    ports: list[Read] = []
    for read in reads:
        if read.layer == adapter.shape.n_layers:
            yield schema.TARGET, [read]
        elif not read.port:
            yield schema.mlp(read.layer), [read]
        else:
            ports.append(read)
            if len(ports) == 3:
                yield schema.heads(read.layer), ports
                ports = []


def _mask(sample: Sample) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(sample.keep) if sample.mask is None else sample.mask


def in_parts(
    adapter: Adapter,
    pairs: Pairing,
    directions: int,
    acts: Mapping[str, Tensor] | None = None,
    *,
    memory: int | None = None,
) -> Iterator[Pairing]:
    """The pairs in parts that take about `memory` bytes each (None: what suits the device); in causal models cut behind
    the last position that a part reads and, given the activations, before the first one at which any of its pairs
    differs."""
    memory = swept_bytes(adapter) if memory is None else memory
    order = pairs.position.argsort(stable=True)
    first = torch.zeros_like(pairs.position)
    if acts is not None and adapter.shape.causal:
        first = first_difference(acts[act("resid_pre", 0)], pairs)
    while len(order):
        width = pairs.valid.shape[1]
        size = max(1, memory // sweep.memory(adapter, width - int(first[order].min()), directions))
        part, order = order[-size:], order[:-size]
        if adapter.shape.causal:
            width = int(pairs.position[part].max()) + 1
        yield pairs.take(part, width, int(first[part].min()))
