"""One view of every supported model: activations by name, folded weights, one forward pass at a time.

`adapt(model)` is the only door through which the library sees a model. Behind it a HookedTransformer (TransformerLens
2.16 to 3.x), a HookedSAETransformer and a TransformerBridge (3.9 and 4.x) look the same: a residual stream to which
heads and MLPs write, and from which each of them reads through a frozen, therefore linear, norm.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import naming
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import rotary
from tl_circuitlasso.models.architecture import (
    check_weights,
    kind_of,
    norm_at,
    refuse_circumstances,
    refuse_unsupported,
)
from tl_circuitlasso.models.device import ELSEWHERE, devices_of, refuse_offloaded, refuse_spread
from tl_circuitlasso.models.hooks import COSTLY_FLAGS
from tl_circuitlasso.models.norms import Norm
from tl_circuitlasso.models.passes import Runner
from tl_circuitlasso.models.weights import (
    MLP,
    Port,
    Reader,
    read_final_norm,
    read_mlp,
    read_port,
    read_unembed,
    read_writer,
)

CACHE_BYTES = 32 << 20  # folded weights kept in memory; folding a layer again takes a hundredth of running it


def adapt(model: Any, *, spread: bool = False) -> "Adapter":
    """The adapter of a model.

    `model` is a HookedTransformer, HookedSAETransformer, TransformerBridge or SAETransformerBridge. It is read, not
    changed; folded weights are computed when first asked for, so make a new adapter after changing weights. `spread`:
    whether its layers may lie on several devices, which the caller then minds (`Runner.place`, `refuse_spread`).

    Raises ModelError, with the reason, for encoders, encoder-decoders, state-space models, multi-head latent
    attention, 4-bit weights, weights without values (meta device) or on several devices where that can't be followed
    or where TransformerLens itself can't run them so, NaN or infinite weights.
    """
    if isinstance(model, Adapter):  # of a caller that has one already
        return model
    kind = kind_of(model)
    refuse_circumstances(model)
    refuse_unsupported(model)
    refuse_offloaded(model)
    if not spread:
        refuse_spread(model, "what was called")
    check_weights(model)
    adapter = Adapter(model, kind)
    if adapter.spread:
        _try_out(adapter)
    return adapter


def _try_out(adapter: "Adapter") -> None:
    """Run a model that is spread on one token: TransformerLens places layers by free memory, runs them by number."""
    try:
        adapter.run(torch.zeros(1, 1, dtype=torch.long, device=adapter.device), None, ["logits"])
    except RuntimeError as error:
        raise ModelError(
            f"TransformerLens can't run `model` as it is spread over {', '.join(devices_of(adapter.model))} ({error}): "
            f"load it by `TransformerBridge.boot_transformers(name, device_map=...)`, or {ELSEWHERE}"
        ) from error


class Adapter(Runner):
    """A model seen as a residual stream with heads and MLPs; made by `adapt`. How to run it: `Runner.run`.

    All tensors come back in float32 (float64 for a float64 model), on the model's device; of a model that is spread
    over several, a layer's weights on that of the layer (`place`).
    """

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__(model, kind)
        self.name = naming.of_model(str(getattr(model.cfg, "model_name", None) or self.architecture))
        self.n_ctx = int(model.cfg.n_ctx)
        self.has_tokenizer = getattr(model, "tokenizer", None) is not None
        self._folded: dict[tuple[str, int], tuple[Any, int]] = {}  # with their bytes
        self._room = CACHE_BYTES

    # -- weights ---------------------------------------------------------------------------------------------------

    def reader(self, layer: int, port: Port) -> Reader:
        """How the heads of a layer read through a port; see `Reader` for the formula. Shared heads are repeated."""
        return self.folded(
            f"read_{port}",
            layer,
            lambda: read_port(self.model, layer, port, self.layouts[layer], self.shape.n_heads, self.compute_dtype),
        )

    def writer(self, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, "d_model"]]:
        """W_O and b_O: head h writes (z_h @ W_O[h]) / scale.attn_out, the layer as a whole b_O / scale.attn_out."""
        return self.folded(
            "write", layer, lambda: read_writer(self.model, layer, self.layouts[layer], self.compute_dtype)
        )

    def mlp(self, layer: int) -> MLP:
        """How the MLP of a layer reads and writes; see `MLP` for the formulas.

        Raises ModelError for attention-only models and mixtures of experts.
        """
        if self.shape.attn_only:
            raise ModelError(f"`model` ({self.architecture}) has no MLPs")
        return self.folded("mlp", layer, lambda: read_mlp(self.model, layer, self.layouts[layer], self.compute_dtype))

    def unembed(
        self, tokens: Int[Tensor, " some"] | None = None
    ) -> tuple[Float[Tensor, "d_model vocab"], Float[Tensor, "vocab"]]:
        """Weight and bias: logits = soft_cap((resid_post @ weight) / scale.final + bias); those of `tokens` only."""
        if tokens is not None:
            with torch.no_grad():
                return read_unembed(self.model, self.compute_dtype, tokens)
        return self.folded("unembed", 0, lambda: read_unembed(self.model, self.compute_dtype))

    def norm(self, scale: str) -> Norm | None:
        """The norm whose divisor is called `scale` ("scale.attn.3", "scale.mlp.3", "scale.final"); None without one."""
        kind, _, layer = scale.removeprefix("scale.").partition(".")
        if kind == "final":
            return self.folded(scale, 0, lambda: read_final_norm(self.model, self.compute_dtype))
        number = int(layer)
        name = self.layouts[number].attn_norm if kind == "attn" else self.layouts[number].mlp_norm
        return self.folded(scale, number, lambda: norm_at(self.model, number, name, self.compute_dtype))

    def folded(self, what: str, layer: int, make: Callable[[], Any]) -> Any:
        """What `make` makes of the weights of a layer; kept as long as what was used later fits beside it."""
        kept = self._folded.pop((what, layer), None)
        if kept is None:
            with torch.no_grad():
                made = make()
            kept = made, sum(part.nbytes for part in _tensors(made))
            self._room -= kept[1]
        self._folded[what, layer] = kept  # the latest last
        while self._room < 0:
            self._room += self._folded.pop(next(iter(self._folded)))[1]
        return kept[0]

    # -- attention -------------------------------------------------------------------------------------------------

    def rotate(
        self,
        x: Float[Tensor, "batch *more pos head d_head"],
        positions: Int[Tensor, "batch pos"],
        layer: int = 0,
        *,
        back: bool = False,
    ) -> Float[Tensor, "batch *more pos head d_head"]:
        """Rotate queries, keys or parts of them as the model does at absolute `positions`; x itself without rotary.
        `back` takes multipliers of what is rotated to multipliers of what it was: the transpose.

        `tl_circuitlasso.models.position_ids(mask)` gives the positions under left or right padding. The angles depend
        on the layer in models that mix local and global attention.
        """
        return rotary.rotate(self.model, layer, x, positions, back=back) if rotary.is_rotary(self.model) else x

    def attn_scale(self, layer: int) -> float:
        """The divisor of the attention scores: score = soft_cap(q k / attn_scale)."""
        attention = self.model.blocks[layer].attn
        if self.kind == "HookedTransformer":
            return float(attention.attn_scale)
        inner = attention.original_component
        if isinstance(scaling := getattr(inner, "scaling", None), float):
            return 1.0 / scaling
        if isinstance(scale := getattr(inner, "scale", None), float):  # TransformerLens' own model divides by it
            return scale
        if self.architecture == "GPTNeoForCausalLM":  # trained without a scale
            return 1.0
        by_layer = layer + 1 if getattr(self.model.cfg, "scale_attn_by_inverse_layer_idx", False) else 1
        return self.shape.d_head**0.5 * by_layer

    @property
    def attn_soft_cap(self) -> float | None:
        """c in score = c tanh(score / c), or None."""
        return _cap(self.model.cfg, "attn_scores_soft_cap", "attn_logit_softcapping")

    @property
    def logit_soft_cap(self) -> float | None:
        """c in logit = c tanh(logit / c), or None."""
        return _cap(self.model.cfg, "output_logits_soft_cap", "final_logit_softcapping")

    # -- text and identity -----------------------------------------------------------------------------------------

    def to_tokens(self, prompts: list[str]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens and mask of `prompts`, padded on the right, with the model's default of a first BOS token."""
        if not self.has_tokenizer:
            raise InputError("`tokens` are strings, but the model has no tokenizer; give token ids")
        if getattr(getattr(self.model, "cfg", None), "tokenizer_prepends_bos", False) is None:
            raise InputError(
                "`tokens` are strings, but the model was never told about its tokenizer: call "
                "`model.set_tokenizer(model.tokenizer)`, or give token ids"
            )
        rows = [self.model.to_tokens(prompt)[0] for prompt in prompts]  # one by one: a pad may be a real token too
        width = max(len(row) for row in rows)
        tokens = rows[0].new_full((len(rows), width), self.special_ids()[1] or 0)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
            mask[index, : len(row)] = True
        return tokens, mask

    def special_ids(self) -> tuple[int | None, int | None]:
        """The ids of the BOS and the padding token, None where the tokenizer (if any) has none."""
        tokenizer = getattr(self.model, "tokenizer", None)
        return getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "pad_token_id", None)

    def config_hash(self) -> str:
        """sha256 of the model's class and config; the device and other circumstances of the run are left out."""
        values = {name: value for name, value in vars(self.model.cfg).items() if name not in _CIRCUMSTANCES}
        config = {name: repr(value) for name, value in values.items() if isinstance(value, _PLAIN) or value is None}
        return _sha256(type(self.model).__name__, json.dumps(config, sort_keys=True))

    @cached_property
    def weight_bytes(self) -> int:
        """What the model's weights take."""
        return sum(weight.nbytes for weight in self.model.parameters())

    def weights_hash(self) -> str:
        """sha256 of a thin sample of every weight: tells two models of one config apart, at no cost."""
        return self._sampled_weights

    @cached_property
    def _sampled_weights(self) -> str:
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            flat = weight.detach().flatten()
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a graph's provenance says of the model."""
        return {
            "model": self.name,
            "architecture": self.architecture,
            "d_model": self.shape.d_model,
            "config_hash": self.config_hash(),
            "weights_hash": self.weights_hash(),
        }

    def __repr__(self) -> str:
        shape = self.shape
        return (
            f"Adapter({self.kind}, {self.architecture}, {shape.n_layers} layers x {shape.n_heads} heads, "
            f"d_model {shape.d_model}, {self.dtype}, {self.device})"
        )


_CIRCUMSTANCES = {"device", "n_devices", "seed", "init_weights", *COSTLY_FLAGS}
_PLAIN = (bool, int, float, str, list, tuple, torch.dtype)  # other objects may print their address in memory


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tensors(made: Any) -> list[Tensor]:
    parts = made if isinstance(made, tuple) else () if made is None else vars(made).values()
    return [part for part in parts if isinstance(part, Tensor)]


def _cap(cfg: Any, *names: str) -> float | None:
    values = [getattr(cfg, name, None) for name in names]
    return next((float(value) for value in values if value is not None and value > 0), None)
