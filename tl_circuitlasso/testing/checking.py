"""How checks are run and what they say."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.errors import CircuitLassoError
from tl_circuitlasso.models import Adapter

PROMPTS, LENGTH = 4, 8  # of random tokens, where none are given
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4}  # relative; 16-bit models get 5e-2

Check = tuple[str, Callable[[], None]]


class CheckFailure(CircuitLassoError, AssertionError):
    """Something that a model, basis, format or method must do and doesn't."""


def run(what: str, checks: Iterator[Check]) -> tuple[str, ...]:
    """The names of the checks that pass.

    Raises
    ------
    CheckFailure: some don't; it says which of `what`, and why.
    """
    passed, failed = [], []
    for name, check in checks:
        try:
            check()
        except Exception as error:  # whatever a stranger's object raises is a finding
            failed.append(f"{name}: {type(error).__name__}: {error}" if str(error) else name)
        else:
            passed.append(name)
    if failed:
        raise CheckFailure(f"{what} fails {len(failed)} of {len(failed) + len(passed)} checks:\n" + "\n".join(failed))
    return tuple(passed)


def expect(holds: bool, message: str) -> None:
    """Fail with `message` unless it `holds`."""
    if not holds:
        raise CheckFailure(message)


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> None:
    """Fail where two tensors differ by more than rounding, as a share of the largest entry wanted."""
    limit = CLOSE.get(wanted.dtype, 5e-2) if tolerance is None else tolerance
    scale = float(wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    error = float((found - wanted).abs().max()) / scale
    expect(error <= limit, f"{what}: relative error {error:.2g}, tolerance {limit:.0e}")


def ignore(_: Any) -> None:
    """For a check whose work is done by making what it looks at."""


def random_tokens(adapter: Adapter) -> Int[Tensor, "batch pos"]:
    """Prompts for a model that none are given for."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(adapter.shape.d_vocab, (PROMPTS, LENGTH), generator=generator)


def state(model: Any) -> tuple[Any, ...]:
    """What a check must leave as it was: weights, gradients, hooks, switches and configuration."""
    sums = tuple(_fingerprint(part.detach()) for part in model.parameters())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    learning = tuple((part.requires_grad, part.grad is None) for part in model.parameters())
    return sums, hooks, model.training, learning, repr(getattr(model, "cfg", None))


def _fingerprint(weights: Tensor) -> float:
    """A sum that also sees entries change places."""
    flat = weights.double().flatten()
    return float(flat @ torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device))
