"""Planted transformers: models with weights set by hand, whose every edge is known, made in an instant.

Each component has `width` dimensions of the residual stream to itself. A head moves what its parents wrote, turned,
along a pattern of positions or of contents; an MLP mixes it nonlinearly; the unembedding reads a few of them. What
isn't planted has a weight of exactly 0, or a small one (`leak`):

    x_v = W_v f_v(sum over u of s_uv R_uv x_u),    R_uv orthogonal, s_uv drawn from [weakest, 1] for parents, else leak

Beside the circuit stand components that read what it reads, and do nothing: by their activity alone they look like it.

>>> made = planted_transformer(layers=1, heads=2, seed=1)
>>> sorted(made.circuit)
[('a0.h0', 'logits'), ('a0.h1', 'm0'), ('input', 'a0.h0'), ('input', 'a0.h1'), ('input', 'm0'), ('m0', 'logits')]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso._checks import part
from tl_circuitlasso.graph.nodes import NodeIndex, component_index
from tl_circuitlasso.models.build import build_hooked_transformer
from tl_circuitlasso.synthetic.problems import (
    SHARPNESS,
    Edge,
    check_sizes,
    draw_circuit,
    drawn_parents,
    orthogonal,
    place_of,
)

EXPANSION = 4  # neurons of an MLP per dimension that it has
SPREAD = 2.0  # of the logits
LEAST = {"layers": 1, "heads": 1, "width": 1, "parents": 1, "prompts": 1, "positions": 2, "tokens": 3, "classes": 2}
BOS = 0  # stands in front of every prompt and has no embedding
Stream = Float[Tensor, "batch pos width"]


@dataclass(frozen=True, eq=False)
class PlantedTransformer:
    """A model whose circuit is known, with prompts.

    Attributes
    ----------
    model: a HookedTransformer without norms, in evaluation mode.
    clean, corrupted: two sets of random prompts; position 0 is BOS and says nothing.
    index: all nodes, from `input` to `logits`.
    circuit: the planted edges that lead to the logits, q, k and v of a head as one.
    edges: all planted edges, those of components that lead nowhere among them.
    """

    model: Any
    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    index: NodeIndex
    circuit: frozenset[Edge]
    edges: frozenset[Edge]

    @property
    def candidates(self) -> frozenset[Edge]:
        """Every edge that the order of computation allows."""
        return self.index.allowed_pairs()


def planted_transformer(
    *,
    layers: int = 2,
    heads: int = 3,
    width: int = 4,
    parents: int = 2,
    prompts: int = 200,
    positions: int = 6,
    tokens: int = 12,
    classes: int = 4,
    weakest: int | float = 0.4,
    leak: int | float = 0.0,
    content: int | float = 0.3,
    seed: int = 0,
) -> PlantedTransformer:
    """A random circuit of `layers` x (`heads` + MLP) as a model's weights. The same seed, the same model.

    Parameters
    ----------
    width: dimensions of the residual stream per component. parents: of every component, where so many come before it.
    positions, tokens: length of the prompts with BOS, and vocabulary with BOS. classes: what the model tells apart at
        every position.
    weakest: the least strength of an edge, from 0 to 1, beside others of up to 1. leak: the strength of all that isn't
        planted: well below `weakest`, every edge then has an effect, and only its size tells the planted ones.
    content: share of the heads that attend by what their parents say; the others attend by position.

    Raises
    ------
    InputError: a size that is too small, or a share outside [0, 1]. ModelError: no HookedTransformer in this
        TransformerLens.

    >>> made = planted_transformer(seed=2)
    >>> made.model(made.clean[:2]).shape
    torch.Size([2, 6, 4])
    """
    check_sizes(locals(), LEAST)
    for name, given in {"weakest": weakest, "leak": leak, "content": content}.items():
        part(name, given)
    generator = torch.Generator().manual_seed(seed)
    index = component_index(n_layers=layers, n_heads=heads)
    family, circuit = draw_circuit(index, parents, generator)
    family |= _idle(index, family, parents, generator)
    model = _blank(index, width, positions, tokens, classes)
    clean, corrupted = (_prompts(prompts, positions, tokens, generator) for _ in range(2))
    planting = _Planting(model, index, width, float(weakest), float(leak), generator)
    planting.input(clean)
    for name in index.names[1:-1]:
        by_content = name.startswith("a") and float(torch.rand((), generator=generator)) < content
        planting.head(name, family[name], by_content) if name.startswith("a") else planting.mlp(name, family[name])
    planting.logits(family[index.names[-1]])
    edges = frozenset((parent, name) for name, found in family.items() for parent in found)
    return PlantedTransformer(model, clean, corrupted, index, circuit, edges)


def _idle(
    index: NodeIndex, family: Mapping[str, list[str]], parents: int, generator: torch.Generator
) -> dict[str, list[str]]:
    """The parents of all components that don't lead to the logits."""
    idle = [name for name in index.names[1:-1] if name not in family]
    return {name: drawn_parents(index, name, parents, generator) for name in idle}


