"""Which rule for the strength finds the planted parents, and how many of them in a second?

    python -m benchmarks.strength                  AR(.5), AR(.9), SAE-like codes; three draws each
    python -m benchmarks.strength --quick

F1 is the mean over targets of the support's F1 against the planted one; seconds are processor time of the choice, its
solves included, moments of ten parts of the data given. "adaptive" is what `strength="auto"` does.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.families import Family, codes, correlated
from tl_circuitlasso import solve

BAR = 0.8  # share of half-samples
RULES = ("fixed", "ebic", "adaptive", "stability", "cv", "cv-1se", "mcp")


def parts(family: Family, count: int = 10) -> list[solve.Moments]:
    x, y = torch.from_numpy(family.x), torch.from_numpy(family.y)
    return [solve.moments_of(x[k::count], y[k::count]) for k in range(count)]


def support(rule: str, folds: list[solve.Moments]) -> torch.Tensor:
    """The edges that a rule keeps."""
    if rule == "stability":
        return solve.stability(folds) >= BAR
    five = [solve.total(folds[k::5]) for k in range(5)]
    return solve.select(solve.total(folds), rule=rule, folds=five).solution.value != 0


def mean_f1(found: np.ndarray, truth: np.ndarray) -> float:
    both = (found & truth).sum(0)
    return float(np.mean(2 * both / np.maximum(found.sum(0) + truth.sum(0), 1)))


def families(quick: bool) -> list[tuple[str, Callable[[int], Family]]]:
    samples, sources = (600, 80) if quick else (2000, 200)
    return [
        ("AR .5", lambda seed: correlated(samples, sources, 0.5, seed)),
        ("AR .9", lambda seed: correlated(samples, sources, 0.9, seed)),
        ("AR .97", lambda seed: correlated(samples, sources, 0.97, seed)),
        ("codes", lambda seed: codes(2 * samples, sources, 10, seed).standard()),
        ("few samples", lambda seed: correlated(samples // 4, sources, 0.5, seed)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
    kinds = families(arguments.quick)
    for _, make in kinds:
        scores: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
        for seed in range(arguments.draws):
            family = make(seed)
            folds, truth = parts(family), family.truth != 0
            for rule in RULES:
                clock = time.process_time()
                found = support(rule, folds)
                scores[rule].append((mean_f1(found.numpy(), truth), time.process_time() - clock))
        for rule in RULES:
            f1, seconds = np.array(scores[rule]).T
            cells[rule].append((f1.mean(), seconds.min()))
    print("| rule | " + " | ".join(name for name, _ in kinds) + " | mean F1 | worst | seconds |")
    print("|---" * (len(kinds) + 4) + "|")
    for rule, row in cells.items():
        f1, seconds = np.array(row).T
        each = " | ".join(f"{a:.3f} ({b:.2f})" for a, b in row)
        print(f"| {rule} | {each} | {f1.mean():.3f} | {f1.min():.3f} | {seconds.sum():.2f} |", flush=True)


if __name__ == "__main__":
    main()
