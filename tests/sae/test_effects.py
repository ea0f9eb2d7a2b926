"""Which effects are edges: error control on planted and on permuted codes, sizes, and what the regression left out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tl_circuitlasso.data.sharing import ALONE
from tl_circuitlasso.features.effects import LEAST, UNREAD, Q, adjusted, is_clear, q_values, with_effects
from tl_circuitlasso.features.fit import PER_EDGE, PER_TARGET, Regressed, Units
from tl_circuitlasso.models.feature_sums import Effects, Sums, Tally


def told(change: Tensor, mass: Tensor) -> Effects:
    """Effects from what happened on each prompt: (prompt, feature, child), and each feature's mass."""
    prompts, features, children = change.shape
    tally = Tally([Sums(children)], torch.zeros(3, features).double())
    for prompt in range(prompts):
        tally.copies[0].add(torch.arange(features), change[prompt], mass[prompt])
        tally.feature += torch.stack([torch.ones(features), mass[prompt], mass[prompt] ** 2]).double()
    return tally.effects(features, ALONE)


def test_effects_are_ratios_with_the_error_of_ratios() -> None:
    random = torch.Generator().manual_seed(0)
    mass = 1 + torch.rand(4000, 3, generator=random)
    change = mass[..., None] * 0.5 + 0.3 * torch.randn(4000, 3, 2, generator=random)
    found = told(change, mass)
    torch.testing.assert_close(
        found.effect, (change.sum(0) / mass.sum(0)[:, None]).double().flatten(), rtol=1e-5, atol=0
    )
    assert found.error.tolist() == pytest.approx([0.3 / 1.5 / 4000**0.5] * 6, rel=0.1)
    assert found.dense(torch.tensor([1])).shape == (3, 1)
    assert found.rows(torch.tensor([2, 0]), torch.tensor([1, 1])).tolist() == [5, 1]


def test_false_discoveries_stay_below_the_nominal_rate() -> None:
    """A tenth of the pairs have an effect; the others a null by turning the signs of what happened at random."""
    rates, powers = [], []
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        real = torch.rand(30, 40, generator=random) < 0.1
        change = torch.randn(24, 30, 40, generator=random) * torch.rand(30, 40, generator=random)
        signs = torch.randint(0, 2, (24, 1, 1), generator=random) * 2 - 1
        found = told(signs * change + 1.0 * real, torch.ones(24, 30))
        kept = q_values(found) <= 0.1
        truth = real.flatten()[found.source * 40 + found.target]
        rates.append(float((kept & ~truth).sum() / kept.sum().clamp(min=1)))
        powers.append(float((kept & truth).sum() / truth.sum()))
    assert sum(rates) / 8 <= 0.1 and sum(powers) / 8 > 0.8


def test_pairs_too_small_to_be_edges_are_not_tested_and_the_rate_holds() -> None:
    """Weak effects among 5,000 pairs, most of them of noise that is far too small: more are found where these aren't
    tested, with no more false ones than asked for, though what is tested is chosen by the same prompts."""
    rates, powers = [], {True: [], False: []}
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        real, loud = (torch.rand(50, 100, generator=random) < share for share in (0.01, 0.05))
        size = torch.where(real | loud, 0.1, 0.01)
        change = size * torch.randn(24, 50, 100, generator=random) + 0.07 * real
        found = told(change, torch.ones(24, 50))
        truth = real.flatten()[found.source * 100 + found.target]
        large = found.root_mean_square() >= 0.05
        assert bool((found.effect.abs() <= found.root_mean_square()).all())
        for tested in (large, None):
            kept = q_values(found, tested) <= 0.1
            powers[tested is not None].append(float((kept & truth).sum() / truth.sum()))
            if tested is not None:
                rates.append(float((kept & ~truth).sum() / kept.sum().clamp(min=1)))
    assert sum(rates) / 8 <= 0.1
    assert sum(powers[True]) > 1.3 * sum(powers[False])


def test_adjusted_p_values_are_those_of_the_field() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = torch.rand(50, generator=torch.Generator().manual_seed(1)).double() ** 3
    torch.testing.assert_close(adjusted(p, 50), torch.from_numpy(stats.false_discovery_control(p.numpy())))
    assert bool((adjusted(p, 500) >= adjusted(p, 50)).all())


