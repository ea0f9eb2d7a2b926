"""Which prompts are compared, and at which positions: with random partners, or with counterparts."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.models import outcome
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.pairing import make_pairs, some_of_each, twins
from tl_circuitlasso.models.views import Pairing

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def masks(lengths: list[int], left: bool) -> Tensor:
    rank = torch.arange(6).flip(0) if left else torch.arange(6)
    return rank < torch.tensor(lengths)[:, None]


@given(lengths=LENGTHS, left=st.booleans(), seed=st.integers(0, 1000), hidden=st.integers(0, 6))
def test_pairs_are_fair(lengths: list[int], left: bool, seed: int, hidden: int) -> None:
    """Nobody is their own partner, partners are at least as long, and the target is read at a kept position."""
    mask = masks(lengths, left)
    keep = mask & (torch.arange(6) >= hidden)
    pairs = make_pairs(mask, keep, torch.Generator().manual_seed(seed))
    length = mask.sum(1)
    assert not bool((pairs.own == pairs.partner).any())
    assert bool((length[pairs.partner] >= length[pairs.own]).all())
    assert bool(keep[pairs.own, pairs.position].all())
    assert torch.equal(pairs.valid, mask[pairs.own] & mask[pairs.partner])
    assert len(pairs.own.unique()) == len(pairs.own)


@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_only_a_longest_prompt_without_an_equal_is_left_out(lengths: list[int], seed: int) -> None:
    mask = masks(lengths, left=False)
    pairs = make_pairs(mask, mask, torch.Generator().manual_seed(seed))
    alone = [row for row, length in enumerate(lengths) if length == max(lengths) and lengths.count(length) == 1]
    assert pairs.own.tolist() == [row for row in range(len(lengths)) if row not in alone]


@given(size=st.integers(2, 9), seed=st.integers(0, 1000))
def test_prompts_of_one_length_are_each_others_partner_once(size: int, seed: int) -> None:
    mask = torch.ones(size, 4, dtype=torch.bool)
    pairs = make_pairs(mask, mask, torch.Generator().manual_seed(seed))
    assert set(Counter(pairs.partner.tolist()).values()) == {1} and len(pairs.own) == size


@given(lengths=LENGTHS, seed=st.integers(0, 1000), hidden=st.integers(0, 6), draws=st.integers(1, 3))
def test_pairs_are_those_of_the_definition_one_by_one(lengths: list[int], seed: int, hidden: int, draws: int) -> None:
    """A shuffle by length; each takes the next of its length, the last the first; without an equal, the next longer."""
    mask = masks(lengths, left=False)
    keep, generator = mask & (torch.arange(6) >= hidden), torch.Generator().manual_seed(seed)
    expected = []
    for _ in range(draws):
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        order = sorted(shuffled, key=lambda row: lengths[row])
        partner = {}
        for place, row in enumerate(order):
            same = [other for other in order if lengths[other] == lengths[row]]
            following = same[(same.index(row) + 1) % len(same)] if len(same) > 1 else (order[place + 1 :] or [None])[0]
            partner[row] = following
        rows = [row for row in range(len(lengths)) if partner[row] is not None and bool(keep[row].any())]
        if rows:
            alike = keep[rows].double() / keep[rows].sum(1, keepdim=True)
            drawn = torch.multinomial(alike, 1, generator=generator)[:, 0].tolist()
            expected += [(row, partner[row], place) for row, place in zip(rows, drawn)]
    pairs = make_pairs(mask, keep, torch.Generator().manual_seed(seed), draws=draws)
    assert list(zip(pairs.own.tolist(), pairs.partner.tolist(), pairs.position.tolist())) == expected


def test_another_seed_draws_other_pairs_and_positions() -> None:
    mask = torch.ones(30, 8, dtype=torch.bool)
    one, same, other = (make_pairs(mask, mask, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.partner, same.partner) and torch.equal(one.position, same.position)
    assert not torch.equal(one.partner, other.partner) and not torch.equal(one.position, other.position)
    assert len(one.position.unique()) > 4


# ---- counterparts, at some of their positions ------------------------------------------------------------------------


def counterparts(lengths: list[int]) -> Pairing:
    """Every prompt with its counterpart at each of its positions."""
    mask = masks(lengths, left=False)
    return twins(mask, mask, torch.zeros(2 * len(lengths), 6, 1), causal=False)


@given(lengths=LENGTHS, draws=st.integers(1, 5), seed=st.integers(0, 1000))
def test_of_each_prompt_as_many_positions_are_drawn_as_asked(lengths: list[int], draws: int, seed: int) -> None:
    """All where there are no more, each for itself; else some that stand for all of them."""
    pairs, generator = counterparts(lengths), torch.Generator().manual_seed(seed)
    apart = torch.rand(len(pairs), generator=generator)
    some = some_of_each(pairs, apart, draws, generator)
    assert some.weight is not None and some.drawn_of is not None
    for prompt, length in enumerate(lengths):
        mine = some.own == prompt
        assert float(some.drawn_of[mine].sum()) == pytest.approx(length)
        assert bool((some.partner[mine] == prompt + len(lengths)).all())
        if length <= draws:
            assert some.position[mine].tolist() == list(range(length)) and bool((some.weight[mine] == 1).all())
        else:
            assert 1 <= int(mine.sum()) <= draws and len(some.position[mine].unique()) == int(mine.sum())


def test_what_is_drawn_stands_for_all_in_the_mean() -> None:
    pairs = counterparts([6, 3, 6, 5])
    generator = torch.Generator().manual_seed(0)
    apart, value = torch.rand(2, len(pairs), generator=generator)
    by_pair = {(int(own), int(place)): float(v) for own, place, v in zip(pairs.own, pairs.position, value)}
    sums = []
    for _ in range(4000):
        some = some_of_each(pairs, apart, 2, generator)
        assert some.weight is not None
        drawn = torch.tensor([by_pair[int(own), int(place)] for own, place in zip(some.own, some.position)])
        sums.append(float((drawn * some.weight).sum()))
    spread = float(torch.tensor(sums).std()) / len(sums) ** 0.5
    assert abs(sum(sums) / len(sums) - float(value.sum())) < 4 * spread


def test_the_one_position_where_prompts_differ_is_always_drawn() -> None:
    pairs = counterparts([6] * 8)
    place = torch.arange(8) % 6
    apart = (pairs.position == place[pairs.own]).float()
    for seed in range(20):
        some = some_of_each(pairs, apart, 2, torch.Generator().manual_seed(seed))
        assert all((some.position[some.own == row] == place[row]).any() for row in range(8))


@pytest.mark.parametrize("vocabulary", [9, 40])
def test_how_far_apart_predictions_are_is_their_divergence(vocabulary: int) -> None:
    adapter = adapt(architectures.hooked("gpt2", d_vocab_out=vocabulary))
    tokens = architectures.prompts(batch=6)
    mask = torch.ones(3, tokens.shape[1], dtype=torch.bool)
    acts = adapter.run(tokens, torch.cat([mask, mask]), {"resid_pre.0", *outcome.wanted(adapter, None), "scale.final"})
    pairs = twins(mask, mask, acts["logits"], causal=False)
    apart = outcome.apart(adapter, acts, pairs, outcome.Question(None, torch.arange(3)))
    own, partner = (acts["logits"].log_softmax(-1)[rows, pairs.position] for rows in pairs.sides)
    expected = torch.nn.functional.kl_div(partner, own, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(apart, expected, rtol=1e-4, atol=1e-5)


def test_how_far_apart_numbers_are_is_their_difference() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    tokens = architectures.prompts(batch=6)
    mask = torch.ones(3, tokens.shape[1], dtype=torch.bool)
    target = tcl.LogitDiff([3, 4, 5], [6, 7, 8])
    wanted = {"logits", *outcome.wanted(adapter, target), "scale.final"}
    acts = adapter.run(tokens, torch.cat([mask, mask]), wanted)
    pairs = twins(mask, mask, acts["logits"], causal=False)
    rows = pairs.own
    right, wrong = (torch.tensor(ids)[rows] for ids in ([3, 4, 5], [6, 7, 8]))
    own, partner = (acts["logits"][side, pairs.position] for side in pairs.sides)
    pick = torch.arange(len(rows))
    change = (partner[pick, right] - partner[pick, wrong]) - (own[pick, right] - own[pick, wrong])
    apart = outcome.apart(adapter, acts, pairs, outcome.Question(target, torch.arange(3)))
    torch.testing.assert_close(apart, change.abs(), rtol=1e-4, atol=1e-5)


def test_counterparts_are_compared_at_few_positions_and_find_the_same_circuit() -> None:
    """A model's own logits are to be explained at all positions: some of them stand for all."""
    demo = tcl.load_demo(prompts=64)
    options = {"corrupted": demo.corrupted, "progress": False}
    graph = tcl.circuit_lasso(demo.model, demo.tokens, **options)
    assert graph.provenance["prompt_pairs"] <= 4 * 64
    few = tcl.circuit_lasso(demo.model, demo.tokens[:8], corrupted=demo.corrupted[:8], progress=False)
    scores, others = graph.pair_scores(), few.pair_scores()
    strong = sorted(scores, key=lambda edge: -abs(scores[edge]))[:4]
    assert all(others[edge] == pytest.approx(scores[edge], rel=0.6) for edge in strong)
