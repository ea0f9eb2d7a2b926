"""Commands that put graphs and methods to the test: evaluate and bench."""

import argparse
from pathlib import Path
from typing import Any

from tl_circuitlasso.cli.options import GRAPH, command, interactive, load_graphs


def add(commands: Any) -> None:
    """Declare the commands."""
    added = command(commands, evaluate)
    added.add_argument("model", help="a TransformerLens model name, or a local folder")
    added.add_argument("prompts", type=Path, help=".csv, .tsv or .jsonl with clean, corrupted, correct, incorrect")
    added.add_argument("graphs", type=Path, nargs="+", metavar="GRAPH", help=f"{GRAPH}; NAME=PATH to name it")
    added.add_argument("--metric", default="logit-diff")
    added.add_argument("--ablation", default="patch", choices=["patch", "mean", "mean-all", "zero", "optimal"])
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument("--out", type=Path, help="draw the curves to this .png or .svg")

    added = command(commands, bench)
    added.add_argument("suite", choices=["interpbench"])
    added.add_argument("folder", help="a folder of cases, or a hub repository such as cybershiptrooper/InterpBench")
    added.add_argument("--json", type=Path, help="write every figure of every case here")
    added.add_argument("--methods", help="comma-separated; default: all")
    added.add_argument("--truth", default="effective", choices=["effective", "flow", "gt"])
    added.add_argument("--seeds", type=int, default=1, help="run every method so often and give means")
    added.add_argument("--limit", type=int, help="at most so many prompts a case")


def evaluate(arguments: argparse.Namespace) -> None:
    """Put saved graphs to the test on the model: faithfulness, completeness and curves by intervention."""
    from tl_circuitlasso import evaluate as evaluation
    from tl_circuitlasso import plot as plots
    from tl_circuitlasso.models.loading import load_model

    model = load_model(arguments.model)
    pairs = evaluation.read_pairs(arguments.prompts, arguments.limit)
    metric = evaluation.metric_by_name(arguments.metric, model, pairs)
    report = evaluation.report(
        model, load_graphs(arguments.graphs), pairs.clean, pairs.corrupted, metric, arguments.ablation
    )
    print(report)
    if arguments.out:
        plots.curves(report.curves, arguments.out)
        print(f"wrote {arguments.out}")


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
        progress=interactive(arguments),
        json_path=arguments.json,
    )
    print(report)
