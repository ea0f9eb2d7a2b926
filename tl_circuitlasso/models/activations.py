"""From activation keys to hook points and back.

A key such as "z.3" names what the library needs, in one layout for every model: heads on their own axis, queries and
keys after rotation and norm, scales with a last axis of one. `plan` says which modules to listen to and how to turn
what was heard into the key's tensor. A raw TransformerLens hook name is a key of its own.
"""

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import rotary
from tl_circuitlasso.models.architecture import Layout, Shape
from tl_circuitlasso.models.hooks import find_module
from tl_circuitlasso.models.names import KINDS
from tl_circuitlasso.models.norms import scale_of
from tl_circuitlasso.models.weights import is_joint, port_norm

Heard = dict[str, Tensor]  # what each listened-to path gave


@dataclass(frozen=True, eq=False)
class Context:
    """What the derivations need besides the activations themselves."""

    model: Any
    shape: Shape
    layouts: tuple[Layout, ...]
    dtype: torch.dtype  # of the returned tensors
    positions: Tensor  # (batch, pos)


@dataclass(frozen=True, eq=False)
class Plan:
    """How to get one key: paths that must fire, paths that may, and the function of what was heard."""

    key: str
    last_layer: int | None  # None: needs the whole model
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    derive: Callable[[Heard, Context], Tensor]


