"""Rotary position embeddings, applied to anything that reads through a query or key port.

Rotation is linear, so a parent's part of a query is rotated just as the query is. The angles are the model's own:
tables of a HookedTransformer layer, or what a bridge's rotary module answers.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.architecture import architecture_of
from tl_circuitlasso.models.hooks import find_module


def position_ids(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Each token's place among the real tokens of its prompt; 0 for the pads before them.

    >>> position_ids(torch.tensor([[False, True, True], [True, True, False]])).tolist()
    [[0, 0, 1], [0, 1, 1]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def is_rotary(model: Any) -> bool:
    """Whether queries and keys are rotated."""
    return str(getattr(model.cfg, "positional_embedding_type", "")).lower() == "rotary"


def rotate(
    model: Any,
    layer: int,
    x: Float[Tensor, "batch *more pos head d_head"],
    positions: Int[Tensor, "batch pos"],
    *,
    back: bool = False,
) -> Float[Tensor, "batch *more pos head d_head"]:
    """Rotate the first components of every head by the angles of its position; `back`: the transpose of that."""
    cos, sin, adjacent = _tables(model, layer, positions, x.shape[-1])
    cos, sin = (part.to(x).unflatten(0, (-1, *[1] * (x.ndim - 4))).unsqueeze(-2) for part in (cos, sin))
    width = cos.shape[-1]
    some = x[..., :width]
    turned = (
        some * cos - _quarter_turn(some * sin, adjacent) if back else some * cos + _quarter_turn(some, adjacent) * sin
    )
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


def _quarter_turn(x: Float[Tensor, "*batch width"], adjacent: bool) -> Float[Tensor, "*batch width"]:
    """(x0, x1) -> (-x1, x0) for every pair: neighbours, or the two halves."""
    if adjacent:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _tables(model: Any, layer: int, positions: Tensor, d_head: int) -> tuple[Tensor, Tensor, bool]:
    """cos and sin (batch, pos, rotated width) and whether pairs are neighbours."""
    attention = model.blocks[layer].attn
    own = getattr(attention, "rotary_cos", None)
    if isinstance(own, Tensor):
        positions = positions.to(own.device)  # of a model that is spread, each layer has its own
        return own[positions], attention.rotary_sin[positions], bool(model.cfg.rotary_adjacent_pairs)
    inner = getattr(attention, "original_component", None)
    native = getattr(inner, "rotary", None)
    if native is not None:  # TransformerLens' own model behind a bridge
        positions = positions.to(native.cos_cached.device)
        return native.cos_cached[positions], native.sin_cached[positions], True
    packed = getattr(inner, "embed_positions", None)
    if packed is None:  # transformers 5.24 and later: one table for all layers
        packed = getattr(find_module(model, "original_model.transformer.rotary_emb"), "embed_positions", None)
    if isinstance(packed, Tensor):  # GPT-J keeps sin and cos side by side
        sin, cos = packed.to(positions.device)[positions].chunk(2, dim=-1)
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), True
    return _ask_module(model, layer, inner, positions, d_head)


def _ask_module(model: Any, layer: int, inner: Any, positions: Tensor, d_head: int) -> tuple[Tensor, Tensor, bool]:
    bridge: Any = find_module(model, "rotary_emb")
    module: Any = getattr(bridge, "original_component", None) or bridge
    if module is None:
        raise ModelError(
            f"`model` ({architecture_of(model)}) rotates queries and keys in a way this library doesn't know; "
            "`design='activation'` doesn't need it and works"
        )
    like = torch.zeros(1, dtype=torch.float32, device=positions.device)
    extra = {"layer_type": inner.config.layer_types[layer]} if _takes_layer_type(module) else {}
    cos, sin = module(like, positions, **extra)
    if getattr(model.cfg, "rotary_interleaved_cos_sin", False):  # Cohere's tables are made for neighbours already
        return cos.expand(*positions.shape, -1), sin.expand(*positions.shape, -1), True
    adjacent = bool(getattr(model.cfg, "rotary_adjacent_pairs", False))
    if adjacent:
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].repeat_interleave(2, -1), sin[..., :half].repeat_interleave(2, -1)
    elif cos.shape[-1] * 2 == d_head and getattr(model.cfg, "rotary_dim", None) in (None, d_head):
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    return cos.expand(*positions.shape, -1), sin.expand(*positions.shape, -1), adjacent


def _takes_layer_type(module: nn.Module) -> bool:
    return "layer_type" in inspect.signature(module.forward).parameters
