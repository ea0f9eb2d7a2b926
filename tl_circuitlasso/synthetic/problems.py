"""Planted circuits: activations of a made-up network whose every edge is known, for tests, tutorials and comparisons.

Every node v of a block DAG writes

    x_v = sqrt(1 - noise^2) drive_v + noise code_v,        drive_v = sum over parents u of (M_v x_u) W_uv,

scaled to unit variance, where M_v mixes positions as an attention pattern does if v is a head and is 1 if it's an MLP,
and code_v is v's own, independent of all else: without it, nodes that say the same could not be told apart by any
regression. Three things make such problems hard as they are in transformers: *mixing*, which hides from a regression at
one position what comes from another; *copies*, nodes beside the circuit that read what a node of it reads; and
*cancelling*, parents u whose direct edge undoes what they say through another parent, so that u and v don't correlate.

>>> problem = planted(layers=1, heads=2, seed=1)
>>> sorted(problem.circuit)
[('a0.h0', 'target'), ('a0.h1', 'm0'), ('input', 'a0.h0'), ('input', 'a0.h1'), ('input', 'm0'), ('m0', 'target')]
>>> statistics = problem.statistics()             # tcl.learn(statistics) finds it again
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso._checks import as_seed, one_of, part, whole_number
from tl_circuitlasso.data.schema import NODES, TARGET
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.statistics import Statistics, add_folds, empty_folds
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index

CODES = ("gaussian", "laplace", "sparse")
DENSITY = 0.1  # share of sparse codes that aren't zero
SHARPNESS = 3.0  # spread of the scores behind an attention pattern
Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted problem: what a regression may see, and what it should find.

    Attributes
    ----------
    index: all nodes, from `input` to `target`.
    maps: the matrix W_uv of every planted edge, by names; columns of v per column of u, after scaling.
    features: activations, nodes side by side with `width` columns each, in the order of the index.
    patterns: by head, the attention pattern that mixes what it reads; none without mixing.
    target: the behaviour to explain.
    circuit: the planted edges that lead to the target.
    """

    index: NodeIndex
    width: int
    maps: Mapping[Edge, Float[Tensor, "width width"]]
    features: Float[Tensor, "batch pos column"]
    patterns: Mapping[str, Float[Tensor, "batch query key"]]
    target: Float[Tensor, "batch pos width"]
    circuit: frozenset[Edge]

    @property
    def edges(self) -> frozenset[Edge]:
        """All planted edges, those of nodes that don't lead to the target among them."""
        return frozenset(self.maps)

    @property
    def candidates(self) -> frozenset[Edge]:
        """Every edge that the order of computation allows."""
        return self.index.allowed_pairs()

    def columns(self, node: str) -> slice:
        """The columns of `features` that belong to a node."""
        return place_of(self.index, node, self.width)

    def seen(self, node: str, design: str) -> Float[Tensor, "batch pos earlier"]:
        """What a node may read: the features of earlier nodes, mixed by its pattern in design `routed`."""
        position = self.index.position(node)
        earlier = int((self.index.ranks < self.index.ranks[position]).sum()) * self.width
        read = self.features[..., :earlier]
        return self.patterns[node] @ read if design == "routed" and node in self.patterns else read

    def statistics(self, design: str = "routed", *, folds: int = 1) -> Statistics:
        """What `learn` takes, as if collected from a model; `folds` > 1 for strengths "cv" and "stability".

        design: "routed" (heads see their parents mixed over positions) or "activation" (all see the same position).

        Raises
        ------
        InputError: another design, or `folds` < 1.
        """
        one_of("design", design, ("activation", "routed"))
        folds = whole_number("folds", folds, what="of parts to keep apart")
        parts = {NODES: self.features, TARGET: torch.cat([self.features, self.target], dim=-1)}
        for name in self.patterns if design == "routed" else ():
            parts[name] = torch.cat([self.seen(name, design), self.features[..., self.columns(name)]], dim=-1)
        moments: dict = {}
        fold = (torch.arange(len(self.features)) % folds)[:, None].expand(self.features.shape[:2]).flatten()
        for key, x in parts.items():
            moments |= empty_folds(key, folds, coords=1, nodes=x.shape[-1], device="cpu")
            add_folds(moments, key, x.flatten(0, 1)[:, None], fold, folds)
        meta = {
            "index": self.index.to_json(),
            "columns": [[name, self.width] for name in self.index.names[:-1]],
            "target_columns": self.target.shape[-1],
            "design": design,
            "folds": folds,
        }
        return Statistics(moments=moments, meta=meta)


