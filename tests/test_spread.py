"""A model whose layers lie on several devices: the same results as on one, and a clear word where it can't be followed.

The devices are make-believe (tests/card.py) and refuse to meet, as cards do.
"""

import pytest

from tests import spread_runs
from tests.apart import apart
from tests.test_card import skip_without_a_card

CLOSE = 1e-6
EVERY = [("hooked", family) for family in ("gpt2", "llama", "pythia", "gemma2", "attn_only", "shortformer", "olmo2")]
EVERY += [("bridge", family) for family in ("gpt2", "llama", "pythia", "gemma2", "qwen3", "gptj")]


def wrong(kind: str, family: str, *names: str) -> dict[str, float | str]:
    """Runs whose result on two devices isn't that of one."""
    skip_without_a_card()
    found = apart(spread_runs.apart_from_one, kind, family, *names)
    return {name: what for name, what in found.items() if isinstance(what, str) or not what <= CLOSE}


def test_a_hooked_model_on_two_devices_gives_the_circuit_of_one() -> None:
    assert wrong("hooked", "gpt2", "read", "faithfulness, patch") == {}


def test_a_dispatched_bridge_gives_the_scores_of_one_device() -> None:
    assert wrong("bridge", "llama", "eap_ig, patch", "read, pairs", "faithfulness, mean") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), EVERY)
def test_every_family_gives_the_results_of_one_device(kind: str, family: str) -> None:
    names = [name for name in spread_runs.RUNS if kind == "bridge" or name not in spread_runs.DERIVATIVES]
    assert wrong(kind, family, *names) == {}


def test_what_cannot_follow_a_spread_model_says_so() -> None:
    skip_without_a_card()
    said = apart(spread_runs.refusals)
    assert {name: text for name, text in said.items() if "spread over card:0, card:1" not in text} == {}


def test_a_model_that_transformer_lens_itself_cannot_run_is_refused() -> None:
    skip_without_a_card()
    said = apart(spread_runs.misplaced)
    assert said.startswith("TransformerLens can't run `model` as it is spread over card:0, card:1"), said


def test_activations_stay_where_their_layer_is() -> None:
    skip_without_a_card()
    found = apart(spread_runs.held_apart)
    assert found == {"first": {"card:0"}, "second": {"card:1"}, "ends": {"card:1"}, "gathered": {"card:1"}}
