"""A GPT-2-shaped transformer in which each reader can be given any writer's output from elsewhere.

Writers are `input`, every head and every MLP. Readers are every head's q, k and v port, every MLP,
and the logits. A mask over reader x writer says which reads come from the donor run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

PORTS = ("q", "k", "v")
WRITE = 0.5  # gain of output weights at the start: the embedding is louder than the rest
Edge = tuple[str, str]
PortEdge = tuple[str, str, str]  # the last: some of "qkv"


@dataclass(frozen=True)
class Shape:
    """The network's sizes; `norm` is "LN" or None."""

    layers: int
    heads: int
    d_model: int
    d_mlp: int
    vocabulary: int
    outputs: int
    length: int
    norm: str | None = "LN"

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise ValueError(f"`d_model` {self.d_model} must be a multiple of heads {self.heads}")

    @property
    def d_head(self) -> int:
        return self.d_model // self.heads

    def writers(self) -> list[str]:
        """Names in the order of computation: input, then each layer's heads and its MLP."""
        return ["input", *(name for layer in range(self.layers) for name in self._layer(layer))]

    def readers(self) -> list[tuple[str, str]]:
        """(node, port) in the order of the mask's rows: per layer q, k, v heads, then the MLP."""
        rows = []
        for layer in range(self.layers):
            *heads, mlp = self._layer(layer)
            rows += [(head, port) for port in PORTS for head in heads] + [(mlp, "")]
        return [*rows, ("logits", "")]

    def candidate_edges(self) -> list[Edge]:
        """Every edge that exists, but input -> logits."""
        nodes = [*self.writers(), "logits"]
        pairs = [(u, v) for u in nodes[:-1] for v in nodes[1:] if self._feeds(u, v)]
        return [pair for pair in pairs if pair != ("input", "logits")]

    def edge_mask(self, edges: Sequence[Edge | PortEdge]) -> Bool[Tensor, "edge reader writer"]:
        """One mask for each edge: of the named ports of a head, or of all where none is named."""
        readers, writers = self.readers(), self.writers()
        mask = torch.zeros(len(edges), len(readers), len(writers), dtype=torch.bool)
        for row, (parent, child, *ports) in enumerate(edges):
            for index, (node, port) in enumerate(readers):
                if node == child and (not ports or port in ports[0]):
                    mask[row, index, writers.index(parent)] = True
        return mask

    def port_edges(self) -> list[PortEdge]:
        """Every edge into a head, three times: for its q, k and v port."""
        pairs = self.candidate_edges()
        return [(u, v, port) for u, v in pairs if v.startswith("a") for port in PORTS]

    def _layer(self, layer: int) -> list[str]:
        return [*(f"a{layer}.h{head}" for head in range(self.heads)), f"m{layer}"]

    def _feeds(self, parent: str, child: str) -> bool:
        return stage(parent) < stage(child)


def stage(node: str) -> float:
    """When a node is computed: heads of layer l at 2l, its MLP at 2l + 1."""
    if node in ("input", "logits"):
        return -1 if node == "input" else math.inf
    layer = int(node[1:].split(".")[0])
    return 2 * layer + (node[0] == "m")


@dataclass(frozen=True, eq=False)
class Run:
    """What one pass leaves behind."""

    logits: Float[Tensor, "batch pos out"]
    written: Float[Tensor, "batch writer pos d_model"]
    scores: list[Float[Tensor, "batch head pos pos"]]  # by layer, before the softmax


