"""What each part of the estimator brings: every part taken away in turn, on models whose circuit is known.

    python -m benchmarks.ablation DIR [DIR ...]                    folders of cases, as for `circuitlasso bench`
    python -m benchmarks.ablation DIR --seeds 3 --only shipped,secants
    python -m benchmarks.ablation --help

SHD and AUROC are means over the edge-certified cases, node SHD over all, at the default choice of edges. A part is
taken away by replacing a constant or a function of the library for as long as its line is measured.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from tl_circuitlasso.bench.cases import Case, case_folders, load_case
from tl_circuitlasso.bench.methods import BATCH
from tl_circuitlasso.discover import choice, refining
from tl_circuitlasso.discover.choice import Edges
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.discover.stopping import CENTRE
from tl_circuitlasso.evaluate.structure import structure
from tl_circuitlasso.models import pairing, read
from tl_circuitlasso.models.outcome import Outcome
from tl_circuitlasso.models.views import NormSecant, View
from tl_circuitlasso.models.weights import repeat_heads


@dataclass(frozen=True)
class Part:
    """A part of the estimator: what stands in its place, and with which options it's run then.

    changes: (owner, name, value) for every constant or function that is replaced.
    """

    instead: str
    changes: Sequence[tuple[Any, str, Any]] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def taken_away(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, value in self.changes:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield


def one_percent(scores: Tensor, *, largest: Tensor | None = None) -> Tensor:
    """The threshold at exactly one percent of the largest score; infinite where there is none."""
    if not scores.shape[-1]:
        return torch.full(scores.shape[:-1], torch.inf, dtype=torch.float64)
    return CENTRE * (scores.amax(-1) if largest is None else largest).double()


def no_way_is_narrow(edges: Edges, cost: Tensor) -> Tensor:
    """As if the best path had no cheapest edge."""
    return torch.full(cost.shape[:-1], torch.inf, dtype=torch.float64)


def energy(outcome: Outcome, change: Tensor) -> Tensor:
    """The squared change of the target's directions, in place of nats."""
    return change.square().sum(1)


def middle(view: View, own: Tensor, reached: Tensor) -> Tensor:
    """Products at the mean of both ends, in place of the prompt's own."""
    return (own + reached) / 2


def mean_heads(view: View, key: str, chosen: slice = slice(None)) -> Tensor:
    """Queries, keys or values in the middle of a secant, in place of the prompt's own."""
    own, reached = view.sides(key, whole=not key.startswith("q"))
    heads = view.adapter.shape.n_heads
    return repeat_heads(((own + reached) / 2).movedim(2, 0), heads)[chosen].movedim(0, 1).unsqueeze(1)


def frozen(view: View, key: str) -> NormSecant:
    """Norms whose scale doesn't move."""
    return NormSecant(view.inverse(key))


def all_nodes(choose: Callable[..., Any]) -> Callable[..., Any]:
    """The choice of edges as if every node mattered alike."""
    return lambda edges, cost, node_cost: choose(edges, cost, torch.full_like(node_cost, 1e300))


PARTS = {
    "shipped": Part("nothing: the defaults"),
    "secants": Part("derivatives at the prompt", [(pairing, "REACHES", (1e-3,))]),
    "half-way": Part("all secants over the whole way to the partner", [(pairing, "REACHES", (1.0,))]),
    "whole way": Part("all secants half-way to the partner", [(pairing, "REACHES", (0.5,))]),
    "own anchor": Part(
        "products in the middle of a secant", [(View, "anchored", mean_heads), (View, "anchor", middle)]
    ),
    "norms": Part("norms with their scale frozen", [(View, "norm", frozen)]),
    "interest": Part("positions drawn alike", [(pairing, "ALIKE", 1.0)]),
    "nats": Part("squared changes of the logits", [(Outcome, "cost", energy)]),
    "gap": Part(
        "a threshold at exactly 1 %",
        [(choice, "widest_gaps", one_percent), (refining, "widest_gap", one_percent)],
    ),
    "node rule": Part("all nodes count", [(Edges, "choose", all_nodes(Edges.choose))]),
    "path bar": Part(
        "a threshold that may cut every path",
        [(Edges, "_narrowest", lambda _, cost: torch.full(cost.shape[:-1], torch.inf))],
    ),
    "bound": Part("costs as they are, however large", [(choice, "RUNAWAY", float("inf"))]),
    "second look": Part("the first look alone", options={"refined": False}),
    "free garrote": Part("edges must have a weight, too: strength .01", options={"strength": 0.01}),
    "ebic": Part("edges must have a weight, too: strength ebic", options={"strength": "ebic"}),
    "pairs": Part("64 pairs", [(read, "PAIRS", 64)]),
    "prompts": Part("64 prompts", options={"max_prompts": 64}),
    "prompts and pairs": Part("64 prompts, 64 pairs", [(read, "PAIRS", 64)], {"max_prompts": 64}),
    "read design": Part("design routed", options={"design": "routed"}),
    "read and routed": Part("design activation", options={"design": "activation"}),
}


def measure(part: Part, cases: Sequence[Case], seeds: Sequence[int]) -> dict[str, float]:
    """The mean figures over cases and seeds without `part`."""
    found, began = [], time.process_time()
    for case in cases:
        for seed in seeds:
            with part.taken_away():
                graph = circuit_lasso(
                    case.model,
                    case.clean,
                    positions=slice(case.first, None),
                    batch_size=BATCH,
                    seed=seed,
                    progress=False,
                    **part.options,
                )
            right = structure(graph, case.truth, case.candidates, true_nodes=case.true_nodes)
            found.append({"certified": case.certified, **vars(right)})
    table = pd.DataFrame(found)
    edges = table[table.certified]
    return {
        "SHD": edges.shd.mean(),
        "missing": (1 - edges.recall).mean(),
        "AUROC": edges.auroc.mean(),
        "node SHD": table.node_shd.mean(),
        "worst SHD": edges.shd.max(),
        "seconds a case": (time.process_time() - began) / len(found),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help=f"comma-separated parts among {', '.join(PARTS)}")
    parser.add_argument("--cases", help="comma-separated names of cases; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only: {unknown} unknown; there are {', '.join(PARTS)}")
    paths = [path for folder in arguments.folders for path in case_folders(folder)]
    if arguments.cases:
        paths = [path for path in paths if path.name in arguments.cases.split(",")]
    cases = [load_case(path) for path in paths]
    lines = []
    for name in wanted:
        part = PARTS[name]
        lines.append({"without": name, "instead": part.instead, **measure(part, cases, range(arguments.seeds))})
        print(pd.DataFrame(lines[-1:]).round(4).to_string(index=False, header=len(lines) == 1), flush=True)
    print(f"\n{len(cases)} cases, {sum(case.certified for case in cases)} certified, seeds 0 to {arguments.seeds - 1}")
    print(pd.DataFrame(lines).round(4).to_string(index=False))
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1, default=float))


if __name__ == "__main__":
    main()
