"""Two prompts beside each other: what differs between them, and the secants through which differences flow.

Between a prompt s and its partner s' every nonlinearity is replaced by a straight line. For products and norms the
line is exact: with a bar for the mean of both ends,

    a' b' - a b        = a_bar (b' - b) + b_bar (a' - a)
    P'_q - P_q         = L_q (ds_q - sum_r L_r ds_r / sum_r L_r),     L = (P' - P) / (log P' - log P)
    x' / c' - x / c    = mean(1/c) dx - x_bar (2/d x_bar . dx) / (c c' (c + c')),     c^2 = mean(x^2) + eps

L is the logarithmic mean of the two probabilities: a softmax is met exactly however sharp it is (up to gaps of 100
between scores, beyond which single precision knows no probability), wherever between the two prompts scores cross.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.norms import scale_of
from tl_circuitlasso.models.weights import repeat_heads

TINY = 1e-45  # stands for a probability of 0 in a logarithm: the smallest number of single precision
NEAR = 1e-3  # below this difference a secant is a central difference


@dataclass(frozen=True, eq=False)
class Pairing:
    """Prompts with their partners.

    own, partner: rows of the batch; position: where the target is read; valid: which positions are real tokens in both
    (elsewhere the partner counts as equal); places: each token's place in the own prompt, pads not counted. reach: how
    far towards the partner each pair's secants go; None: all the way, with every product taken at the mean of both
    ends, so that contributions add up exactly. weight: how many pairs of the data each stands for, by the chance with
    which it was drawn; drawn_of: of how many of the data it was drawn, so that weights have the sum of `drawn_of` in
    the mean (None: 1). first: positions before it are the same in both prompts of every pair.
    """

    own: Int[Tensor, " pair"]
    partner: Int[Tensor, " pair"]
    position: Int[Tensor, " pair"]
    valid: Bool[Tensor, "pair pos"]
    places: Int[Tensor, "pair pos"]
    reach: Float[Tensor, " pair"] | None = None
    weight: Float[Tensor, " pair"] | None = None
    drawn_of: Float[Tensor, " pair"] | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.own)

    @property
    def sides(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """The rows of both prompts of each pair."""
        return self.own, self.partner

    @classmethod
    def joined(cls, parts: Sequence["Pairing"]) -> "Pairing":
        """All pairs of several draws from the same batch."""

        def all_of(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        rows = (all_of(name) for name in ("own", "partner", "position", "valid", "places"))
        return cls(*rows, reach=all_of("reach"), weight=all_of("weight"))

    def standing_for(self, prompts: Float[Tensor, " pair"]) -> "Pairing":
        """The same pairs, each of a prompt that stands for so many of the data."""
        by = prompts.to(self.own.device)
        weight, drawn_of = (by if part is None else part * by for part in (self.weight, self.drawn_of))
        return replace(self, weight=weight, drawn_of=drawn_of)

    def to(self, device: torch.device) -> "Pairing":
        """The same pairs on another device."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)})

    def take(self, rows: Int[Tensor, " row"], width: int | None = None, first: int = 0) -> "Pairing":
        """Some of the pairs, cut behind position `width`, of which those before `first` are known to be equal."""
        each = (self.reach, self.weight, self.drawn_of)
        reach, weight, drawn_of = (None if part is None else part[rows] for part in each)
        own, partner, position = self.own[rows], self.partner[rows], self.position[rows]
        valid, places = self.valid[rows, :width], self.places[rows, :width]
        return Pairing(own, partner, position, valid, places, reach, weight, drawn_of, first)


@dataclass(frozen=True, eq=False)
class NormSecant:
    """A norm as a linear map of differences: dx -> inverse dx - slope (along . dx) along; without `along` its scale is
    frozen."""

    inverse: Float[Tensor, "pair pos 1"]
    slope: Float[Tensor, "pair pos 1"] | None = None
    along: Float[Tensor, "pair pos d_model"] | None = None

    def pull(self, n: Float[Tensor, "pair *reader pos d_model"]) -> Float[Tensor, "pair *reader pos d_model"]:
        """A multiplier of the norm's output as one of its input; the map is its own transpose."""
        pulled = n * self._beside(self.inverse, n)
        if self.along is None or self.slope is None:
            return pulled
        along = self._beside(self.along, n)
        share = (n * along).sum(-1, keepdim=True) * self._beside(self.slope, n)
        return pulled.addcmul_(share, along, value=-1)

    @staticmethod
    def _beside(part: Tensor, n: Tensor) -> Tensor:
        return part.view(len(part), *[1] * (n.ndim - part.ndim), *part.shape[1:])


