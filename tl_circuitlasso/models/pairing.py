"""Which prompts are compared, and at which of their positions: each with its own counterpart, or with one drawn at
random; at all kept positions, or at some that are drawn by how far the two lie apart there.

What is drawn by a chance p stands for 1 / p: sums over what was drawn are in the mean those over everything.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models import outcome
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.views import Pairing

REACHES = (0.5, 1.0)  # how far towards a random partner secants go, in turn: some thresholds lie in the second half
ALIKE = 0.1  # share of the draws that treat all positions alike


def compared(
    adapter: Adapter,
    acts: Mapping[str, Tensor],
    mask: Bool[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"],
    question: outcome.Question,
    *,
    contrast: bool,
    draws: int,
    generator: torch.Generator,
) -> Pairing:
    """The pairs of a batch, `draws` of each prompt: with partners drawn at random, or (`contrast`) at as many of its
    positions with its counterpart, whose activations stand behind those of all prompts."""
    if not contrast:
        return make_pairs(
            mask, keep, generator, draws=draws, logits=acts["logits"] if question.target is None else None
        )
    pairs = twins(mask, keep, acts[act("resid_pre", 0)], causal=adapter.shape.causal)
    if not len(pairs) or int(pairs.own.bincount().max()) <= draws:
        return pairs
    return some_of_each(pairs, outcome.apart(adapter, acts, pairs, question), draws, generator)


def first_difference(stream: Float[Tensor, "batch pos d_model"], pairs: Pairing) -> Int[Tensor, " pair"]:
    """Where the two prompts of each pair first differ; where the target is read, if they don't before."""
    first = torch.empty_like(pairs.position)
    for rows in torch.arange(len(pairs), device=pairs.own.device).split(64):
        differ = (stream[pairs.own[rows]] != stream[pairs.partner[rows]]).any(-1) & pairs.valid[rows]
        places = torch.arange(differ.shape[1], device=differ.device)
        first[rows] = torch.where(differ, places, differ.shape[1]).amin(1)
    return torch.minimum(first, pairs.position)


def twins(
    mask: Bool[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"],
    stream: Float[Tensor, "both pos d_model"],
    *,
    causal: bool,
) -> Pairing:
    """Each prompt with its own counterpart, which stands as many rows behind it, at every kept position that can see a
    difference between the two."""
    own, position = keep.nonzero().unbind(1)
    pairs = Pairing(own, own + len(mask), position, mask[own], position_ids(mask)[own])
    if causal:
        first = first_difference(stream, pairs.take(torch.arange(len(own), device=own.device)))
        differs = (stream[pairs.own, first] != stream[pairs.partner, first]).any(-1)
        pairs = pairs.take(differs.nonzero().flatten())
    return pairs


def some_of_each(pairs: Pairing, apart: Float[Tensor, " pair"], draws: int, generator: torch.Generator) -> Pairing:
    """At most `draws` pairs of each prompt, all where there are no more, else drawn by how far `apart` the two are.

    Drawn systematically (one random start, equal steps through the chances' sum): a pair with chance p is taken
    floor(draws p) or ceil(draws p) times, draws p in the mean, so one that alone is as far apart as all others is sure.
    """
    prompt, place = pairs.own, _places_within(pairs.own)
    rows = int(prompt.max()) + 1
    there = torch.zeros(rows, int(place.max()) + 1, dtype=torch.bool, device=prompt.device)
    there[prompt, place] = True
    chances = _chances(there, torch.zeros_like(there, dtype=torch.float64).index_put((prompt, place), apart.double()))
    start = torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(chances.device)
    until = (chances.cumsum(1) * draws + start).floor()
    times = until.diff(dim=1, prepend=torch.zeros_like(until[:, :1]))
    each = there.sum(1, keepdim=True)
    every = each <= draws
    times = torch.where(every, there.double(), times)[prompt, place]
    expected = torch.where(every, there.double(), draws * chances)[prompt, place]
    drawn_of = torch.where(every, there.double(), each / draws)[prompt, place]
    taken = (times > 0).nonzero().flatten()
    thin = pairs.take(taken)
    return replace(thin, weight=(times / expected)[taken], drawn_of=(times * drawn_of)[taken])


def _places_within(runs: Int[Tensor, " item"]) -> Int[Tensor, " item"]:
    """The place of each item in its run of equals.

    >>> _places_within(torch.tensor([0, 0, 2, 2, 2, 3])).tolist()
    [0, 1, 0, 1, 2, 0]
    """
    size = runs.unique_consecutive(return_counts=True)[1]
    return torch.arange(len(runs), device=runs.device) - (size.cumsum(0) - size).repeat_interleave(size)


def make_pairs(
    mask: Bool[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"],
    generator: torch.Generator,
    *,
    draws: int = 1,
    logits: Float[Tensor, "batch pos vocab"] | None = None,
) -> Pairing:
    """Each prompt with another of at least its length, drawn at random, and one of its kept positions; `draws` times.

    Prompts of one length form a random cycle; the last of a length that has no equal takes the next longer one. A
    prompt that is alone with the largest length, or has no kept position, is left out. Given the `logits`, positions
    are drawn by how far the predictions of the two prompts lie apart, and weigh as if all were drawn alike.
    """
    lengths = mask.sum(1).cpu()
    parts = []
    for draw in range(draws):
        partner = _partners(lengths, generator).to(mask.device)
        own = ((partner >= 0) & keep.any(1)).nonzero().flatten()
        chances = _chances(keep[own], None if logits is None else outcome.divergence(logits, own, partner[own]))
        position = _draws(chances, generator)
        chance = chances.gather(1, position[:, None])[:, 0]
        weight = 1 / (keep[own].sum(1) * chance).clamp_min(1e-12)
        reach = torch.tensor(REACHES, device=mask.device)[(own + draw) % len(REACHES)]
        valid = mask[own] & mask[partner[own]]
        parts.append(Pairing(own, partner[own], position, valid, position_ids(mask)[own], reach, weight))
    return Pairing.joined(parts)


def _chances(keep: Bool[Tensor, "pair pos"], apart: Float[Tensor, "pair pos"] | None) -> Float[Tensor, "pair pos"]:
    """With which chance each kept position is drawn: all alike, or mostly by how far apart predictions are there."""
    alike = keep.double() / keep.sum(1, keepdim=True).clamp_min(1)
    if apart is None:
        return alike
    apart = torch.where(keep, apart.double(), 0.0)
    total = apart.sum(1, keepdim=True)
    by_interest = torch.where(total > 0, apart / total.clamp_min(1e-300), alike)
    return ALIKE * alike + (1 - ALIKE) * by_interest


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


def _draws(chances: Float[Tensor, "row place"], generator: torch.Generator) -> Int[Tensor, " row"]:
    """One place of each row, drawn by its chances."""
    if not len(chances):
        return torch.zeros(0, dtype=torch.long, device=chances.device)
    return torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(chances.device)
