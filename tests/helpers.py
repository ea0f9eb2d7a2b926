"""What several test files share: the folder of reference data, small models, tolerances."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.errors import CircuitLassoError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.architecture import Shape

CASES = Path(__file__).parents[1] / "benchmarks" / "cases"  # models whose circuit is known


def shared_folder(*parts: str) -> Path:
    """A path in the folder of reference models and data sets, or a skip that says how to supply it."""
    root = Path(os.environ.get("TL_CIRCUITLASSO_DATA", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no reference data at {path}: set TL_CIRCUITLASSO_DATA to the folder that holds it")
    return path


def join_two(rank: int, store: str | Path, size: int = 2) -> None:
    """Be one of two (or `size`) processes under gloo that meet at a file; minutes of waiting are a failure."""
    patience = timedelta(minutes=3)  # gloo's own is half an hour
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience)


@contextmanager
def message_of(folder: Path, name: str, rank: int) -> Iterator[None]:
    """Write down what was raised in one of several processes, for the parent to look at."""
    try:
        yield
    except CircuitLassoError as error:
        (folder / f"{name}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def to_matrix(graph: AttributionGraph, shape: Shape) -> Float[Tensor, "source reader"]:
    """The scores of a graph as the matrix that `EdgeLayout.graph` reads; zero where there's no edge."""
    layout = EdgeLayout(shape)
    nodes, ports = layout.targets()
    column = {key: i for i, key in enumerate(zip(nodes, ports))}
    matrix = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64)
    for s, t, p, score in zip(*(part.tolist() for part in (graph.source, graph.target, graph.port, graph.score))):
        matrix[s, column[t, p]] = score
    return matrix
