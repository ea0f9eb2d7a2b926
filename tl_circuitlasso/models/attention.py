"""Attention recomputed for heads that share keys and values in the model.

In grouped-query attention several heads read the same keys and values, so a bridge's hook points can't show what one
head alone reads through k or v. Given the queries, keys and values of every head, `Attending` computes its output as
the model does, and so gives each head a derivative, or an edit, of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.norms import Norm, apply_norm
from tl_circuitlasso.models.weights import Port, is_joint, port_norm, repeat_heads

PORTS: tuple[Port, ...] = ("q", "k", "v")


def keeps_heads_shared(adapter: Adapter) -> bool:
    """Whether heads share keys and values in a model that can't be told to repeat them (every bridge)."""
    return adapter.shape.n_kv_heads != adapter.shape.n_heads and adapter.kind != "HookedTransformer"


@dataclass(frozen=True, eq=False)
class Attending:
    """One layer's attention as it ran: projected q, k and v (shared heads not yet repeated) and the pattern."""

    adapter: Adapter
    layer: int
    heard: Mapping[Port, Float[Tensor, "batch pos group d_head"]]
    pattern: Float[Tensor, "batch head query key"]
    positions: Int[Tensor, "batch pos"]

    def __post_init__(self) -> None:
        name = self.adapter.architecture
        for port in ("q", "k"):
            norm = self._norm(port)
            if norm is not None and is_joint(norm, self.adapter.shape.d_head):
                raise ModelError(
                    f"`model` ({name}) shares keys between heads and normalises all of them together, so a head's keys "
                    "aren't its own; edges into k can't be told apart"
                )
        total = self.pattern.sum(-1)
        if not bool((((total - 1).abs() < 5e-2) | (total == 0)).all()):  # pads may attend to nothing
            raise ModelError(f"`model` ({name}) has attention sinks beside shared keys, which isn't supported")

    def heads(self, port: Port) -> Float[Tensor, "batch pos head d_head"]:
        """What each head projected through a port, shared heads repeated."""
        shared = self.heard[port].to(self.adapter.compute_dtype)
        return repeat_heads(shared.transpose(0, 2), self.adapter.shape.n_heads).transpose(0, 2)

    def output(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos head d_head"],
        v: Float[Tensor, "batch pos head d_head"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """z of every head, from projected queries, keys and values of every head; masked as it was in the model."""
        queries, keys = (self._ready(part, port) for part, port in ((q, "q"), (k, "k")))
        scores = torch.einsum("bqhe,bkhe->bhqk", queries, keys) / self.adapter.attn_scale(self.layer)
        cap = self.adapter.attn_soft_cap
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(self.pattern <= 0, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)

    def _ready(self, heads: Tensor, port: Any) -> Tensor:
        norm = self._norm(port)
        normed = heads if norm is None else apply_norm(norm, heads)
        return self.adapter.rotate(normed, self.positions, self.layer)

    def _norm(self, port: Any) -> Norm | None:
        attention = self.adapter.model.blocks[self.layer].attn
        return port_norm(attention, port, self.adapter.compute_dtype)

    def own_gradients(self, at_output: Float[Tensor, "batch pos head d_head"]) -> dict[Port, Tensor]:
        """The derivatives at each head's own queries, keys and values, from those at its output."""
        with torch.enable_grad():
            leaves = {port: self.heads(port).detach().requires_grad_() for port in PORTS}
            output = self.output(*(leaves[port] for port in PORTS))
            parts = torch.autograd.grad(output, [leaves[port] for port in PORTS], at_output)
        return dict(zip(PORTS, parts))
