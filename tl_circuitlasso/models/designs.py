"""Designs: how a parent's activity is presented to a child.

| design       | the regressor of the edge u -> v at position p                                             |
|--------------|--------------------------------------------------------------------------------------------|
| `activation` | x_u[p]: parent and child at the same position, as in the paper                              |
| `paper`      | the same, of whole outputs as they are: the paper's regression to the letter               |
| `routed`     | sum_q P[p,q] x_u[q] for a head v with observed pattern P, x_u[p] for every other child      |
| `read`       | what v reads of u through its own weights, linearised at the observed activations (read.py) |

All need forward passes only. A design says what to collect, and adds a batch to the statistics. With `nonlinear` a
parent of the first two is seen through fixed functions of its activity (solve/nonlinear.py), of which x_u is the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.schema import NODES, TARGET
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.data.statistics import Statistics, add_folds, empty_folds, merge_rows
from tl_circuitlasso.data.targets import Labels, Target
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import Basis, kept_rows
from tl_circuitlasso.models.names import act

LOGITS = "logit metric"
ROW_CAPACITY = 16_384  # samples kept whole where a target needs them (class labels)
FUNCTIONS = 2  # of a parent in a nonlinear design: more find little more (docs/scaling.md)
MOST_COLUMNS = 8192  # in one Gram: half a gigabyte, of which a collection holds a few
_DICTIONARY = ("knots", "location", "spread", "mixing", "shift")


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch as a design sees it.

    keep: which positions are samples of node-to-node regressions; target_keep: of the target's regression.
    prompts: the batch's prompt numbers in the data set; folds: in how many parts to keep the moments.
    generator: for whatever is drawn at random from this batch.
    """

    acts: Mapping[str, Tensor]
    mask: Bool[Tensor, "batch pos"] | None
    keep: Bool[Tensor, "batch pos"]
    target_keep: Bool[Tensor, "batch pos"]
    target: Target
    prompts: Int[Tensor, " batch"]
    folds: int
    generator: torch.Generator

    def fold(self, keep: Bool[Tensor, "batch pos"]) -> Int[Tensor, " sample"]:
        """The fold of each kept sample: that of its prompt, so that a prompt's positions stay together."""
        return (self.prompts.to(keep.device) % self.folds)[:, None].expand(keep.shape)[keep]


@runtime_checkable
class Design(Protocol):
    """What collection asks of a design, which is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """How the design is called in arguments and provenance."""
        ...

    @property
    def basis(self) -> Basis:
        """In which coordinates sites are read."""
        ...

    @property
    def pilots(self) -> bool:
        """Whether `start` reads the pilot's activations."""
        ...

    @property
    def paired(self) -> bool:
        """Whether prompts are compared in pairs, by what children read through their own weights."""
        ...

    @property
    def functions(self) -> int:
        """How many functions of a parent's activity its children are regressed on: 1 where that is linear."""
        ...

    def wanted(self, adapter: Adapter, target: Target) -> tuple[str, ...]:
        """The activations that `start` and `add` read."""
        ...

    def start(self, adapter: Adapter, pilot: Sample) -> Statistics:
        """Empty statistics whose fixed tensors are set by the pilot batch."""
        ...

    def add(self, statistics: Statistics, adapter: Adapter, sample: Sample) -> Statistics:
        """With one batch added."""
        ...


@dataclass(frozen=True)
class Activation:
    """Parent and child at the same position (CircuitLasso, arXiv 2606.16939, eq. of section 3).

    nonlinear: children are regressed on functions of every coordinate x of their parents: x itself and a hinge at its
    median, made white and of x's own size, so that with one function the two variants are the same.
    """

    basis: Basis
    nonlinear: bool = False
    name: str = "activation"
    pilots: bool = True
    paired: bool = False

    @property
    def functions(self) -> int:
        return FUNCTIONS if self.nonlinear else 1

    def wanted(self, adapter: Adapter, target: Target) -> tuple[str, ...]:
        return (*self.basis.wanted(adapter), *readout.wanted(adapter, target))

    def start(self, adapter: Adapter, pilot: Sample) -> Statistics:
        raw = self.basis.features(adapter, pilot.acts)
        fixed = self.basis.fit({site: kept_rows(x, pilot.keep) for site, x in raw.items()})
        sizes = [[str(site), width * self.functions] for site in raw if (width := _width(fixed[str(site)]))]
        index = self.basis.index(adapter, fixed, readout.target_site(pilot.target))
        nodes = sum(size for _, size in sizes)
        if nodes > MOST_COLUMNS:
            raise InputError(
                f"`design` {self.name!r} would regress {nodes:,} columns on one another, and {MOST_COLUMNS:,} fit: "
                "give `basis` fewer, as tcl.Component(16) (leading directions of every component) or max_nodes="
            )
        if self.nonlinear:
            encoded = [self.basis.encode(x, fixed[str(site)]) for site, x in raw.items()]
            fixed |= _fitted(torch.cat(encoded, dim=-1)[pilot.keep])
        if pilot.target is None:
            fixed[LOGITS] = readout.fit(adapter, pilot.acts, pilot.target_keep)
        columns = fixed[LOGITS].shape[1] if pilot.target is None else 1
        device = pilot.keep.device
        moments = empty_folds(NODES, pilot.folds, coords=1, nodes=nodes, device=device)
        moments |= empty_folds(TARGET, pilot.folds, coords=1, nodes=nodes + columns, device=device)
        meta = {
            "index": index.to_json(),
            "columns": sizes,
            "target_columns": columns,
            "capacity": ROW_CAPACITY,
            "folds": pilot.folds,
        }
        return Statistics(moments=moments, fixed=fixed, meta=meta)

    def add(self, statistics: Statistics, adapter: Adapter, sample: Sample) -> Statistics:
        features = encode(self.basis, statistics, adapter, sample)
        features = _bent(features, statistics.fixed) if self.nonlinear else features
        return accumulate(statistics, adapter, features, sample)