def _prompts(count: int, positions: int, tokens: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    drawn = torch.randint(1, tokens, (count, positions), generator=generator)
    drawn[:, 0] = BOS
    return drawn


def _blank(index: NodeIndex, width: int, positions: int, tokens: int, classes: int) -> Any:
    """A model that does nothing yet: every weight is 0."""
    components = index.names[1:-1]
    layers = sum(name.startswith("m") for name in components)
    config = {
        "n_layers": layers,
        "n_heads": (len(components) - layers) // layers,
        "d_model": width * (len(components) + 1) + positions,
        "d_head": 2 * width + positions,
        "d_mlp": EXPANSION * width,
        "d_vocab": tokens,
        "d_vocab_out": classes,
        "n_ctx": positions,
        "act_fn": "gelu",
        "normalization_type": None,
        "attention_dir": "causal",
        "default_prepend_bos": False,
        "model_name": "planted",
    }
    model = build_hooked_transformer(config, {}, random_weights=True)
    for weight in model.parameters():
        weight.data.zero_()
    return model


class _Planting:
    """Sets weights component by component, each scaled so that what it writes has unit variance on the prompts."""

    def __init__(
        self, model: Any, index: NodeIndex, width: int, weakest: float, leak: float, generator: torch.Generator
    ) -> None:
        self.model, self.index, self.width, self.generator = model, index, width, generator
        self.weakest, self.leak = weakest, leak
        self.wrote: dict[str, Stream] = {}

    def _rows(self, name: str) -> slice:
        """The dimensions of the stream that a component has."""
        return place_of(self.index, name, self.width)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _strength(self, planted: bool) -> float:
        drawn = float(torch.rand((), generator=self.generator)) if planted else 0.0
        return self.weakest + (1 - self.weakest) * drawn if planted else self.leak

    def _read(self, name: str, weight: Float[Tensor, "d_model width"], parents: list[str]) -> Stream:
        """Reads what comes before a node by maps that go into `weight`; what is read."""
        before = [other for other in self.wrote if self.index.may_feed(other, name)]
        for other in before:
            if strength := self._strength(other in parents):
                weight[self._rows(other)] = strength * orthogonal(self.width, self.generator).float()
        return torch.stack([self.wrote[other] @ weight[self._rows(other)] for other in before]).sum(0)

    def input(self, clean: Int[Tensor, "batch pos"]) -> None:
        """Random embeddings, none for BOS, and a dimension for each position."""
        rows, count = self._rows("input"), len(self.model.pos_embed.W_pos)
        self.model.embed.W_E.data[1:, rows] = self._normal(len(self.model.embed.W_E) - 1, self.width)
        self.model.pos_embed.W_pos.data[:, -count:] = torch.eye(count)
        self.wrote["input"] = self.model.embed.W_E.data[clean][..., rows]

    def head(self, name: str, parents: list[str], by_content: bool) -> None:
        """A head that moves the sum of what its parents wrote."""
        layer, number = (int(part) for part in name[1:].split(".h"))
        attention, width = self.model.blocks[layer].attn, self.width
        q, k, v, o = (getattr(attention, f"W_{port}").data[number] for port in "QKVO")
        scores = self._scores_of_content(name, q, k, parents) if by_content else self._scores_of_positions(q, k)
        count = scores.shape[-1]
        hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
        pattern = (scores / math.sqrt(q.shape[1])).masked_fill(hidden, -torch.inf).softmax(-1)
        moved = pattern @ self._read(name, v[:, :width], parents)
        scale = moved[:, 1:].std().reciprocal()
        o[:width, self._rows(name)] = scale * torch.eye(width)
        self.wrote[name] = scale * moved

    def _scores_of_positions(
        self, q: Float[Tensor, "d_model d_head"], k: Float[Tensor, "d_model d_head"]
    ) -> Float[Tensor, "query key"]:
        """From every position a draw of those before it; BOS, which says nothing, isn't looked at."""
        count = len(self.model.pos_embed.W_pos)
        wanted = SHARPNESS * self._normal(count, count)
        wanted[1:, 0] = -4 * SHARPNESS
        q[-count:, -count:] = wanted * math.sqrt(q.shape[1])
        k[-count:, -count:] = torch.eye(count)
        return q[-count:, -count:]

    def _scores_of_content(
        self, name: str, q: Float[Tensor, "d_model d_head"], k: Float[Tensor, "d_model d_head"], parents: list[str]
    ) -> Float[Tensor, "batch query key"]:
        """By the product of what parents wrote here and there."""
        part = slice(self.width, 2 * self.width)
        asked, given = (self._read(name, port[:, part], parents) for port in (q, k))
        raw = asked @ given.mT
        scale = SHARPNESS * math.sqrt(q.shape[1]) / raw[:, 1:, 1:].std()
        q[:, part] *= scale
        return scale * raw

    def mlp(self, name: str, parents: list[str]) -> None:
        """An MLP that mixes the sum of what its parents wrote."""
        mlp, width = self.model.blocks[int(name[1:])].mlp, self.width
        turned = torch.zeros(mlp.W_in.shape[0], width)
        read = self._read(name, turned, parents)
        spread = self._normal(width, mlp.W_in.shape[1]) / math.sqrt(width)
        mlp.W_in.data[:] = turned @ spread
        mlp.b_in.data[:] = 0.5 * self._normal(mlp.W_in.shape[1])
        out = self._normal(mlp.W_in.shape[1], width)
        wrote = torch.nn.functional.gelu(read @ spread + mlp.b_in.data) @ out
        mean = wrote[:, 1:].mean((0, 1))
        scale = (wrote - mean)[:, 1:].std().reciprocal()
        mlp.W_out.data[:, self._rows(name)] = scale * out
        mlp.b_out.data[self._rows(name)] = -scale * mean
        self.wrote[name] = scale * (wrote - mean)

    def logits(self, parents: list[str]) -> None:
        """Classes by what the last components wrote."""
        weight = torch.zeros(self.model.unembed.W_U.shape[0], self.width)
        read = self._read("logits", weight, parents)
        out = self._normal(self.width, self.model.unembed.W_U.shape[1])
        self.model.unembed.W_U.data[:] = weight @ out * SPREAD / (read @ out)[:, 1:].std()
