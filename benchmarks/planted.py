"""Planted circuits: how well regressions find them, by what makes them hard, beside marginal correlation.

    python -m benchmarks.planted                  every setting, 10 problems each
    python -m benchmarks.planted --seeds 3 --layers 4 --heads 8

CircuitLasso chooses its edges by itself at each strength; correlation is given the one threshold that's best for the
setting, knowing the truth. Means over problems.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.evaluate.structure import structure
from tl_circuitlasso.synthetic import Edge, Planted, planted

PLAIN = {"mixing": False, "copies": 0.0, "cancelling": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "mixing": PLAIN | {"mixing": True},
    "copies": PLAIN | {"copies": 1.0},
    "cancelling": PLAIN | {"cancelling": 1.0},
    "all": {"mixing": True, "copies": 1.0, "cancelling": 1.0},
    "all, sparse codes": {"mixing": True, "copies": 1.0, "cancelling": 1.0, "codes": "sparse"},
    "all, groups of 4": {"mixing": True, "copies": 1.0, "cancelling": 1.0, "width": 4},
}
METHODS: dict[str, tuple[str, Any]] = {  # design, strength; groups of columns make the Lasso a group Lasso
    "auto": ("routed", "auto"),
    "lasso .05": ("routed", 0.05),
    "ebic": ("routed", "ebic"),
    "cv": ("routed", "cv"),
    "stability": ("routed", "stability"),
    "auto, activation": ("activation", "auto"),
}


def correlations(problem: Planted) -> dict[Edge, float]:
    """The largest |correlation| between a column of the child and one of the parent as the child sees it."""
    found = {}
    names = problem.index.names
    for child in names[1:]:
        seen = problem.seen(child, "routed").flatten(0, 1)
        own = problem.target if child == names[-1] else problem.features[..., problem.columns(child)]
        columns = torch.cat([seen, own.flatten(0, 1)], dim=1).T
        table = torch.corrcoef(columns)[: seen.shape[1], seen.shape[1] :].abs()
        best = table.amax(1).view(-1, problem.width).amax(1).tolist()
        found |= {(parent, child): value for parent, value in zip(names, best)}
    return found


def best_choice(scores: list[dict[Edge, float]], problems: list[Planted]) -> list[frozenset[Edge]]:
    """Every problem's edges above the one threshold with the smallest mean SHD."""

    def above(threshold: float) -> list[frozenset[Edge]]:
        return [frozenset(edge for edge, score in each.items() if score >= threshold) for each in scores]

    def errors(threshold: float) -> int:
        return sum(len(kept ^ problem.circuit) for kept, problem in zip(above(threshold), problems))

    return above(min(np.linspace(0.01, 1.01, 101).tolist(), key=errors))


def figures(kept: list[frozenset[Edge]], problems: list[Planted]) -> dict[str, float]:
    """Mean SHD and F1."""
    found = []
    for edges, problem in zip(kept, problems):
        hits = len(edges & problem.circuit)
        found.append((len(edges ^ problem.circuit), 2 * hits / max(len(edges) + len(problem.circuit), 1)))
    shd, f1 = np.mean(found, axis=0)
    return {"SHD": shd, "F1": f1}


def measure(options: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """Every method on the problems of one setting."""
    problems = [planted(seed=seed, **options) for seed in range(seeds)]
    empty = [frozenset[Edge]() for _ in problems]
    scores = [correlations(problem) for problem in problems]
    lines = [
        {"method": "(empty graph)", **figures(empty, problems)},
        {"method": "correlation, best threshold", **figures(best_choice(scores, problems), problems)},
    ]
    for name, (design, strength) in METHODS.items():
        began, graphs = time.process_time(), []
        for problem in problems:
            folds = 10 if strength in ("cv", "stability") else 1
            graphs.append(learn(problem.statistics(design, folds=folds), strength=strength))
        seconds = (time.process_time() - began) / seeds
        auroc = [structure(graph, p.circuit, p.candidates).auroc for graph, p in zip(graphs, problems)]
        kept = [frozenset(graph.kept_edges()) for graph in graphs]
        lines.append({"method": name, **figures(kept, problems), "AUROC": np.mean(auroc), "seconds": seconds})
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="problems per setting")
    for name, value in {"layers": 3, "heads": 6, "prompts": 128, "positions": 8, "parents": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = {name: getattr(arguments, name) for name in ("layers", "heads", "prompts", "positions", "parents", "noise")}
    lines = []
    for setting, options in SETTINGS.items():
        lines += [{"setting": setting, **line} for line in measure(shape | options, arguments.seeds)]
        print(pd.DataFrame([line for line in lines if line["setting"] == setting]).round(3).to_string(index=False))
        print(flush=True)
    table = pd.DataFrame(lines)
    print(table.pivot(index="method", columns="setting", values="SHD")[list(SETTINGS)].round(2).to_string())
    if arguments.json:
        table.to_json(arguments.json, orient="records", indent=1)


if __name__ == "__main__":
    main()