@dataclass(frozen=True)
class Routed:
    """Heads see each parent mixed over positions by their own observed pattern; other children as in `activation`."""

    basis: Basis
    name: str = "routed"
    pilots: bool = True
    paired: bool = False
    functions: int = 1

    def wanted(self, adapter: Adapter, target: Target) -> tuple[str, ...]:
        plain = Activation(self.basis).wanted(adapter, target)
        return (*plain, *(act("pattern", layer) for layer in range(adapter.shape.n_layers)))

    def start(self, adapter: Adapter, pilot: Sample) -> Statistics:
        statistics = Activation(self.basis).start(adapter, pilot)
        moments = dict(statistics.moments)
        columns = column_slices(statistics)
        for site, own in columns.items():
            if site.kind == "head":
                nodes = heads_start(columns, site.layer) + own.stop - own.start
                moments |= empty_folds(str(site), pilot.folds, coords=1, nodes=nodes, device=pilot.keep.device)
        return replace(statistics, moments=moments)

    def add(self, statistics: Statistics, adapter: Adapter, sample: Sample) -> Statistics:
        features = encode(self.basis, statistics, adapter, sample)
        statistics = accumulate(statistics, adapter, features, sample)
        columns = column_slices(statistics)
        moments = dict(statistics.moments)
        for site, own in columns.items():
            if site.kind == "head":
                pattern = sample.acts[act("pattern", site.layer)][:, site.head]
                mixed = pattern @ features[:, :, : heads_start(columns, site.layer)]
                both = torch.cat([mixed, features[:, :, own]], dim=-1)[sample.keep]
                add_folds(moments, str(site), both[:, None], sample.fold(sample.keep), sample.folds)
        return replace(statistics, moments=moments)


def encode(basis: Basis, statistics: Statistics, adapter: Adapter, sample: Sample) -> Float[Tensor, "batch pos node"]:
    """All sites' features side by side, in the order of `meta["columns"]`."""
    raw = basis.features(adapter, sample.acts)
    encoded = [basis.encode(x, statistics.fixed[str(site)].to(x.device)) for site, x in raw.items()]
    return torch.cat(encoded, dim=-1)


def accumulate(
    statistics: Statistics, adapter: Adapter, features: Float[Tensor, "batch pos node"], sample: Sample
) -> Statistics:
    """With the same-position moments of nodes and target, and whole rows where the target needs them, added."""
    metric = statistics.fixed.get(LOGITS)
    target = readout.columns(adapter, sample.acts, sample.target_keep, sample.target, sample.prompts, metric)
    both = torch.cat([features[sample.target_keep], target.to(features)], dim=1)
    moments = dict(statistics.moments)
    add_folds(moments, NODES, features[sample.keep][:, None], sample.fold(sample.keep), sample.folds)
    add_folds(moments, TARGET, both[:, None], sample.fold(sample.target_keep), sample.folds)
    rows = statistics.rows
    if isinstance(sample.target, Labels):
        priority = torch.rand(len(both), generator=sample.generator, dtype=torch.float64)
        new = {"samples": both.float(), "priority": priority.to(both.device)}
        rows = merge_rows(rows, new, int(statistics.meta["capacity"]))
    return replace(statistics, moments=moments, rows=rows)


def column_slices(statistics: Statistics) -> dict[Site, slice]:
    """Each site's columns among the features."""
    slices, start = {}, 0
    for name, size in statistics.meta["columns"]:
        slices[parse_site(name)] = slice(start, start + size)
        start += size
    return slices


def heads_start(columns: Mapping[Site, slice], layer: int) -> int:
    """Where the heads of `layer` begin: every column before is a possible parent of theirs."""
    return min(own.start for site, own in columns.items() if site.kind == "head" and site.layer == layer)


def _fitted(features: Float[Tensor, "sample node"]) -> dict[str, Tensor]:
    """The functions of every node, chosen on the pilot, as tensors to be saved."""
    dictionary = solve.fit_dictionary(features, size=FUNCTIONS)
    return {f"dictionary {name}": getattr(dictionary, name).contiguous() for name in _DICTIONARY}


def _bent(
    features: Float[Tensor, "batch pos node"], fixed: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos function"]:
    """Every node's functions side by side, in the node's own units: the first is the node about its pilot mean."""
    parts = {name: fixed[f"dictionary {name}"].to(features.device) for name in _DICTIONARY}
    dictionary = solve.Dictionary("hinge", **parts)
    size = torch.where(dictionary.spread.isinf(), 0.0, dictionary.spread).repeat_interleave(dictionary.size)
    return (dictionary.transform(features.flatten(0, 1)) * size).unflatten(0, features.shape[:2])


def _width(chosen: Tensor) -> int:
    return int(chosen.sum()) if chosen.dtype == torch.bool else chosen.shape[1]
