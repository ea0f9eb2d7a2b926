"""Commands that put graphs and methods to the test: evaluate and bench."""

import argparse
from inspect import signature
from pathlib import Path
from typing import Any

from tl_circuitlasso.cli.judging import judged, say_other_questions
from tl_circuitlasso.cli.options import (
    ABLATION,
    GRAPH,
    METRIC,
    MODEL,
    PICTURES,
    command,
    interactive,
    load_graphs,
    saes,
    writable,
    writable_file,
)
from tl_circuitlasso.errors import InputError

PAIRS = "pairs: .csv, .tsv, .json or .jsonl with clean, corrupted, correct, incorrect; demo: the bundled model's own"


def add(commands: Any) -> None:
    """Declare the commands."""
    added = command(commands, evaluate)
    added.add_argument("model", help=MODEL)
    added.add_argument("prompts", type=Path, help=PAIRS)
    added.add_argument("graphs", type=Path, nargs="+", metavar="GRAPH", help=f"{GRAPH}; NAME=PATH to name it")
    added.add_argument("--metric", default="logit-diff", help=METRIC)
    added.add_argument(
        "--ablation", default="patch", choices=["patch", "mean", "mean-all", "zero", "optimal"], help=ABLATION
    )
    added.add_argument(
        "--sae", action="append", metavar="HOOK=PATH", default=[],
        help="the SAE behind a graph's features: a folder of SAELens, or release/sae_id; may be repeated",
    )  # fmt: skip
    added.add_argument(
        "--error", default="graph", choices=["graph", "keep", "remove"],
        help="what becomes of the part that SAEs miss (default: it's a node where the graph has one for it)",
    )  # fmt: skip
    added.add_argument(
        "--rest", default="ablate", choices=["ablate", "keep"],
        help="what becomes of features that a graph has no node for (default: they are outside of the circuit)",
    )  # fmt: skip
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument("--out", type=Path, help="draw the curves to this .png or .svg")

    added = command(commands, baseline)
    added.add_argument("method", metavar="METHOD", help="eap-ig, acdc, exact, ...: a name of baselines.METHODS")
    added.add_argument("model", help=MODEL)
    added.add_argument("prompts", type=Path, help=PAIRS)
    added.add_argument("--metric", default="logit-diff", help=METRIC)
    added.add_argument("--steps", type=int, help="steps of integrated gradients (default: the method's own)")
    added.add_argument("--budget", type=int, help="of lasso+confirm: measure so many edges at most, the weakest first")
    added.add_argument("--top", type=int, help="keep the N strongest edges (default: all, as a ranking)")
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument("--out", type=Path, default=Path("baseline"), help="folder to write to (default: baseline)")

    added = command(commands, bench)
    added.add_argument("suite", choices=["interpbench"])
    added.add_argument("folder", help="a folder of cases, or a hub repository such as cybershiptrooper/InterpBench")
    added.add_argument("--json", type=Path, help="write every figure of every case here")
    added.add_argument("--methods", help="comma-separated; default: all")
    added.add_argument("--truth", default="effective", choices=["effective", "flow", "gt"])
    added.add_argument("--seeds", type=int, default=1, help="run every method so often and give means")
    added.add_argument("--limit", type=int, help="at most so many prompts a case")
    added.add_argument("--budget", type=int, help="of circuit-lasso+confirm: measure so many edges a case at most")


def evaluate(arguments: argparse.Namespace) -> None:
    """Put saved graphs to the test on the model: faithfulness, completeness and curves by intervention."""
    from tl_circuitlasso import evaluate as evaluation
    from tl_circuitlasso import plot as plots

    if arguments.out:
        writable_file(arguments.out, PICTURES)
    asked = judged(arguments.model, arguments.prompts, arguments.metric, arguments.limit)
    graphs = load_graphs(arguments.graphs)
    options = {**_features(arguments), "progress": interactive(arguments)}
    report = evaluation.report(
        asked.model, graphs, asked.clean, asked.corrupted, asked.metric, arguments.ablation, **options
    )
    print(report)
    say_other_questions(graphs, arguments.metric, arguments.ablation)
    if arguments.out:
        plots.curves(report.curves, arguments.out)
        print(f"Wrote {arguments.out}. Open it in a picture viewer")


def baseline(arguments: argparse.Namespace) -> None:
    """Score a model's edges by another method, such as EAP-IG, or confirm the regression's: in a graph like ours."""
    from tl_circuitlasso import baselines

    if arguments.top is not None and arguments.top < 1:
        raise InputError(f"`--top` is {arguments.top}: how many edges to keep is a whole number, 1 or more")
    method, options = baselines.method(arguments.method), {"progress": interactive(arguments)}
    if arguments.budget is not None and "budget" not in signature(method).parameters:
        raise InputError(
            f"`--budget` is for lasso+confirm, which measures edges one by one: {arguments.method} doesn't"
        )
    given = {"steps": arguments.steps, "budget": arguments.budget}
    options |= {name: value for name, value in given.items() if value is not None}
    out = writable(arguments.out)
    asked = judged(arguments.model, arguments.prompts, arguments.metric, arguments.limit)
    graph = method(asked.model, asked.clean, asked.corrupted, asked.metric, **options)
    graph = graph if arguments.top is None else graph.top_k(arguments.top)
    graph.save(out)
    print(f"Explained: {arguments.metric}, {_where(graph)}")
    print(graph)
    print(f"Wrote graph.json and graph.safetensors to {out}; draw it with circuitlasso plot {out} --out graph.html")


def _where(graph: Any) -> str:
    """What else a graph's record says of the question: prompts, positions and the unit of scores."""
    known = graph.provenance
    told = {"positions": known.get("positions"), "score": known.get("unit")}
    parts = [f"{name}: {said}" for name, said in told.items() if said is not None]
    return ", ".join([f"{known.get('prompts')} prompt pairs", *parts])


def _features(arguments: argparse.Namespace) -> dict[str, Any]:
    """What graphs of SAE features need beside the model."""
    if not arguments.sae:
        return {}
    from tl_circuitlasso.models.sae import load_sae

    loaded = {hook: load_sae(path) for hook, path in saes(arguments.sae).items()}
    return {"saes": loaded, "error": arguments.error, "rest": arguments.rest}


def bench(arguments: argparse.Namespace) -> None:
    """Run methods over a folder of models with known circuits and print one table."""
    from tl_circuitlasso import bench as benches

    methods = arguments.methods.split(",") if arguments.methods else None
    report = benches.interpbench(
        arguments.folder,
        methods,
        truth=arguments.truth,
        prompts=arguments.limit,
        seeds=arguments.seeds,
        budget=arguments.budget,
        progress=interactive(arguments),
        json_path=arguments.json,
    )
    print(report)
