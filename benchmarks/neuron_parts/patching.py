"""How scores go with exact patching: of neurons one at a time, and of MLP outputs at one position."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.neuron_parts.pairs import Agreement, agreement_pairs
from tl_circuitlasso import baselines
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.neuron_patch import patched_neurons, plain_run
from tl_circuitlasso.models.neuron_scores import Batch, ByGradient, BySweep, Scoring, products
from tl_circuitlasso.models.neuron_sweep import RELP, SECANT

Way = BySweep | ByGradient
PATCHED: dict[str, Way] = {
    "RelP": BySweep(RELP, alone=True),
    "RelP, attention moving": BySweep(replace(RELP, attention=False), alone=True),
    "RelP, whole products": BySweep(replace(RELP, half=False), alone=True),
    "gradient x activation": ByGradient(),
    "CircuitLasso": BySweep(SECANT, alone=False),
}
SMALL = "exact, a tenth of the step"


def patching(model: Any, folder: Path, names: Sequence[str], count: int, prompts: int) -> pd.DataFrame:
    """How scores go with what exact patching does (Pearson, Spearman), in several samples.

    Neurons one at a time, at all positions together: half of them RelP's foremost, half drawn from all of the model's;
    the same after a tenth of the step to the corrupted run, where effects are linear still. Then the outputs of whole
    MLPs, one layer and one position at a time: what RelP's authors correlate.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        data = agreement_pairs(model, folder / f"{name}_train.json", prompts)
        found = {method: contributions(model, data, way) for method, way in PATCHED.items()}
        samples = _neurons_patched(model, data, {method: own.sum(0) for method, own in found.items()}, count)
        samples["MLP outputs"] = _outputs_patched(model, data, {method: own.sum(2).T for method, own in found.items()})
        samples["MLP outputs, m0 left out"] = samples["MLP outputs"].iloc[data.clean.shape[1] :]
        for method in PATCHED:
            row: dict[str, Any] = {"set": name, "method": method}
            for sample, table in samples.items():
                row[sample] = table[method].corr(table.exact)
                row[f"{sample}, ranks"] = table[method].corr(table.exact, "spearman")
            rows.append(row)
        print(f"\n{name}: {count} neurons, {len(data.clean)} pairs; Pearson and rank correlation")
        print(pd.DataFrame(rows[-len(PATCHED) :]).round(3).T.to_string(header=False), flush=True)
        print(samples["both"].sort_values("exact", key=abs, ascending=False)[:8].round(3).to_string(), flush=True)
    return pd.DataFrame(rows)


def contributions(model: Any, data: Agreement, way: Way) -> Float[Tensor, "pos layer neuron"]:
    """Each neuron's mean contribution at each position, against the corrupted partner."""
    scoring = Scoring(adapt(model), lambda logits, batch: data.metric(logits, batch.rows), "neuron", "corrupted")
    batch = Batch(
        data.clean, data.corrupted, torch.ones_like(data.clean, dtype=torch.bool), torch.arange(len(data.clean))
    )
    found = {key: part.mean(0) for _, key, part in products(scoring, lambda: iter([batch]), len(data.clean), way)}
    return torch.stack([found[key] for key in scoring.keys], dim=1)


def _neurons_patched(
    model: Any, data: Agreement, scores: Mapping[str, Float[Tensor, "layer neuron"]], count: int
) -> dict[str, pd.DataFrame]:
    """What patching does to the metric and what each score says, by sample of neurons."""
    width = scores["RelP"].shape[1]
    foremost = scores["RelP"].flatten().abs().argsort(descending=True)[: count // 2].tolist()
    drawn = random.Random(0).sample(range(scores["RelP"].numel()), count - count // 2)
    nodes = sorted({*foremost, *drawn})
    names = [f"m{node // width}#{node % width}" for node in nodes]
    exact = {}
    for column, step in (("exact", 1.0), (SMALL, 0.1)):
        graph = baselines.exact_neurons(
            model, data.clean, data.corrupted, data.metric, neurons=names, step=step, progress=True
        )
        exact[column] = graph.score.tolist()
    table = pd.DataFrame(exact | {way: own.flatten()[nodes].tolist() for way, own in scores.items()}, index=names)
    return {
        "foremost": table.loc[[node in set(foremost) for node in nodes]],
        "drawn": table.loc[[node in set(drawn) for node in nodes]],
        "both": table,
        "both, m0 left out": table.loc[[node >= width for node in nodes]],
        "both, a tenth of the step": table.assign(exact=table[SMALL]),
    }


def _outputs_patched(model: Any, data: Agreement, scores: Mapping[str, Float[Tensor, "layer pos"]]) -> pd.DataFrame:
    """The same of whole MLPs, by layer and position."""
    adapter, pos = adapt(model), data.clean.shape[1]
    rows, mask = torch.arange(len(data.clean)), torch.ones_like(data.clean, dtype=torch.bool)
    plain = plain_run(adapter, data.clean, data.corrupted, mask, range(adapter.shape.n_layers))
    whole, which = data.metric.each(plain.logits, rows).mean(), torch.eye(pos, dtype=torch.bool)[..., None]
    exact = []
    for layer in range(adapter.shape.n_layers):
        logits = patched_neurons(adapter, plain, layer, which.expand(-1, -1, adapter.shape.d_mlp))
        exact += [float(whole - data.metric.each(one, rows).mean()) for one in logits]
    return pd.DataFrame({"exact": exact} | {method: own.flatten().tolist() for method, own in scores.items()})
