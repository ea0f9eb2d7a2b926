"""The closure check: does the frozen-linear view reproduce the model?

What heads, biases and MLPs write must add up to the residual stream, and what the folded weights read from that sum
must be the queries, keys, values, pre-activations, patterns and logits that the model computed. It runs before any
result is trusted: an architecture that does something this library doesn't know fails here, loudly.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.hooks import disturbances
from tl_circuitlasso.models.names import Kind, act, head_scale
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.weights import Port, repeat_heads

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MAX_PROMPTS = 4  # the relations are the same for every prompt


@dataclass(frozen=True, eq=False)
class Closure:
    """Relative errors by relation: "residual.3" (what layer 3 writes), "q.3", "z.3", "mlp_pre.3", "logits", ..."""

    errors: dict[str, float]
    tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The relation with the largest error (a NaN counts as the largest), and the error."""
        return max(self.errors.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])

    @property
    def first_failure(self) -> tuple[str, float] | None:
        """The relation above the tolerance in the earliest layer (what is written before what is read), or None."""
        failed = [(relation, error) for relation, error in self.errors.items() if not error <= self.tolerance]
        return min(failed, key=lambda item: _place(item[0]), default=None)


def _place(relation: str) -> tuple[float, bool]:
    kind, _, layer = relation.partition(".")
    return float(layer or "inf"), kind != "residual"


def closure_check(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    ports: bool = True,
) -> float:
    """Run the model on the first few prompts and compare it with its frozen-linear view; the largest relative error.

    With `ports=False` only the writers are checked (residual in + heads + biases + MLPs = residual out): enough for
    every design but `read`.

    Raises ModelError, naming relation, layer and architecture, above the tolerance of the model's dtype.
    """
    report = closure_report(adapter, tokens, mask, ports=ports)
    if report.first_failure is not None:
        raise ModelError(_message(adapter, *report.first_failure, report.tolerance))
    return report.worst[1]


def _message(adapter: Adapter, relation: str, error: float, tolerance: float) -> str:
    kind, _, layer = relation.partition(".")
    where = f"in layer {layer} " if layer else ""
    if found := disturbances(adapter.model):
        writers = readers = f". What can cause that: {'; '.join(found)}"
    else:
        writers = "; this architecture is not supported"
        readers = "; `design='activation'` doesn't need it and works"
    return (
        f"the closure check of `{kind}` failed {where}of {adapter.architecture}: relative error {error:.2g}, tolerance "
        f"{tolerance:.0e} for {adapter.dtype}{writers if kind == 'residual' else readers}"
    )


def closure_report(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    ports: bool = True,
) -> Closure:
    """The relative error of every relation, largest over the real positions of the first few prompts."""
    tokens, mask = tokens[:MAX_PROMPTS], None if mask is None else mask[:MAX_PROMPTS]
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    real = real.to(adapter.device)
    acts = adapter.run(tokens, mask, _keys(adapter, ports), gathered=False)
    check_finite(adapter, acts, real)
    check = _Check(adapter, acts, real, {})
    stream = acts[act("resid_pre", 0)]
    for layer in range(adapter.shape.n_layers):
        stream = _check_layer(check, layer, stream, ports)
    if ports:
        _check_logits(check, stream)
    return Closure(check.errors, TOLERANCE.get(adapter.dtype, 1e-4))


def check_finite(adapter: Adapter, acts: Mapping[str, Tensor], keep: Bool[Tensor, "batch pos"]) -> None:
    """Raise ModelError for NaN or infinite activations at real positions, naming where they come from: the first."""
    broken = [key for key, value in acts.items() if not _is_finite(value, keep)]
    if broken:
        half = ", which ends at 65,504: load the model in bfloat16 or float32" if adapter.dtype == torch.float16 else ""
        raise ModelError(
            f"activations at {min(broken, key=_depth)} are NaN or infinite: check the model's weights and its dtype "
            f"({adapter.dtype}{half})"
        )


def _is_finite(value: Tensor, keep: Bool[Tensor, "batch pos"]) -> bool:
    if bool(value.sum().isfinite()):  # pads may hold anything, so a failure here needs a closer look
        return True
    return bool((value[keep.to(value.device)] if value.shape[:2] == keep.shape else value).isfinite().all())


def _depth(key: str) -> tuple[int, int]:
    """Where an activation stands in the order of computation: its layer, and where in that.

    >>> sorted(["logits", "mlp_out.0", "resid_post.0", "z.1", "z.0"], key=_depth)
    ['z.0', 'mlp_out.0', 'resid_post.0', 'z.1', 'logits']
    """
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", key)
    within = [part in key for part in ("resid_post", "mlp", "resid_pre")]
    return int(layer[1]) if layer else sys.maxsize, (3, 2, 0)[within.index(True)] if any(within) else 1


def _keys(adapter: Adapter, ports: bool) -> list[str]:
    shape = adapter.shape
    kinds: list[Kind] = ["z", "scale.attn_out", "resid_post"]
    kinds.extend([] if shape.attn_only else ["mlp_out"])
    if ports:
        kinds.extend(["q", "k", "v", "pattern", "scale.attn", "scale.q", "scale.k"])
        kinds.extend([] if shape.attn_only or shape.moe else ["mlp_pre", "mlp_post", "scale.mlp", "scale.mlp_out"])
        kinds.extend(["mlp_linear"] if shape.gated else [])
    keys = [act("resid_pre", 0), *(act(kind, layer) for layer in range(shape.n_layers) for kind in kinds)]
    return keys + (["logits", "scale.final"] if ports else []) + (["pos_embed"] if adapter.shortformer else [])


