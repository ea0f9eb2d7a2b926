"""What a model is made of: its shape, where each layer keeps its norms, and which models are refused.

Everything is read from the model's config and modules once; nothing here runs the model.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.graph.components import Components
from tl_circuitlasso.models.hooks import altering_saes, find_module, is_a
from tl_circuitlasso.models.norms import Norm, read_norm


@dataclass(frozen=True)
class Shape:
    """The sizes and kinds that everything else needs to know."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int  # 0 without MLPs
    d_vocab: int
    d_vocab_out: int
    parallel: bool  # attention and MLP of a layer read the same residual stream
    attn_only: bool
    moe: bool
    gated: bool
    causal: bool

    @cached_property
    def components(self) -> Components:
        """The grid of its sources and readers."""
        return Components(self.n_layers, self.n_heads, parallel=self.parallel, attn_only=self.attn_only)


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its norms: paths below the block, None where there is no norm."""

    attn_norm: str | None  # in front of attention
    mlp_norm: str | None  # in front of the MLP
    attn_post: str | None  # behind attention, before its output joins the residual stream
    mlp_post: str | None


# These norms named ln1 and ln2 stand behind attention and MLP, with nothing in front.
POST_NORM_ONLY = {"Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM"}
ENCODERS = ("HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder", "BertNextSentencePrediction")


def kind_of(model: object) -> str:
    """ "HookedTransformer" or "TransformerBridge"; raises ModelError for anything else."""
    if is_a(model, "HookedTransformer"):
        return "HookedTransformer"
    if is_a(model, "TransformerBridge"):
        return "TransformerBridge"
    name = type(model).__name__
    if is_a(model, "OptimizedModule"):
        raise ModelError("`model` is what torch.compile returned, whose hooks don't fire: give the model that went in")
    if is_a(model, *ENCODERS):
        raise ModelError(f"`model` is a {name}; encoders and encoder-decoders are not supported, only decoders are")
    raise ModelError(
        f"`model` is a {name}; it must be a HookedTransformer or a TransformerBridge. A Hugging Face model becomes one "
        "by `TransformerBridge.boot_transformers(name, hf_model=model)`"
    )


def architecture_of(model: Any) -> str:
    """The model's own name for its architecture, for messages and provenance."""
    cfg = model.cfg
    for name in ("architecture", "original_architecture"):
        value = getattr(cfg, name, None)
        if isinstance(value, str) and value:
            return value
    return type(model).__name__


def refuse_circumstances(model: Any) -> None:
    """Raise an error for what keeps any model from being run and listened to."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ModelError(
            "`model` was compiled in place (model.compile()), so its hooks don't fire: load it again, or set "
            "`model._compiled_call_impl = None`"
        )
    if torch.empty(0).device.type == "meta":
        raise InputError(
            "torch's default device is 'meta', where tensors have no values: call torch.set_default_device('cpu') first"
        )


def refuse_altered(model: nn.Module) -> None:
    """Raise ModelError for attached SAEs that leave out what they miss: a graph would be of another model."""
    if altered := altering_saes(model):
        raise ModelError(
            f"an SAE without its error term is attached to `model` at `{altered[0]}`, which therefore runs altered: "
            "call model.reset_saes(), or attach it with use_error_term=True"
        )


def refuse_unsupported(model: Any) -> None:
    """Raise ModelError, saying why, for a model that can't be read as residual stream + heads + MLPs."""
    cfg, name = model.cfg, architecture_of(model)
    wrapped = getattr(model.__dict__.get("original_model"), "config", None)
    if getattr(wrapped, "is_encoder_decoder", False):
        raise ModelError(f"`model` ({name}) is an encoder-decoder; only decoders are supported")
    if "Bert" in name or "MaskedLM" in name:
        raise ModelError(f"`model` ({name}) is a masked language model; only decoders are supported")
    if getattr(cfg, "is_audio_model", False) or getattr(cfg, "is_visual_model", False):
        raise ModelError(f"`model` ({name}) doesn't read tokens; only text decoders are supported")
    if getattr(cfg, "load_in_4bit", False):
        raise ModelError(f"`model` ({name}) is loaded in 4 bits; load it in 16 or 32 bits")
    if find_module(model, "blocks.0") is None:
        raise ModelError(f"`model` ({name}) has no `blocks`; it is not a stack of transformer layers")
    for layer, block in enumerate(model.blocks):
        _refuse_layer(block, layer, name)


