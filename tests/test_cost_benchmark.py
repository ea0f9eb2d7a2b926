"""The re-enactment of the package's way, which the cost benchmark compares with, computes the same scores."""

import pytest
import torch

from benchmarks import cost
from benchmarks.cost import Problem, logit_difference, package_way, run
from tests.helpers import to_matrix
from tl_circuitlasso import baselines
from tl_circuitlasso.models import adapt

SMALL = Problem(layers=2, heads=2, d_model=16, vocab=23, prompts=5, length=6, batch_size=3)


@pytest.mark.parametrize("steps", [0, 3])
def test_the_package_way_gives_the_same_scores(steps):
    model, (clean, corrupted) = SMALL.model(), SMALL.pairs()
    theirs = package_way(model, clean, corrupted, SMALL.batch_size, steps)
    method = baselines.eap_ig if steps else baselines.eap
    ours = to_matrix(method(model, clean, corrupted, logit_difference, steps=max(steps, 1)), adapt(model).shape)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    assert not model.cfg.use_attn_result and all(p.grad is None for p in model.parameters())


def test_the_table_has_a_line_per_method():
    table = run(SMALL, steps=2, skip=("circuit-lasso",), repeats=1)
    assert list(table.method) == ["bare forward", "eap", "eap-ig", "package-eap", "package-eap-ig"]
    assert table.forwards[0] == 1 and bool((table.seconds > 0).all())
    assert torch.is_tensor(SMALL.pairs()[0])


def test_growth_is_measured_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "GROWTH", {"layers": [{"layers": 1}, {"layers": 2}], "prompts": [{"prompts": 2}]})
    table = cost.growth(SMALL, steps=1, skip=("circuit-lasso", "package-eap", "package-eap-ig"))
    assert list(table.axis.unique()) == ["layers", "prompts"] and len(table) == 9
    cost.plot(table, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000
