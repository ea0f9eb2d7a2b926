"""The Triton program is the loop of the torch sweeper, run here by Triton's interpreter: no card is needed."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from tl_circuitlasso.solve.torch_set import sweep_torch
from tl_circuitlasso.solve.triton_set import sweep_triton
generator = torch.Generator().manual_seed(0)
for targets, width, bounded in ((3, 7, False), (2, 20, True), (2, 33, False)):
    x = torch.randn(targets, 50, width, generator=generator, dtype=torch.float64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    pull = torch.randn(targets, width, generator=generator, dtype=torch.float64)
    cut, ridge = torch.full_like(pull, 0.3), torch.rand(pull.shape, generator=generator, dtype=torch.float64)
    cut[:, -1] = torch.inf
    upper = torch.full_like(pull, 0.5 if bounded else torch.inf)
    rest = (x.mT @ x / 50, torch.zeros_like(pull), pull, cut, ridge, upper, bounded, 20)
    one, two = sweep_torch(*rest), sweep_triton(*rest)
    assert int((one != 0).sum()) > targets
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton isn't installed")
def test_interpreted_triton_sweeps_like_torch() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
