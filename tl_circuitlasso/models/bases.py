"""Bases: in which coordinates a site is read.

| basis       | sites                                   | a node is                               |
|-------------|-----------------------------------------|-----------------------------------------|
| `Component` | input, every head, every MLP            | the whole site, seen in a few directions |
| `Neuron`    | every MLP, after its nonlinearity       | one neuron, `m3#17`                     |
| `Residual`  | the residual stream before every layer  | one dimension, `resid.3#17`             |

A basis turns activations into features, one `pos`-aligned matrix per site. Wide sites are narrowed by a *pilot*, the
first batch: components to their principal directions, neurons to those that vary most. What the pilot chose is part of
the statistics, so that later batches and other workers see the same coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso._checks import shortened, whole_number, whole_or_none
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.names import act

Features: TypeAlias = Mapping[Site, Float[Tensor, "batch pos coord"]]
Pilot: TypeAlias = dict[str, Tensor]


@runtime_checkable
class Basis(Protocol):
    """What collection asks of a basis."""

    @property
    def name(self) -> str:
        """How the basis is called in arguments and provenance."""
        ...

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        """The activations that `features` reads."""
        ...

    def features(self, adapter: Adapter, acts: Mapping[str, Tensor]) -> Features:
        """Every site's raw coordinates at every position."""
        ...

    def fit(self, features: Mapping[Site, Float[Tensor, "sample coord"]]) -> Pilot:
        """What the first batch decides: directions or chosen coordinates by site name."""
        ...

    def encode(self, raw: Float[Tensor, "*rows coord"], chosen: Tensor) -> Float[Tensor, "*rows node"]:
        """Raw coordinates of one site in those that the pilot chose."""
        ...

    def index(self, adapter: Adapter, pilot: Mapping[str, Tensor], target: Site) -> NodeIndex:
        """The graph's nodes, the target last."""
        ...


@dataclass(frozen=True)
class Component:
    """Whole components, each seen in its `directions` leading principal directions.

    A head is described by z R' with W_O' = Q R, an isometry of its output that is d_head wide: the d_model-wide output
    of a head is never formed. With `directions=None` it is: every component is what it writes to the residual stream,
    coordinate by coordinate, as the paper stacks activations.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> options = {"basis": Component(directions=1), "refined": False, "progress": False}
    >>> len(tcl.circuit_lasso(demo.model, demo.tokens, **options).index)
    17
    """

    directions: int | None = 16
    name: str = "component"

    def __post_init__(self) -> None:
        whole_or_none("directions", self.directions, what="of directions per component")

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        shape = adapter.shape
        heads = [act(key, layer) for layer in range(shape.n_layers) for key in ("z", "scale.attn_out")]
        mlps = [] if shape.attn_only else [act("mlp_out", layer) for layer in range(shape.n_layers)]
        return (act("resid_pre", 0), *heads, *mlps)

    def features(self, adapter: Adapter, acts: Mapping[str, Tensor]) -> Features:
        found: dict[Site, Tensor] = {Site("input"): acts[act("resid_pre", 0)]}
        outputs = head_outputs if self.directions is None else head_coordinates
        for layer in range(adapter.shape.n_layers):
            output = outputs(adapter, acts, layer)
            found |= {Site("head", layer, head): output[:, :, head] for head in range(adapter.shape.n_heads)}
            if not adapter.shape.attn_only:
                found[Site("mlp", layer)] = acts[act("mlp_out", layer)]
        return found

    def fit(self, features: Mapping[Site, Float[Tensor, "sample coord"]]) -> Pilot:
        if self.directions is None:
            return {str(site): x.new_ones(x.shape[1], dtype=torch.bool) for site, x in features.items()}
        return {str(site): principal_directions(x, self.directions) for site, x in features.items()}

    def encode(self, raw: Float[Tensor, "*rows coord"], chosen: Tensor) -> Float[Tensor, "*rows node"]:
        return raw if self.directions is None else raw @ chosen.to(raw)

    def index(self, adapter: Adapter, pilot: Mapping[str, Tensor], target: Site) -> NodeIndex:
        shape = adapter.shape
        whole = component_index(
            n_layers=shape.n_layers, n_heads=shape.n_heads, attn_only=shape.attn_only, parallel=shape.parallel
        )
        *inner, last = whole.blocks
        return NodeIndex((*inner, Block(target, last.rank)))


