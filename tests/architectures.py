"""Small random models of every supported family, on every installed version of TransformerLens.

`hooked(family)` makes a HookedTransformer, `bridge(family)` a TransformerBridge; both skip the test where the
installed version has no such model. All parameters, biases and norm gains included, are random, so that nothing is
right by being zero or one.
"""

import json
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SIZES = {"n_layers": 2, "d_model": 24, "n_heads": 4, "d_head": 6, "d_mlp": 40, "d_vocab": 31, "n_ctx": 32}
GATED = {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS", "final_rms": True}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 6}
GEMMA = {**ROTARY, **GATED, "act_fn": "gelu_pytorch_tanh", "n_key_value_heads": 2}

HOOKED: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "no_norm": {"act_fn": "gelu", "normalization_type": None},
    "folded": {"act_fn": "gelu_new", "normalization_type": "LNPre"},
    "attn_only": {"attn_only": True, "normalization_type": "LN", "d_mlp": None, "act_fn": None},
    "shortformer": {
        "attn_only": True,
        "normalization_type": "LN",
        "positional_embedding_type": "shortformer",
        "d_mlp": None,
        "act_fn": None,
    },
    "pythia": {**ROTARY, "rotary_dim": 2, "act_fn": "gelu", "normalization_type": "LN", "parallel_attn_mlp": True},
    "gptj": {
        **ROTARY,
        "rotary_dim": 4,
        "rotary_adjacent_pairs": True,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
    },
    "llama": {**ROTARY, **GATED, "n_key_value_heads": 2},
    "qwen3": {**ROTARY, **GATED, "n_key_value_heads": 2, "use_qk_norm": True},
    "gemma2": {
        **GEMMA,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 2.0,
        "output_logits_soft_cap": 3.0,
        "use_local_attn": True,
        "attn_types": ["global", "local"],
        "window_size": 3,
    },
    "olmo2": {**ROTARY, **GATED, "original_architecture": "Olmo2ForCausalLM"},
    "mistral": {
        **ROTARY,
        **GATED,
        "n_key_value_heads": 1,
        "use_local_attn": True,
        "attn_types": ["local"] * 2,
        "window_size": 4,
    },
    "bidirectional": {"act_fn": "gelu", "normalization_type": None, "attention_dir": "bidirectional"},
    "solu": {"act_fn": "solu", "normalization_type": "LN"},
    "solu_ln": {"act_fn": "solu_ln", "normalization_type": "LN"},
    "alibi": {"act_fn": "gelu", "normalization_type": "LN", "positional_embedding_type": "alibi"},
    "inverse_scale": {"act_fn": "gelu", "normalization_type": "LN", "scale_attn_by_inverse_layer_idx": True},
    "moe": {**ROTARY, **GATED, "num_experts": 2, "experts_per_token": 1},
}

