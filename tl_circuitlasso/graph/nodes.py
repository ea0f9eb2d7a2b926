"""Nodes and their order: one index object instead of slices scattered over the code.

A *node* is one coordinate of a site, a *block* all nodes of a site with a rank in the order of computation. Only a
smaller rank may feed a larger one: heads of a layer share a rank, and so do heads and MLP of a parallel layer (GPT-J,
Pythia), because neither reads what the other writes.

>>> index = component_index(n_layers=1, n_heads=2)
>>> index.names
('input', 'a0.h0', 'a0.h1', 'm0', 'logits')
>>> index.may_feed("a0.h0", "a0.h1"), index.may_feed("a0.h0", "m0")
(False, True)
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError


@dataclass(frozen=True)
class Block:
    """All nodes of one site.

    `features` numbers the nodes in the site's own coordinates (neuron, residual dimension or SAE feature). None means
    that the whole site is a single node, which then carries the site's plain name.
    """

    site: Site
    rank: int
    features: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return 1 if self.features is None else len(self.features)

    @property
    def names(self) -> tuple[str, ...]:
        if self.features is None:
            return (str(self.site),)
        return tuple(f"{self.site}#{feature}" for feature in self.features)


@dataclass(frozen=True, eq=False)
class NodeIndex:
    """Ordered blocks of nodes: name to position, position to rank, and who may feed whom.

    Raises
    ------
    InputError: no blocks, a site given twice, or blocks that aren't sorted by rank.

    >>> index = component_index(n_layers=1, n_heads=1)
    >>> index.position("m0"), index.may_feed("a0.h0", "m0"), index.may_feed("m0", "a0.h0")
    (2, True, False)
    """

    blocks: tuple[Block, ...]
    _positions: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InputError("`blocks` is empty: a node index needs at least one block")
        ranks = [block.rank for block in self.blocks]
        if ranks != sorted(ranks):
            raise InputError("`blocks` must be sorted by rank, the order of computation")
        names = [name for block in self.blocks for name in block.names]
        positions = {name: position for position, name in enumerate(names)}
        if len(positions) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})[:3]
            raise InputError(f"`blocks` name {', '.join(twice)} more than once: give each site one block")
        object.__setattr__(self, "_positions", positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeIndex) and self.blocks == other.blocks

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every node's name, in order."""
        return tuple(self._positions)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Each block's nodes as a slice of the node axis."""
        ends = torch.tensor([block.size for block in self.blocks]).cumsum(0).tolist()
        return tuple(slice(end - block.size, end) for block, end in zip(self.blocks, ends))

    @cached_property
    def ranks(self) -> Int[Tensor, " node"]:
        """Each node's rank in the order of computation."""
        sizes = torch.tensor([block.size for block in self.blocks])
        return torch.tensor([block.rank for block in self.blocks]).repeat_interleave(sizes)

    @cached_property
    def block_of(self) -> Int[Tensor, " node"]:
        """Each node's block number."""
        sizes = torch.tensor([block.size for block in self.blocks])
        return torch.arange(len(self.blocks)).repeat_interleave(sizes)

    def position(self, name: str) -> int:
        """Where `name` stands on the node axis.

        Raises
        ------
        InputError: no such node; the message shows some names that exist.
        """
        try:
            return self._positions[name]
        except KeyError:
            some = ", ".join(self.names[:4])
            raise InputError(f"`node` {name!r} isn't in this index of {len(self)} nodes ({some}, ...)") from None

    def site(self, name: str) -> Site:
        """The site of the node called `name`."""
        return self.blocks[int(self.block_of[self.position(name)])].site

    def may_feed(self, source: str, target: str) -> bool:
        """Whether `source` is computed before `target`, so that an edge between them is possible."""
        return bool(self.ranks[self.position(source)] < self.ranks[self.position(target)])

    def allowed(self) -> Bool[Tensor, "source target"]:
        """The block upper-triangular mask of possible edges: True where rank[source] < rank[target]."""
        return self.ranks[:, None] < self.ranks[None, :]

    def allowed_pairs(self) -> frozenset[tuple[str, str]]:
        """The same by the names of both ends.

        >>> sorted(component_index(n_layers=1, n_heads=1, attn_only=True).allowed_pairs())
        [('a0.h0', 'logits'), ('input', 'a0.h0'), ('input', 'logits')]
        """
        names = self.names
        return frozenset((names[s], names[t]) for s, t in self.allowed().nonzero().tolist())

    def to_json(self) -> list[dict]:
        """Plain data that `from_json` reads back."""
        return [
            {
                "site": str(b.site),
                "rank": b.rank,
                "features": None if b.features is None else list(b.features),
            }
            for b in self.blocks
        ]

    @classmethod
    def from_json(cls, data: list[dict]) -> "NodeIndex":
        """The inverse of `to_json`."""
        return cls(
            tuple(
                Block(
                    parse_site(d["site"]),
                    int(d["rank"]),
                    None if d["features"] is None else tuple(d["features"]),
                )
                for d in data
            )
        )


def component_index(*, n_layers: int, n_heads: int, attn_only: bool = False, parallel: bool = False) -> NodeIndex:
    """The nodes of a transformer at component level: input, every head, every MLP, logits.

    Ranks: input 0; heads of layer l 1 + 2l; its MLP 2 + 2l, or 1 + 2l where attention and MLP run in parallel.

    >>> component_index(n_layers=1, n_heads=2).names
    ('input', 'a0.h0', 'a0.h1', 'm0', 'logits')
    """
    blocks = [Block(Site("input"), 0)]
    for layer in range(n_layers):
        blocks += [Block(Site("head", layer, head), 1 + 2 * layer) for head in range(n_heads)]
        if not attn_only:
            blocks.append(Block(Site("mlp", layer), 1 + 2 * layer if parallel else 2 + 2 * layer))
    return NodeIndex((*blocks, Block(Site("logits"), 1 + 2 * n_layers)))
