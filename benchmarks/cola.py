"""Feature circuits on CoLA's sentences: what becomes of concepts, and faithfulness by nodes and by edges.

    python -m benchmarks.cola --model MODEL --saes DIR                    trains SAEs into DIR where it has none
    python -m benchmarks.cola --saes DIR --hooks blocks.1.hook_resid_post blocks.3.hook_resid_post   stories260K

SAEs and circuits are of the training sentences, cut to rows of one length; what is measured is of the in-domain
development sentences: the mean log-probability of the next token, everything outside the circuit ablated by its mean at
the same position, what the SAEs miss kept. Three rankings of the same features:

    circuit   CircuitLasso's edges, |score| followed to the target
    SHIFT     integrated gradients of features, and gradients between them times the integrated gradient of their end
    random    features and edges drawn at random

Circuits of so many nodes keep the features of largest effect; circuits of so many edges grow back from the target. Of
each are printed faithfulness (1: does what the model does) and completeness (0: nothing is left without it).
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

import tl_circuitlasso as tcl
from benchmarks.data import STORY_END, data_folder, story_model, story_rows
from benchmarks.train_saes import Recipe, load_saes, train_all
from tl_circuitlasso.baselines.features import hook_pairs
from tl_circuitlasso.evaluate.faithfulness import share_interval, shares
from tl_circuitlasso.evaluate.feature_edges import edge_scores, in_order, wiring_of
from tl_circuitlasso.evaluate.features import circuit_of, feature_sites, measure_features, node_scores
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.selection import Edges, grown

TWINS = 0.8  # correlation of two features' codes above which they are twins


def sentences(model: Any, part: str, length: int) -> Int[Tensor, "batch pos"]:
    """CoLA's sentences as rows of `length` tokens, BOS first; what is left over of a sentence is left out."""
    path = data_folder("datasets", "cola", f"{part}.tsv")
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row[3] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return story_rows(model, STORY_END.join(texts), length=length)


def shift(model: Any, like: AttributionGraph, basis: tcl.SAEFeatures, rows: Tensor, options: Any) -> AttributionGraph:
    """Gradients between features, and integrated gradients of features as edges to the target and as contributions."""
    prompts = rows[: options.gradient_rows]
    inner = tcl.baselines.feature_gradient(model, basis, prompts, like, prompts=options.gradient_prompts)
    metric = tcl.evaluate.next_token(prompts)
    effects = tcl.evaluate.feature_attribution(
        model, like, prompts, None, metric, "mean", saes=basis.saes, steps=options.steps
    )
    target = like.index.names[-1]
    ends = {name: effects[name] for name, _ in _into_target(like)}
    scores = dict(zip(_ends(inner), inner.score.tolist())) | {(name, target): value for name, value in ends.items()}
    info = {name: {"contribution": effects[name]} for name in like.index.names if name in effects}
    return AttributionGraph.from_edges(like.index, scores, node_info=info)


def _ends(graph: AttributionGraph) -> list[tuple[str, str]]:
    names = graph.index.names
    return [(names[s], names[t]) for s, t in zip(graph.source.tolist(), graph.target.tolist())]


def _into_target(graph: AttributionGraph) -> list[tuple[str, str]]:
    """Every feature of the hooks that feed the target, with the target."""
    last = len(graph.index) - 1
    blocks = graph.index.block_of[graph.source[graph.target == last]].unique().tolist()
    own = [graph.index.blocks[block] for block in blocks]
    return [(name, graph.index.names[last]) for block in own if block.features is not None for name in block.names]


