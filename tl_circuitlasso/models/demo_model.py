"""A small GPT-2-shaped model from its config and weights, on every TransformerLens.

Where HookedTransformer exists (2.16 to 3.x) it is one; from 4.0 on it is a TransformerBridge around TransformerLens's
own model, which has the same parameters in the layout of torch.nn.Linear.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.build import build_hooked_transformer

_SHAPE = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx")
_KIND = ("act_fn", "normalization_type", "attention_dir", "positional_embedding_type", "eps", "attn_only")


def build_demo_model(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The model in evaluation mode: HookedTransformer if this TransformerLens has it, else TransformerBridge.

    Raises
    ------
    ModelError: config and weights that don't make a model.
    """
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return build_native_bridge(config, weights)
    return build_hooked_transformer(config, weights)


def build_native_bridge(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """TransformerBridge (TransformerLens 3.9 on) of a model with learned positions, MLPs and no unembedding bias.

    Raises
    ------
    ModelError: a config or weights that TransformerLens's own model can't hold.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    if (bias := weights.get("unembed.b_U")) is not None and bool((bias != 0).any()):
        raise ModelError("`weights` hold an unembedding bias, which TransformerLens's own model doesn't have")
    try:
        bridge = TransformerBridge.boot_native(
            TransformerBridgeConfig(
                architecture="TransformerLensNative",
                seed=0,
                **{name: config[name] for name in (*_SHAPE, *_KIND)},
            )
        )
        bridge.load_state_dict({_bridge_name(name): _bridge_layout(name, value) for name, value in weights.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the model can't be built from its config and weights: {error}") from error
    return bridge.eval()


def _bridge_name(name: str) -> str:
    """`blocks.0.attn.W_Q` -> `blocks.0.attn.q.weight`, `ln_final.w` -> `ln_final.weight`."""
    module, leaf = name.rsplit(".", 1)
    kind = "weight" if leaf[0] in "Ww" else "bias"
    inner = leaf[2:].lower() if module.endswith((".attn", ".mlp")) else ""
    return ".".join(part for part in (module, inner, kind) if part)


def _bridge_layout(name: str, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*bridge_shape"]:
    """As torch.nn.Linear has it: (out, in), heads side by side."""
    leaf = name.rsplit(".", 1)[1]
    if leaf in ("W_Q", "W_K", "W_V"):  # head d_model d_head -> head*d_head d_model
        return value.transpose(1, 2).flatten(0, 1)
    if leaf == "W_O":  # head d_head d_model -> d_model head*d_head
        return value.flatten(0, 1).T
    if leaf in ("W_in", "W_out", "W_U"):
        return value.T
    return value.flatten() if leaf in ("b_Q", "b_K", "b_V") else value