@dataclass(frozen=True, eq=False)
class _Check:
    adapter: Adapter
    acts: dict[str, Tensor]
    real: Tensor  # (batch, pos)
    errors: dict[str, float]

    def compare(self, relation: str, mine: Tensor, theirs: Tensor) -> None:
        """Largest over real positions of |mine - theirs| / |theirs|, with a floor at the typical size of theirs."""
        real = self.real.to(theirs.device)
        mine, theirs = mine.to(theirs.device)[real].flatten(1), theirs[real].flatten(1)
        size = theirs.norm(dim=1)
        floor = 0.01 * size.square().mean().sqrt() + 1e-12
        self.errors[relation] = float(((mine - theirs).norm(dim=1) / size.clamp_min(floor)).max())


def _check_layer(check: _Check, layer: int, stream: Tensor, ports: bool) -> Tensor:
    """Check one layer from the residual stream in front of it; returns the stream behind it."""
    adapter, acts = check.adapter, check.acts
    stream = stream.to(adapter.places[layer])
    weight, bias = adapter.writer(layer)
    scale = acts[act("scale.attn_out", layer)]
    heads = (torch.einsum("bphe,hed->bpd", acts[act("z", layer)], weight) + bias) / scale
    behind = stream + heads
    if ports:
        _check_attention(check, layer, stream)
    if not adapter.shape.attn_only:
        if ports and not adapter.shape.moe:
            _check_mlp(check, layer, stream if adapter.shape.parallel else behind)
        behind = behind + acts[act("mlp_out", layer)]
    check.compare(f"residual.{layer}", behind, acts[act("resid_post", layer)])
    return behind


def _check_attention(check: _Check, layer: int, stream: Tensor) -> None:
    adapter, acts = check.adapter, check.acts
    for port in ("q", "k", "v"):
        mine = read_through(adapter, layer, port, stream, acts, check.real)
        check.compare(act(port, layer), mine, repeat_heads_last(acts[act(port, layer)], adapter.shape.n_heads))
    pattern, value = acts[act("pattern", layer)], repeat_heads_last(acts[act("v", layer)], adapter.shape.n_heads)
    check.compare(act("z", layer), torch.einsum("bhqk,bkhe->bqhe", pattern, value), acts[act("z", layer)])
    if getattr(adapter.model.cfg, "positional_embedding_type", None) != "alibi":  # a bias on the scores is no read
        rows = pattern.transpose(1, 2)
        total = rows.sum(-1, keepdim=True).clamp_min(1e-30)  # less than one beside an attention sink
        check.compare(act("pattern", layer), _pattern(adapter, layer, acts).transpose(1, 2), rows / total)


def read_through(
    adapter: Adapter,
    layer: int,
    port: Port,
    stream: Float[Tensor, "batch pos d_model"],
    acts: dict[str, Tensor],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos head d_head"]:
    """What the heads of `layer` read from a residual stream through a port, with the scales in `acts` frozen."""
    reader = adapter.reader(layer, port)
    read = (
        torch.einsum("bpd,hde->bphe", stream, reader.weight) / acts[act("scale.attn", layer)][..., None] + reader.bias
    )
    if reader.position_weight is not None:
        positions = acts["pos_embed"].to(read.device)
        read = read + torch.einsum("bpd,hde->bphe", positions, reader.position_weight)
    if port == "v":
        return read
    read = read / repeat_heads_last(acts[head_scale(port, layer)], adapter.shape.n_heads)
    return adapter.rotate(read, position_ids(mask), layer)


def repeat_heads_last(x: Float[Tensor, "batch pos group width"], n_heads: int) -> Float[Tensor, "batch pos head width"]:
    """Repeat shared heads of an activation."""
    return repeat_heads(x.transpose(0, 2), n_heads).transpose(0, 2)


def _pattern(adapter: Adapter, layer: int, acts: dict[str, Tensor]) -> Tensor:
    q, k = acts[act("q", layer)], repeat_heads_last(acts[act("k", layer)], adapter.shape.n_heads)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / adapter.attn_scale(layer)
    scores = soft_cap(adapter.attn_soft_cap)(scores)
    seen = acts[act("pattern", layer)] > 0  # the model's own mask, whatever it is
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)


def soft_cap(cap: float | None) -> Callable[[Tensor], Tensor]:
    """x -> cap tanh(x / cap), or the identity."""
    return (lambda x: x) if cap is None else (lambda x: cap * torch.tanh(x / cap))


def _check_mlp(check: _Check, layer: int, stream: Tensor) -> None:
    adapter, acts = check.adapter, check.acts
    mlp, scale = adapter.mlp(layer), acts[act("scale.mlp", layer)]
    linear = stream @ mlp.w_in / scale + mlp.b_in
    pre, post = linear, mlp.act(acts[act("mlp_pre", layer)])
    if mlp.w_gate is not None and mlp.b_gate is not None:
        pre = stream @ mlp.w_gate / scale + mlp.b_gate
        check.compare(act("mlp_linear", layer), linear, acts[act("mlp_linear", layer)])
        post = post * acts[act("mlp_linear", layer)]
    check.compare(act("mlp_pre", layer), pre, acts[act("mlp_pre", layer)])
    check.compare(
        act("mlp_post", layer), post if mlp.b_post is None else post + mlp.b_post, acts[act("mlp_post", layer)]
    )
    written = (acts[act("mlp_post", layer)] @ mlp.w_out + mlp.b_out) / acts[act("scale.mlp_out", layer)]
    check.compare(act("mlp_out", layer), written, acts[act("mlp_out", layer)])


def _check_logits(check: _Check, stream: Tensor) -> None:
    weight, bias = check.adapter.unembed()
    logits = stream.to(weight.device) @ weight / check.acts["scale.final"] + bias
    check.compare("logits", soft_cap(check.adapter.logit_soft_cap)(logits), check.acts["logits"])
