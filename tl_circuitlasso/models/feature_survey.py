"""What the data say of each feature: how often it fires, how strongly, and where most; and which features are kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.codes import Codes
from tl_circuitlasso.models.feature_codes import Chunk
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.progress import bar

EXAMPLES = 16  # strongest samples remembered of each feature
BEFORE, AFTER = 12, 4  # tokens of context around a sample


@dataclass(frozen=True, eq=False)
class Firing:
    """Of each feature of one hook: in how many samples it fires, sum and sum of squares of its codes, and the largest.

    Columns are float64, so that sums over a billion tokens stay exact.
    """

    samples: int
    count: Float[Tensor, " feature"]
    total: Float[Tensor, " feature"]
    squares: Float[Tensor, " feature"]
    largest: Float[Tensor, " feature"]

    @classmethod
    def empty(cls, features: int) -> "Firing":
        """No samples yet."""
        return cls(0, *(torch.zeros(features, dtype=torch.float64) for _ in range(4)))

    def add(self, codes: Codes) -> "Firing":
        """With some samples added."""
        columns, values = codes.columns.long(), codes.values.double()
        return Firing(
            self.samples + codes.rows,
            self.count + torch.bincount(columns, minlength=codes.width),
            self.total.index_add(0, columns, values),
            self.squares.index_add(0, columns, values.square()),
            self.largest.scatter_reduce(0, columns, values, "amax"),
        )

    def shared(self, ranks: Ranks) -> "Firing":
        """The firing in the samples of all processes, on each."""
        count, total, squares = ranks.sum(torch.stack([self.count, self.total, self.squares]))
        samples = ranks.count(self.samples)
        return Firing(samples, count, total, squares, ranks.largest(self.largest))

    @property
    def variance(self) -> Float[Tensor, " feature"]:
        """The variance of each code over all samples."""
        return (self.squares / self.samples - (self.total / self.samples).square()).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Alive:
    """Which features of a hook are kept, and how many were left out for which reason."""

    features: Int[Tensor, " kept"]
    left_out: Mapping[str, int]


def survey(chunks: Iterable[Chunk], features: Mapping[str, int], ranks: Ranks = ALONE) -> dict[str, Firing]:
    """The firing of each hook's features (so many) over all samples, those of all processes, in one pass."""
    found = {hook: Firing.empty(count) for hook, count in features.items()}
    for chunk in chunks:
        found = {hook: firing.add(chunk.codes[hook]) for hook, firing in found.items()}
    return {hook: firing.shared(ranks) for hook, firing in found.items()}


def choose_alive(hook: str, firing: Firing, decoder: Float[Tensor, "feature width"], basis: SAEFeatures) -> Alive:
    """The features that fire at least `min_count` times but not always; of these at most `max_features`.

    Above that number those stay that carry most of what the SAE says: variance of the code times |decoder row|^2.

    Raises
    ------
    InputError: no feature is left.
    """
    never, always = firing.count == 0, firing.count == firing.samples
    rare = ~never & ~always & (firing.count < basis.min_count)
    kept = ~never & ~always & ~rare & (firing.variance > 0)
    if not bool(kept.any()):
        raise InputError(
            f"`saes`: no feature of {hook} is left over {firing.samples} samples ({int(never.sum())} never fire, "
            f"{int(always.sum())} always, {int(rare.sum())} fewer than `min_count` = {basis.min_count} times): lower "
            "`min_count`, give more tokens, or check that the SAE belongs to this model and hook"
        )
    dropped = 0
    if basis.max_features is not None and int(kept.sum()) > basis.max_features:
        weight = torch.where(kept, firing.variance * decoder.double().square().sum(1).cpu(), -1.0)
        some = torch.zeros_like(kept).index_fill(0, weight.topk(basis.max_features).indices, True)
        dropped = int((kept & ~some).sum())
        kept &= some
    counts = {"never": never, "always": always, "rare": rare}
    left_out = {reason: int(which.sum()) for reason, which in counts.items()}
    return Alive(kept.nonzero().flatten(), left_out | {"dropped_by_max_features": dropped})


