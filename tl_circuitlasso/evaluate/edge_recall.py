"""How much of what features do to each other do graphs hold? Every effect of some sources, kept or not.

Of sources drawn at random the effects on all features of the child's hook are measured, and those that are sure (a
t-test over prompts, at a false-discovery rate of `SURE` among all that could be of a size asked for, as in
`features.effects`) and of some size are looked up in each graph: found are those that it keeps with the right sign. Of
tens of thousands of pairs hundreds are three standard errors from zero by chance alone, which no graph should hold.
Inhibition is counted apart, so a rule that always says "+" finds half of the signs at best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import t as student
from torch import Tensor

from tl_circuitlasso.baselines.features import features_of, hook_pairs
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.features.effects import adjusted
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import Recording, Trying, trials

NULL = 0.95  # share of the pairs that no graph keeps whose |effect| lies below what is called real
BOUNDS = (0.05, 0.1, 0.2)  # standard deviations of the child per one of the parent
SURE = 0.05  # false-discovery rate


@dataclass(frozen=True, eq=False)
class Truth:
    """All effects of some sources on one hook: per unit of the source, and in standard deviations of both; and which
    of them are sure."""

    sources: Int[Tensor, " source"]
    targets: Int[Tensor, " target"]
    effect: Float[Tensor, "source target"]
    score: Float[Tensor, "source target"]
    sure: Tensor


def measure_all(
    recording: Recording,
    encoders: Mapping[str, Encoder],
    graphs: Sequence[AttributionGraph],
    sources: int,
    how: Trying,
    tick: Callable[[], Any],
) -> dict[tuple[str, str], Truth]:
    """By pair of hooks of any graph, the effects at their own position of up to `sources` features drawn at random."""
    graph, found = graphs[0], {}
    features = features_of(graph)
    random = np.random.default_rng(how.seed)
    for first, last in dict.fromkeys(pair for one in graphs for pair in hook_pairs(one)):
        if not {first, last} <= set(encoders):
            continue
        drawn = random.choice(len(features[first]), min(sources, len(features[first])), replace=False)
        some = features[first][torch.from_numpy(np.sort(drawn))]
        sums = torch.zeros(3, len(some), len(features[last]), dtype=torch.float64)
        mass = torch.zeros(3, len(some), dtype=torch.float64)
        for batch in trials(recording, (encoders[first], encoders[last]), some, features[last], how):
            one = batch["ablate"]
            c, m, at = one.code.double().cpu(), one.mass.double().cpu(), one.source.cpu()
            sums.index_add_(1, at, torch.stack([c, c * c, c * m[:, None]]))
            mass.index_add_(1, at, torch.stack([torch.ones_like(m), m, m * m]))
            tick()
        spreads = [_spreads(graph, hook, some_of) for hook, some_of in ((first, some), (last, features[last]))]
        found[first, last] = _truth(some, features[last], sums, mass, *spreads)
    return found


def _truth(
    sources: Tensor, targets: Tensor, sums: Float[Tensor, "3 source target"], mass: Float[Tensor, "3 source"],
    source: Float[Tensor, " source"], target: Float[Tensor, " target"],
) -> Truth:  # fmt: skip
    n, m, mm = (one[:, None] for one in mass)
    effect = sums[0] / m.clamp(min=1e-300)
    spread = (sums[1] - 2 * effect * sums[2] + effect.square() * mm).clamp(min=0)
    error = (spread * n / (n - 1).clamp(min=1)).sqrt() / m.clamp(min=1e-300)
    score = effect * source[:, None] / target.clamp(min=1e-300)
    p = 2 * student.sf((effect.abs() / error.clamp(min=1e-300)).numpy(), (n - 1).clamp(min=1).numpy())
    size = (effect.square() + error.square() * n).sqrt() * source[:, None] / target.clamp(min=1e-300)
    tested = (n > 2) & (size >= BOUNDS[0])
    q = adjusted(torch.from_numpy(p)[tested], int(tested.sum()))
    return Truth(sources, targets, effect, score, torch.zeros_like(tested).masked_scatter(tested, q <= SURE))


def _spreads(graph: AttributionGraph, hook: str, features: Int[Tensor, " some"]) -> Float[Tensor, " some"]:
    """The standard deviations of codes, as the graph knows them."""
    spreads = [graph.node_info.get(f"{hook}#{i}", {}).get("std", float("nan")) for i in features.tolist()]
    return torch.tensor(spreads, dtype=torch.float64)


def recall(graphs: Mapping[str, AttributionGraph], truths: Mapping[tuple[str, str], Truth]) -> pd.DataFrame:
    """Per method, sign of the effect and least size: how many sure effects there are, the share that is found, and the
    share that is kept with whatever sign; `mass` is the found share of the sum of |score| over all sure effects.
    """
    rows = []
    for method, graph in graphs.items():
        kept = {pair: _weights(graph, pair, truth) for pair, truth in truths.items()}
        for sign in (1, -1):
            rows += [_row(method, sign, bound, truths, kept) for bound in BOUNDS]
    columns = ["method", "sign", "bound", "effects", "recall", "kept", "mass"]
    return pd.DataFrame(rows, columns=columns).set_index(["method", "sign", "bound"])


def nulls(
    graphs: Mapping[str, AttributionGraph], truths: Mapping[tuple[str, str], Truth]
) -> dict[tuple[str, str], float]:
    """By pair of hooks, what `NULL` of |effect| lie below, of all pairs of features that no graph keeps.

    Each pair of hooks has its own: a feature of an attention's output does less to anything than one of the stream.
    """
    found = {}
    for pair, truth in truths.items():
        kept = torch.stack([_weights(graph, pair, truth) != 0 for graph in graphs.values()]).any(0)
        fires = truth.effect.abs().amax(1) > 0
        off = truth.effect[fires].abs()[~kept[fires]]
        if len(off):
            found[pair] = float(np.quantile(off.numpy(), NULL))
    return found


def _row(
    method: str, sign: int, bound: float, truths: Mapping[Any, Truth], kept: Mapping[Any, Tensor]
) -> dict[str, Any]:
    parts = []
    for pair, truth in truths.items():
        rows = truth.sure & (sign * truth.score >= bound)
        parts.append(torch.stack([sign * kept[pair][rows], truth.score[rows].abs()]))
    weight, size = torch.cat(parts, 1) if parts else torch.zeros(2, 0)
    found, count = weight > 0, len(weight)
    total = float(size.sum())
    return {
        "method": method,
        "sign": "+" if sign > 0 else "-",
        "bound": bound,
        "effects": count,
        "recall": float(found.double().mean()) if count else float("nan"),
        "kept": float((weight != 0).double().mean()) if count else float("nan"),
        "mass": float(size[found].sum()) / total if total else float("nan"),
    }


def _weights(graph: AttributionGraph, pair: tuple[str, str], truth: Truth) -> Float[Tensor, "source target"]:
    """The kept edges' weights at the child's own position, 0 for pairs that aren't kept."""
    found = torch.zeros(truth.effect.shape, dtype=torch.float64)
    places = [_places(graph, hook, some) for hook, some in zip(pair, (truth.sources, truth.targets))]
    rows = (graph.kept & (graph.port == PORTS.index(""))).nonzero().flatten()
    source, target = places[0][graph.source[rows]], places[1][graph.target[rows]]
    inside = (source >= 0) & (target >= 0)
    found[source[inside], target[inside]] = graph.weight[rows[inside]].double()
    return found


def _places(graph: AttributionGraph, hook: str, features: Int[Tensor, " some"]) -> Int[Tensor, " node"]:
    """Where each node stands among some features of a hook, -1 for others."""
    table = torch.full((len(graph.index),), -1)
    for place, feature in enumerate(features.tolist()):
        table[graph.index.position(f"{hook}#{feature}")] = place
    return table