def at_random(like: AttributionGraph, seed: int) -> AttributionGraph:
    """As many edges between the same hooks, drawn at random, all of random size."""
    random = torch.Generator().manual_seed(seed)
    block, found = like.index.block_of, {}
    pairs, counts = torch.stack([block[like.source], block[like.target]], 1).unique(dim=0, return_counts=True)
    for (first, last), count in zip(pairs.tolist(), counts.tolist()):
        sizes = [like.index.blocks[number].size for number in (first, last)]
        cells = torch.randperm(sizes[0] * sizes[1], generator=random)[:count].tolist()
        names = [like.index.blocks[number].names for number in (first, last)]
        for cell, score in zip(cells, torch.rand(count, generator=random).tolist()):
            found[names[0][cell // sizes[1]], names[1][cell % sizes[1]]] = score
    whole = torch.rand(len(like.index), generator=random).tolist()
    info = {name: {"contribution": value} for name, value in zip(like.index.names, whole) if "#" in name}
    return AttributionGraph.from_edges(like.index, found, node_info=info)


def figures(setup: Experiment, graph: AttributionGraph, nodes: list[int], edges: list[int]) -> pd.DataFrame:
    """Faithfulness and completeness of one ranking's circuits of so many nodes, and of so many edges."""
    sites = in_order(graph, feature_sites(graph, setup.adapter, setup.saes))
    scores = node_scores(graph)
    best = sorted(scores, key=lambda node: -scores[node])
    order = grown(Edges(graph.source, graph.target, graph.index.ranks), edge_scores(graph))
    rows, runs = [], []
    for count in nodes:
        some = set(best[:count])
        runs += [circuit_of(setup, graph, sites, some, rest=rest) for rest in (False, True)]
        rows.append({"by": "nodes", "asked": count, "nodes": len(some), "edges": None})
    for count in edges:
        mask = torch.zeros(len(graph.score), dtype=torch.bool)
        mask[order[:count]] = True
        kept = graph.keep(mask)
        runs += [wiring_of(setup, kept, sites, rest=rest) for rest in (False, True)]
        inside = scores.keys() & kept.kept_nodes()
        rows.append({"by": "edges", "asked": count, "nodes": len(inside), "edges": kept.n_kept})
    measured = measure_features(setup, sites, [*runs, circuit_of(setup, graph, sites, set())])
    found, ends = shares(measured).tolist(), share_interval(measured)
    table = pd.DataFrame(rows).assign(faithfulness=found[::2], completeness=found[1::2])
    return table.assign(low=[low for low, _ in ends[::2]], high=[high for _, high in ends[::2]])


def fates(graph: AttributionGraph, correlation: AttributionGraph) -> pd.DataFrame:
    """By pair of hooks: features with a twin at the next one, and how many of them are carried on or called dropped."""
    found = tcl.apps.concepts(graph)
    carried = {node for chain in found.persistence["nodes"] for node in chain[:-1]}
    dropped, rows = set(found.dropping["node"]), []
    alike = [ends for ends, r in zip(_ends(correlation), correlation.score.tolist()) if r > TWINS]
    for first, last in hook_pairs(graph):
        names = {name for name in graph.index.names if name.startswith(f"{first}#")}
        twins = {source for source, target in alike if source in names and target.startswith(f"{last}#")}
        rows.append({
            "from": first, "to": last, "features": len(names), "with a twin": len(twins),
            "twins carried": len(twins & carried), "twins dropped": len(twins & dropped),
            "all dropped": len(dropped & names),
        })  # fmt: skip
    print(found)
    for name in ("persistence", "merging", "dropping"):
        columns = {"persistence": ["nodes", "score", "label"], "merging": ["node", "parents", "score", "label"]}
        shown = getattr(found, name)[columns.get(name, ["node", "carried", "frequency", "label"])].head(3)
        print(f"\n{name}\n{shown.to_string(index=False)}")
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pd.set_option("display.width", 200, "display.max_columns", 30, "display.max_colwidth", 90)
    model = story_model(options.model)
    train, test = (sentences(model, part, options.length) for part in ("in_domain_train", "in_domain_dev"))
    if not any(Path(options.saes).glob("*/cfg.json")):
        given = {key: getattr(options, key) for key in ("features", "active", "tokens", "seed")}
        made = train_all(model, options.hooks, train, test, replace(Recipe(batch=512), **given), options.saes)
        print(made.round(3).to_string(), flush=True)
    saes = load_saes(options.saes)
    basis = tcl.SAEFeatures(saes)
    clock = time.perf_counter()
    graph = tcl.circuit_lasso(model, train[: options.rows], basis=basis, progress=False)
    seconds = {"circuit": time.perf_counter() - clock}
    print(f"{options.rows} rows of {options.length} tokens; {graph.n_kept} kept edges", flush=True)
    alike = tcl.baselines.feature_correlation(model, basis, train[: options.rows], graph, progress=False)
    print(fates(graph, alike).to_string(index=False), "\n", flush=True)
    clock = time.perf_counter()
    graphs = {"circuit": graph, "SHIFT": shift(model, graph, basis, train, options)}
    seconds["SHIFT"] = time.perf_counter() - clock
    graphs["random"] = at_random(graph, options.seed)
    judged = test[: options.prompts]
    setup = tcl.Experiment(
        model, judged, None, tcl.evaluate.next_token(judged), "mean", saes=saes, error="keep", progress=False
    )
    for name, one in graphs.items():
        table = figures(setup, one, options.nodes, options.edges)
        print(f"{name}{f', {seconds[name]:.0f} s' if name in seconds else ''}")
        print(table.round(3).to_string(index=False), "\n", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=Path, required=True, help="a folder of SAEs, one folder a hook")
    parser.add_argument("--model", type=Path, help="the model's folder; default: stories260K")
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 3)]
    parser.add_argument("--hooks", nargs="+", default=hooks, help="of SAEs trained here; default %(default)s")
    parser.add_argument("--features", type=int, default=1024, help="of an SAE trained here; default %(default)s")
    parser.add_argument("--active", type=int, default=16, help="of them per token; default %(default)s")
    parser.add_argument("--tokens", type=int, default=300_000, help="it is trained on; default %(default)s")
    parser.add_argument("--length", type=int, default=10, help="of a row, BOS included; default %(default)s")
    parser.add_argument("--rows", type=int, default=2000, help="to find the circuit with; default %(default)s")
    parser.add_argument("--gradient-rows", type=int, default=200, help="rows for SHIFT; default %(default)s")
    parser.add_argument("--gradient-prompts", type=int, default=8, help="of them per feature; default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="of integrated gradients; default %(default)s")
    parser.add_argument("--prompts", type=int, default=32, help="held-out rows to judge on; default %(default)s")
    parser.add_argument("--nodes", type=int, nargs="+", default=[25, 100, 400], help="default %(default)s")
    parser.add_argument("--edges", type=int, nargs="+", default=[50, 200, 800], help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
