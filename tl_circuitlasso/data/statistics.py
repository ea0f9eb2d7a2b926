"""Streaming second moments: all that a regression ever sees of the data.

Samples arrive in batches, are added to float64 sums and freed, so memory doesn't grow with the number of prompts.
Sums are taken about a pilot mean (that of the first batch), which keeps the centred Gram exact to rounding even where
the mean is 1e3 times the spread. Statistics of disjoint data merge, so that workers can share the collection, and
they save and load, so that an interrupted collection resumes.

>>> import torch
>>> x = torch.tensor([[1., 2.], [3., 0.], [5., 4.]])
>>> moments = Moments.empty(coords=1, nodes=2).add(x[:2, None]).add(x[2:, None])
>>> moments.gram()
tensor([[2.6667, 1.3333],
        [1.3333, 2.6667]], dtype=torch.float64)
"""

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_circuitlasso.data import storage
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.errors import FormatError, InputError

_KIND, _VERSION = "statistics", 1
_TENSORS = ("sums", "rows", "fixed")  # the groups of tensors beside the moments


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, means and Gram of the columns of one regression.

    A sample of node i is a vector of `coord` numbers (one for scalar nodes); the Gram sums over samples and coords:
    gram[i, j] = 1/count sum_m sum_c (x_mci - mean_ci) (x_mcj - mean_cj).

    Attributes
    ----------
    count: number of samples, 0 before the first.
    shift: the pilot mean about which the sums are taken.
    total: sum of x - shift; scatter: sum of (x - shift)(x - shift)'. Both float64 on the device of the data.
    """

    count: int
    shift: Float[Tensor, "coord node"]
    total: Float[Tensor, "coord node"]
    scatter: Float[Tensor, "node node"]

    @classmethod
    def empty(cls, *, coords: int, nodes: int, device: torch.device | str = "cpu") -> "Moments":
        """No samples yet."""
        zeros = torch.zeros(coords, nodes, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone(), torch.zeros(nodes, nodes, dtype=torch.float64, device=device))

    def fresh(self) -> "Moments":
        """The same columns without samples."""
        return Moments.empty(coords=self.shift.shape[0], nodes=self.shift.shape[1], device=self.shift.device)

    def add(self, x: Float[Tensor, "sample coord node"]) -> "Moments":
        """With the samples `x` added. Consumes `self`: its buffers are updated in place, as a stream needs."""
        if not x.shape[0]:
            return self
        shift = self.shift if self.count else x.double().mean(0)
        centred = x.double() - shift
        flat = centred.flatten(0, 1)
        self.scatter.addmm_(flat.T, flat)
        self.total.add_(centred.sum(0))
        return replace(self, count=self.count + x.shape[0], shift=shift)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both data sets together."""
        if self.shift.shape != other.shift.shape:
            raise InputError(f"moments of {tuple(self.shift.shape)} and {tuple(other.shift.shape)} columns don't merge")
        if not self.count:
            return other
        if not other.count:
            return self
        moved = other.about(self.shift)
        return Moments(self.count + other.count, self.shift, self.total + moved.total, self.scatter + moved.scatter)

    def about(self, shift: Float[Tensor, "coord node"]) -> "Moments":
        """The same samples with their sums taken about another point."""
        step = self.shift - shift
        cross = self.total.T @ step
        scatter = self.scatter + cross + cross.T + self.count * step.T @ step
        return Moments(self.count, shift, self.total + self.count * step, scatter)

    def shared(self, ranks: Ranks) -> "Moments":
        """The moments of the samples of all processes, on each: one all-reduce of sums about a common pilot mean."""
        count = ranks.count(self.count)
        pilot = ranks.sum(self.shift * self.count) / max(count, 1)
        own = self.about(pilot) if self.count else replace(self, shift=pilot)
        return Moments(count, pilot, ranks.sum(own.total), ranks.sum(own.scatter))

    def to(self, device: torch.device | str) -> "Moments":
        """The same moments elsewhere."""
        return Moments(self.count, self.shift.to(device), self.total.to(device), self.scatter.to(device))

    def mean(self) -> Float[Tensor, "coord node"]:
        """The mean of every column."""
        return self.shift + self.total / max(self.count, 1)

    def gram(self, about: Float[Tensor, "coord node"] | None = None) -> Float[Tensor, "node node"]:
        """The Gram over the count, centred at the mean or `about` another point; a covariance where `coord` is 1."""
        count = max(self.count, 1)
        step = self.shift - (self.mean() if about is None else about)
        cross = self.total.T @ step
        gram = (self.scatter + cross + cross.T) / count + step.T @ step
        return (gram + gram.T) / 2


