"""What forward passes hold, in bytes, told from shapes alone: nothing is run, and nothing is allocated.

held      the activations that were asked for, until their batch is done
passing   what the pass itself has beside them at its widest place: an MLP, the scores of a layer, or the logits
folded    the weights with their norms folded in, as far as the adapter keeps them (`adapter.CACHE_BYTES`)
"""

from collections.abc import Iterable, Mapping

from tl_circuitlasso.models import adapter as adapters
from tl_circuitlasso.models.adapter import Adapter

MLP_COPIES = 6  # tensors as wide as an MLP's hidden layer while its activation is computed; one more with a gate
SCORE_COPIES = 3  # scores, masked scores and pattern of one layer
LOGIT_COPIES = 2  # as the model makes them, and as they are handed on
STREAM_COPIES = 4  # residual stream, its normalised copy, what a component adds, and their sum


def itemsize(adapter: Adapter) -> int:
    """Bytes of a number in which activations are kept."""
    return adapter.compute_dtype.itemsize


def held(
    adapter: Adapter, keys: Iterable[str], prompts: int, positions: int, widths: Mapping[str, int] | None = None
) -> int:
    """Bytes of the activations `keys` of `prompts` prompts; `widths` are those of hooks that aren't what they seem."""
    numbers = sum(
        (widths or {}).get(key) or _per_token(adapter, key, positions) for key in {_storage(key) for key in keys}
    )
    return itemsize(adapter) * prompts * positions * numbers


def passing(adapter: Adapter, prompts: int, positions: int, *, logits: bool) -> int:
    """Bytes that a forward pass has at once beside what is held; `logits`: whether the unembedding is run."""
    shape = adapter.shape
    widest = max(
        (MLP_COPIES + shape.gated) * shape.d_mlp,
        SCORE_COPIES * shape.n_heads * positions,
        LOGIT_COPIES * shape.d_vocab_out * logits,
    )
    return itemsize(adapter) * prompts * positions * (widest + STREAM_COPIES * shape.d_model)


def folded(adapter: Adapter) -> int:
    """Bytes of the folded weights that are there at once: those that are kept, or the largest while it's in use."""
    shape = adapter.shape
    attention = 4 * shape.n_heads * shape.d_model * shape.d_head
    mlp = (3 if shape.gated else 2) * shape.d_model * shape.d_mlp
    unembed = shape.d_model * shape.d_vocab_out
    whole = itemsize(adapter) * (shape.n_layers * (attention + mlp) + unembed)
    return min(whole, max(adapters.CACHE_BYTES, itemsize(adapter) * max(attention, mlp, unembed)))


def _storage(key: str) -> str:
    """The stream behind the last layer has two names and is held once."""
    parts = key.split(".")
    if parts[0] == "blocks" and parts[-1] in ("hook_resid_pre", "hook_resid_post"):
        return f"{parts[-1].removeprefix('hook_')}.{parts[1]}"
    return key


def _per_token(adapter: Adapter, key: str, positions: int) -> int:
    """Numbers for each token."""
    shape, kind = adapter.shape, key.rpartition(".")[0] or key
    if kind.startswith("scale"):
        return shape.n_heads if kind in ("scale.q", "scale.k") else 1
    sizes = {
        "q": shape.n_heads * shape.d_head,
        "z": shape.n_heads * shape.d_head,
        "k": shape.n_kv_heads * shape.d_head,
        "v": shape.n_kv_heads * shape.d_head,
        "pattern": shape.n_heads * positions,
        "logits": shape.d_vocab_out,
        **dict.fromkeys(("mlp_pre", "mlp_linear", "mlp_post"), shape.d_mlp),
    }
    return sizes.get(kind, shape.d_model)
