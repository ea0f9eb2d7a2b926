"""Are the edges between SAE features real, and what do they cost? On a model with trained SAEs, in one run.

    python -m benchmarks.train_saes --out DIR
    python -m benchmarks.sae_features --saes DIR                 stories260K, 110k tokens of TinyStories
    python -m benchmarks.sae_features --saes DIR --tokens 20000 --held-out 64 --prompts 4 --gradient-prompts 4

Learns a circuit of all adjacent layers, ablates and amplifies source features on held-out text, and prints sign
agreement, precision and rank correlation for CircuitLasso, gradient attribution and correlation: the strongest edges,
all kept edges, and persistence edges apart. Then the time of statistics and solve against forward passes
and encoding, and each layer's held-out R^2 beside its sparsity.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_circuitlasso as tcl
from benchmarks.data import data_folder, story_model, story_rows
from benchmarks.train_saes import load_saes
from tl_circuitlasso.models.adapter import adapt

GOALS = {
    "strongest: sign agreement": 0.98,
    "strongest: precision": 0.95,
    "kept: sign agreement": 0.9,
    "kept: Spearman |A|, effect": 0.7,
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_rows", 200)
    model = story_model(options.model)
    saes = load_saes(options.saes)
    train, held_out = texts(model, options.tokens, options.held_out, options.length)
    basis = tcl.SAEFeatures(saes, **json.loads(options.basis))
    began = time.perf_counter()
    graph = tcl.circuit_lasso(model, train, basis=basis, strength=_strength(options.strength), progress=False)
    whole = time.perf_counter() - began
    graphs = {"CircuitLasso": graph}
    if not options.alone:
        graphs["gradient"] = tcl.baselines.feature_gradient(
            model, saes, train[: options.held_out], graph, prompts=options.gradient_prompts
        )
        graphs["correlation"] = tcl.baselines.feature_correlation(model, saes, train, graph)
    print(f"{len(saes)} SAEs, {train.numel() - len(train)} tokens; edges of features: {len(graph.kept_edges())} kept")
    found = tcl.evaluate.edges(model, graphs, basis, held_out, prompts=options.prompts, strongest=options.strongest,
                               sample=options.sample, recall_sources=options.recall_sources, progress=False,
                               seed=options.seed)  # fmt: skip
    print(found.summary.round(3).to_string())
    if (found.table["port"] == "v").any():
        print(by_port(found.table).round(3).to_string())
    print(found.signs.round(3).to_string(), "\n")
    print(found.recall.round(3).to_string(), "\n")
    print("an effect is real with an interval free of zero, above what 95 % of pairs lie below that no method keeps:")
    print(pd.Series(found.nulls).round(4).to_string(), "\n")
    print(goals(found.summary).to_string(), "\n")
    print(layers(graph).round(4).to_string(), "\n")
    print(costs(model, saes, train, graph, whole).round(2).to_string())
    if options.json:
        options.json.write_text(found.table.to_json(orient="records", indent=1))
    return 0


def texts(model: Any, tokens: int, held_out: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to learn from and rows to test on, of the validation part of TinyStories, which no SAE has seen."""
    valid = data_folder("datasets", "tinystories", "valid_part_cased.txt").read_text(encoding="utf-8")
    rows = story_rows(model, valid, length=length)
    count = min(-(-tokens // (length - 1)), len(rows) - held_out)
    return rows[:count], rows[-held_out:]


def goals(summary: pd.DataFrame) -> pd.DataFrame:
    """The four figures of each method beside their goals."""
    columns = {}
    for method in summary.index.get_level_values("method").unique().drop("non-edges"):
        top, kept = summary.loc[method, "strongest", "all"], summary.loc[method, "kept", "all"]
        values = (top.sign_agreement, top.precision, kept.sign_agreement, kept.spearman)
        columns[method] = dict(zip(GOALS, values))
    return pd.DataFrame({"goal": GOALS, **columns}).round(3)


def by_port(table: pd.DataFrame) -> pd.DataFrame:
    """The kept edges at the child's own position (port "") and through attention ("v") apart."""
    kept: Any = table[table["set"] == "kept"]
    columns = {}
    for (method, port), some in kept.groupby(["method", "port"]):
        rank = some[["weight", "effect"]].abs().corr("spearman").iloc[0, 1]
        right = float((some["weight"] * some["effect"] > 0).mean())
        columns[method, port] = {
            "edges": len(some), "sign agreement": right, "precision": float(some["real"].mean()), "spearman": rank
        }  # fmt: skip
    return pd.DataFrame(columns).T


def layers(graph: tcl.AttributionGraph) -> pd.DataFrame:
    """Each pair of hooks: edges, edges per target, coefficients of the regression, its held-out R^2 and strength."""
    columns = ["source", "target", "edges", "edges_per_target", "coefficients", "held_out_r2", "strength"]
    return pd.DataFrame(graph.provenance["pairs"]).reindex(columns=columns).set_index(["source", "target"])


def costs(model: Any, saes: Any, tokens: torch.Tensor, graph: tcl.AttributionGraph, whole: float) -> pd.DataFrame:
    """Seconds for forward passes and encoding, measured apart, and for statistics and solve, as the graph reports."""
    adapter, basis = adapt(model), tcl.SAEFeatures(saes)
    encoders, forward, encoding = basis.encoders(), 0.0, 0.0
    for some in tokens.split(32):
        clock = time.perf_counter()
        acts = adapter.run(some, None, list(encoders))
        between = time.perf_counter()
        for hook, encoder in encoders.items():
            encoder.encode(acts[hook][:, 1:].flatten(0, 1))
        forward, encoding = forward + between - clock, encoding + time.perf_counter() - between
    parts = pd.DataFrame([pair["seconds"] for pair in graph.provenance["pairs"]]).sum()
    reads = {"replay": graph.provenance["seconds"]["replay"]}
    rows = {"forward passes": forward, "encoding": encoding, **reads, **parts, "circuit_lasso, all in all": whole}
    frame = pd.DataFrame({"seconds": rows})
    frame["of forward + encoding"] = frame["seconds"] / (forward + encoding)
    return frame


def _strength(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=Path, required=True, help="the folder that benchmarks.train_saes wrote")
    parser.add_argument("--model", type=Path, help="the model's folder; default: stories260K")
    parser.add_argument("--tokens", type=int, default=110_000, help="to learn from; default %(default)s")
    parser.add_argument("--held-out", type=int, default=512, help="prompts to intervene on; default %(default)s")
    parser.add_argument("--length", type=int, default=64, help="of a prompt; default %(default)s")
    parser.add_argument("--prompts", type=int, default=32, help="per tested source feature; default %(default)s")
    parser.add_argument(
        "--gradient-prompts", type=int, default=12, help="per source for gradient attribution; default %(default)s"
    )
    parser.add_argument("--strongest", type=int, default=100)
    parser.add_argument("--sample", type=int, default=10**6, help="kept edges drawn at random; default: all of them")
    parser.add_argument("--recall-sources", type=int, default=64, help="a pair of hooks; default %(default)s")
    parser.add_argument("--strength", default="auto")
    parser.add_argument("--basis", default="{}", help="further options of SAEFeatures as JSON")
    parser.add_argument("--alone", action="store_true", help="without gradient attribution and correlation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table of tested edges there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
