"""What cut edges carry in their source's place: what it does on other prompts, or values such as means or zeros."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.patching import Streams, Written, record_all, unembed


@dataclass(frozen=True, eq=False)
class Ablated:
    """What cut edges carry, and the streams that a reader sees whose edges are all cut.

    Behind a norm on attention's output, b_O is divided by that norm's scale: `bias_scales[l]` is the factor that
    `streams` hold it with (None where there's no such norm or no bias, so that b_O is the same in all runs).
    """

    written: Written
    streams: Streams
    bias_scales: tuple[Float[Tensor, "batch pos 1"] | None, ...]
    logits: Float[Tensor, "batch pos vocab"]


def from_run(adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None) -> Ablated:
    """Cut edges carry what their sources do on `tokens`. One forward pass."""
    made = record_all(adapter, tokens, mask)
    scales: dict[int, Tensor] = {}
    if layers := _scaled_biases(adapter):
        acts = adapter.run(tokens, mask, [act("scale.attn_out", layer) for layer in layers], gathered=False)
        scales = {layer: 1 / acts[act("scale.attn_out", layer)] for layer in layers}
    bias_scales = tuple(scales.get(layer) for layer in range(adapter.shape.n_layers))
    return Ablated(made.written, made.streams, bias_scales, made.logits)


def from_values(adapter: Adapter, written: Written) -> Ablated:
    """Cut edges carry given values, such as zeros or means. No forward pass but the unembedding."""
    stream, attn, mlp = written.input, [], []
    scaled = _scaled_biases(adapter)
    for layer, heads in enumerate(written.heads):
        stream = stream.to(heads.device)
        attn.append(stream)
        weight, bias = adapter.writer(layer)
        behind = stream + heads.flatten(2) @ weight.flatten(0, 1) + (0 if layer in scaled else bias)
        if written.mlps:
            mlp.append(stream if adapter.shape.parallel else behind)
            behind = behind + written.mlps[layer]
        stream = behind
    stream = stream.to(adapter.device)
    zero = torch.zeros_like(stream[..., :1])
    bias_scales = tuple(zero if layer in scaled else None for layer in range(adapter.shape.n_layers))
    return Ablated(written, Streams(tuple(attn), tuple(mlp), stream), bias_scales, unembed(adapter, stream))


def _scaled_biases(adapter: Adapter) -> list[int]:
    """Layers whose b_O stands in front of a norm (no released model has one; random ones do)."""
    behind = [layer for layer, layout in enumerate(adapter.layouts) if layout.attn_post is not None]
    return [layer for layer in behind if bool(adapter.writer(layer)[1].any())]
