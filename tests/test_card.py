"""Nothing is left on the wrong device: everything public is run on a make-believe accelerator, beside the CPU."""

import contextlib

import pytest
import torch
from torch.utils import backend_registration

import tl_circuitlasso as tcl
from tests import architectures, card_runs
from tests.apart import apart
from tests.card import card

QUICK = (
    "read, difference",
    "neurons",
    "SAE, strength auto",
    "eap, patch",
    "eap_ig, mean",
    "faithfulness, optimal",
    "steer",
    "lasso, auto",
    "lasso, fista",
    "lasso, groups",
    "logistic",
)


def skip_without_a_card() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch can't be given a device from Python")


def wrong(*names: str) -> dict[str, str]:
    """What went wrong in some runs (none: in all), from a process of their own."""
    skip_without_a_card()
    return {name: what for name, what in apart(card_runs.outcomes, *names).items() if what}


def test_nothing_is_left_on_the_cpu() -> None:
    assert wrong(*QUICK) == {}


@pytest.mark.slow
def test_nothing_is_left_on_the_cpu_anywhere() -> None:
    assert wrong() == {}


def mixtures_met() -> int:
    """How many ways of letting a tensor of the CPU meet one of the card went through."""
    met = 0
    with card() as device:
        there, here = torch.ones(2, device=device), torch.ones(2)
        assert (there + 1).device == device and (there + here.to(device)).cpu().tolist() == [2.0, 2.0]
        for mixed in (
            lambda: there + here,
            there.numpy,
            lambda: here[there.long()],
            lambda: torch.cat([here, there]),
        ):
            with contextlib.suppress(RuntimeError, TypeError):
                mixed()
                met += 1
    return met


def test_the_card_refuses_what_a_card_refuses() -> None:
    assert apart(mixtures_met) == 0


def refusals_of_a_spread_model() -> list[str]:
    """What is said of a model with one block on the card, with and without `device`, which leaves it where it is."""
    said = []
    with card() as device:
        model = architectures.small()
        torch.nn.Module.to(model.blocks[1], device)
        for asked in (None, "cpu"):
            with pytest.raises(tcl.ModelError) as refused:
                tcl.circuit_lasso(model, architectures.prompts(batch=4), progress=False, device=asked)
            said.append(str(refused.value))
        assert model.blocks[1].attn.W_Q.device == device and model.blocks[0].attn.W_Q.device.type == "cpu"
    return said


def test_a_model_on_two_devices_is_refused_by_name_and_left_where_it_is() -> None:
    skip_without_a_card()
    said = apart(refusals_of_a_spread_model)
    assert len(said) == 2 and all("spread over card:0, cpu" in text and "`n_devices`" in text for text in said), said
