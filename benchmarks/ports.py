"""Queries, keys and values told apart: how ours and exact patching rank ports, by data flow and by effect.

    python -m benchmarks.ports DIR [DIR ...] [--limit 200]

The data flow (`flow_edges_qkv`) of InterpBench cases isn't guaranteed by their training: some of its ports carry what
is constant, and other ports have effects. The last column therefore scores ours by what exact patching of single ports
finds: those that change the output by more than 1 % of the largest change.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_circuitlasso.bench.cases import Case, case_folders, load_case
from tl_circuitlasso.bench.methods import METHODS
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.discover.stopping import CENTRE
from tl_circuitlasso.evaluate.structure import structure
from tl_circuitlasso.graph import AttributionGraph

PortEdge = tuple[str, str, str]


def port_scores(graph: AttributionGraph, case: Case) -> dict[PortEdge, float]:
    """|score| of every candidate edge's ports."""
    names = graph.index.names
    rows = zip(graph.source.tolist(), graph.target.tolist(), graph.port.tolist(), graph.score.abs().tolist())
    return {(names[s], names[t], PORTS[p]): v for s, t, p, v in rows if (names[s], names[t]) in case.candidates}


def measure(case: Case, prompts: int | None) -> dict[str, Any]:
    """AUROC of ports for one case."""
    exact, ours = METHODS["exact"].run(case, prompts, 0), METHODS["circuit-lasso"].run(case, None, 0)
    effects = port_scores(exact, case)
    effective = {edge for edge, effect in effects.items() if effect > CENTRE * max(effects.values())}
    flow = case.port_truth or frozenset()
    return {
        "case": case.name,
        "idle flow ports": len(flow - effective),
        "effective, not flow": len(effective - flow),
        "exact against flow": structure(exact, flow, effects).auroc if flow else float("nan"),
        "ours against flow": structure(ours, flow, effects).auroc if flow else float("nan"),
        "ours against effective": structure(ours, effective, effects).auroc,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=200, help="prompts that exact patching uses")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [load_case(path) for folder in arguments.folders for path in case_folders(folder)]
    table = pd.DataFrame([measure(case, arguments.limit) for case in cases if case.certified])
    print(table.round(4).to_string(index=False))
    print(f"means: {table.drop(columns='case').mean().round(4).to_dict()}")


if __name__ == "__main__":
    main()
