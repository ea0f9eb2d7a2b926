"""Changing what single components read: what every component writes, and forwards with edited reads.

An edge u -> v is a term of a sum: the residual stream that v reads is the sum of what all earlier components wrote.
`record` gives the terms, `run_edited` runs the model while single readers see another residual stream. No per-head
copies of the residual stream are made in the model, and it is left as it was found.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.hooks import find_module
from tl_circuitlasso.models.names import Kind, act, as_projected
from tl_circuitlasso.models.norms import Norm, apply_norm, fold_behind, scale_of
from tl_circuitlasso.models.passes import ForwardPass
from tl_circuitlasso.models.weights import Port, port_weights, repeat_heads


@dataclass(frozen=True, eq=False)
class Written:
    """What every component writes to the residual stream, in the order of computation.

    Heads are kept as z (divided by the scale of a norm behind attention): head h writes heads[l][:, :, h] @ W_O[h].
    Each layer's are where the layer is.
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
    return written_in(adapter, adapter.run(tokens, mask, written_keys(adapter), gathered=False))


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
    streams = [act(kind, layer) for kind in ("resid_pre", "resid_post") for layer in layers]
    acts = adapter.run(tokens, mask, [*written_keys(adapter), *streams, "logits"], gathered=False)
    return Record(written_in(adapter, acts), _streams(adapter, acts), acts["logits"])


def written_keys(adapter: Adapter) -> list[str]:
    """The activations that `written_in` reads."""
    kinds: list[Kind] = ["z", "scale.attn_out"]
    kinds.extend([] if adapter.shape.attn_only else ["mlp_out"])
    return [act("resid_pre", 0), *(act(kind, layer) for kind in kinds for layer in range(adapter.shape.n_layers))]


def written_in(adapter: Adapter, acts: Mapping[str, Tensor]) -> Written:
    """What every component writes, from a run's activations."""
    layers = range(adapter.shape.n_layers)
    heads = tuple(acts[act("z", layer)] / acts[act("scale.attn_out", layer)][..., None] for layer in layers)
    mlps = () if adapter.shape.attn_only else tuple(acts[act("mlp_out", layer)] for layer in layers)
    return Written(acts[act("resid_pre", 0)], heads, mlps)


