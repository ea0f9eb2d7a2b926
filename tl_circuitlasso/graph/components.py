"""The grid of components: which sources a transformer has, who reads them, and where each stands.

Sources are numbered in the order of computation: the input, then each layer's heads and its MLP. Readers are numbered
by layer: all heads through q, then k, then v, then the MLP; the logits come last. A reader (layer, port) is a layer's
heads through a port, its MLP (port ""), or the logits (the layer behind the last). This is the layout of EAP-IG's
matrices, and every count of components in this library is taken from here.

>>> parts = Components(n_layers=2, n_heads=3)
>>> parts.n_sources, parts.head(1, 2), parts.mlp(1)
(9, 7, 8)
>>> parts.sources_of(1, "q"), parts.sources_of(1, ""), parts.columns(0, "v")
(5, 8, slice(6, 9, None))
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.data.sites import PORTS, Site
from tl_circuitlasso.graph.nodes import NodeIndex, component_index

QKV = PORTS[1:]


@dataclass(frozen=True)
class Components:
    """The shape of a transformer at component level, which fixes nodes, edges and their order.

    parallel: attention and MLP of a layer read the same stream; attn_only: there are no MLPs.
    """

    n_layers: int
    n_heads: int
    parallel: bool = False
    attn_only: bool = False

    @cached_property
    def index(self) -> NodeIndex:
        """The nodes: every source, in order, then the logits."""
        return component_index(
            n_layers=self.n_layers, n_heads=self.n_heads, attn_only=self.attn_only, parallel=self.parallel
        )

    # ---- sources ----------------------------------------------------------------------------------------------------

    @property
    def per_layer(self) -> int:
        """Sources of a layer."""
        return self.n_heads + (not self.attn_only)

    @property
    def n_sources(self) -> int:
        return self.before(self.n_layers)

    def before(self, layer: int) -> int:
        """How many sources are computed before a layer: the number of its first head."""
        return 1 + layer * self.per_layer

    def head(self, layer: int, head: int) -> int:
        """The number of a head among the sources."""
        return self.before(layer) + head

    def mlp(self, layer: int) -> int:
        """The number of a layer's MLP among the sources."""
        return self.before(layer) + self.n_heads

    def row(self, site: Site) -> int:
        """The site's number among the sources; `logits` and `target` come after the last one."""
        match site.kind:
            case "input":
                return 0
            case "head":
                return self.head(site.layer, site.head)
            case "mlp":
                return self.mlp(site.layer)
            case _:
                return self.n_sources

    def groups(self) -> dict[tuple[int, str], slice]:
        """The sources that are computed together: (-1, "input"), then (layer, "heads") and (layer, "mlp")."""
        found = {(-1, "input"): slice(0, 1)}
        for layer in range(self.n_layers):
            found[layer, "heads"] = slice(self.before(layer), self.before(layer) + self.n_heads)
            if not self.attn_only:
                found[layer, "mlp"] = slice(self.mlp(layer), self.mlp(layer) + 1)
        return found

    def is_mlp(self) -> Bool[Tensor, " source"]:
        """Which sources are MLPs."""
        found = torch.zeros(self.n_sources, dtype=torch.bool)
        if not self.attn_only:
            found[[self.mlp(layer) for layer in range(self.n_layers)]] = True
        return found

    def sources(self) -> list[str]:
        """The sources' names."""
        return list(self.index.names[:-1])

    # ---- readers ----------------------------------------------------------------------------------------------------

    @property
    def columns_per_layer(self) -> int:
        """Readers of a layer: q, k and v of every head, and the MLP."""
        return 3 * self.n_heads + (not self.attn_only)

    @property
    def n_readers(self) -> int:
        return self.n_layers * self.columns_per_layer + 1

    def readers(self) -> Iterator[tuple[int, str]]:
        """Every (layer, port) with a column, in column order; (n_layers, "") is the logits."""
        ports = QKV if self.attn_only else (*QKV, "")
        yield from ((layer, port) for layer in range(self.n_layers) for port in ports)
        yield self.n_layers, ""

    def columns(self, layer: int, port: str) -> slice:
        """The columns of all heads through one port, of the layer's MLP (port ""), or of the logits (the layer behind
        the last)."""
        first = layer * self.columns_per_layer
        if layer == self.n_layers:
            return slice(first, first + 1)
        if port == "":
            return slice(first + 3 * self.n_heads, first + 3 * self.n_heads + 1)
        start = first + QKV.index(port) * self.n_heads
        return slice(start, start + self.n_heads)

    def sources_of(self, layer: int, port: str) -> int:
        """How many sources, the first ones, a reader may read."""
        own_heads = port == "" and layer < self.n_layers and not self.parallel
        return self.before(layer) + (self.n_heads if own_heads else 0)

    def column(self, site: Site, port: str) -> int:
        """The column of one input of a site."""
        match site.kind:
            case "head":
                return self.columns(site.layer, port).start + site.head
            case "mlp":
                return self.columns(site.layer, "").start
            case _:
                return self.n_readers - 1

    def inputs(self) -> list[str]:
        """The columns' names, ports in angle brackets."""
        names, (nodes, ports) = self.index.names, self.column_nodes()
        suffixes = ["", *(f"<{port}>" for port in QKV)]
        return [names[node] + suffixes[port] for node, port in zip(nodes.tolist(), ports.tolist())]

    def column_nodes(self) -> tuple[Int[Tensor, " column"], Int[Tensor, " column"]]:
        """Each column's node (its number; logits one past the last source) and port (position in `PORTS`)."""
        within, ports = np.tile(np.arange(self.n_heads), 3), np.repeat([1, 2, 3], self.n_heads)
        if not self.attn_only:
            within, ports = np.r_[within, self.n_heads], np.r_[ports, 0]
        first = np.array([self.before(layer) for layer in range(self.n_layers)], dtype=within.dtype)
        nodes = np.r_[(first[:, None] + within).ravel(), self.n_sources]
        return torch.from_numpy(nodes), torch.from_numpy(np.r_[np.tile(ports, self.n_layers), 0])

    # ---- edges ------------------------------------------------------------------------------------------------------

    @property
    def n_edges(self) -> int:
        """How many edges there are, ports apart."""
        before = self.n_layers + self.per_layer * self.n_layers * (self.n_layers - 1) // 2
        own_heads = 0 if self.parallel or self.attn_only else self.n_layers * self.n_heads
        return before * self.columns_per_layer + own_heads + self.n_sources

    def mask(self) -> Bool[Tensor, "source reader"]:
        """Which entries of the matrix of sources by readers are edges."""
        mask = torch.zeros(self.n_sources, self.n_readers, dtype=torch.bool)
        for layer, port in self.readers():
            mask[: self.sources_of(layer, port), self.columns(layer, port)] = True
        return mask

    def edges(self) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
        """Row and column of every edge, in the order in which EAP-IG lists them."""
        pieces = [piece for layer in range(self.n_layers) for piece in self._layer_edges(layer)]
        last = (np.arange(self.n_sources), np.full(self.n_sources, self.n_readers - 1))
        rows, columns = zip(*pieces, last)
        return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))

    def _layer_edges(self, layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
        heads = self.columns(layer, "q").start + np.arange(3 * self.n_heads).reshape(3, self.n_heads).T.ravel()
        mlp = np.arange(0) if self.attn_only else np.array([self.columns(layer, "").start])
        groups = [np.r_[heads, mlp]] if self.parallel else [heads, mlp]
        counts = (self.sources_of(layer, port) for port in ("q", ""))
        return [
            (np.repeat(np.arange(count), columns.size), np.tile(columns, count))
            for columns, count in zip(groups, counts)
        ]

    def edge_names(self) -> list[str]:
        """Every edge as EAP-IG writes it, `a0.h1->m0` or `input->a0.h1<q>`, in its order."""
        rows, columns = self.edges()
        sources, inputs = [f"{name}->" for name in self.sources()], self.inputs()
        return [sources[r] + inputs[c] for r, c in zip(rows.tolist(), columns.tolist())]