def planted(
    *,
    layers: int = 2,
    heads: int = 4,
    width: int = 1,
    parents: int = 2,
    prompts: int = 256,
    positions: int = 8,
    codes: str = "laplace",
    mixing: bool = True,
    copies: float = 0.25,
    cancelling: float = 0.25,
    noise: float = 0.4,
    seed: int = 0,
) -> Planted:
    """A random circuit in a network of `layers` x (`heads` + MLP), and data from it. The same seed, the same problem.

    Parameters
    ----------
    width: columns per node: 1 for Lasso, more for group Lasso.
    parents: of every node of the circuit, where there are as many before it.
    codes: what nodes add of their own: "gaussian", "laplace", or "sparse" (nine of ten are zero, as SAE features are).
    mixing: heads read other positions, never their own, through random patterns.
    copies, cancelling: shares of the circuit's nodes with a copy beside them, or with parents that cancel.
    noise: share of a node's standard deviation that's its own.

    Raises
    ------
    InputError: a size below 1, a share outside [0, 1], or unknown codes.

    >>> problem = planted(layers=1, heads=2, seed=1)
    >>> len(problem.circuit)
    6
    """
    check_sizes(locals(), dict.fromkeys(("layers", "heads", "width", "parents", "prompts", "positions"), 1))
    for name, given in {"copies": copies, "cancelling": cancelling, "noise": noise}.items():
        part(name, given)
    one_of("codes", codes, CODES)
    generator = torch.Generator().manual_seed(seed)
    index = component_index(n_layers=layers, n_heads=heads)
    index = NodeIndex((*index.blocks[:-1], Block(Site("target"), index.blocks[-1].rank)))
    family, circuit = draw_circuit(index, parents, generator)
    family |= _copies(index, family, copies, generator)
    x: dict[str, Tensor] = {}
    maps: dict[Edge, Tensor] = {}
    patterns: dict[str, Tensor] = {}
    for name in index.names:
        own = _codes(codes, (prompts, positions, width), generator)
        if name.startswith("a") and mixing:
            patterns[name] = _pattern(prompts, positions, generator)
        if name not in family:
            x[name] = own
            continue
        new = {parent: orthogonal(width, generator) for parent in family[name]}
        if float(torch.rand((), generator=generator)) < cancelling:
            new |= _undone(family[name], new, maps)
        drive = torch.stack([x[parent] @ new[parent] for parent in family[name]]).sum(0)
        drive = patterns[name] @ drive if name in patterns else drive
        scale = math.sqrt(1 - noise**2) / drive.std(correction=0)
        x[name] = scale * drive + noise * own
        maps |= {(parent, name): scale * matrix for parent, matrix in new.items()}
    target = x.pop(index.names[-1])
    features = torch.cat([x[name] for name in index.names[:-1]], dim=-1)
    return Planted(index, width, maps, features, patterns, target, circuit)


def check_sizes(given: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """InputError where the seed isn't one, or a size is no whole number of at least so much."""
    as_seed(given["seed"])
    for name, lowest in least.items():
        whole_number(name, given[name], least=lowest)


def place_of(index: NodeIndex, node: str, width: int) -> slice:
    """Where a node is among columns that hold `width` of each, in the order of the index."""
    start = index.position(node) * width
    return slice(start, start + width)


def drawn_parents(index: NodeIndex, node: str, count: int, generator: torch.Generator) -> list[str]:
    """So many of those that may feed a node, or all where there are fewer, in the order of the index."""
    before = [other for other in index.names if index.may_feed(other, node)]
    drawn = torch.randperm(len(before), generator=generator)[:count].sort().values.tolist()
    return [before[place] for place in drawn]


def draw_circuit(
    index: NodeIndex, parents: int, generator: torch.Generator
) -> tuple[dict[str, list[str]], frozenset[Edge]]:
    """The parents of every node of the circuit, drawn from the target backwards, and the circuit's edges."""
    family: dict[str, list[str]] = {}
    waiting = [index.names[-1]]
    for name in reversed(index.names):
        if name in waiting and (drawn := drawn_parents(index, name, parents, generator)):
            family[name] = drawn
            waiting += drawn
    return family, frozenset((parent, name) for name, found in family.items() for parent in found)


def _copies(
    index: NodeIndex, family: Mapping[str, list[str]], share: float, generator: torch.Generator
) -> dict[str, list[str]]:
    """Nodes beside the circuit, each with the parents of a node of its rank."""
    found: dict[str, list[str]] = {}
    for name in [name for name in family if name.startswith("a")]:
        free = [
            other
            for other in index.names
            if index.ranks[index.position(other)] == index.ranks[index.position(name)]
            and other not in family
            and other not in found
        ]
        if free and float(torch.rand((), generator=generator)) < share:
            found[free[int(torch.randint(len(free), (), generator=generator))]] = family[name]
    return found


def _undone(parents: list[str], new: Mapping[str, Tensor], maps: Mapping[Edge, Tensor]) -> dict[str, Tensor]:
    """For the first parent u that another parent w reads: a direct map that undoes u -> w -> child."""
    for w in parents:
        for u in parents:
            if (u, w) in maps:
                return {u: -maps[u, w] @ new[w]}
    return {}


def _codes(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent numbers of mean 0 and variance 1."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "gaussian":
        return normal
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "laplace":  # a Gaussian with exponential variance
        return normal * (-uniform.clamp_min(1e-300).log()).sqrt()
    return normal * (uniform < DENSITY) / math.sqrt(DENSITY)


def _pattern(prompts: int, positions: int, generator: torch.Generator) -> Float[Tensor, "batch query key"]:
    """Random attention to all other positions, none to the own; a single position has only itself."""
    scores = SHARPNESS * torch.randn(prompts, positions, positions, generator=generator, dtype=torch.float64)
    if positions > 1:
        scores = scores.masked_fill(torch.eye(positions, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1)


def orthogonal(width: int, generator: torch.Generator) -> Float[Tensor, "column column"]:
    """A random orthogonal matrix; for one column a random sign."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