@dataclass(frozen=True)
class Neuron:
    """MLP neurons after their nonlinearity.

    max_nodes: with design "activation" those that vary most over the pilot, dead ones left out; with design "read"
        those that contribute most to the target.
    reference: with design "read", what a neuron is compared with: its "mean" over the partners at the same position, as
        circuits are mostly judged, or what it does in the prompt's own partner ("corrupted").
    linked: with design "read", how many of them are joined by edges, their direct effects on one another (0: none), or
        a share below 1: those that carry so much of the target's difference. Each costs a sweep through attention alone
        on a small sample of the prompts.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> options = {"target": demo.target, "corrupted": demo.corrupted, "progress": False}
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=Neuron(linked=8), **options)
    >>> graph.provenance["unit"]
    'contribution to the target, logits'
    """

    max_nodes: int = 4096
    linked: int | float = 0
    reference: str = "mean"
    name: str = "neuron"

    def __post_init__(self) -> None:
        whole_number("max_nodes", self.max_nodes, what="of nodes at most")
        whole, share = isinstance(self.linked, int) and self.linked >= 0, isinstance(self.linked, float)
        if isinstance(self.linked, bool) or not (whole or (share and 0 < self.linked < 1)):
            raise InputError(
                f"`linked` is {self.linked!r}: give the number of neurons to join by edges (0 for none), or the share "
                "of the target's difference that each carries at least, above 0 and below 1"
            )
        if self.reference not in ("mean", "corrupted"):
            raise InputError(f"`reference` is {self.reference!r}: write 'mean' or 'corrupted'")

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        if adapter.shape.attn_only:
            raise ModelError(f"`basis` 'neuron': {adapter.name} has no MLPs; use basis='component' or 'residual'")
        if adapter.shape.moe:
            raise ModelError(
                f"`basis` 'neuron': {adapter.name} routes tokens through experts, whose neurons change from token to "
                "token; use basis='component' or 'residual'"
            )
        return tuple(act("mlp_post", layer) for layer in range(adapter.shape.n_layers))

    def features(self, adapter: Adapter, acts: Mapping[str, Tensor]) -> Features:
        return {Site("mlp", layer): acts[act("mlp_post", layer)] for layer in range(adapter.shape.n_layers)}

    def fit(self, features: Mapping[Site, Float[Tensor, "sample coord"]]) -> Pilot:
        return most_varying(features, self.max_nodes)

    def encode(self, raw: Float[Tensor, "*rows coord"], chosen: Bool[Tensor, " coord"]) -> Float[Tensor, "*rows node"]:
        return raw[..., chosen]

    def index(self, adapter: Adapter, pilot: Mapping[str, Tensor], target: Site) -> NodeIndex:
        sites = [Site("mlp", layer) for layer in range(adapter.shape.n_layers)]
        return chosen_index(sites, pilot, target)


@dataclass(frozen=True)
class Residual:
    """Dimensions of the residual stream in front of every layer and behind the last; those that vary most.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> options = {"basis": Residual(max_nodes=4), "design": "activation", "progress": False}
    >>> len(tcl.circuit_lasso(demo.model, demo.tokens, **options).index) > 1
    True
    """

    max_nodes: int = 4096
    name: str = "residual"

    def __post_init__(self) -> None:
        whole_number("max_nodes", self.max_nodes, what="of nodes at most")

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        return tuple(residual_key(layer, adapter.shape.n_layers) for layer in range(adapter.shape.n_layers + 1))

    def features(self, adapter: Adapter, acts: Mapping[str, Tensor]) -> Features:
        layers = range(adapter.shape.n_layers + 1)
        return {Site("resid", layer): acts[residual_key(layer, adapter.shape.n_layers)] for layer in layers}

    def fit(self, features: Mapping[Site, Float[Tensor, "sample coord"]]) -> Pilot:
        return most_varying(features, self.max_nodes)

    def encode(self, raw: Float[Tensor, "*rows coord"], chosen: Bool[Tensor, " coord"]) -> Float[Tensor, "*rows node"]:
        return raw[..., chosen]

    def index(self, adapter: Adapter, pilot: Mapping[str, Tensor], target: Site) -> NodeIndex:
        sites = [Site("resid", layer) for layer in range(adapter.shape.n_layers + 1)]
        return chosen_index(sites, pilot, target)