# What a Hugging Face config class needs beyond the common sizes; the key is `<name>Config`.
TALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}
BRIDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "vocab_size": 31, "n_positions": 32}),
    "pythia": ("GPTNeoX", {**TALL, "rotary_pct": 0.34}),
    "pythia_sequential": ("GPTNeoX", {**TALL, "use_parallel_residual": False}),
    "gptj": (
        "GPTJ",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "vocab_size": 31, "n_positions": 32, "rotary_dim": 4},
    ),
    "llama": ("Llama", {**TALL, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**TALL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**TALL, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("Gemma", {**TALL, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            **TALL,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 3,
            "query_pre_attn_scalar": 10,
        },
    ),
    "gemma3": ("Gemma3Text", {**TALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3}),
    "olmo2": ("Olmo2", {**TALL, "num_key_value_heads": 2}),
    "olmo": ("Olmo", {**TALL, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {**TALL, "num_key_value_heads": 1, "sliding_window": 4}),
    "phi": ("Phi", {**TALL, "partial_rotary_factor": 0.34}),
    "phi3": ("Phi3", {**TALL, "num_key_value_heads": 2, "pad_token_id": 0}),
    "opt": (
        "OPT",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 40,
            "vocab_size": 31,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 24,
        },
    ),
    "olmo3": ("Olmo3", {**TALL, "num_key_value_heads": 2, "sliding_window": 3}),
    "falcon": ("Falcon", {**TALL, "ffn_hidden_size": 40, "alibi": False, "multi_query": True, "parallel_attn": True}),
    "bloom": ("Bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 4, "vocab_size": 31}),
    "granite": (
        "Granite",
        {
            **TALL,
            "num_key_value_heads": 2,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
        },
    ),
    "cohere2": (
        "Cohere2",
        {**TALL, "num_key_value_heads": 2, "logit_scale": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 40,
            "vocab_size": 31,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
        },
    ),
    "glm4": (
        "Glm4",
        {**TALL, "num_key_value_heads": 2, "head_dim": 6, "partial_rotary_factor": 0.34, "pad_token_id": 0},
    ),
    "gpt_oss": (
        "GptOss",
        {**TALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "mixtral": ("Mixtral", {**TALL, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
NATIVE: dict[str, dict[str, Any]] = {
    "native": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "native_llama": {**ROTARY, **GATED, "n_key_value_heads": 2},
    "native_attn_only": {"attn_only": True, "normalization_type": "LN"},
    "native_no_norm": {"act_fn": "gelu", "normalization_type": None},
    "native_bidirectional": {"act_fn": "gelu", "normalization_type": "LN", "attention_dir": "bidirectional"},
}


def randomise(model: torch.nn.Module) -> None:
    """Random values for every parameter: gains around one, the rest of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        if weight.data_ptr() in seen or not weight.is_floating_point():
            continue
        seen.add(weight.data_ptr())
        noise = torch.randn(weight.shape, generator=generator)
        scale = 0.2 if weight.ndim == 1 or ".b_" in name else 1.0 / max(weight.shape[-2:]) ** 0.5
        is_gain = weight.ndim == 1 and name.split(".")[-1] in ("w", "weight")
        weight.data.copy_(scale * noise + (1.0 if is_gain else 0.0))


def hooked(family: str, seed: int = 0, tokenizer: Any = None, **changes: Any) -> Any:
    """A random HookedTransformer of a family of HOOKED."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer")
    if family == "olmo2" and not _knows_olmo2():
        pytest.skip("this TransformerLens has no OLMo-2")
    settings = {**SIZES, "device": "cpu", "seed": seed, **HOOKED[family], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(HookedTransformerConfig(**settings), tokenizer=tokenizer)
    randomise(model)
    return model.eval()


def _knows_olmo2() -> bool:
    try:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
    except ImportError:
        return False
    return "Olmo2ForCausalLM" in POST_NORM_ARCHITECTURES


def small(tokenizer: Any = None, *, layers: int = 2) -> Any:
    """A random GPT-2 of whichever kind is installed, with or without a tokenizer; a bridge always has two layers."""
    try:
        from transformer_lens import HookedTransformer as _  # noqa: F401
    except ImportError:
        return bridge("native") if tokenizer is None else bridge("gpt2")
    return hooked("gpt2", tokenizer=tokenizer, n_layers=layers)


def bridge(family: str, *, compatible: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A random TransformerBridge of a family of BRIDGES or NATIVE, in compatibility mode if asked."""
    transformer_bridge = _bridge_class()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family in NATIVE:
            model = _boot_native(transformer_bridge, family)
        else:
            model = transformer_bridge.boot_transformers(
                "local", hf_model=hugging_face(family).to(dtype), tokenizer=tokenizer(), device="cpu", dtype=dtype
            )
        if compatible:
            model.enable_compatibility_mode()
    return model.eval()


def _bridge_class() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        pytest.skip("this TransformerLens has no TransformerBridge")
    return TransformerBridge


def _boot_native(transformer_bridge: Any, family: str) -> Any:
    from transformer_lens.config import TransformerBridgeConfig

    settings = {**SIZES, "device": "cpu", **NATIVE[family]}
    model = transformer_bridge.boot_native(TransformerBridgeConfig(architecture="TransformerLensNative", **settings))
    randomise(model.original_model)
    return model


def hugging_face(family: str) -> Any:
    """The random Hugging Face model behind a bridge."""
    import transformers

    name, settings = BRIDGES[family]
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {name}")
    config = config_class(**settings, attn_implementation="eager", tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]
    randomise(model)
    return model.eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Whole words w3 ... w30 with <s> = 1, </s> = pad = 2; loaded from disk, as TransformerLens demands."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 31)}}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    folder = tempfile.mkdtemp(prefix="circuitlasso-tokenizer-")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def prompts(d_vocab: int = 31, batch: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random tokens that begin with the BOS token 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, d_vocab, (batch, length), generator=generator)
    tokens[:, 0] = 1
    return tokens


def padded(d_vocab: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts: left-padded by 3, right-padded by 2, whole."""
    tokens = prompts(d_vocab)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :3] = False
    tokens[0, 3] = 1
    mask[1, -2:] = False
    return tokens.masked_fill(~mask, 2), mask


def other_bridge(config: str, settings: dict[str, Any]) -> Any:
    """A bridge of a model that this library refuses; skips where it can't be made."""
    import transformers

    transformer_bridge = _bridge_class()
    config_class = getattr(transformers, config, None)
    if config_class is None:
        pytest.skip(f"this transformers has no {config}")
    made = config_class(**settings)
    auto = {"T5Config": "AutoModelForSeq2SeqLM", "BertConfig": "AutoModelForMaskedLM"}.get(
        config, "AutoModelForCausalLM"
    )
    model = getattr(transformers, auto).from_config(made)
    model.config.architectures = [type(model).__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformer_bridge.boot_transformers("local", hf_model=model, tokenizer=tokenizer(), device="cpu")


def interpbench(folder: Path) -> Any:
    """A trained model with a known circuit, from a folder of the reference data."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer")
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("n_params_actual")
    model = HookedTransformer(HookedTransformerConfig(**{**settings, "dtype": torch.float32}))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model.eval()
