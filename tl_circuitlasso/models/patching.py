"""Changing what single components read: what every component writes, and forwards with edited reads.

An edge u -> v is a term of a sum: the residual stream that v reads is the sum of what all earlier components wrote.
`record` gives the terms, `run_edited` runs the model while single readers see another residual stream. No per-head
copies of the residual stream are made in the model, and it is left as it was found.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.hooks import find_module, observe, resting, without_costly_flags
from tl_circuitlasso.models.norms import Norm, apply_norm, fold_behind, read_norm, scale_of
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.weights import Port, port_weights, repeat_heads


@dataclass(frozen=True, eq=False)
class Written:
    """What every component writes to the residual stream, in the order of computation.

    Heads are kept as z (divided by the scale of a norm behind attention): head h writes heads[l][:, :, h] @ W_O[h].
    """

    input: Float[Tensor, "batch pos d_model"]
    heads: tuple[Float[Tensor, "batch pos head d_head"], ...]
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]  # empty in attention-only models

    def map(self, change: Callable[..., Tensor], *others: "Written") -> "Written":
        """`change` applied to each component, together with the same component of `others`."""
        return Written(
            change(self.input, *(other.input for other in others)),
            tuple(change(*parts) for parts in zip(self.heads, *(other.heads for other in others))),
            tuple(change(*parts) for parts in zip(self.mlps, *(other.mlps for other in others))),
        )

    @property
    def in_order(self) -> tuple[Tensor, ...]:
        """The input, then each layer's heads and MLP."""
        layers = zip(self.heads, self.mlps) if self.mlps else ((heads,) for heads in self.heads)
        return self.input, *(part for layer in layers for part in layer)


@dataclass(frozen=True, eq=False)
class Streams:
    """The residual stream that each reader sees: attention and MLP of every layer, and the unembedding."""

    attn: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]
    logits: Float[Tensor, "batch pos d_model"]


# ---- what is written and read -------------------------------------------------------------------------------------


