"""Run a model elsewhere for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tl_circuitlasso.errors import InputError


@contextmanager
def on_device(model: Any, device: Any) -> Iterator[None]:
    """The model on `device` (None: where it is) inside the block, and back where it was behind it.

    Raises
    ------
    InputError: no such device, or none of that kind on this machine.
    """
    if device is None:
        yield
        return
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"`device` {device!r} can't be used here ({error}): use 'cpu', or leave it out") from None
    home = next(model.parameters()).device
    cfg_home = model.cfg.device
    try:
        nn.Module.to(model, wanted)
        model.cfg.device = str(wanted)
        yield
    finally:
        nn.Module.to(model, home)
        model.cfg.device = cfg_home
