"""A HookedTransformer from plain data: the fields of its config and its weights."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso.errors import ModelError


def build_hooked_transformer(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], *, device: str = "cpu", random_weights: bool = False
) -> Any:
    """The model that `config` and `weights` describe, in evaluation mode.

    `config` holds fields of HookedTransformerConfig as JSON has them (dtype as text such as "float32" or
    "torch.float32"); fields that this version of TransformerLens doesn't know are left out. Buffers needn't be in
    `weights`, and with `random_weights` parameters needn't either.

    Raises
    ------
    ModelError: no HookedTransformer in this TransformerLens, a config it refuses, or weights that don't fit.
    """
    hooked, config_class = _classes()
    known = {field.name for field in fields(config_class)} - {"n_params", "device", "dtype"}
    dtype = str(config.get("dtype") or "float32").removeprefix("torch.")
    try:
        built = hooked(
            config_class(
                **{name: value for name, value in config.items() if name in known},
                device=device,
                dtype=getattr(torch, dtype),
            )
        )
        missing = built.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, strict=False)
    except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"the model can't be built from its config and weights: {error}") from error
    parameters = {name for name, _ in built.named_parameters()}
    if (absent := sorted(parameters & set(missing.missing_keys))) and not random_weights:
        raise ModelError(
            f"the weights lack {absent[0]} (and {len(absent) - 1} more): the file belongs to another model"
        )
    return built.eval()


def _classes() -> tuple[Any, Any]:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise ModelError(
            "this version of TransformerLens has no HookedTransformer, which these models need: "
            'pip install "transformer-lens>=2.16.1,<4"'
        ) from error
    return HookedTransformer, HookedTransformerConfig