def learned_positions(
    adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch pos d_model"] | None:
    """What learned positions add to the token embeddings; None for models that add none. One forward pass."""
    if not adds_positions(adapter.model):
        return None
    acts = adapter.run(tokens, mask, [act("resid_pre", 0), "pos_embed"])
    return acts["pos_embed"].expand_as(acts[act("resid_pre", 0)])


def adds_positions(model: Any) -> bool:
    """Whether learned positions are added to the token embedding before the first layer."""
    kind = getattr(model.cfg, "positional_embedding_type", "standard")
    return str(kind).lower() == "standard" and find_module(model, "hook_pos_embed") is not None


def _streams(adapter: Adapter, acts: Mapping[str, Tensor]) -> Streams:
    shape = adapter.shape
    attn = tuple(acts[act("resid_pre", layer)] for layer in range(shape.n_layers))
    after = tuple(acts[act("resid_post", layer)] for layer in range(shape.n_layers))
    if shape.attn_only:
        mlp: tuple[Tensor, ...] = ()
    elif shape.parallel:
        mlp = attn
    else:  # what stood in front of the MLP is what stands behind it without what it wrote
        wrote = (acts[act("mlp_out", layer)] for layer in range(shape.n_layers))
        mlp = tuple(post.to(out.device) - out for post, out in zip(after, wrote))
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


def mlp_norm(adapter: Adapter, layer: int) -> Norm | None:
    """The norm in front of a layer's MLP, None without one."""
    return norm_at(adapter.model, layer, adapter.layouts[layer].mlp_norm, adapter.compute_dtype)


# ---- forwards with edited reads -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edit:
    """One reader of one copy of the prompts sees `stream`: head `head` through `port`, or the MLP (port "")."""

    port: Literal["", "q", "k", "v"]
    head: int
    stream: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class _Change:
    """By how much what a head projects changes, in the rows of one copy of the prompts.

    It is added, so that what the model adds to the projection itself (shortformer) stays.
    """

    port: Port
    head: int
    rows: slice
    change: Float[Tensor, "batch pos d_head"]


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
    copies, ports = len(edits), {edit.port for edit in edits}
    shared = keeps_heads_shared(adapter) and bool(ports & {"k", "v"})
    many, real = tokens.repeat(copies, 1), adapter.sound_mask(tokens, mask).repeat(copies, 1)
    begin = (layer, start.repeat(copies, 1, 1)) if adapter.starts_midway else None
    heads = [as_projected(port, layer) for port in PORTS] if shared else []
    made = ForwardPass(adapter, many, real, [*heads, "logits"], start=begin, own_heads=True)
    if "" in ports:
        made.run([(act("mlp_read", layer), partial(_swap_mlp, adapter, layer, edits))])
    elif shared:
        pattern = adapter.run(tokens, mask, [act("pattern", layer)])[act("pattern", layer)].repeat(copies, 1, 1, 1)
        changes = _changes(adapter, layer, edits, start)
        made.run([(act("z", layer), partial(_swap_shared, adapter, made, layer, changes, pattern))])
    else:
        changes = _changes(adapter, layer, edits, start)
        made.run((as_projected(port, layer), partial(_swap_heads, changes, port)) for port in PORTS if port in ports)
    return made["logits"].unflatten(0, (copies, tokens.shape[0]))


def _swap_mlp(adapter: Adapter, layer: int, edits: list[Edit], given: Tensor) -> Tensor:
    norm, streams = mlp_norm(adapter, layer), torch.cat([edit.stream for edit in edits])
    return (streams if norm is None else apply_norm(norm, streams)).to(given.dtype).view_as(given)


def _changes(adapter: Adapter, layer: int, edits: list[Edit], start: Tensor) -> list[_Change]:
    reads = {port: projection(adapter, layer, port) for port in PORTS if any(edit.port == port for edit in edits)}
    changes = []
    for copy, edit in enumerate(edits):
        assert edit.port != ""
        read, rows = reads[edit.port], slice(copy * len(start), (copy + 1) * len(start))
        change = read.of_head(edit.head, edit.stream) - read.of_head(edit.head, start)
        changes.append(_Change(edit.port, edit.head, rows, change))
    return changes


def _swap_heads(changes: list[_Change], port: Port, activation: Tensor) -> Tensor:
    changed = activation.clone()
    for one in changes:
        if one.port == port:
            changed[one.rows, :, one.head] += one.change.to(changed.dtype)
    return changed


def _swap_shared(
    adapter: Adapter, made: ForwardPass, layer: int, changes: list[_Change], pattern: Tensor, z: Tensor
) -> Tensor:
    """Heads that share keys or values: their outputs are computed anew and put in the place of z."""
    heard: dict[Port, Tensor] = {port: made[as_projected(port, layer)] for port in PORTS}
    attending = Attending(adapter, layer, heard, pattern, made.positions)
    heads, changed = {port: attending.heads(port).clone() for port in PORTS}, z.clone()
    for one in changes:
        heads[one.port][one.rows, :, one.head] += one.change
    fresh = attending.output(heads["q"], heads["k"], heads["v"]).to(z.dtype)
    for one in changes:
        changed[one.rows, :, one.head] = fresh[one.rows, :, one.head]
    return changed


def unembed(adapter: Adapter, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """The logits that the model reads from a residual stream behind its last layer."""
    weight, bias = adapter.unembed()
    norm = adapter.norm("scale.final")
    scale = 1.0 if norm is None else scale_of(stream, norm)
    logits = stream @ weight / scale + bias
    cap = adapter.logit_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)
