"""Every way to find a circuit in one table: known circuits, and indirect objects in a real language model.

    python -m benchmarks.rivals cases FOLDER                            models with a known truth, as in `bench`
    python -m benchmarks.rivals cases FOLDER --only 13 11 --prompts 100 --resamples 5
    python -m benchmarks.rivals smollm2 MODEL IOI.csv --prompts 16      SmolLM2-135M (a Hugging Face folder)

Of each method: SHD of its circuit (the methods that only rank are cut to the size of the truth by `top_k`), AUROC over
the candidates, CPR and CMD of the ranking patched from the corrupted prompts (always both: CPR alone can be gamed),
stability (mean pairwise Jaccard over resamples of the prompts, of circuits of the truth's size), cost in
forward-equivalents (a backward pass counts as two forward ones) per prompt, seconds and peak memory. Circuits are found
on the first half of the prompts; CPR and CMD are measured on the other half.
"""

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.bench.cases import Case, case_folders, limited, load_case
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.bench.methods import objective
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt

Metric = Callable[[Tensor, Tensor], Tensor]
Find = Callable[[Any, Tensor, Tensor, Metric], AttributionGraph]
BATCH = 256  # prompts per pass of the small models


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, prompts to find circuits on, other prompts to judge them on, and what is known.

    `methods` holds what finds a circuit, and the metric that it is given; `judge` is the metric on the fresh prompts.
    """

    name: str
    model: Any
    found: tuple[Tensor, Tensor]
    fresh: tuple[Tensor, Tensor]
    judge: Metric
    size: int
    methods: dict[str, tuple[Find, Metric]]
    truth: frozenset[tuple[str, str]] | None = None
    candidates: frozenset[tuple[str, str]] | None = None


def row(setting: Setting, name: str, resamples: int) -> dict[str, Any]:
    """One line of the table."""
    find, metric = setting.methods[name]
    graph, cost = measured(lambda: find(setting.model, *setting.found, metric), adapt(setting.model).device)
    chosen = bool(graph.kept.any()) and not bool(graph.kept.all())
    circuit = graph if chosen else graph.top_k(setting.size)
    line: dict[str, Any] = {"case": setting.name, "method": name, "edges": circuit.n_kept}
    if setting.truth is not None:
        found = evaluate.structure(circuit, setting.truth, setting.candidates)
        line |= {"SHD": found.shd, "empty": found.empty_shd, "AUROC": found.auroc}
    curve = evaluate.curve(setting.model, graph, *setting.fresh, setting.judge, absolute=True, batch_size=8)
    line |= {"CPR": curve.cpr, "CMD": curve.cmd}
    if resamples:
        options: Any = {"resamples": resamples, "k": setting.size}
        line["stability"] = evaluate.stability(find, setting.model, *setting.found, metric, **options).jaccard
    passes = graph.provenance
    line["forward-equivalents"] = passes["forward_passes"] + 2 * passes.get("backward_passes", 0.0)
    return line | {"seconds": cost.seconds, "MiB": cost.peak_mib}


NAMES = {
    "EAP-IG": "eap-ig",
    "EAP-GP": "eap-gp",
    "bootstrap EAP-IG": "bootstrap-eap-ig",
    "ACDC": "acdc",
    "magnitude": "magnitude",
    "random": "random",
}


def _named(key: str, batch_size: int) -> Find:
    def find(model: Any, clean: Tensor, corrupted: Tensor, metric: Metric) -> AttributionGraph:
        return baselines.method(key)(model, clean, corrupted, metric, batch_size=batch_size)

    return find


def _lasso(batch_size: int, **options: Any) -> Find:
    def find(model: Any, clean: Tensor, corrupted: Tensor, metric: Metric) -> AttributionGraph:
        return circuit_lasso(model, clean, batch_size=batch_size, progress=False, **options)

    return find


# ---- models with a known truth --------------------------------------------------------------------------------------


def case_setting(case: Case, prompts: int | None) -> Setting:
    """The first half of a case's prompts to find circuits on, the other half to judge; as `bench` gives metrics."""
    clean, corrupted = limited(case, prompts)
    half = len(clean) // 2
    found, fresh = ((clean[part], corrupted[part]) for part in (slice(half), slice(half, None)))
    distance, contrast = (objective(case, *found, kind) for kind in ("distance", "contrast"))  # type: ignore[arg-type]
    methods = {
        "CircuitLasso": (_lasso(BATCH, positions=slice(case.first, None)), distance),
        "EAP": (_named("eap", BATCH), contrast),
        **{name: (_named(key, BATCH), distance) for name, key in NAMES.items()},
    }
    judge = objective(case, *fresh, "distance")
    return Setting(case.name, case.model, found, fresh, judge, len(case.truth), methods, case.truth, case.candidates)


