"""Models by name or from a folder, for the command line."""

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.build import build_hooked_transformer


def load_model(name: str) -> Any:
    """The model that `name` means: a folder, or a name that TransformerLens knows (which may download it).

    A folder holds either `config.json` with HookedTransformerConfig fields and `model.safetensors` with TransformerLens
    parameter names (and a tokenizer, if prompts are text), or a Hugging Face model, which becomes a TransformerBridge.

    Raises
    ------
    InputError: no such folder or name, or a folder without a model. ModelError: a model that can't be built.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _by_name(name)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"`model` {name}: no config.json in this folder; give a model's folder or a TransformerLens name"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "d_model" not in config:  # Hugging Face writes hidden_size
            return _bridge(name)
        model = build_hooked_transformer(config, load_file(folder / "model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"`model` {name}: can't be loaded ({error})") from error
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        model.set_tokenizer(AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    return model


def _by_name(name: str) -> Any:
    try:
        try:
            from transformer_lens import HookedTransformer
        except ImportError:  # TransformerLens 4
            return _bridge(name)
        return HookedTransformer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = _near(name)
        why = f"did you mean {near}?" if near else first[:300]
        raise InputError(f"`model` {name!r} is neither a folder nor a model that could be loaded: {why}") from error


def _near(name: str) -> str:
    """The names that TransformerLens knows and that look most like an unknown `name`; empty where it knows it."""
    try:
        known: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
        aliases = [alias for some in known.MODEL_ALIASES.values() for alias in some]
        names = [*known.OFFICIAL_MODEL_NAMES, *aliases]
    except (ImportError, AttributeError):  # another TransformerLens keeps no list
        return ""
    if name in names:
        return ""
    by_lower = {one.lower(): one for one in reversed(names)}
    return ", ".join(by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4))


def _bridge(name: str) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ModelError(
            f"`model` {name}: a Hugging Face folder needs TransformerLens 3.9 or later ({error})"
        ) from None
    return TransformerBridge.boot_transformers(name)