BASES: Mapping[str, type[Component] | type[Neuron] | type[Residual]] = {
    "component": Component,
    "neuron": Neuron,
    "residual": Residual,
}


def as_basis(basis: "str | Basis") -> Basis:
    """The basis that a user named or made.

    Raises
    ------
    InputError: no basis of that name.
    """
    if isinstance(basis, Basis):
        return basis
    if isinstance(basis, Mapping):
        raise InputError("`basis` is a mapping: features of SAEs are tcl.SAEFeatures({hook: sae, ...})")
    if not isinstance(basis, str) or basis not in BASES:
        raise InputError(
            f"`basis` {shortened(basis)} is unknown: use one of {', '.join(map(repr, BASES))} or a Basis object "
            "(features of SAEs: tcl.SAEFeatures)"
        )
    return BASES[basis]()


def residual_key(layer: int, n_layers: int) -> str:
    """The hook that holds the residual stream in front of `layer`, or behind the last."""
    return f"blocks.{n_layers - 1}.hook_resid_post" if layer == n_layers else f"blocks.{layer}.hook_resid_pre"


def head_coordinates(
    adapter: Adapter, acts: Mapping[str, Tensor], layer: int
) -> Float[Tensor, "batch pos head d_head"]:
    """Each head's output in an isometric d_head-wide basis: z R' with W_O' = Q R, so that norms are those of z W_O."""
    w_o, _ = adapter.writer(layer)
    triangle = torch.linalg.qr(w_o.mT.double()).R.to(w_o)  # head, d_head, d_head
    z = acts[act("z", layer)] / acts[act("scale.attn_out", layer)].unsqueeze(-1)
    return torch.einsum("bphd,hed->bphe", z, triangle)


def head_outputs(adapter: Adapter, acts: Mapping[str, Tensor], layer: int) -> Float[Tensor, "batch pos head d_model"]:
    """What each head writes to the residual stream, its bias left out."""
    w_o, _ = adapter.writer(layer)
    z = acts[act("z", layer)] / acts[act("scale.attn_out", layer)].unsqueeze(-1)
    return torch.einsum("bphd,hde->bphe", z, w_o.to(z))


def principal_directions(x: Float[Tensor, "sample coord"], k: int) -> Float[Tensor, "coord k"]:
    """The k leading eigenvectors of the covariance of x; at most as many as x has coordinates."""
    centred = x.double() - x.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -k:].flip(1).float().contiguous()  # the layout that a saved file has, for equal rounding


def most_varying(features: Mapping[Site, Float[Tensor, "sample coord"]], limit: int) -> Pilot:
    """By site, which coordinates are among the `limit` of largest variance over all sites; constants never are."""
    variance = {site: x.double().var(0, correction=0) for site, x in features.items()}
    everything = torch.cat(list(variance.values()))
    floor = everything.sort(descending=True).values[:limit][-1]
    return {str(site): (v >= floor) & (v > 1e-12 * everything.max()) for site, v in variance.items()}


def chosen_index(sites: Sequence[Site], pilot: Mapping[str, Tensor], target: Site) -> NodeIndex:
    """One block per site with its chosen coordinates, in order, then the target."""
    blocks = [
        Block(site, rank, tuple(pilot[str(site)].nonzero().flatten().tolist()))
        for rank, site in enumerate(sites)
        if bool(pilot[str(site)].any())
    ]
    return NodeIndex((*blocks, Block(target, len(sites))))


def kept_rows(x: Float[Tensor, "batch pos *coord"], keep: Bool[Tensor, "batch pos"]) -> Float[Tensor, "sample *coord"]:
    """The kept positions of all prompts as samples."""
    return rearrange(x, "b p ... -> (b p) ...")[keep.flatten()]