# ---- a real language model ------------------------------------------------------------------------------------------


def smollm2_setting(folder: Path, table: Path, prompts: int) -> Setting:
    """Indirect objects and twins that repeat another name; half of the prompts to find circuits on."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M",
        hf_model=LlamaForCausalLM.from_pretrained(folder),
        tokenizer=tokenizer,
        device="cpu",
    )
    clean, corrupted, right, wrong = _pairs(table, tokenizer, prompts)
    parts = slice(len(clean) // 2), slice(len(clean) // 2, None)
    metric, judge = (evaluate.logit_diff(right[part], wrong[part]) for part in parts)
    target = LogitDiff(right[parts[0]], wrong[parts[0]])
    methods = {
        "CircuitLasso": (_lasso(8, target=target, positions="last"), metric),
        "EAP": (_named("eap", 8), metric),
        **{name: (_named(key, 8), metric) for name, key in NAMES.items() if name != "ACDC"},  # a pass for each edge
    }
    found, fresh = ((clean[part], corrupted[part]) for part in parts)
    return Setting("SmolLM2 indirect objects", model, found, fresh, judge, 600, methods)


def _pairs(table: Path, tokenizer: Any, prompts: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Prompt pairs of one length whose names are single tokens: the right name is the one that isn't repeated."""
    chosen: dict[int, list[tuple[list[int], list[int], int, int]]] = {}
    with table.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            words = line["clean"].split()
            repeated = words[words.index("and") + 3 :]
            names = [words[words.index("and") - 1], words[words.index("and") + 1]]
            wrong = next((name for name in names if name in repeated), None)
            if wrong is None:
                continue
            right = names[1 - names.index(wrong)]
            ids = [tokenizer.encode(" " + name, add_special_tokens=False) for name in (right, wrong)]
            both = [tokenizer.encode(line[key], add_special_tokens=False) for key in ("clean", "corrupted")]
            if len(ids[0]) == len(ids[1]) == 1 and len(both[0]) == len(both[1]):
                chosen.setdefault(len(both[0]), []).append((*both, ids[0][0], ids[1][0]))
    rows = max(chosen.values(), key=len)[:prompts]
    clean, corrupted = (torch.tensor([one[side] for one in rows]) for side in (0, 1))
    return clean, corrupted, [one[2] for one in rows], [one[3] for one in rows]


# ---- the table ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "smollm2"))
    parser.add_argument("folder", type=Path, help="the cases, or the model")
    parser.add_argument("table", type=Path, nargs="?", help="the prompts of smollm2: a table with clean and corrupted")
    parser.add_argument("--only", nargs="+", help="some of the cases, by number")
    parser.add_argument("--methods", nargs="+", help="some of the methods, by name")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=0, help="for the stability; 0 leaves it out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "smollm2":
        settings = [smollm2_setting(options.folder, options.table, options.prompts)]
    else:
        folders = [f for f in case_folders(options.folder) if not options.only or f.name.split("_")[-1] in options.only]
        settings = [case_setting(load_case(folder), options.prompts) for folder in folders]
    if options.what == "smollm2" and options.resamples:
        parser.error("--resamples: for the known circuits only, which take seconds")
    lines = []
    for setting in settings:
        for name in setting.methods:
            if not options.methods or name in options.methods:
                lines.append(row(setting, name, options.resamples))
                print(pd.DataFrame(lines[-1:]).to_string(index=False, header=len(lines) == 1), flush=True)
    frame = pd.DataFrame(lines)
    print(f"\nMeans over {frame['case'].nunique()} cases:")
    print(frame.drop(columns="case").groupby("method", sort=False).mean().to_string(float_format="{:.3f}".format))
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