class View:
    """The two sides of every pair, by activation, between the first position that differs and the last that is read;
    whatever it shows is on the device of its pairs."""

    def __init__(self, adapter: Adapter, acts: Mapping[str, Tensor], pairs: Pairing) -> None:
        self.adapter, self.acts, self.pairs = adapter, acts, pairs
        self.all_valid = bool(pairs.valid.all())
        self.first, self.width = pairs.first, pairs.valid.shape[1]
        self._moved: dict[torch.device, Pairing] = {self.device: pairs}  # not views: they would be a circle

    @property
    def device(self) -> torch.device:
        """Where the pairs are."""
        return self.pairs.own.device

    def at(self, layer: int) -> "View":
        """The same view where the weights of a layer are."""
        place = self.adapter.places[layer]
        if place == self.device:
            return self
        if place not in self._moved:
            self._moved[place] = self.pairs.to(place)
        there = View(self.adapter, self.acts, self._moved[place])
        there._moved = self._moved
        return there

    @property
    def target(self) -> Int[Tensor, " pair"]:
        """Where in the window the target is read."""
        return self.pairs.position - self.first

    def own(self, key: str, *, whole: bool = False) -> Tensor:
        """The activation of each prompt; `whole`: from position 0."""
        return self._of(key, self.pairs.own, whole)

    def ends(self, key: str, *, whole: bool = False) -> tuple[Tensor, Tensor]:
        """The activation of each prompt, and of its partner where both have a real token; `whole`: from position 0."""
        own, partner = self.own(key, whole=whole), self._of(key, self.pairs.partner, whole)
        if self.all_valid:
            return own, partner
        valid = self.pairs.valid[:, 0 if whole else self.first :]
        return own, torch.where(valid.view(*valid.shape, *[1] * (own.ndim - 2)), partner, own)

    def _of(self, key: str, rows: Int[Tensor, " pair"], whole: bool) -> Tensor:
        made = self.acts[key]
        return made[rows.to(made.device), 0 if whole else self.first : self.width].to(self.device)

    def sides(self, key: str, *, whole: bool = False) -> tuple[Tensor, Tensor]:
        """The activation of each prompt, and what it becomes on the way to its partner's, as far as secants reach."""
        own, partner = self.ends(key, whole=whole)
        return own, self._reached(own, partner)

    def _reached(self, own: Tensor, partner: Tensor) -> Tensor:
        if self.pairs.reach is None:
            return partner
        return torch.lerp(own, partner, self.pairs.reach.to(own).view(-1, *[1] * (own.ndim - 1)))

    def mean(self, key: str) -> Tensor:
        own, reached = self.sides(key)
        return (own + reached) / 2

    def difference(self, key: str) -> Tensor:
        own, partner = self.ends(key)
        return partner - own

    def inverse(self, key: str) -> Tensor:
        """One over a norm's scale, the mean of both ends of a secant: the norm with its scale frozen."""
        own, reached = self.sides(key)
        return (own.reciprocal() + reached.reciprocal()) / 2

    def norm(self, key: str) -> NormSecant:
        """The norm in front of a reader, named by its scale ("scale.attn.3", "scale.mlp.3", "scale.final")."""
        norm = self.adapter.norm(key)
        if norm is None:
            return NormSecant(self.inverse(key))
        own, partner = self._stream(key)
        reached = self._reached(own, partner)
        scale, other = self.ends(key)
        if self.pairs.reach is not None:
            other = scale_of(reached, norm)
        middle = (own + reached) / 2
        if norm.centred:
            middle = middle - middle.mean(-1, keepdim=True)
        slope = 2 / (own.shape[-1] * scale * other * (scale + other))
        return NormSecant((scale.reciprocal() + other.reciprocal()) / 2, slope, middle)

    def _stream(self, key: str) -> tuple[Tensor, Tensor]:
        """Both prompts' residual stream in front of a norm."""
        last = self.adapter.shape.n_layers - 1
        kind, layer = (key.split(".")[1], last) if key == "scale.final" else (key.split(".")[1], int(key.split(".")[2]))
        if kind == "attn" or (kind == "mlp" and self.adapter.shape.parallel):
            return self.ends(act("resid_pre", layer))
        behind = self.ends(act("resid_post", last) if layer == last else act("resid_pre", layer + 1))
        if kind == "final":
            return behind
        wrote = self.ends(act("mlp_out", layer))
        return behind[0] - wrote[0], behind[1] - wrote[1]

    def own_pattern(self, layer: int, head: int) -> Float[Tensor, "pair query key"]:
        """The prompt's own attention pattern of one head; queries of the window, all keys."""
        return self.acts[act("pattern", layer)][self.pairs.own, head, self.first : self.width, : self.width]

    def patterns(self, layer: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The prompt's attention patterns and those reached along the line of scores: (pair, head, query, key).

        log P_t = (1 - t) log P + t log P' + const; queries of the window, all keys.
        """
        pattern, width = self.acts[act("pattern", layer)], self.width
        own, partner = (
            pattern[rows, heads, self.first : width, :width] for rows in (self.pairs.own, self.pairs.partner)
        )
        if not self.all_valid:
            partner = torch.where(self.pairs.valid[:, None, self.first :, None], partner, own)
        if self.pairs.reach is None:
            return own, partner
        logs = torch.lerp(
            own.clamp_min(TINY).log(), partner.clamp_min(TINY).log(), self.pairs.reach.to(own).view(-1, 1, 1, 1)
        )
        return own, logs.softmax(-1)

    def anchor(self, own: Tensor, reached: Tensor) -> Tensor:
        """What the other factor of a product is taken at: the prompt's own, or the mean where sums are to be exact."""
        return own if self.pairs.reach is not None else (own + reached) / 2

    def anchored(self, key: str, heads: slice = slice(None)) -> Tensor:
        """Queries, keys or values as the other factor of a product, at every position that is read:
        (pair, 1, head, pos, d_head), shared ones repeated for every head."""
        whole = not key.startswith("q")
        at = self.anchor(*self.sides(key, whole=whole)) if self.pairs.reach is None else self.own(key, whole=whole)
        return repeat_heads(at.movedim(2, 0), self.adapter.shape.n_heads)[heads].movedim(0, 1).unsqueeze(1)


def secant(
    act: Callable[[Tensor], Tensor],
    a: Float[Tensor, "*x"],
    b: Float[Tensor, "*x"],
    values: tuple[Float[Tensor, "*x"], Float[Tensor, "*x"]] | None = None,
) -> Float[Tensor, "*x"]:
    """(act(b) - act(a)) / (b - a), a central difference at the middle where the two nearly meet.

    `values` are act(a) and act(b) where they are known already.

    >>> secant(torch.relu, torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 1.0]))
    tensor([0.7500, 1.0000])
    """
    low, high = (act(a), act(b)) if values is None else values
    near = (b - a).abs() < NEAR
    slope = (high - low) / torch.where(near, 1.0, b - a)
    middle = ((a + b) / 2)[near]
    slope[near] = (act(middle + NEAR) - act(middle - NEAR)) / (2 * NEAR)
    return slope


def logarithmic_mean(p: Float[Tensor, "*x"], q: Float[Tensor, "*x"]) -> Float[Tensor, "*x"]:
    """(q - p) / (log q - log p), which lies between p and q; their mean where they nearly meet, 0 where one is 0.

    >>> logarithmic_mean(torch.tensor([0.2, 0.5, 0.0]), torch.tensor([0.2, 0.1, 0.3])).round(decimals=4)
    tensor([0.2000, 0.2485, 0.0029])
    """
    ratio = q.clamp_min(TINY).log() - p.clamp_min(TINY).log()
    near = ratio.abs() < NEAR
    return torch.where(near, (p + q) / 2, (q - p) / torch.where(near, 1.0, ratio))


def softmax_secant(
    own: Float[Tensor, "pair head query key"],
    partner: Float[Tensor, "pair head query key"],
    b: Float[Tensor, "pair direction head query key"],
) -> Float[Tensor, "pair direction head query key"]:
    """w with sum_q w ds = sum_q (P' - P) b for the scores' difference ds, whatever is added to all scores of a row.

    w = L (b - sum L b / sum L), L the logarithmic mean of the two patterns: exact however sharp they are.
    """
    mean = logarithmic_mean(own, partner)
    share = (mean / mean.sum(-1, keepdim=True).clamp_min(TINY)).unsqueeze(1)
    return mean.unsqueeze(1) * (b - (share * b).sum(-1, keepdim=True))
