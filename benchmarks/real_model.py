"""Circuits of a real model, every method on the same prompts: how faithful, how large, how steady, at what cost.

    python -m benchmarks.real_model MODEL                              a Hugging Face name or folder, four tasks
    python -m benchmarks.real_model MODEL --tasks ioi,capitals --prompts 64 --json FILE --plot FILE.svg
    python -m benchmarks.real_model MODEL --templates held-out         on templates, names and texts kept for checking
    python -m benchmarks.real_model MODEL --judge held-out             found on seen prompts, judged on others
    python -m benchmarks.real_model MODEL --resamples 20               how alike circuits of half the prompts are
    python -m benchmarks.real_model --rehearse                         all of it in short, on stories260K, in seconds

Without MODEL it's stories260K of the shared data. Tasks: indirect objects (--third: counterparts with a third name),
agreement of subject and verb, capitals of states, the next token of a story; and by name pronouns, opposites, plurals,
languages, sequences, repeats (real/makers.py). Only prompts that the model gets right.

Circuits of the strongest edges by |score| and by signed score, grown from the target so that every edge counts (--rule
top: wherever they lie), are judged at MIB's sizes: .1 to 50 % of all edges, and the whole model, which costs nothing.
What cut edges carry: what their source does on the counterpart ("patch"), its mean over the prompts ("mean"), or what
it does on another prompt of the task ("resample"). Cost is processor time over that of bare forward passes on the same
prompts, run just before and after.

Judging a ranking takes nine forward passes over the prompts, so five methods by both rankings under three ablations
take about 250: an hour on one core for 64 prompts and 135M parameters. --methods, --ablations and --prompts make it
less; every task is printed, and --json written, as soon as it's done.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import data_folder, story_model
from benchmarks.real import measure, methods, report, tasks, wording
from benchmarks.real.measure import say
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.loading import load_model

REHEARSAL = {"prompts": 6, "resamples": 2}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, draw and save."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rehearse:
        parser.set_defaults(**REHEARSAL)
        options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        return _measure(options)
    except InputError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace) -> int:
    model = load_model(options.model) if options.model else story_model(data_folder("models", "stories260K"))
    if options.device != "cpu":
        model.to(options.device)
    results, left_out = [], {}
    for name in options.tasks.split(","):
        began = time.perf_counter()
        try:
            results.append(one_task(model, name, options))
        except InputError as error:
            left_out[name] = str(error)
            print(f"## {name}\n\nleft out: {error}\n", flush=True)
            continue
        print(f"{report.tables(results[-1])}\n\n({time.perf_counter() - began:.0f} s)\n", flush=True)
        if options.json:
            _save(options, results, left_out)
    if options.json:
        _save(options, results, left_out)
    if options.plot and results:
        report.draw(results, options.plot)
    return 0 if results else 1


def one_task(model: Any, name: str, options: argparse.Namespace) -> report.Result:
    """Everything that is measured on one task."""
    say(f"{name}: prompts")
    asked: dict[str, Any] = {"prompts": options.prompts, "seed": options.seed, "third": options.third}
    task = tasks.task(model, name, split=options.templates, **asked)
    judged = tasks.task(model, name, split=options.judge, **asked) if options.judge else task
    some, ablations = methods.chosen(options.methods), options.ablations.split(",")
    found = measure.find(model, task, some, options.seed)
    curves = {
        ablation: measure.curves(model, found.graphs, judged, ablation, options.seed, options.rule)
        for ablation in ablations
    }
    circuits = measure.circuits(model, found, some, judged, ablations, options.seed)
    stability = {
        method.name: measure.stability(model, method, task, samples=options.resamples, seed=options.seed)
        for method in some
        if options.resamples and method.name in found.graphs
    }
    return report.Result(task, judged, curves, circuits, stability, found.spent, found.left_out)


def _save(options: argparse.Namespace, results: list[report.Result], left_out: dict[str, str]) -> None:
    asked = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    whole = {"arguments": asked, "tasks": [report.plain(result) for result in results], "left_out": left_out}
    options.json.write_text(json.dumps(whole, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name, or a folder; default: stories260K")
    parser.add_argument(
        "--tasks", default=",".join(tasks.USUAL), help=f"among {', '.join(tasks.TASKS)}; default %(default)s"
    )
    parser.add_argument("--prompts", type=int, default=64, help="that the model gets right; default %(default)s")
    parser.add_argument("--methods", default=",".join(methods.DEFAULT), help=f"among {', '.join(methods.METHODS)}")
    parser.add_argument("--ablations", default=",".join(measure.ABLATIONS), help="default %(default)s")
    parser.add_argument(
        "--templates", default="seen", choices=wording.SPLITS, help="of the prompts; default %(default)s"
    )
    parser.add_argument(
        "--judge", choices=wording.SPLITS, help="judge on prompts of this kind; default: on the same ones"
    )
    parser.add_argument(
        "--rule",
        default="greedy",
        choices=("greedy", "top"),
        help="how circuits are made of scores; default %(default)s",
    )
    parser.add_argument("--third", action="store_true", help="counterparts of indirect objects have a third name")
    parser.add_argument("--resamples", type=int, default=0, help="half-samples for the stability of circuits")
    parser.add_argument("--rehearse", action="store_true", help="few prompts and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a figure of all curves, .svg or another kind")
    return parser


if __name__ == "__main__":
    sys.exit(main())
