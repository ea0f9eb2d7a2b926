"""Integrated gradients of features against exact ablation where the metric is linear in them."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import pair
from tests.evaluate.test_features import SAES, feature_graph, hook_site

HOOK = tuple(SAES)[1]  # behind the last layer of two
METRIC = tcl.evaluate.logit_diff([3, 4], [5, 6])


def attributed(steps: int, ablation: str = "patch", **options: Any) -> dict[str, float]:
    clean, corrupted, _ = pair()
    graph = feature_graph({hook_site(HOOK): list(range(40))}, [])
    options = {"saes": {HOOK: SAES[HOOK]}, "progress": False, "steps": steps, **options}
    model = architectures.hooked("gpt2")
    return tcl.evaluate.feature_attribution(model, graph, clean, corrupted, METRIC, ablation, **options)


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero"])
def test_effects_add_up_to_what_ablating_all_features_does(ablation: str) -> None:
    """The error of the left sum falls as one over the steps."""
    clean, corrupted, _ = pair()
    graph = feature_graph({hook_site(HOOK): list(range(40))}, [])
    whole = tcl.evaluate.faithfulness(
        architectures.hooked("gpt2"), graph, clean, corrupted, METRIC, ablation, saes={HOOK: SAES[HOOK]}, error="keep"
    )
    off = [sum(attributed(steps, ablation).values()) - (whole.model - whole.ablated) for steps in (1, 30)]
    assert abs(off[1]) < 0.05 * abs(whole.model - whole.ablated) + 1e-4
    assert abs(off[1]) < abs(off[0])


def test_features_that_do_not_change_have_no_effect() -> None:
    clean, _, _ = pair()
    graph = feature_graph({hook_site(HOOK): list(range(40))}, [])
    same = tcl.evaluate.feature_attribution(
        architectures.hooked("gpt2"), graph, clean, clean, METRIC, saes={HOOK: SAES[HOOK]}, progress=False, steps=2
    )
    assert max(map(abs, same.values())) < 1e-6
    changed = attributed(1)
    assert len(changed) == 40 and max(map(abs, changed.values())) > 1e-3


def test_a_decoder_that_is_not_linear_is_refused() -> None:
    class Bent(type(SAES[HOOK])):
        def decode(self, codes: torch.Tensor) -> torch.Tensor:
            return super().decode(codes.square())

    with pytest.raises(tcl.errors.InputError, match="isn't linear"):
        attributed(1, saes={HOOK: Bent()})
