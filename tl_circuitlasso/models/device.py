"""Where a model is: on one device, or moved to another one for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tl_circuitlasso.errors import InputError, ModelError


def refuse_spread(model: nn.Module) -> None:
    """Weights are multiplied with activations of other layers, so all must be on one device.

    Raises
    ------
    ModelError: they are on several, or accelerate keeps some of them elsewhere until their layer runs.
    """
    wrapped = model.__dict__.get("original_model", model)
    away = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if away and getattr(wrapped, "hf_device_map", None):
        raise ModelError(
            f"`model` keeps {len(away)} weights elsewhere until their layer runs, `{away[0]}` for one, so that they "
            "can't be read: load it without `device_map`, whole on one device"
        )
    devices = sorted({str(weight.device) for weight in model.parameters()} - {"meta"})
    if len(devices) > 1:
        raise ModelError(
            f"`model` is spread over {', '.join(devices)}: circuits need all weights on one device. Load it without "
            "`n_devices` or `device_map`, in bfloat16 where it is too large, and share prompts among processes that "
            "have a copy each (`process_group`)"
        )


@contextmanager
def on_device(model: Any, device: Any) -> Iterator[None]:
    """The model on `device` (None: where it is) inside the block, and back where it was behind it.

    Raises
    ------
    InputError: no such device, or none of that kind on this machine. ModelError: the model is on several already.
    """
    if device is None:
        yield
        return
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"`device` {device!r} can't be used here ({error}): use 'cpu', or leave it out") from None
    refuse_spread(model)
    home = next(model.parameters()).device
    cfg_home = model.cfg.device
    try:
        nn.Module.to(model, wanted)
        model.cfg.device = str(wanted)
        yield
    finally:
        nn.Module.to(model, home)
        model.cfg.device = cfg_home