def _refuse_layer(block: nn.Module, layer: int, name: str) -> None:
    attention = find_module(block, "attn")
    if attention is None:
        raise ModelError(f"layer {layer} of `model` ({name}) has no attention: state-space layers are not supported")
    if is_a(attention, "MLAAttentionBridge", "MLAAttention") or find_module(attention, "kv_a_proj_with_mqa"):
        raise ModelError(
            f"layer {layer} of `model` ({name}) uses multi-head latent attention, whose heads have no keys and values "
            "of their own; it is not supported"
        )
    if find_module(attention, "hook_z") is None:
        raise ModelError(f"layer {layer} of `model` ({name}) has no `attn.hook_z`: its heads can't be read")


def check_weights(model: nn.Module) -> None:
    """Raise ModelError for weights on the meta device, and for NaN or infinite weights."""
    for name, weight in model.named_parameters():
        if weight.device.type == "meta":
            raise ModelError(f"`model` has no values: `{name}` is on the meta device; load the weights first")
        if not weight.is_floating_point():
            continue
        total = weight.detach().sum(dtype=torch.float32)
        if not bool(total.isfinite()) and not bool(weight.isfinite().all()):
            raise ModelError(f"`model` has NaN or infinite values in `{name}`; load sound weights")


def shape_of(model: Any) -> Shape:
    """Read the sizes from the config, and from the weights where configs disagree."""
    cfg = model.cfg
    mlps: list[Any] = [mlp for block in model.blocks if (mlp := find_module(block, "mlp")) is not None]
    moe = bool(getattr(cfg, "num_experts", None)) or any(_is_moe(mlp) for mlp in mlps)
    gated = not moe and bool(mlps) and getattr(mlps[0], "W_gate", None) is not None
    return Shape(
        n_layers=len(model.blocks),
        n_heads=int(cfg.n_heads),
        n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
        d_model=int(cfg.d_model),
        d_head=int(cfg.d_head),
        d_mlp=_mlp_width(mlps, cfg, moe),
        d_vocab=int(cfg.d_vocab),
        d_vocab_out=int(model.unembed.W_U.shape[-1]),
        parallel=_is_parallel(model),
        attn_only=not mlps,
        moe=moe,
        gated=gated,
        causal=_is_causal(model),
    )


def _is_moe(mlp: nn.Module) -> bool:
    return any("MoE" in kind.__name__ for kind in type(mlp).__mro__)


def _mlp_width(mlps: list[Any], cfg: Any, moe: bool) -> int:
    if not mlps:
        return 0
    return int(cfg.d_mlp) if moe else int(mlps[0].W_in.shape[-1])


def _is_parallel(model: Any) -> bool:
    if is_a(model, "TransformerBridge"):
        return is_a(model.blocks[0], "ParallelBlockBridge") or bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return bool(model.cfg.parallel_attn_mlp)


def _is_causal(model: Any) -> bool:
    own = getattr(model.blocks[0].attn, "is_causal", True)
    return bool(own) and getattr(model.cfg, "attention_dir", "causal") != "bidirectional"


def is_shortformer(model: Any) -> bool:
    """Whether positions join what queries and keys read, and not the residual stream."""
    return getattr(model.cfg, "positional_embedding_type", None) == "shortformer"


def layout_of(model: Any, layer: int) -> Layout:
    """Where the norms of a layer stand."""
    block = model.blocks[layer]
    norms = {name for name in ("ln1", "ln2", "ln1_post", "ln2_post") if _is_norm(find_module(block, name))}
    if architecture_of(model) in POST_NORM_ONLY and not norms & {"ln1_post", "ln2_post"}:
        return Layout(None, None, attn_post="ln1", mlp_post="ln2")
    attn_norm = "ln1" if "ln1" in norms else None
    mlp_norm = "ln2" if "ln2" in norms else None
    if mlp_norm is None and _is_parallel(model):  # GPT-J on a bridge: one norm serves both
        mlp_norm = attn_norm
    return Layout(
        attn_norm,
        mlp_norm,
        attn_post="ln1_post" if "ln1_post" in norms else None,
        mlp_post="ln2_post" if "ln2_post" in norms else None,
    )


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and find_module(module, "hook_scale") is not None


def norm_at(model: Any, layer: int, name: str | None, dtype: torch.dtype) -> Norm | None:
    """The norm at a path below a block; None where the layout has none."""
    return None if name is None else read_norm(find_module(model.blocks[layer], name), dtype)