# kind -> path below the block, for the keys that are one hook point's value
PLAIN = {
    "resid_pre": "hook_resid_pre",
    "projected.q": "attn.hook_q",
    "projected.k": "attn.hook_k",
    "projected.v": "attn.hook_v",
    "resid_post": "hook_resid_post",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "mlp_pre": "mlp.hook_pre",
    "mlp_linear": "mlp.hook_pre_linear",
    "mlp_post": "mlp.hook_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
INPUT = ":input"  # behind a module's path: what it is given
INPUTS = ("mlp_stream", "mlp_read")  # of the norm in front of a layer's MLP, and of the MLP itself
NEURON_KINDS = ("mlp_pre", "mlp_linear", "mlp_post")
SCALES = {"attn": "attn_norm", "mlp": "mlp_norm", "attn_out": "attn_post", "mlp_out": "mlp_post"}


def plan(key: str, model: Any, shape: Shape, layouts: tuple[Layout, ...]) -> Plan:
    """How to get `key`. Raises InputError, with near matches, for a key that this model doesn't have."""
    if key in ("logits", "scale.final", "pos_embed"):
        return _model_plan(key, model)
    kind, _, number = key.rpartition(".")
    if kind not in KINDS:
        return _raw_plan(key, model)
    layer = _layer(key, number, shape)
    if kind in PLAIN:
        return _plain_plan(key, kind, layer, shape)
    if kind == "block":  # whatever it puts out, which may be a tuple
        return Plan(key, layer, (f"blocks.{layer}",), (), lambda heard, context: heard[f"blocks.{layer}"])
    if kind in INPUTS:
        return _input_plan(key, kind, layer, model, layouts[layer])
    if kind.startswith("scale.") and kind[6:] in SCALES:
        return _scale_plan(key, layer, getattr(layouts[layer], SCALES[kind[6:]]))
    if kind == "v":
        return _value_plan(key, layer)
    return _port_plan(key, kind, layer)


def _layer(key: str, number: str, shape: Shape) -> int:
    if number.isdigit() and int(number) < shape.n_layers:
        return int(number)
    raise InputError(f"`{key}` names no layer of this model; layers run from 0 to {shape.n_layers - 1}")


def _model_plan(key: str, model: Any) -> Plan:
    if key == "logits":
        return Plan(key, None, ("logits",), (), lambda heard, context: heard["logits"])
    if key == "pos_embed":
        return Plan(key, 0, ("hook_pos_embed",), (), lambda heard, context: heard["hook_pos_embed"])
    if find_module(model, "ln_final.hook_scale") is None:
        return Plan(key, 0, (), (), _ones)
    return Plan(key, None, ("ln_final.hook_scale",), (), lambda heard, context: heard["ln_final.hook_scale"])


def _plain_plan(key: str, kind: str, layer: int, shape: Shape) -> Plan:
    if kind.startswith("mlp") and shape.attn_only:
        raise InputError(f"`{key}`: this model has no MLPs")
    if kind in NEURON_KINDS and shape.moe:
        raise ModelError(f"`{key}`: the MLPs of this model are mixtures of experts, which have no fixed neurons")
    if kind == "mlp_linear" and not shape.gated:
        raise InputError(f"`{key}`: the MLPs of this model are not gated")
    path = f"blocks.{layer}.{PLAIN[kind]}"
    if kind == "z":
        return Plan(key, layer, (path,), (), lambda heard, context: _by_head(heard[path], context.shape.n_heads))
    return Plan(key, layer, (path,), (), lambda heard, context: _by_prompt(heard[path], context))


def _input_plan(key: str, kind: str, layer: int, model: Any, layout: Layout) -> Plan:
    reads_stream = kind == "mlp_stream" and layout.mlp_norm is not None
    path = f"blocks.{layer}.{layout.mlp_norm if reads_stream else _mlp_entry(model.blocks[layer])}{INPUT}"
    return Plan(key, layer, (path,), (), lambda heard, context: _by_prompt(heard[path], context))


def _mlp_entry(block: Any) -> str:
    """The module whose input is what the MLP reads: its first layer where it has one, for some MLPs never run whole."""
    return "mlp" if find_module(block, "mlp.in") is None or find_module(block, "mlp.gate") is not None else "mlp.in"


def _by_prompt(activation: Tensor, context: Context) -> Tensor:
    # OPT flattens (batch, pos) in front of its MLP.
    return activation.unflatten(0, context.positions.shape) if activation.ndim == 2 else activation


def _by_head(activation: Tensor, n_heads: int) -> Tensor:
    # On a bridge with an SAE attached here, heads lie side by side.
    return activation.unflatten(-1, (n_heads, -1)) if activation.ndim == 3 else activation


def _scale_plan(key: str, layer: int, norm: str | None) -> Plan:
    if norm is None:
        return Plan(key, 0, (), (), _ones)
    path = f"blocks.{layer}.{norm}.hook_scale"
    return Plan(key, layer, (path,), (), lambda heard, context: _per_token(heard[path], context))


def _ones(heard: Heard, context: Context) -> Tensor:
    return torch.ones(*context.positions.shape, 1, dtype=context.dtype, device=context.positions.device)


def _per_token(scale: Tensor, context: Context) -> Tensor:
    # With split inputs the norm runs once per head, on copies of the same residual stream.
    return scale[:, :, 0] if scale.ndim == 4 else _by_prompt(scale, context)


def _value_plan(key: str, layer: int) -> Plan:
    path = f"blocks.{layer}.attn.hook_v"
    return Plan(key, layer, (path,), (), lambda heard, context: _ungrouped(heard[path], context.shape))


def _ungrouped(heads: Tensor, shape: Shape) -> Tensor:
    """Undo a model's own repetition of key and value heads."""
    return heads[:, :, :: heads.shape[2] // shape.n_kv_heads]


def _port_plan(key: str, kind: str, layer: int) -> Plan:
    port = kind[-1]
    raw, rotated = f"blocks.{layer}.attn.hook_{port}", f"blocks.{layer}.attn.hook_rot_{port}"
    if kind.startswith("scale."):
        return Plan(key, layer, (raw,), (), lambda heard, context: _port_scale(heard[raw], layer, port, context)[0])
    return Plan(key, layer, (raw,), (rotated,), lambda heard, context: _port_value(heard, raw, rotated, layer, context))


def _port_scale(raw: Tensor, layer: int, port: str, context: Context) -> tuple[Tensor, Tensor]:
    """The divisor of the query or key norm (ones without one), and the normalised heads."""
    heads = raw if port == "q" else _ungrouped(raw, context.shape)
    norm = port_norm(context.model.blocks[layer].attn, port, context.dtype)  # type: ignore[arg-type]
    if norm is None:
        return torch.ones_like(heads[:, :, :1, :1]), heads
    joint = is_joint(norm, heads.shape[-1])
    read = heads.flatten(2).unsqueeze(2) if joint else heads
    scale = scale_of(read, norm)
    centred = heads - heads.mean(-1, keepdim=True) if norm.centred else heads
    gain = norm.gain
    if gain is None:
        return scale, centred / scale
    return scale, centred / scale * (gain.reshape(heads.shape[2:]) if joint else gain)


def _port_value(heard: Heard, raw: str, rotated: str, layer: int, context: Context) -> Tensor:
    port = raw[-1]
    if rotated in heard:
        return heard[rotated] if port == "q" else _ungrouped(heard[rotated], context.shape)
    heads = _port_scale(heard[raw], layer, port, context)[1]
    if rotary.is_rotary(context.model):  # this model rotates where no hook point listens
        heads = rotary.rotate(context.model, layer, heads, context.positions)
    return heads


def _raw_plan(key: str, model: Any) -> Plan:
    if find_module(model, key) is None or not _is_point(model, key):
        raise InputError(
            f"`{key}` is neither an activation of this library nor a hook name of this model{_hint(key, model)}"
        )
    parts = key.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() else None
    return Plan(key, layer, (key,), (), lambda heard, context: heard[key])


def _is_point(model: Any, key: str) -> bool:
    return key in model.hook_dict or find_module(model, f"{key}.hook_sae_output") is not None or _is_hook(model, key)


def _is_hook(model: Any, key: str) -> bool:
    module: nn.Module | None = find_module(model, key)
    return type(module).__name__ == "HookPoint"


def _hint(key: str, model: Any) -> str:
    near = difflib.get_close_matches(key, [*model.hook_dict, *(f"{kind}.0" for kind in KINDS)], n=3, cutoff=0.5)
    return f"; near matches: {', '.join(near)}" if near else f"; activations are {', '.join(KINDS)} with a layer"


def assert_fired(plans: Iterable[Plan], fired: Collection[str], architecture: str) -> None:
    """Raise ModelError for a hook that a key needs and that isn't among those which have `fired`."""
    silent = [path for made in plans for path in made.needed if path not in fired]
    if silent:
        raise ModelError(
            f"the hook `{silent[0]}` of this model ({architecture}) did not fire in a forward pass, so its activation "
            "can't be read or changed; it may be switched off in the config, or `stop_at_layer` may lie before it"
        )


def check_keys(wanted: Collection[str]) -> None:
    """Raise InputError for a lone string, which would be read letter by letter."""
    if isinstance(wanted, str):
        raise InputError(f"`wanted` must be a collection of keys, not the string {wanted!r}; put it in a list")
