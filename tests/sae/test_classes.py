"""Class labels: every rule for the strength is obeyed, and what is chosen predicts."""

from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor

from tl_circuitlasso.data.targets import Labels
from tl_circuitlasso.features.classes import classify_pair
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.features.regression import Rule
from tl_circuitlasso.features.samples import Column, PairData, Part
from tl_circuitlasso.models.feature_store import CodeStore

SOURCES, TELLERS = 30, (3, 8)


def data(classes: int, samples: int = 400) -> tuple[PairData, Tensor]:
    random = torch.Generator().manual_seed(classes)
    codes = torch.rand(samples, SOURCES, generator=random) * (torch.rand(samples, SOURCES, generator=random) < 0.4)
    score = 3 * codes[:, TELLERS[0]] - 3 * codes[:, TELLERS[1]] + 0.4 * torch.randn(samples, generator=random)
    y = (score[:, None] > torch.linspace(-0.6, 0.6, classes + 1)[1:-1]).sum(1)
    matrix, child = scipy.sparse.csr_matrix(codes.numpy()), y[:, None].double()
    part = Part(matrix, torch.zeros(samples, 0), child, torch.arange(samples))
    pair = PairData(
        CodeStore(None, 1 << 20, {}), "blocks.0.hook_resid_post", None, (Column("a", ""),), torch.arange(SOURCES),
        torch.arange(1), 0, False, 0.25, given=(part,),
    )  # fmt: skip
    return pair, y


def classified(strength: Any, classes: int = 2, **rule: Any) -> Regressed:
    pair, y = data(classes)
    return classify_pair(pair, Rule(strength, **rule), Labels(y))


@pytest.mark.parametrize("classes", [2, 3])
def test_strengths_differ_by_rule_and_all_find_what_tells(classes: int) -> None:
    found = {rule: classified(rule, classes) for rule in ("auto", "cv", "ebic", 0.9)}
    assert len({float(one.strength[0]) for one in found.values()}) == 4
    assert all(set(TELLERS) <= set(one.source.tolist()) for rule, one in found.items() if rule != 0.9)
    assert len(found["ebic"].source) < len(found["cv"].source)
    assert found["cv"].overall > found["auto"].overall - 0.02 and found["cv"].overall > 0.3


def test_cross_validation_predicts_as_well_as_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    pair, _ = data(2)
    train, held = (next(iter(pair.parts(held=held))) for held in (False, True))
    x, y = train.codes.toarray(), train.child.numpy()[:, 0]
    options = {"Cs": 17, "cv": 5, "penalty": "l1", "solver": "liblinear", "scoring": "neg_log_loss"}
    other = linear_model.LogisticRegressionCV(**options).fit(x / x.std(0), y)
    p = other.predict_proba(held.codes.toarray() / x.std(0))[:, 1]
    wanted = torch.from_numpy(held.child.numpy()[:, 0])
    theirs = torch.nn.functional.binary_cross_entropy(torch.from_numpy(p), wanted)
    share = torch.tensor(y.mean())
    guess = -(wanted * share.log() + (1 - wanted) * (1 - share).log()).mean()
    assert classified("cv").overall >= float(1 - theirs / guess) - 0.02


def test_half_samples_tell_how_stable_coefficients_are() -> None:
    found = classified(0.2, draws=10)
    stable = dict(zip(found.source.tolist(), found.stability.tolist()))
    assert all(stable[teller] == 1.0 for teller in TELLERS) and min(stable.values()) >= 0
    assert bool(classified(0.2).stability.isnan().all())
    few = classified("stability")
    assert set(TELLERS) <= set(few.source.tolist()) and bool((few.stability >= 0.8).all())
