"""How much the nodes and edges of a circuit bear on its target, as circuit-tracer counts it; and what errors bear.

    found = tcl.apps.influence(tcl.apps.contributions(model, graph, basis, prompt).graph)
    small = found.pruned(nodes=0.8, edges=0.98)
    tcl.formats.to_circuit_tracer(small, "prompt.json", prompt=prompt)

    W_ij = |score_ij| / sum over i of |score_ij|         the kept edges into a node add up to 1
    I_i  = sum over paths from i to the targets of the product of W along it, each target by its weight
    edge i -> j: W_ij (I_j + the weight of j)

    replacement    of the influence of roots (nodes that nothing feeds) the share of those that aren't an SAE's error
    completeness   1 - the share of errors in what feeds a node, averaged over nodes by their influence

Targets are the nodes of the last rank: one, of weight 1, or the logits of `apps.prompt_graph`, weighted by their
probability. What isn't explained of a feature there counts as an error. Both figures are 1 in a graph without errors,
be they away or never looked for.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.data.sites import is_missed
from tl_circuitlasso.graph import AttributionGraph


@dataclass(frozen=True, eq=False)
class Influence:
    """What bears on the target, and how much.

    Attributes
    ----------
    graph: the graph that was asked about. node, edge: influence of each node (a target's own is 0) and edge (0 where it
        isn't kept). replacement, completeness: as above, from 0 to 1; NaN without a kept path to the target.
    """

    graph: AttributionGraph
    node: Float[Tensor, " node"]
    edge: Float[Tensor, " edge"]
    replacement: float
    completeness: float

    def nodes(self) -> pd.DataFrame:
        """Nodes by influence, those without left out."""
        table = pd.DataFrame({"node": self.graph.index.names, "influence": self.node.numpy()})
        rows: Any = table[table["influence"] > 0]
        return rows.sort_values("influence", ascending=False, ignore_index=True)

    def pruned(self, *, nodes: int | float = 0.8, edges: int | float = 0.98) -> AttributionGraph:
        """The nodes that hold a share `nodes` of all influence, of the edges among them those that hold `edges` of
        theirs, counted anew; what then hangs loose is left out, too.

        Raises
        ------
        InputError: a share that isn't above 0 and at most 1.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            fraction(name, share, "of all influence")
        graph = self.graph
        stays = (self.node > 0) & (self.node >= _bar(self.node, nodes))
        stays |= _ends(graph) > 0
        among = graph.keep(graph.kept & stays[graph.source] & stays[graph.target])
        again = influence(among).edge
        return among.keep(among.kept & (again > 0) & (again >= _bar(again, edges))).prune()


def influence(graph: AttributionGraph) -> Influence:
    """The influence of a graph's kept edges on its target, or its targets. No model is needed.

    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> index = component_index(n_layers=1, n_heads=1)
    >>> edges = {("input", "a0.h0"): 2.0, ("a0.h0", "logits"): -3.0, ("input", "logits"): 1.0}
    >>> influence(AttributionGraph.from_edges(index, edges)).nodes().to_dict("list")
    {'node': ['input', 'a0.h0'], 'influence': [1.0, 0.75]}
    """
    weight = _shares(graph)
    ends = _ends(graph)
    out = ends.clone()
    ranks = graph.index.ranks[graph.target]
    for rank in ranks[weight > 0].unique().flip(0).tolist():  # from the target up: an edge's source has a lower rank
        some = (ranks == rank) & (weight > 0)
        out.index_add_(0, graph.source[some], weight[some] * out[graph.target[some]])
    edge = weight * out[graph.target]
    node = torch.where(ends > 0, 0.0, out)
    return Influence(graph, node, edge, *_scores(graph, node, out, weight))


def _ends(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The weights of the targets, 0 for other nodes; they add up to 1."""
    ranks, names = graph.index.ranks, graph.index.names
    last = [place for place, rank in enumerate(ranks.tolist()) if rank == int(ranks.max())]
    found = torch.zeros(len(ranks), dtype=torch.float64)
    for place in last:
        found[place] = float(graph.node_info.get(names[place], {}).get("probability", 1.0))
    return found / found.sum().clamp(min=1e-300)


def _shares(graph: AttributionGraph) -> Float[Tensor, " edge"]:
    size = torch.where(graph.kept, graph.score.abs().double(), 0.0)
    total = torch.zeros(len(graph.index), dtype=torch.float64).index_add(0, graph.target, size)
    return size / total[graph.target].clamp(min=1e-300)


def _scores(
    graph: AttributionGraph, node: Float[Tensor, " node"], out: Float[Tensor, " node"], weight: Float[Tensor, " edge"]
) -> tuple[float, float]:
    error = torch.tensor([is_missed(name) for name in graph.index.names])
    fed = torch.zeros_like(node).index_add(0, graph.target, weight)
    by_error = torch.zeros_like(node).index_add(0, graph.target, weight * error[graph.source])
    roots = fed == 0
    if not float(node.sum()):
        return float("nan"), float("nan")
    replacement = float(node[roots & ~error].sum() / node[roots].sum())
    return replacement, float(((1 - by_error) * out).sum() / out.sum())


def _bar(value: Float[Tensor, " item"], share: float) -> float:
    """The least of the largest values that hold this share of the sum."""
    ordered = value.sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum().clamp(min=1e-300)
    place = int((held < share - 1e-12).sum())
    return float(ordered[min(place, len(ordered) - 1)]) if len(ordered) else 0.0