def regressed(**edges: Any) -> Regressed:
    count = len(edges["source"])
    plain: dict[str, Any] = {name: torch.full((count,), torch.nan).double() for name in PER_EDGE}
    plain |= {name: torch.zeros(2).double() for name in PER_TARGET} | {"overall": 0.0, "samples": 9, "seconds": {}}
    plain |= {"iterations": torch.zeros(2).long(), "converged": torch.ones(2).bool()}
    return Regressed(**{**plain, **edges})


def test_effects_that_the_regression_left_out_come_in() -> None:
    effects = Effects(
        torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0.5, -0.25, 0.001]).double(),
        torch.tensor([0.01, 0.01, 0.5]).double(), torch.tensor([20, 20]), 1, 2,
    )  # fmt: skip
    ones = torch.ones(2).double()
    value = torch.tensor([0.7]).double()
    one = regressed(
        source=torch.tensor([0]), target=torch.tensor([0]), weight=value, lasso=value, score=value,
        effect=value * torch.nan,
    )  # fmt: skip
    found = with_effects(one, effects, Units(ones, ones, ones, ones), grow=True)
    assert found.source.tolist() == [0, 0] and found.target.tolist() == [0, 1]
    assert found.effect.tolist() == [0.5, -0.25] and found.weight.tolist() == pytest.approx([0.7, 0.0])
    assert found.score.tolist() == [0.5, -0.25] and bool((found.q < 1e-6).all())
    lengths = torch.ones(2).double()
    assert is_clear(found, lengths, lengths, unread=False).tolist() == [True, True]


def test_where_effects_are_small_throughout_those_that_stand_out_are_edges() -> None:
    """Of 400 pairs some of the largest, where no effect reaches the bar in standard deviations; the bar never rises."""
    random = torch.Generator().manual_seed(0)
    size = 1e-3 * torch.rand(20, 20, generator=random)
    size[:2, :2] = torch.tensor([[0.02, -0.03], [0.012, 0.04]])
    prompts = torch.ones(12, 20, 20) * size * (1 + 0.1 * torch.rand(12, 20, 20, generator=random))
    effects = told(prompts, torch.ones(12, 20))
    units = Units(*(torch.ones(20).double() for _ in range(4)))
    nothing = {name: torch.zeros(0).double() for name in PER_EDGE} | {"target": torch.zeros(0).long()}
    found = with_effects(regressed(**nothing | {"source": torch.zeros(0).long()}), effects, units, grow=True)
    lengths = torch.ones(20).double()
    kept = is_clear(found, lengths, lengths, unread=False)
    pairs = set(zip(found.source[kept].tolist(), found.target[kept].tolist()))
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= pairs and len(pairs) <= 6  # 1.5 % of 400
    assert found.bars is not None and found.bars[0][0] < LEAST
    assert Regressed.of(found.tensors(), found.plain()).bars == found.bars
    large = told(torch.ones(12, 20, 20) * (0.06 + 50 * size.abs()), torch.ones(12, 20))
    assert with_effects(found, large, units, grow=True).bars[0][0] == LEAST  # never asks for more than that


def test_edges_ask_for_size_surety_and_something_passed_on() -> None:
    effect = torch.tensor([0.5, 0.5, 0.5, LEAST / 2, torch.nan, torch.nan]).double()
    q = torch.tensor([0.0, 2 * Q, 0.0, 0.0, torch.nan, torch.nan]).double()
    score = torch.tensor([0.5, 0.5, 0.5, LEAST / 2, UNREAD, 0.9 * UNREAD]).double()
    source = torch.tensor([0, 0, 1, 0, 0, 0])
    some = regressed(source=source, target=torch.zeros(6).long(), effect=effect, q=q, score=score)
    written = torch.tensor([1.0, 100.0]).double()
    assert is_clear(some, written, written[:1], unread=True).tolist() == [True, False, False, False, True, False]
    assert is_clear(some, written, written[:1], unread=False).tolist() == [True, False, False, False, True, True]
