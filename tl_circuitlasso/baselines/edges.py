"""All edges of a model as one matrix, and the sum over tokens that fills it.

Rows are sources and columns readers, in the order of `Components`. A method fills the matrix; `graph` makes it a graph.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import Components
from tl_circuitlasso.models import Adapter, Shape
from tl_circuitlasso.models.attention import PORTS
from tl_circuitlasso.models.patch import Circuits
from tl_circuitlasso.models.patching import Written, projection
from tl_circuitlasso.models.tracing import Trace, read_gradient

WORKSPACE = 128 << 20  # bytes for what the sources of one piece of tokens write; the only place where it's written out


class EdgeLayout(Components):
    """The components of a model, and the matrix of sources by readers that a method fills."""

    shape: Shape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.n_layers, shape.n_heads, parallel=shape.parallel, attn_only=shape.attn_only)
        object.__setattr__(self, "shape", shape)

    def targets(self) -> tuple[list[int], list[int]]:
        """Each column's node, as a position in the index, and port, as a position in `sites.PORTS`."""
        nodes, ports = self.column_nodes()
        return nodes.tolist(), ports.tolist()

    def graph(self, scores: Float[Tensor, "source reader"], provenance: dict[str, Any]) -> AttributionGraph:
        """All edges with their scores, all kept."""
        source, column = self.mask().nonzero(as_tuple=True)
        nodes, port = (values[column] for values in self.column_nodes())
        score = scores.double().cpu()[source, column]
        return AttributionGraph(
            index=self.index,
            source=source,
            target=nodes,
            port=port,
            score=score,
            weight=score.clone(),
            kept=torch.ones(len(score), dtype=torch.bool),
            provenance=provenance,
        )


def as_circuits(kept: Bool[Tensor, "circuit source reader"], layout: EdgeLayout) -> Circuits:
    """What the readers of each kind read."""
    return Circuits(dict(_readers(kept, layout)))


def _readers(
    kept: Bool[Tensor, "circuit source reader"], layout: EdgeLayout
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    for layer, port in layout.readers():
        sources, columns = layout.sources_of(layer, port), layout.columns(layer, port)
        yield (layer, port), kept[:, :sources, columns].transpose(1, 2).contiguous()


# ---- the sum over tokens ------------------------------------------------------------------------------------------


def written_out(adapter: Adapter, parts: Written, chosen: tuple[Tensor, ...]) -> Float[Tensor, "source token d_model"]:
    """What each source writes to the residual stream at some (prompt, position) pairs."""
    pieces = [at_tokens(parts.input, chosen)[None]]
    for layer, heads in enumerate(parts.heads):
        pieces.append(torch.bmm(at_tokens(heads, chosen).transpose(0, 1), adapter.writer(layer)[0]))
        if parts.mlps:
            pieces.append(at_tokens(parts.mlps[layer], chosen)[None])
    return torch.cat([piece.to(adapter.device) for piece in pieces])


def at_tokens(values: Float[Tensor, "batch pos *rest"], chosen: tuple[Tensor, ...]) -> Float[Tensor, "token *rest"]:
    """The values at some (prompt, position) pairs, on their own device."""
    return values[tuple(index.to(values.device) for index in chosen)]


def pieces_of(layout: EdgeLayout, keep: Bool[Tensor, "batch pos"], itemsize: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The kept positions in pieces small enough that all their sources fit the workspace."""
    per_token = (layout.n_sources + 4 * layout.shape.n_heads) * layout.shape.d_model * itemsize
    rows, positions = keep.nonzero(as_tuple=True)
    size = max(1, WORKSPACE // per_token)
    yield from zip(rows.split(size), positions.split(size))


Chosen = tuple[Tensor, ...]  # (prompt, position) pairs, as indices
Derivative = Callable[[int, str, Chosen], Float[Tensor, "head token d_model"] | None]
"""The derivative at what a layer's heads read through a port, its MLP (port ""), or the logits (the layer behind the
last) reads of the residual stream at some tokens; None where it's zero."""


def add_products(
    layout: EdgeLayout,
    adapter: Adapter,
    scores: Float[Tensor, "source reader"],
    difference: Written,
    derivative: Derivative,
    keep: Bool[Tensor, "batch pos"],
) -> None:
    """Add to each edge u -> v the sum over kept positions of <difference_u, derivative at v's input>."""
    for chosen in pieces_of(layout, keep, difference.input.element_size()):
        sources = written_out(adapter, difference, chosen).flatten(1)
        for layer, port in layout.readers():
            grads = derivative(layer, port, chosen)
            if grads is not None:
                rows = slice(layout.sources_of(layer, port))
                read = grads.flatten(1).T.to(sources.device)
                scores[rows, layout.columns(layer, port)] += (sources[rows] @ read).double()


def traced_derivative(adapter: Adapter, traced: Trace) -> Derivative:
    """The derivatives of a trace."""
    layers = range(adapter.shape.n_layers)
    reads = {(layer, port): projection(adapter, layer, port) for layer in layers for port in PORTS}

    def at(layer: int, port: str, chosen: Chosen) -> Float[Tensor, "head token d_model"]:
        if layer == len(layers):
            return at_tokens(traced.unembed, chosen)[None]
        if port == "":
            return at_tokens(traced.mlps[layer], chosen)[None]
        at_port = at_tokens(traced.ports[layer][port], chosen)  # type: ignore[index]
        stream = at_tokens(traced.streams.attn[layer], chosen).to(at_port.device)
        return read_gradient(reads[layer, port], stream, at_port)  # type: ignore[index]

    return at
