"""Circuits of edges between neurons: |attribution|, the garrote and signed attribution at equal numbers of edges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.neuron_parts.agreement import mean_ablation, ours
from benchmarks.neuron_parts.pairs import agreement_pairs
from tl_circuitlasso.evaluate.faithfulness import share_interval, shares
from tl_circuitlasso.evaluate.features import circuit_of, feature_sites, measure_features
from tl_circuitlasso.neurons.links import rank_by

RANKINGS = ("attribution", "garrote", "signed")
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def edge_circuits(
    model: Any, folder: Path, name: str, linked: int, train: int, test: int, shares_of: Sequence[float] = SHARES
) -> pd.DataFrame:
    """Faithfulness of the neurons that have a kept edge in and one out, at each share of the candidate edges."""
    seen = agreement_pairs(model, folder / f"{name}_train.json", train)
    unseen = agreement_pairs(model, folder / f"{name}_test.json", test)
    graph = ours(model, seen, linked=linked)
    setup = mean_ablation(model, unseen)
    sites = feature_sites(graph, setup.adapter, {})
    rows, circuits = [], []
    for how in RANKINGS:
        ranked = rank_by(graph, how)
        for share in shares_of:
            kept = ranked.top_k(round(share * len(ranked))).prune()
            circuits.append(circuit_of(setup, graph, sites, kept.kept_nodes()))
            neurons = sum(int(part.features.sum()) for part in circuits[-1].values())
            rows.append({"ranked by": how, "share": share, "edges": kept.n_kept, "neurons": neurons})
    result = measure_features(setup, sites, [*circuits, circuit_of(setup, graph, sites, set())])
    low, high = zip(*share_interval(result))
    table = pd.DataFrame(rows).assign(faithfulness=shares(result).tolist(), low=low, high=high)
    print(f"\n{name}: {linked} neurons, {len(graph)} candidate edges, {len(seen.clean)} pairs to find them")
    print(table.round(3).to_string(index=False), flush=True)
    return table
