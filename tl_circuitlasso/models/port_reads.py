"""What heads project from streams that are theirs alone: one matrix product for all heads of a port."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention import PORTS
from tl_circuitlasso.models.norms import Norm
from tl_circuitlasso.models.patching import Projection, projection
from tl_circuitlasso.models.weights import Port


def port_projection(adapter: Adapter, layer: int, port: Port) -> Projection:
    """How the heads of a layer project through a port; folded once."""
    return adapter.folded(f"project_{port}", layer, lambda: projection(adapter, layer, port))


def project(
    reads: Projection,
    x: Float[Tensor, "prompt pos d_model"],
    scale: Float[Tensor, "prompt pos 1"] | None,
    heads: list[int],
) -> Float[Tensor, "prompt pos head d_head"]:
    """What some heads project from one stream, divided by its norm's scale."""
    weight = reads.weight[heads].transpose(0, 1).flatten(1)
    projected = x @ weight if scale is None else (x @ weight) / scale
    return projected.unflatten(-1, (len(heads), -1)) + reads.bias[heads]


@dataclass(frozen=True, eq=False)
class Alone:
    """Heads of one port that each see a stream of their own: neighbours in the list of streams, from `first` on."""

    port: Port
    first: int
    heads: list[int]
    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"]

    def project(
        self,
        seen: Float[Tensor, "reader prompt pos d_model"],
        scales: Float[Tensor, "reader prompt pos 1"] | None,
    ) -> Float[Tensor, "prompt pos head d_head"]:
        """What each head projects from its own stream."""
        own = slice(self.first, self.first + len(self.heads))
        made = torch.bmm(seen[own].flatten(1, 2), self.weight).unflatten(1, seen.shape[1:3])
        made = made if scales is None else made / scales[own]
        return (made + self.bias[:, None, None]).permute(1, 2, 0, 3)


def alone_readers(reads: Mapping[Port, Projection], groups: list[list[tuple[Port, int]]]) -> Iterator[Alone]:
    """The heads that no other reader shares a stream with, by port; groups of one come first, in the order of ports."""
    singles = [group[0] for group in groups if len(group) == 1]
    for port in PORTS:
        if heads := [head for at, head in singles if at == port]:
            first = singles.index((port, heads[0]))
            yield Alone(port, first, heads, reads[port].weight[heads], reads[port].bias[heads])


def by_port(group: list[tuple[Port, int]]) -> Iterator[tuple[Port, list[int]]]:
    """The heads of a group through each port."""
    for port in PORTS:
        if heads := [head for at, head in group if at == port]:
            yield port, heads


def centred_scale(x: Float[Tensor, "*batch d_model"], norm: Norm) -> Float[Tensor, "*batch 1"]:
    """As `scale_of`; centres x in place (folded weights read centred and plain streams alike), so nothing is copied."""
    if norm.centred:
        x -= x.mean(-1, keepdim=True)
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + norm.eps).sqrt()
