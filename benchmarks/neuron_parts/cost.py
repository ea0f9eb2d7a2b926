"""What finding neurons takes, by the number of pairs: passes, processor time and memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.neuron_parts.pairs import Agreement, agreement_pairs
from tl_circuitlasso.bench.measure import Cost, measured
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt

BATCH = 32  # prompts of a bare forward pass, as the methods take them
WARM = 2  # pairs on which a method runs before its time counts

Method = Callable[[Any, Agreement], AttributionGraph]


def costs(
    model: Any, folder: Path, name: str, methods: dict[str, Method], counts: Sequence[int], seed: int = 0
) -> pd.DataFrame:
    """Each method at each number of pairs; a forward-equivalent is a bare forward pass of the same prompts."""
    rows: list[dict[str, Any]] = []
    for method, make in methods.items():
        for count in counts:
            data = agreement_pairs(model, folder / f"{name}_train.json", count, seed)
            graph, cost, equivalents = timed(model, make, data)
            rows.append(
                {
                    "method": method,
                    "pairs": len(data.clean),
                    "forward passes": graph.provenance.get("forward_passes"),
                    "sweeps or backward passes": passes(graph) - (graph.provenance.get("forward_passes") or 0.0),
                    "forward-equivalents": equivalents,
                    "MiB": round(cost.peak_mib or 0.0),
                }
            )
    table = pd.DataFrame(rows)
    print(f"\n{name}: passes per prompt, processor time in bare forward passes, peak memory above the model's")
    print(table.round(1).to_string(index=False), flush=True)
    return table


def timed(model: Any, make: Method, data: Agreement) -> tuple[AttributionGraph, Cost, float]:
    """A method's graph, what it took once warm, and that in bare forward passes."""
    few = Agreement(*(part[:WARM] for part in (data.clean, data.corrupted, data.correct, data.incorrect)))
    bare_pass(model, few)
    make(model, few)
    graph, cost = measured(lambda: make(model, data))
    return graph, cost, cost.cpu_seconds / max(measured(lambda: bare_pass(model, data))[1].cpu_seconds, 1e-9)


def bare_pass(model: Any, data: Agreement) -> None:
    """One forward pass of the prompts, nothing kept."""
    with torch.no_grad():
        for tokens in data.clean.split(BATCH):
            adapt(model).run(tokens, None, ["logits"])


def passes(graph: AttributionGraph) -> float:
    """Forward passes per prompt, sweeps and backward passes counted alike."""
    parts = ("forward_passes", "backward_passes", "sweeps")
    return round(sum(graph.provenance.get(part) or 0.0 for part in parts), 1)
