"""What is summed of prompts while features are taken out, and what the sums say: each feature's effects, and how sure.

With c what a child's code loses on a prompt and m the mass of the feature's codes there, S = sum c / sum m, and its
standard error is that of a ratio: sum (c - S m)^2 = sum c^2 - 2 S sum c m + S^2 sum m^2.

What heads bring is seen head by head, all others silent, and all together. A child's threshold or its norm makes the
whole differ from the sum of its parts; the difference is dealt out in proportion to what each head does alone, so that
parts add up to the edge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.models.feature_survey import positions_of

COMPACT = 1 << 22  # entries of sums before they are added up


@dataclass(eq=False)
class Sums:
    """Sums over groups, for each (feature, child's feature) that anything happened to: of c, c^2 and c m."""

    children: int
    key: Int[np.ndarray, " entry"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    values: Float[np.ndarray, "3 entry"] = field(default_factory=lambda: np.zeros((3, 0)))
    _pending: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(
        self, feature: Int[Tensor, " group"], change: Float[Tensor, "group child"], mass: Float[Tensor, " group"]
    ) -> None:
        """Take in some groups."""
        group, child = change.nonzero(as_tuple=True)
        c, m = change[group, child].double(), mass[group].double()
        key = feature[group] * self.children + child
        self._pending.append((key.cpu().numpy(), torch.stack([c, c * c, c * m]).cpu().numpy()))
        if sum(len(key) for key, _ in self._pending) > COMPACT:
            self.compact()

    def compact(self) -> None:
        """Add up what belongs together."""
        keys = np.concatenate([self.key, *(key for key, _ in self._pending)])
        values = np.concatenate([self.values, *(values for _, values in self._pending)], 1)
        self.key, place = np.unique(keys, return_inverse=True)
        self.values = np.stack([np.bincount(place, one, len(self.key)) for one in values])
        self._pending = []


Part = tuple[Int[Tensor, " _entry"], Int[Tensor, " _entry"], Float[Tensor, " _entry"], Float[Tensor, " _entry"]]


@dataclass(frozen=True, eq=False)
class Effects:
    """What a parent's features do to a child's, where it is anything: S_ij and its standard error.

    source: the column of [copies x feature] as in a regression; target: the child's kept feature, ordered by source;
    error is infinite where one prompt alone tells. groups: how many prompts tell of each feature. copies, children:
    the numbers of copies, and of the child's features. together: where copies are of single heads, the same with one
    copy for all of them.
    """

    source: Int[Tensor, " entry"]
    target: Int[Tensor, " entry"]
    effect: Float[Tensor, " entry"]
    error: Float[Tensor, " entry"]
    groups: Int[Tensor, " feature"]
    copies: int
    children: int
    together: "Effects | None" = None

    @property
    def sources(self) -> int:
        """The number of columns that they are about."""
        return self.copies * len(self.groups)

    def root_mean_square(self) -> Float[Tensor, " entry"]:
        """What happens per unit of the parent's code, as its root mean square over prompts: never below |S_ij|.

        >>> one = torch.tensor([0]), torch.tensor([0]), torch.tensor([0.75]).double(), torch.tensor([0.5]).double()
        >>> Effects(*one, torch.tensor([4]), 1, 1).root_mean_square().tolist()
        [1.25]
        """
        spread = torch.where(self.error.isfinite(), self.error, 0.0).square()
        return (self.effect.square() + spread * self.groups[self.source % len(self.groups)]).sqrt()

    def dense(self, targets: Int[Tensor, " some"]) -> Float[Tensor, "source some"]:
        """S_ij of some of the child's features, 0 where nothing happened."""
        place = positions_of(targets, self.children)[self.target]
        rows = place >= 0
        found = torch.zeros(self.sources, len(targets), dtype=torch.float64)
        found[self.source[rows], place[rows]] = self.effect[rows]
        return found

    def rows(self, source: Int[Tensor, " edge"], target: Int[Tensor, " edge"]) -> Int[Tensor, " edge"]:
        """Where some pairs are among the entries, -1 where nothing happened."""
        known, asked = self.source * self.children + self.target, source * self.children + target
        if not len(known):
            return torch.full_like(asked, -1)
        place = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
        return torch.where(known[place] == asked, place, -1)


@dataclass(eq=False)
class Tally:
    """What is summed of one pair: a `Sums` for each copy, of each feature the groups, m and m^2, and one more `Sums` of
    all heads together where copies are of single heads."""

    copies: list[Sums]
    feature: Float[Tensor, "3 feature"]
    together: Sums | None = None

    def state(self) -> dict[str, Tensor]:
        """All that is summed so far; `resume` goes on from it to the same last bit."""
        found = {"feature": self.feature}
        for name, sums in self._named():
            sums.compact()
            found |= {f"{name}/key": torch.from_numpy(sums.key), f"{name}/values": torch.from_numpy(sums.values)}
        return found

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Put what `state` said in the place of what is summed here."""
        self.feature = state["feature"]
        for name, sums in self._named():
            sums.key, sums.values = state[f"{name}/key"].numpy(), state[f"{name}/values"].numpy()

    def _named(self) -> list[tuple[str, Sums]]:
        named = [(str(number), sums) for number, sums in enumerate(self.copies)]
        return named if self.together is None else [*named, ("together", self.together)]

    def effects(self, features: int, ranks: Ranks) -> Effects:
        count, mass, square = ranks.sum(self.feature)
        sums = (count, mass, square)
        parts = [self._of(copy, number * features, sums, ranks) for number, copy in enumerate(self.copies)]
        children, groups = self.copies[0].children, count.long()
        if self.together is None:
            return Effects(*_joined(parts), groups, len(parts), children)
        whole = self._of(self.together, features, sums, ranks)
        both = Effects(*_joined([parts[0], whole]), groups, 2, children)
        heads = _adding_up(parts[1:], whole, features, children)
        return Effects(*_joined([parts[0], *heads]), groups, len(parts), children, both)

    def _of(self, sums: Sums, first: int, of_features: tuple[Tensor, Tensor, Tensor], ranks: Ranks) -> Part:
        sums.compact()
        if ranks.size > 1:
            parts = ranks.gather({"key": torch.from_numpy(sums.key), "values": torch.from_numpy(sums.values)})
            sums = Sums(sums.children)
            sums._pending = [(part["key"].numpy(), part["values"].numpy()) for part in parts]
            sums.compact()
        key, (c, cc, cm) = torch.from_numpy(sums.key), torch.from_numpy(sums.values)
        source, target = key // sums.children, key % sums.children
        n, m, mm = (one[source] for one in of_features)
        m = m.clamp(min=1e-300)
        effect = c / m
        spread = (cc - 2 * effect * cm + effect.square() * mm).clamp(min=0)
        error = torch.where(n > 1, (spread * n / (n - 1).clamp(min=1)).sqrt() / m, torch.inf)
        return source + first, target, effect, error


def _joined(parts: Sequence[Part]) -> Part:
    """Source, target, effect and error of several copies, one after the other."""
    return tuple(torch.cat(part) for part in zip(*parts))  # type: ignore[return-value]


def _adding_up(heads: Sequence[Part], whole: Part, features: int, children: int) -> list[Part]:
    """What each head brings, so that the heads add up to what all of them bring; equal shares where none does anything
    alone."""
    keys = [source % features * children + target for source, target, *_ in (*heads, whole)]
    every = torch.cat(keys).unique()
    places = [torch.searchsorted(every, key) for key in keys]
    alone = torch.zeros(len(heads), len(every), dtype=torch.float64)
    for number, (place, part) in enumerate(zip(places, heads)):
        alone[number, place] = part[2]
    total, error = (torch.zeros(len(every), dtype=torch.float64).index_put((places[-1],), x) for x in whole[2:])
    size = alone.abs().sum(0)
    share = torch.where(size > 0, alone.abs() / size.clamp(min=1e-300), 1 / len(heads))
    parts = alone + share * (total - alone.sum(0))
    found = []
    for number, part in enumerate(parts, 1):
        there = part.nonzero().flatten()
        source, target = every[there] // children + number * features, every[there] % children
        found.append((source, target, part[there], error[there]))
    return found