@dataclass(frozen=True, eq=False)
class Statistics:
    """Named moments and plain sums of one data set, with what's needed to go on collecting.

    Attributes
    ----------
    moments: by regression; the key "" is the one Gram that all children share (design `activation`).
    sums: further additive tensors (a score's running sums), merged by addition.
    rows: a bounded random set of samples kept whole: the `capacity` (in `meta`) smallest values of its `priority`.
    fixed: tensors set by the pilot batch that all parts must share (principal directions).
    done: number of batches collected.
    meta: plain data that must agree before two parts may merge: model, basis, design, columns.
    origin: hash of the data collected so far, by which a checkpoint knows its own data; "" for merged statistics.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    done: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def folds(self) -> int:
        """In how many parts the moments are kept (whole prompts go to one part), for resampling without the data."""
        return int(self.meta.get("folds", 1))

    def whole(self, key: str) -> Moments:
        """One regression's moments over all folds."""
        return self.part(key, range(self.folds))

    def part(self, key: str, folds: Iterable[int]) -> Moments:
        """One regression's moments over some folds: leave one out for cross-validation, half for stability."""
        return functools.reduce(operator.add, (self.moments[fold_key(key, fold)] for fold in folds))

    def has(self, key: str) -> bool:
        """Whether there's a regression of that name."""
        return fold_key(key, 0) in self.moments

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both data sets together.

        Raises
        ------
        InputError: the two come from different models, bases, designs or pilot directions.
        """
        differ = sorted(key for key in {*self.meta, *other.meta} if self.meta.get(key) != other.meta.get(key))
        if differ:
            raise InputError(f"statistics differ in {', '.join(differ)}: collect both parts with the same arguments")
        if self.fixed.keys() != other.fixed.keys() or any(
            not torch.equal(value, other.fixed[key]) for key, value in self.fixed.items()
        ):
            raise InputError(
                "statistics have different pilot directions: collect the second part with start=first.fresh()"
            )
        capacity = int(self.meta.get("capacity", 0))
        return replace(
            self,
            moments={key: value + other.moments[key] for key, value in self.moments.items()},
            sums={key: value + other.sums[key] for key, value in self.sums.items()},
            rows=merge_rows(self.rows, other.rows, capacity),
            done=self.done + other.done,
            origin="",
        )

    def shared(self, ranks: Ranks = ALONE) -> "Statistics":
        """The statistics of all processes' data together, on each of them.

        Raises
        ------
        InputError: the processes have collected different things.
        """
        if ranks.size == 1:
            return self
        ranks.agree({**self.meta, "data": self.origin})
        rows: dict[str, Tensor] = {}
        for part in ranks.gather(self.rows):
            rows = merge_rows(rows, part, int(self.meta.get("capacity", 0)))
        return replace(
            self,
            moments={key: value.shared(ranks) for key, value in self.moments.items()},
            sums={key: ranks.sum(value) for key, value in self.sums.items()},
            rows=rows,
        )

    def to(self, device: torch.device | str) -> "Statistics":
        """The same statistics elsewhere: a file is read onto the CPU, and a collection goes on where its model is."""
        groups = {name: {key: x.to(device) for key, x in getattr(self, name).items()} for name in _TENSORS}
        return replace(self, moments={key: value.to(device) for key, value in self.moments.items()}, **groups)

    def fresh(self) -> "Statistics":
        """Statistics of the same kind, with the same pilot directions, without data: where a parallel worker starts."""
        return replace(
            self,
            moments={key: value.fresh() for key, value in self.moments.items()},
            sums={key: torch.zeros_like(value) for key, value in self.sums.items()},
            rows={},
            done=0,
            origin="",
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically."""
        tensors = {f"{name}/{key}": value for name in _TENSORS for key, value in getattr(self, name).items()}
        for key, moments in self.moments.items():
            parts = {"shift": moments.shift, "total": moments.total, "scatter": moments.scatter}
            tensors |= {f"moments/{key}/{part}": value for part, value in parts.items()}
        counts = {key: moments.count for key, moments in self.moments.items()}
        plain = {"counts": counts, "done": self.done, "meta": dict(self.meta), "origin": self.origin}
        data = {"kind": _KIND, "version": _VERSION} | plain
        storage.write_tensors(Path(path), tensors, data)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote.

        Raises
        ------
        FormatError: missing, truncated, foreign or of another version.
        """
        tensors, data = storage.read_tensors(Path(path), _KIND)
        if data.get("version") != _VERSION:
            raise FormatError(f"{path}: statistics format {data.get('version')!r}, this release reads {_VERSION}")
        try:
            moments = {
                key: Moments(count, *(tensors[f"moments/{key}/{part}"] for part in ("shift", "total", "scatter")))
                for key, count in data["counts"].items()
            }
            sums, rows, fixed = (_group(tensors, name) for name in _TENSORS)
            return cls(moments, sums, rows, fixed, data["done"], data["meta"], data.get("origin", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: statistics with missing or wrong entries ({error!r})") from error


def fold_key(key: str, fold: int) -> str:
    """Under which name a fold of a regression's moments is kept."""
    return f"{key}@{fold}"


def empty_folds(key: str, folds: int, *, coords: int, nodes: int, device: torch.device | str) -> dict[str, Moments]:
    """Empty moments of one regression for every fold."""
    return {fold_key(key, fold): Moments.empty(coords=coords, nodes=nodes, device=device) for fold in range(folds)}


def add_folds(
    moments: dict[str, Moments],
    key: str,
    x: Float[Tensor, "sample coord node"],
    fold: Int[Tensor, " sample"],
    folds: int,
) -> None:
    """Add each sample to the moments of its fold, in place."""
    for number in range(folds):
        rows = x if folds == 1 else x[fold == number]
        moments[fold_key(key, number)] = moments[fold_key(key, number)].add(rows)


def merge_rows(
    ours: Mapping[str, Shaped[Tensor, "_ ..."]], theirs: Mapping[str, Shaped[Tensor, "_ ..."]], capacity: int
) -> dict[str, Tensor]:
    """The `capacity` rows of smallest `priority` among both: the same rows in whatever order parts arrive."""
    if not ours or not theirs:
        return dict(ours or theirs)
    order = torch.cat([ours["priority"], theirs["priority"]]).argsort(stable=True)[:capacity]
    return {key: torch.cat([value, theirs[key]])[order] for key, value in ours.items()}


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
