"""Circuits of edges between features: who hears whom, from a graph's kept edges (`models.feature_wires` runs them)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.features import ERROR, node_relevance, target_nodes
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.feature_patch import FeatureSite, Kept
from tl_circuitlasso.models.feature_wires import Listener, Wiring

Nodes = frozenset[int]  # positions in the graph's index


def in_order(graph: AttributionGraph, sites: Sequence[FeatureSite]) -> list[FeatureSite]:
    """The sites in the order of computation.

    Raises
    ------
    InputError: an SAE at a hook that the graph doesn't know.
    """
    ranks = {str(block.site): block.rank for block in graph.index.blocks}
    if unknown := [site.name for site in sites if site.name not in ranks]:
        raise InputError(f"`saes` has {unknown[0]!r}, which `graph` has no edges of: leave it out at level='edge'")
    return sorted(sites, key=lambda site: ranks[site.name])


def edge_scores(graph: AttributionGraph) -> Float[Tensor, " edge"]:
    """How much each edge matters to the target: |score(u -> v)| times the relevance of v, as in `node_scores`."""
    relevance = node_relevance(graph)
    relevance[target_nodes(graph)] = 1.0
    return graph.score.abs() * relevance[graph.target]


def leading(graph: AttributionGraph) -> Bool[Tensor, " edge"]:
    """Which kept edges lead to the target along kept edges; the others do nothing."""
    reached = target_nodes(graph)
    ranks, leads = graph.index.ranks, torch.zeros_like(graph.kept)
    for rank in ranks.unique().flip(0):
        rows = (graph.kept & (ranks[graph.target] == rank)).nonzero().flatten()
        rows = rows[reached[graph.target[rows]]]
        leads[rows] = True
        reached[graph.source[rows]] = True
    return leads


def wiring_of(
    setup: Experiment, graph: AttributionGraph, sites: Sequence[FeatureSite], *, rest: bool = False
) -> Wiring:
    """Who hears whom by the kept edges, or with `rest` by all possible edges but those; ports are merged.

    Features that the graph has no node for are heard by all where they stay, and hear the whole circuit.
    """
    ends = target_nodes(graph)
    rows = graph.kept if rest else leading(graph)
    parents = _parents(graph.source[rows], graph.target[rows], ends)
    inside = frozenset[int]() if rest else frozenset(u for some in parents.values() for u in some)
    hearing = _Hearing(setup, graph, sites, rest)
    listeners = {}
    for number, site in enumerate(sites):
        groups: dict[Nodes, list[int]] = defaultdict(list)
        for node, feature in hearing.nodes(site):
            if rest or node in inside:
                groups[parents.get(node, frozenset())].append(feature)
        if unnamed := hearing.unnamed(site):
            groups[inside] += unnamed
        listeners[site.name] = [hearing.listener(site, number, *group) for group in groups.items()]
    errors = {site.name: hearing.heard(inside, number) for number, site in enumerate(sites)}
    return Wiring(listeners, errors, hearing.heard(parents.get(_TARGET, frozenset()), len(sites)))


_TARGET = -1  # all nodes of the target are one


def _parents(source: Int[Tensor, " edge"], target: Int[Tensor, " edge"], ends: Tensor) -> dict[int, Nodes]:
    found: dict[int, set[int]] = defaultdict(set)
    for u, v in zip(source.tolist(), torch.where(ends[target], _TARGET, target).tolist()):
        found[v].add(u)
    return {v: frozenset(some) for v, some in found.items()}


class _Hearing:
    """What nodes hear of earlier sites, given the nodes that kept edges into them come from."""

    def __init__(self, setup: Experiment, graph: AttributionGraph, sites: Sequence[FeatureSite], rest: bool) -> None:
        self.setup, self.sites, self.rest = setup, sites, rest
        named = {str(block.site): (block, part.start) for block, part in zip(graph.index.blocks, graph.index.slices)}
        self.start = {name: start for name, (block, start) in named.items() if block.features is not None}
        self.features = {name: named[name][0].features or () for name in self.start}
        self.errors = {name.removesuffix(ERROR): start for name, (_, start) in named.items() if name.endswith(ERROR)}
        self.otherwise = {site.name: self._otherwise(site) for site in sites}

    def _otherwise(self, site: FeatureSite) -> Bool[Tensor, " feature"]:
        """What is heard where no edge is named: nothing, or with `rest` everything; of features without a node, as
        `Experiment` says."""
        mask = torch.full((site.features,), self.rest or self.setup.rest == "keep")
        mask[list(self.features[site.name])] = self.rest
        return mask

    def nodes(self, site: FeatureSite) -> Iterator[tuple[int, int]]:
        """Each node of a site, and its feature."""
        return enumerate(self.features[site.name], self.start[site.name])

    def unnamed(self, site: FeatureSite) -> list[int]:
        """The features without a node that stay."""
        mask = self.otherwise[site.name].clone()
        mask[list(self.features[site.name])] = False
        return mask.nonzero().flatten().tolist()

    def heard(self, edges: Nodes, number: int) -> dict[str, Kept]:
        """What is heard of the first `number` sites by what these edges lead into."""
        return {site.name: self._kept(site, edges) for site in self.sites[:number]}

    def listener(self, site: FeatureSite, number: int, edges: Nodes, features: Sequence[int]) -> Listener:
        """Some features of a site that these edges lead into."""
        mask = torch.zeros(site.features, dtype=torch.bool)
        mask[list(features)] = True
        return Listener(mask, self.heard(edges, number))

    def _kept(self, site: FeatureSite, edges: Nodes) -> Kept:
        mask, start, features = self.otherwise[site.name].clone(), self.start[site.name], self.features[site.name]
        mask[[features[u - start] for u in edges if start <= u < start + len(features)]] = not self.rest
        if self.setup.error != "graph":
            return Kept(mask, self.setup.error)
        error = self.errors.get(site.name)
        stays = error is None or (error in edges) != self.rest
        return Kept(mask, "keep" if stays else "ablate")