def record(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Written:
    """One forward pass: what every component writes."""
    return written_in(adapter, adapter.run(tokens, mask, written_keys(adapter)))


@dataclass(frozen=True, eq=False)
class Record:
    """One forward pass: what every component writes, what every reader sees, and the logits."""

    written: Written
    streams: Streams
    logits: Float[Tensor, "batch pos vocab"]


def record_all(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None = None
) -> Record:
    """One forward pass: everything that an edge connects."""
    layers = range(adapter.shape.n_layers)
    streams = [f"{kind}.{layer}" for kind in ("resid_pre", "resid_post") for layer in layers]
    acts = adapter.run(tokens, mask, [*written_keys(adapter), *streams, "logits"])
    return Record(written_in(adapter, acts), _streams(adapter, acts), acts["logits"])


def written_keys(adapter: Adapter) -> list[str]:
    """The activations that `written_in` reads."""
    kinds = ["z", "scale.attn_out"] + ([] if adapter.shape.attn_only else ["mlp_out"])
    return ["resid_pre.0", *(f"{kind}.{layer}" for kind in kinds for layer in range(adapter.shape.n_layers))]


def written_in(adapter: Adapter, acts: Mapping[str, Tensor]) -> Written:
    """What every component writes, from a run's activations."""
    layers = range(adapter.shape.n_layers)
    heads = tuple(acts[f"z.{layer}"] / acts[f"scale.attn_out.{layer}"][..., None] for layer in layers)
    mlps = () if adapter.shape.attn_only else tuple(acts[f"mlp_out.{layer}"] for layer in layers)
    return Written(acts["resid_pre.0"], heads, mlps)


def learned_positions(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch pos d_model"] | None:
    """What learned positions add to the token embeddings; None for models that add none. One forward pass."""
    if not adds_positions(adapter.model):
        return None
    acts = adapter.run(tokens, mask, ["resid_pre.0", "pos_embed"])
    return acts["pos_embed"].expand_as(acts["resid_pre.0"])


def adds_positions(model: Any) -> bool:
    """Whether learned positions are added to the token embedding before the first layer."""
    kind = getattr(model.cfg, "positional_embedding_type", "standard")
    return str(kind).lower() == "standard" and find_module(model, "hook_pos_embed") is not None


def _streams(adapter: Adapter, acts: Mapping[str, Tensor]) -> Streams:
    shape = adapter.shape
    attn = tuple(acts[f"resid_pre.{layer}"] for layer in range(shape.n_layers))
    after = tuple(acts[f"resid_post.{layer}"] for layer in range(shape.n_layers))
    if shape.attn_only:
        mlp: tuple[Tensor, ...] = ()
    elif shape.parallel:
        mlp = attn
    else:  # what stood in front of the MLP is what stands behind it without what it wrote
        mlp = tuple(post - acts[f"mlp_out.{layer}"] for layer, post in enumerate(after))
    return Streams(attn, mlp, after[-1])


@dataclass(frozen=True, eq=False)
class Projection:
    """A port as it projects: ((x @ weight) / scale(x) + bias), before query/key norm and rotation."""

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"]
    norm: Norm | None

    def of_head(self, head: int, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_head"]:
        """What one head projects from a residual stream."""
        scale = 1.0 if self.norm is None else scale_of(stream, self.norm)
        return stream @ self.weight[head] / scale + self.bias[head]


def projection(adapter: Adapter, layer: int, port: Port) -> Projection:
    """The folded weights of a port, shared heads repeated, with the norm whose scale they need."""
    n_heads, dtype = adapter.shape.n_heads, adapter.compute_dtype
    raw, bias = port_weights(adapter.model.blocks[layer].attn, port, dtype)
    norm = norm_at(adapter.model, layer, adapter.layouts[layer].attn_norm, dtype)
    weight, bias = fold_behind(norm, raw, bias)
    return Projection(repeat_heads(weight, n_heads), repeat_heads(bias, n_heads), norm)


def mlp_entry(block: Any) -> nn.Module:
    """The module whose input is what the MLP reads: its first layer where it has one, for some MLPs never run whole."""
    first = find_module(block, "mlp.in")
    return block.mlp if first is None or find_module(block, "mlp.gate") is not None else first


def mlp_norm(adapter: Adapter, layer: int) -> Norm | None:
    """The norm in front of a layer's MLP, None without one."""
    return norm_at(adapter.model, layer, adapter.layouts[layer].mlp_norm, adapter.compute_dtype)


def real_mask(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """The mask of real positions on the model's device; without a mask all are real."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return real.to(adapter.device)


@contextmanager
def own_heads(adapter: Adapter) -> Iterator[None]:
    """The model without idle per-head copies of the residual stream.

    A HookedTransformer repeats shared keys and values inside the block, so that each head has its own.
    """
    cfg = adapter.model.cfg
    with ExitStack() as stack:
        if adapter.kind == "HookedTransformer":
            stack.enter_context(without_costly_flags(adapter.model, ()))
            if adapter.shape.n_kv_heads != adapter.shape.n_heads and not cfg.ungroup_grouped_query_attention:
                cfg.ungroup_grouped_query_attention = True
                stack.callback(setattr, cfg, "ungroup_grouped_query_attention", False)
        yield


# ---- forwards with edited reads -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edit:
    """One reader of one copy of the prompts sees `stream`: head `head` through `port`, or the MLP (port "")."""

    port: Literal["", "q", "k", "v"]
    head: int
    stream: Float[Tensor, "batch pos d_model"]


def run_edited(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    layer: int,
    edits: list[Edit],
    start: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "edit batch pos vocab"]:
    """Logits of as many copies of the prompts as there are edits; in copy e, one reader of `layer` sees edits[e].

    `start` is the unedited residual stream in front of `layer`: a HookedTransformer starts there. All edits are on
    heads, or all on the MLP.
    """
    copies, model = len(edits), adapter.model
    real = real_mask(adapter, tokens, mask).repeat(copies, 1).long()
    pattern = None
    if keeps_heads_shared(adapter):
        pattern = adapter.run(tokens, mask, [f"pattern.{layer}"])[f"pattern.{layer}"].repeat(copies, 1, 1, 1)
    points, modules = _edited_points(adapter, layer, edits, start, real, pattern)
    with ExitStack() as stack:
        stack.enter_context(resting(model))
        stack.enter_context(own_heads(adapter))
        stack.enter_context(observe(points))
        for module, hook in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if adapter.kind == "HookedTransformer" and not _is_shortformer(model):
            first = start.to(adapter.dtype).repeat(copies, 1, 1)
            logits = model(first, start_at_layer=layer, attention_mask=real, return_type="logits")
        else:
            many = tokens.to(adapter.device).repeat(copies, 1)
            logits = model(many, attention_mask=real, return_type="logits")
    return logits.to(adapter.compute_dtype).unflatten(0, (copies, tokens.shape[0]))


def _is_shortformer(model: Any) -> bool:
    return getattr(model.cfg, "positional_embedding_type", None) == "shortformer"


def _edited_points(
    adapter: Adapter, layer: int, edits: list[Edit], start: Tensor, real: Tensor, pattern: Tensor | None
) -> tuple[list[Any], list[Any]]:
    block = adapter.model.blocks[layer]
    if edits[0].port == "":
        norm, streams = mlp_norm(adapter, layer), torch.cat([edit.stream for edit in edits])
        seen = (streams if norm is None else apply_norm(norm, streams)).to(adapter.dtype)
        return [], [(mlp_entry(block), lambda module, args, kwargs: ((seen.view_as(args[0]), *args[1:]), kwargs))]
    ports = {edit.port for edit in edits}
    if keeps_heads_shared(adapter) and ports & {"k", "v"}:
        return _Shared(adapter, layer, edits, start, real, pattern).points(), []  # type: ignore[arg-type]
    return [
        (find_module(block, f"attn.hook_{port}"), _swap_heads(projection(adapter, layer, port), port, edits, start))
        for port in PORTS
        if port in ports
    ], []


def _swap_heads(reads: Projection, port: Port, edits: list[Edit], start: Tensor) -> Callable[[Tensor], Tensor]:
    def swap(activation: Tensor) -> Tensor:
        changed, batch = activation.clone(), start.shape[0]
        for copy, edit in enumerate(edits):
            if edit.port == port:
                # The change is added, so that what the model adds to the projection itself (shortformer) stays.
                change = reads.of_head(edit.head, edit.stream) - reads.of_head(edit.head, start)
                changed[copy * batch : (copy + 1) * batch, :, edit.head] += change.to(activation.dtype)
        return changed

    return swap


class _Shared:
    """Edits on heads that share keys or values: their outputs are computed anew and put in the place of z."""

    def __init__(
        self, adapter: Adapter, layer: int, edits: list[Edit], start: Tensor, real: Tensor, pattern: Tensor
    ) -> None:
        self.adapter, self.layer, self.edits, self.start, self.pattern = adapter, layer, edits, start, pattern
        self.positions = position_ids(real.bool())
        self.heard: dict[str, Tensor] = {}

    def points(self) -> list[Any]:
        attention = self.adapter.model.blocks[self.layer].attn
        kept = [(find_module(attention, f"hook_{name}"), partial(self._keep, name)) for name in PORTS]
        return [*kept, (find_module(attention, "hook_z"), self._swap)]

    def _keep(self, name: str, activation: Tensor) -> None:
        self.heard[name] = activation

    def _swap(self, z: Tensor) -> Tensor:
        heard: dict[Port, Tensor] = {port: self.heard[port] for port in PORTS}
        attending = Attending(self.adapter, self.layer, heard, self.pattern, self.positions)
        heads = {port: attending.heads(port).clone() for port in PORTS}
        batch, changed = self.start.shape[0], z.clone()
        for copy, edit in enumerate(self.edits):
            reads = projection(self.adapter, self.layer, edit.port)  # type: ignore[arg-type]
            change = reads.of_head(edit.head, edit.stream) - reads.of_head(edit.head, self.start)
            heads[edit.port][copy * batch : (copy + 1) * batch, :, edit.head] += change  # type: ignore[index]
        fresh = attending.output(heads["q"], heads["k"], heads["v"]).to(z.dtype)
        for copy, edit in enumerate(self.edits):
            rows = slice(copy * batch, (copy + 1) * batch)
            changed[rows, :, edit.head] = fresh[rows, :, edit.head]
        return changed


def unembed(adapter: Adapter, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """The logits that the model reads from a residual stream behind its last layer."""
    weight, bias = adapter.unembed()
    norm = read_norm(find_module(adapter.model, "ln_final"), adapter.compute_dtype)
    scale = 1.0 if norm is None else scale_of(stream, norm)
    logits = stream @ weight / scale + bias
    cap = adapter.logit_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)
