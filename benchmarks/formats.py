"""How long a large graph takes to write and to read back, format by format, and how large its files are.

    python -m benchmarks.formats                         Llama-3.1-8B's shape: 32 layers of 32 heads, 1.6 million edges
    python -m benchmarks.formats --layers 12 --heads 12  GPT-2 small's
    python -m benchmarks.formats --only eap.pt eap.json

Every file is read back and its scores and kept edges are compared with what was written.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from tl_circuitlasso import formats
from tl_circuitlasso.formats._grid import Grid, graph_of
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import Components

LIMITS = {"eap.pt": 5.0, "eap.json": 60.0}  # seconds to write, at Llama-3.1-8B's shape


@dataclass(frozen=True)
class Format:
    """A kind of file: its suffix, and whether it holds every score (else membership alone comes back)."""

    name: str
    suffix: str
    scores: bool = True


KINDS = {
    "circuit-lasso.safetensors": Format("circuit-lasso", ".safetensors"),
    "eap.pt": Format("eap", ".pt"),
    "eap.json": Format("eap", ".json"),
    "auto-circuit.pt": Format("auto-circuit", ".pt"),
    "acdc.pth": Format("acdc", ".pth", scores=False),
}


def graph_of_shape(layers: int, heads: int, seed: int = 0) -> AttributionGraph:
    """A graph with a normal score on every edge of a model, ports apart; one in some 370 is kept."""
    parts = Components(n_layers=layers, n_heads=heads)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(parts.n_sources, parts.n_readers, dtype=torch.float64, generator=generator)
    return graph_of(Grid(parts, score, score.abs() > 3))


def seconds(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def measure(graph: AttributionGraph, kind: str, folder: Path) -> dict[str, object]:
    """One row of the table."""
    form = KINDS[kind]
    path = folder / f"graph{form.suffix}"
    _, writing = seconds(lambda: formats.write(graph, path, form.name))
    again, reading = seconds(lambda: formats.read(path, form.name))
    assert isinstance(again, AttributionGraph)
    same = torch.equal(again.score, graph.score) if form.scores else again.kept_edges() == graph.kept_edges()
    size = path.stat().st_size / 2**20
    path.unlink()
    return {"file": kind, "write s": writing, "read s": reading, "MiB": size, "read back the same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    graph = graph_of_shape(arguments.layers, arguments.heads)
    print(f"{arguments.layers} layers of {arguments.heads} heads: {len(graph):,} edges, {int(graph.kept.sum()):,} kept")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(graph, kind, Path(folder)) for kind in arguments.only]
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print("limits at the default shape: " + ", ".join(f"{name} in {limit:g} s" for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
