"""Nothing is left on the wrong device: everything public is run on a make-believe accelerator, beside the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

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


def wrong(*names: str) -> dict[str, str]:
    """What went wrong in some runs (none: in all), from a process of their own."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch can't be given a device from Python")
    command = [sys.executable, "-m", "tests.card_runs", *names]
    root, env = Path(__file__).parents[1], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: what for name, what in json.loads(done.stdout.splitlines()[-1]).items() if what}


def test_nothing_is_left_on_the_cpu() -> None:
    assert wrong(*QUICK) == {}


@pytest.mark.slow
def test_nothing_is_left_on_the_cpu_anywhere() -> None:
    assert wrong() == {}


def test_the_card_refuses_what_a_card_refuses() -> None:
    code = """
import torch
from tests.card import card
with card() as device:
    there, here = torch.ones(2, device=device), torch.ones(2)
    assert (there + 1).device == device and (there + here.to(device)).cpu().tolist() == [2.0, 2.0]
    mixed = (lambda: there + here, there.numpy, lambda: here[there.long()], lambda: torch.cat([here, there]))
    for wrong in mixed:
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("a tensor of the CPU met one of the card")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
