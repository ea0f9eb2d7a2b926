"""The design `read`: what every child reads of every parent through its own weights, weighed by the target.

From each batch, prompts are paired with one another at random; a sweep (sweep.py) then gives, for every edge u -> v and
every pair, the part g[u -> v] of the target's difference that runs through it. Three kinds of sums are kept, all
additive:

- `gram/...`: second moments of the contributions of a child's parents: the data of the child's sparse regression
  y_v = sum_u a_u g[u -> v], a >= 0 (a non-negative garrote; Breiman 1995), with y_v = sum_u g[u -> v];
- `cost/...`: the expected cost to the target (KL in nats, or absolute change) of each edge's contribution alone;
- `node`: the same for all of a component's contributions together, so that cancelling paths count as what they do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import schema
from tl_circuitlasso.models import outcome, readout, sweep
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import Basis
from tl_circuitlasso.models.designs import Sample
from tl_circuitlasso.models.outcome import Probe
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.sweep import Pairs, Read
from tl_circuitlasso.schema import FOLDS
from tl_circuitlasso.statistics import Statistics
from tl_circuitlasso.targets import Target

PAIRS = 1024  # pairs that fewer prompts are drawn into again and again, where that is
CHEAP = 2e10  # operations: what forward passes may take that are worth so many sweeps
MEMORY = 256 << 20  # bytes that the pairs swept at once may take
ON_CPU = 64 << 20  # the same on a CPU, where small parts cost nothing: they are cut closer to what they read


@dataclass(frozen=True)
class ReadDesign:
    """Contributions of edges to the target, by secants between paired prompts; component basis only."""

    basis: Basis
    probe: Probe | None = None
    draws: int = 1  # how often each batch is paired anew
    name: str = "read"
    pilots: bool = False

    def wanted(self, adapter: Adapter, target: Target) -> tuple[str, ...]:
        return (*sweep.wanted(adapter), *outcome.wanted(adapter, target))

    def start(self, adapter: Adapter, pilot: Sample) -> Statistics:
        index = self.basis.index(adapter, {}, readout.target_site(pilot.target))
        sums = _empty_sums(adapter, len(index) - 1, pilot.folds, pilot.keep.device)
        return Statistics(sums=sums, meta={"index": index.to_json(), "cost_folds": FOLDS, "folds": pilot.folds})

    def add(self, statistics: Statistics, adapter: Adapter, sample: Sample) -> Statistics:
        acts = {**sample.acts, "positions": position_ids(_mask(sample))}
        sums = {key: value.clone() for key, value in statistics.sums.items()}
        pairs = make_pairs(_mask(sample), sample.target_keep, sample.generator, draws=self.draws)
        for part in in_parts(adapter, pairs, outcome.count(adapter, sample.target, self.probe)):
            self._add_pairs(sums, adapter, acts, part, sample)
        return replace(statistics, sums=sums)

    def _add_pairs(
        self, sums: dict[str, Tensor], adapter: Adapter, acts: dict[str, Tensor], pairs: Pairs, sample: Sample
    ) -> None:
        goal = outcome.outcome(adapter, acts, pairs, sample.target, sample.prompts, self.probe)
        fold = (sample.prompts.to(pairs.own.device)[pairs.own] % FOLDS).to(goal.directions.device)
        nodes = goal.directions.new_zeros(*goal.directions.shape[:2], sums[schema.NODE_COSTS].shape[1])
        for key, reads in _by_child(adapter, sweep.sweep(adapter, acts, pairs, goal.directions)):
            merged = torch.stack([read.value for read in reads]).sum(0)
            nodes[:, :, : merged.shape[-1]] += merged.sum(2)
            _add_cost(sums[schema.cost(key)], goal.cost(merged), fold)
            for read in reads if len(reads) > 1 else ():
                _add_cost(sums[schema.cost(key, read.port)], goal.cost(read.value), fold)
            columns = torch.cat([read.value for read in reads], dim=-1).double()
            for number in range(sample.folds):  # the data of the regressions: parts only where a rule compares parts
                rows = (columns if sample.folds == 1 else columns[fold % sample.folds == number]).flatten(0, 1)
                sums[schema.gram(key)][number] += torch.einsum("rhi,rhj->hij", rows, rows)
        _add_cost(sums[schema.NODE_COSTS], goal.cost(nodes), fold)
        sums[schema.PAIRS].index_add_(0, fold, torch.ones_like(fold, dtype=torch.float64))


def operations(adapter: Adapter) -> tuple[float, float, float]:
    """Multiplications and additions per token, to the leading term: of one MLP, one head, and all layers."""
    shape = adapter.shape
    mlp = (3 if shape.gated else 2) * 2.0 * shape.d_model * shape.d_mlp
    head = 8.0 * shape.d_model * shape.d_head
    return mlp, head, shape.n_layers * (mlp + shape.n_heads * head)


def affordable_draws(adapter: Adapter, prompts: int, positions: int) -> int:
    """How often few prompts are paired anew: up to `PAIRS` pairs, but once where the model is large."""
    forward = operations(adapter)[2] * positions * prompts
    return max(1, min(-(-PAIRS // prompts), int(CHEAP / forward)))


def children(adapter: Adapter) -> list[tuple[str, int, int]]:
    """Every group of children: its key, how many there are, and how many sources may feed them."""
    shape = adapter.shape
    per_layer = shape.n_heads + (not shape.attn_only)
    found = []
    for layer in range(shape.n_layers):
        before = 1 + layer * per_layer
        found.append((schema.heads(layer), shape.n_heads, before))
        if not shape.attn_only:
            found.append((schema.mlp(layer), 1, before if shape.parallel else before + shape.n_heads))
    return [*found, (schema.TARGET, 1, 1 + shape.n_layers * per_layer)]


def _empty_sums(adapter: Adapter, nodes: int, folds: int, device: torch.device) -> dict[str, Tensor]:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    sums = {schema.NODE_COSTS: zeros(FOLDS, nodes), schema.PAIRS: zeros(FOLDS)}
    for key, heads, sources in children(adapter):
        ports = schema.ports(key)
        sums |= {schema.cost(key, port): zeros(FOLDS, heads, sources) for port in ("", *ports)}
        columns = sources * len(ports)
        sums[schema.gram(key)] = zeros(folds, heads, columns, columns)
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


def _add_cost(total: Float[Tensor, "fold *edges"], cost: Float[Tensor, "pair *edges"], fold: Tensor) -> None:
    total.index_add_(0, fold, cost.double())


def _mask(sample: Sample) -> Bool[Tensor, "batch pos"]:
    return torch.ones_like(sample.keep) if sample.mask is None else sample.mask


def in_parts(adapter: Adapter, pairs: Pairs, directions: int) -> Iterator[Pairs]:
    """The pairs in parts that fit into memory; in causal models cut behind the last position that a part reads."""
    memory = ON_CPU if pairs.own.device.type == "cpu" else MEMORY
    order = pairs.position.argsort(stable=True)
    while len(order):
        width = pairs.valid.shape[1]
        size = max(1, memory // sweep.memory(adapter, width, directions))
        part, order = order[-size:], order[:-size]
        if adapter.shape.causal:
            width = int(pairs.position[part].max()) + 1
        yield Pairs(pairs.own[part], pairs.partner[part], pairs.position[part], pairs.valid[part, :width])


def make_pairs(
    mask: Bool[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"], generator: torch.Generator, *, draws: int = 1
) -> Pairs:
    """Each prompt with another of at least its length, drawn at random, and one of its kept positions; `draws` times.

    Prompts of one length form a random cycle; the last of a length that has no equal takes the next longer one. A
    prompt that is alone with the largest length, or has no kept position, is left out.
    """
    kept, lengths = keep.cpu(), mask.sum(1).cpu()
    parts = []
    for _ in range(draws):
        partner = _partners(lengths, generator)
        own = ((partner >= 0) & kept.any(1)).nonzero().flatten()
        parts.append(torch.stack([own, partner[own], _draws(kept[own], generator)]))
    own, other, position = torch.cat(parts, dim=1).to(mask.device)
    return Pairs(own, other, position, mask[own] & mask[other])


def _partners(lengths: Int[Tensor, " prompt"], generator: torch.Generator) -> Int[Tensor, " prompt"]:
    """The partner of every prompt, -1 for none: the next in a shuffle by length, back to the first of its length."""
    order = torch.randperm(len(lengths), generator=generator)
    order = order[lengths[order].argsort(stable=True)]
    _, run, size = lengths[order].unique_consecutive(return_inverse=True, return_counts=True)
    after = torch.cat([order[1:], order.new_tensor([-1])])
    first = order[(size.cumsum(0) - size)[run]]
    ends = torch.cat([run[1:] != run[:-1], run.new_tensor([True], dtype=torch.bool)])
    following = torch.where(ends & (size[run] > 1), first, after)
    return torch.empty_like(order).scatter_(0, order, following)


def _draws(places: Bool[Tensor, "row place"], generator: torch.Generator) -> Int[Tensor, " row"]:
    """One of each row's true places, drawn at random."""
    count, run = places.sum(1).unique_consecutive(return_counts=True)
    drawn = [torch.randint(high, (rows,), generator=generator) for high, rows in zip(count.tolist(), run.tolist())]
    rank = torch.cat([torch.empty(0, dtype=torch.long), *drawn])
    return (places.cumsum(1) > rank[:, None]).to(torch.uint8).argmax(1)
