"""Train transformers whose circuit is known.

    python benchmarks/train_siit.py demo --out DIR                # the model bundled with the package
    python benchmarks/train_siit.py sums --layers 4 --heads 8 --d-model 64 --out DIR
    python benchmarks/train_siit.py --help                        # tasks and settings

A case folder holds config.json, model.safetensors, edges.json, meta.json and data.safetensors, and can be given to
`circuitlasso bench interpbench`. The exit status is 1 where exact patching doesn't confirm the planted circuit.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.siit.cases import write_case, write_demo
from benchmarks.siit.certify import Certificate, certify
from benchmarks.siit.library import TASKS
from benchmarks.siit.network import Shape
from benchmarks.siit.tasks import Task, place
from benchmarks.siit.train import Recipe, Trained, train

DEMO_PLACEMENT = {
    "input": "input",
    "duplicate token": "a0.h1",
    "name": "m0",
    "S-inhibition": "a1.h2",
    "name mover": "a2.h0",
    "output": "logits",
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    torch.set_num_threads(options.threads)
    demo = options.task == "demo"
    task = TASKS["names" if demo else options.task]()
    shape = _shape(task, options)
    placement = DEMO_PLACEMENT if demo else place(task, shape.layers, shape.heads, options.seed)
    trained = train(task, placement, shape, _recipe(options), progress=sys.stderr.isatty())
    proof = certify(trained)
    (write_demo if demo else write_case)(trained, proof, options.out)
    print(report(trained, proof))
    return 0 if proof.certified else 1


def report(trained: Trained, proof: Certificate) -> str:
    """What was planted, how well it holds, and how clear it is."""
    lines = [
        f"{trained.task.name}: {trained.task.description}",
        f"accuracy {proof.accuracy:.4f}, all other edges patched {proof.strict:.4f}, {trained.seconds:.0f} s",
        *(f"  {u} -> {v}  effect {proof.effects[u, v]:.4g} nats" for u, v in proof.true_edges),
        f"weakest planted edge over strongest other edge: {proof.gap:.3g}",
        f"other edges above the threshold: {proof.false_effective_edges or 'none'}",
        f"planted edges below the threshold: {proof.idle_true_edges or 'none'}",
    ]
    return "\n".join(lines)


def _shape(task: Task, options: argparse.Namespace) -> Shape:
    return Shape(
        layers=options.layers,
        heads=options.heads,
        d_model=options.d_model,
        d_mlp=options.d_mlp or 2 * options.d_model,
        vocabulary=len(task.vocabulary),
        outputs=len(task.classes),
        length=len(task.weight),
        norm=None if options.norm == "none" else options.norm,
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(steps=options.steps, batch=options.batch, rate=options.rate, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["demo", *TASKS], help="demo: names at 3 layers of 4 heads, placed by hand")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=48)
    parser.add_argument("--d-mlp", type=int, help="default: twice d-model")
    parser.add_argument("--norm", choices=["LN", "none"], default="LN")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.rate)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="log the loss")
    return parser


if __name__ == "__main__":
    sys.exit(main())