@dataclass(frozen=True, eq=False)
class Examples:
    """The strongest samples of each kept feature, strongest first; code 0 where there are fewer.

    value: the code; prompt, position: where; tokens: the window of tokens around it, -1 outside the prompt.
    """

    value: Float[Tensor, "kept example"]
    prompt: Int[Tensor, "kept example"]
    position: Int[Tensor, "kept example"]
    tokens: Int[Tensor, "kept example window"]

    @classmethod
    def empty(cls, features: int) -> "Examples":
        """None yet."""
        where = torch.full((features, EXAMPLES), -1)
        window = torch.full((features, EXAMPLES, BEFORE + 1 + AFTER), -1)
        return cls(torch.zeros(features, EXAMPLES), where, where.clone(), window)

    def add(self, chunk: Chunk, codes: Codes, kept: Int[Tensor, " kept"]) -> "Examples":
        """With the samples of a chunk looked at."""
        row, feature, value = _beating(codes, kept, self.value[:, -1])
        if not len(row):
            return self
        rows = _best_of_each(feature, value)
        row, feature, value = row[rows], feature[rows], value[rows]
        rank = _rank_within(feature)
        new = Examples.empty(len(kept))
        new.value[feature, rank] = value
        new.prompt[feature, rank] = chunk.prompt[row].long()
        new.position[feature, rank] = chunk.position[row].long()
        new.tokens[feature, rank] = _windows(chunk, row)
        return _merged([self, new])

    def shared(self, ranks: Ranks) -> "Examples":
        """The strongest of all processes' samples, on each: of equal ones the first, as one process would have it."""
        return self if ranks.size == 1 else _merged([Examples(**part) for part in ranks.gather(vars(self))])


def strongest(
    chunks: Iterable[Chunk],
    kept: Mapping[str, Int[Tensor, " _kept"]],
    ranks: Ranks = ALONE,
    *,
    progress: bool = False,
) -> dict[str, Examples]:
    """Every kept feature's strongest samples, those of all processes, in one pass."""
    found = {hook: Examples.empty(len(features)) for hook, features in kept.items()}
    for chunk in bar(chunks, progress=progress, desc="find examples", unit="chunk"):
        found = {hook: examples.add(chunk, chunk.codes[hook], kept[hook]) for hook, examples in found.items()}
    return {hook: examples.shared(ranks) for hook, examples in found.items()}


def positions_of(kept: Int[Tensor, " kept"], width: int) -> Int[Tensor, " feature"]:
    """Where each feature stands among the kept ones, -1 for the others."""
    table = torch.full((width,), -1)
    table[kept] = torch.arange(len(kept))
    return table


def _beating(
    codes: Codes, kept: Int[Tensor, " kept"], bar: Float[Tensor, " kept"]
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Float[Tensor, " entry"]]:
    """The entries (sample, kept feature, code) that exceed what is remembered of their feature."""
    place = positions_of(kept, codes.width)[codes.columns.long()]
    better = (place >= 0) & (codes.values > bar[place.clamp(min=0)])
    entry = better.nonzero().flatten()
    row = torch.searchsorted(codes.starts, entry, right=True) - 1
    return row, place[entry], codes.values[entry]


def _best_of_each(feature: Int[Tensor, " entry"], value: Float[Tensor, " entry"]) -> Int[Tensor, " best"]:
    """The largest `EXAMPLES` entries of each feature, feature by feature, in falling order."""
    falling = value.argsort(descending=True, stable=True)
    order = falling[feature[falling].argsort(stable=True)]
    return order[_rank_within(feature[order]) < EXAMPLES]


def _rank_within(feature: Int[Tensor, " entry"]) -> Int[Tensor, " entry"]:
    """0, 1, 2, ... within each run of equal features."""
    place = torch.arange(len(feature))
    begins = torch.cat([torch.ones(1, dtype=torch.bool), feature[1:] != feature[:-1]])
    return place - torch.cummax(torch.where(begins, place, 0), 0).values


def _windows(chunk: Chunk, row: Int[Tensor, " entry"]) -> Int[Tensor, "entry window"]:
    number = chunk.places(chunk.prompt[row])
    begin = torch.cat([torch.zeros(1, dtype=chunk.ends.dtype), chunk.ends[:-1]])[number]
    offset = torch.arange(-BEFORE, AFTER + 1)
    at = (begin + chunk.position[row].long())[:, None] + offset
    inside = (at >= begin[:, None]) & (at < chunk.ends[number][:, None])
    return torch.where(inside, chunk.tokens.long()[at.clamp(0, len(chunk.tokens) - 1)], -1)


def _merged(parts: Sequence[Examples]) -> Examples:
    """The strongest of all, strongest first, equal ones in the order of the data."""
    value, prompt, position, tokens = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("value", "prompt", "position", "tokens")
    )
    order = (prompt * (int(position.max()) + 2) + position).argsort(dim=1, stable=True)
    ranked = value.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, ranked)[:, :EXAMPLES]
    window = order[:, :, None].expand(-1, -1, tokens.shape[2])
    return Examples(
        value.gather(1, order), prompt.gather(1, order), position.gather(1, order), tokens.gather(1, window)
    )
