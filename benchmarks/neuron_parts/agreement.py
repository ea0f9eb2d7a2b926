"""Faithfulness and completeness of neuron circuits, whichever method found them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.neuron_parts.cost import Method, passes, timed
from benchmarks.neuron_parts.pairs import Agreement, agreement_pairs
from tl_circuitlasso import LogitDiff, Neuron, baselines, circuit_lasso
from tl_circuitlasso.evaluate.faithfulness import share_interval, shares
from tl_circuitlasso.evaluate.features import (
    circuit_of,
    feature_sites,
    measure_features,
    node_scores,
)
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph


def ours(model: Any, data: Agreement, **options: Any) -> AttributionGraph:
    """The secant sweep between the prompts of a pair."""
    target = LogitDiff(data.correct, data.incorrect)
    basis = Neuron(**options)
    return circuit_lasso(
        model, data.clean, corrupted=data.corrupted, basis=basis, design="read", target=target, max_prompts=None,
        progress=False,
    )  # fmt: skip


def unpaired(model: Any, data: Agreement) -> AttributionGraph:
    """The same with partners drawn at random among the prompts."""
    target = LogitDiff(data.correct, data.incorrect)
    return circuit_lasso(
        model, data.clean, basis="neuron", design="read", target=target, max_prompts=None, progress=False
    )


def relp(basis: str = "neuron", **options: Any) -> Method:
    """RelP with all scores of a basis kept."""
    return lambda model, data: baselines.relp(
        model, data.clean, data.corrupted, data.metric, basis=basis, max_nodes=None, **options
    )


METHODS: dict[str, Method] = {
    "CircuitLasso": ours,
    "CircuitLasso, corrupted reference": lambda model, data: ours(model, data, reference="corrupted"),
    "CircuitLasso, unpaired": unpaired,
    "RelP": relp(),
    "RelP, mean reference": relp(reference="mean"),
    "RelP, attention moving": relp(attention="moving"),
    "RelP, whole products": relp(products="whole"),
    "RelP, MLP outputs": relp("mlp_out"),
    "gradient x activation": lambda model, data: baselines.gradient_activation(
        model, data.clean, data.corrupted, data.metric, max_nodes=None
    ),
    "IG-10": lambda model, data: baselines.integrated_gradients(
        model, data.clean, data.corrupted, data.metric, max_nodes=None
    ),
    "random": lambda model, data: baselines.random_nodes(model, max_nodes=None),
}
TABLE = ("CircuitLasso", "RelP", "gradient x activation", "random", "RelP, MLP outputs", "IG-10")


def agreement(
    model: Any, folder: Path, names: Sequence[str], methods: Sequence[str], sizes: Sequence[int], train: int, test: int
) -> pd.DataFrame:
    """Faithfulness and completeness of each method's circuits on test pairs, with what finding them took."""
    rows: list[dict[str, Any]] = []
    for name in names:
        seen = agreement_pairs(model, folder / f"{name}_train.json", train)
        unseen = agreement_pairs(model, folder / f"{name}_test.json", test)
        for method in methods:
            graph, _, equivalents = timed(model, METHODS[method], seen)
            about = {
                "set": name,
                "method": method,
                "passes": passes(graph),
                "forward-equivalents": round(equivalents, 1),
            }
            found = judged(model, graph, unseen, sizes)
            rows += [about | row for row in found.to_dict("records")]
            print(f"\n{name}, {len(seen.clean)} pairs to find, {len(unseen.clean)} to judge")
            print(", ".join(f"{key} {value}" for key, value in about.items() if key != "set"))
            print(found.round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def mean_ablation(model: Any, data: Agreement) -> Experiment:
    """Everything outside of a circuit carries its mean over the corrupted prompts at the same position."""
    return Experiment(
        model, data.clean, data.corrupted, data.metric, "mean", mean_over="corrupted", batch_size=len(data.clean)
    )


def judged(model: Any, graph: AttributionGraph, data: Agreement, sizes: Sequence[int]) -> pd.DataFrame:
    """Faithfulness of the nodes of largest |score|, and completeness (the same of all but these), by their number."""
    setup = mean_ablation(model, data)
    sites, scores = feature_sites(graph, setup.adapter, {}), node_scores(graph)
    ranked = sorted(scores, key=lambda node: -scores[node])
    sizes = [size for size in sizes if size <= len(ranked)]
    circuits = [
        circuit_of(setup, graph, sites, set(ranked[:size]), rest=rest) for rest in (False, True) for size in sizes
    ]
    result = measure_features(setup, sites, [*circuits, circuit_of(setup, graph, sites, set())])
    columns: dict[str, Any] = {"nodes": sizes}
    low, high = zip(*share_interval(result))
    for part, name in enumerate(("faithfulness", "completeness")):
        own = slice(part * len(sizes), (part + 1) * len(sizes))
        columns |= {name: shares(result)[own].tolist(), f"{name} low": low[own], f"{name} high": high[own]}
    return pd.DataFrame(columns)