class Network(nn.Module):
    """Causal, pre-norm, learned positions, gelu_new; no unembedding bias (as GPT-2)."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)

        def weight(*size: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * gain * fan_in**-0.5)

        d, h, e, m = shape.d_model, shape.heads, shape.d_head, shape.d_mlp
        self.embed = weight(shape.vocabulary, d, fan_in=1)
        self.position = weight(shape.length, d, fan_in=1, gain=0.5)
        self.unembed = weight(d, shape.outputs, fan_in=d)
        self.layers = nn.ModuleList()
        for _ in range(shape.layers):
            layer = nn.Module()
            for name in "QKV":
                layer.register_parameter(f"W_{name}", weight(h, d, e, fan_in=d))
                layer.register_parameter(f"b_{name}", nn.Parameter(torch.zeros(h, e)))
            layer.W_O, layer.b_O = weight(h, e, d, fan_in=h * e, gain=WRITE), nn.Parameter(torch.zeros(d))
            layer.W_in, layer.b_in = weight(d, m, fan_in=d), nn.Parameter(torch.zeros(m))
            layer.W_out, layer.b_out = weight(m, d, fan_in=m, gain=WRITE), nn.Parameter(torch.zeros(d))
            layer.ln1, layer.ln2 = self._norm(), self._norm()
            self.layers.append(layer)
        self.ln_final = self._norm()

    def _norm(self) -> nn.Module:
        return nn.LayerNorm(self.shape.d_model) if self.shape.norm else nn.Identity()

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        donor: Float[Tensor, "batch writer pos d_model"] | None = None,
        mask: Float[Tensor, "batch reader writer"] | None = None,
    ) -> Run:
        """One pass; reads marked in `mask` take the donor's output."""
        read = _Reads(self.embed[tokens] + self.position[: tokens.shape[1]], donor, mask)
        scores = []
        for layer in self.layers:
            heads, score = self._attention(layer, layer.ln1(read(len(PORTS) * self.shape.heads)))
            read.write(heads, constant=layer.b_O)
            scores.append(score)
            hidden = layer.ln2(read(1)) @ layer.W_in + layer.b_in
            read.write(functional.gelu(hidden, approximate="tanh") @ layer.W_out + layer.b_out)
        return Run(self.ln_final(read(1))[:, 0] @ self.unembed, read.written, scores)

    def _attention(
        self, layer: nn.Module, x: Float[Tensor, "batch port_head pos d_model"]
    ) -> tuple[Float[Tensor, "batch head pos d_model"], Float[Tensor, "batch head pos pos"]]:
        parts = x.chunk(len(PORTS), dim=1) if x.shape[1] > 1 else [x] * len(PORTS)
        q, k, v = (
            torch.einsum("bhpd,hde->bhpe", part, getattr(layer, f"W_{name}")) + getattr(layer, f"b_{name}")[:, None]
            for part, name in zip(parts, "QKV", strict=True)
        )
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(self.shape.d_head)).masked_fill(later, -torch.inf)
        return torch.einsum("bhpe,hed->bhpd", scores.softmax(-1) @ v, layer.W_O), scores

    def tl_state(self) -> dict[str, Tensor]:
        """The parameters under their TransformerLens names."""
        state = {
            "embed.W_E": self.embed,
            "pos_embed.W_pos": self.position,
            "unembed.W_U": self.unembed,
            "unembed.b_U": torch.zeros(self.shape.outputs),
        }
        for index, layer in enumerate(self.layers):
            for name, value in layer.named_parameters():
                state[f"blocks.{index}.{_tl_name(name)}"] = value
        for name, value in self.ln_final.named_parameters():
            state[_tl_name(f"ln_final.{name}")] = value
        return {name: value.detach().contiguous() for name, value in state.items()}


class _Reads:
    """The residual stream, seen by each reader in turn with its own patches."""

    def __init__(
        self,
        start: Float[Tensor, "batch pos d_model"],
        donor: Float[Tensor, "batch writer pos d_model"] | None,
        mask: Float[Tensor, "batch reader writer"] | None,
    ) -> None:
        self.written = start[:, None]
        self._stream, self._donor, self._mask, self._row = start, donor, mask, 0

    def __call__(self, readers: int) -> Float[Tensor, "batch reader pos d_model"]:
        """The next `readers` inputs; one for all where nothing is patched."""
        stream = self._stream[:, None]
        if self._donor is None or self._mask is None:
            return stream
        count = self.written.shape[1]
        rows = self._mask[:, self._row : self._row + readers, :count]
        self._row += readers
        if not rows.any():
            return stream
        change = self._donor[:, :count] - self.written
        return stream + torch.einsum("bru,bupd->brpd", rows, change)

    def write(
        self,
        outputs: Float[Tensor, "batch writer pos d_model"],
        constant: Float[Tensor, " d_model"] | float = 0.0,
    ) -> None:
        self.written = torch.cat([self.written, outputs], dim=1)
        self._stream = self._stream + outputs.sum(dim=1) + constant


def _tl_name(name: str) -> str:
    """`W_Q` -> `attn.W_Q`, `W_in` -> `mlp.W_in`, `ln1.weight` -> `ln1.w`."""
    if name.startswith("ln"):
        return name.replace("weight", "w").replace("bias", "b")
    return f"{'mlp' if name[2:] in ('in', 'out') else 'attn'}.{name}"
