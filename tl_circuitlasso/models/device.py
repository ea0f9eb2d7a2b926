"""Where a model is: on one device, spread over several, or moved to another one for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tl_circuitlasso.errors import InputError, ModelError

ELSEWHERE = (
    "load it whole on one device, without `n_devices` or `device_map`, in bfloat16 where it is too large, and share "
    "prompts among processes that have a copy each (`process_group`)"
)


def devices_of(model: nn.Module) -> list[str]:
    """The devices that hold weights, by name; several for a model that is spread (`device_map`, `n_devices`)."""
    return sorted({str(weight.device) for weight in model.parameters()} - {"meta"})


def refuse_offloaded(model: nn.Module) -> None:
    """Raise ModelError for weights that accelerate keeps elsewhere until their layer runs: they can't be read."""
    wrapped = model.__dict__.get("original_model", model)
    away = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    if away and getattr(wrapped, "hf_device_map", None):
        raise ModelError(
            f"`model` keeps {len(away)} weights elsewhere until their layer runs, `{away[0]}` for one, so that they "
            "can't be read: load it without `device_map`, whole on one device, or with a map of cards alone"
        )


def refuse_spread(model: nn.Module, what: str) -> None:
    """Raise ModelError where the model is on several devices and `what` multiplies across layers as if on one."""
    if len(devices := devices_of(model)) > 1:
        raise ModelError(
            f"`model` is spread over {', '.join(devices)}, which {what} can't follow (design 'read' of components, "
            f"`evaluate`'s measures of such circuits, and eap, eap_ig and clean_corrupted can): {ELSEWHERE}"
        )


def layer_devices(model: Any) -> tuple[torch.device, ...]:
    """The device of each layer. Raises ModelError for a layer that lies on several."""
    places = []
    for layer, block in enumerate(model.blocks):
        if len(devices := devices_of(block)) > 1:
            raise ModelError(
                f"layer {layer} of `model` is spread over {', '.join(devices)}: give every layer one device in "
                "`device_map` (`no_split_module_classes`)"
            )
        places.append(next(block.parameters()).device)
    return tuple(places)


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
    if len(devices := devices_of(model)) > 1:
        raise ModelError(f"`model` is spread over {', '.join(devices)}: leave `device` out, or {ELSEWHERE}")
    home = next(model.parameters()).device
    cfg_home = model.cfg.device
    try:
        nn.Module.to(model, wanted)
        model.cfg.device = str(wanted)
        yield
    finally:
        nn.Module.to(model, home)
        model.cfg.device = cfg_home
