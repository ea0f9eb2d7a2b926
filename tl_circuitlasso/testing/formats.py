"""A file format: whether what is written is read again, and what is spoilt is refused."""

import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.testing.checking import (
    Check,
    CheckFailure,
    expect,
    run,
)


def check_format(
    reader: Callable[[Path], AttributionGraph],
    writer: Callable[[AttributionGraph, Path], Any],
    suffix: str = ".json",
    *,
    scores: bool = True,
) -> tuple[str, ...]:
    """Does a format give component graphs back, and refuse what isn't one?

    Checked: kept edges and their scores survive with their signs (of a head's q, k and v the score of largest size is
    enough), with and without ports, in parallel and attention-only models, and of an empty circuit; writing changes no
    graph; no file, an empty one, half a file and foreign bytes raise `FormatError` and nothing else. `scores`: False
    for formats that only say which edges are kept.

    Raises
    ------
    CheckFailure: names every check that failed.

    >>> import tl_circuitlasso as tcl
    >>> len(check_format(tcl.formats.from_eap, tcl.formats.to_eap)) > 3
    True
    """
    with tempfile.TemporaryDirectory() as folder:
        return run("the format", _format_checks(reader, writer, Path(folder), suffix, scores))


def _format_checks(reader: Any, writer: Any, folder: Path, suffix: str, scores: bool) -> Iterator[Check]:
    for name, graph in _graphs():
        path = folder / f"{name.replace(' ', '_')}{suffix}"
        yield f"gives back {name}", lambda graph=graph, path=path: _round_trip(reader, writer, graph, path, scores)
    whole = folder / f"whole{suffix}"

    def spoilt(change: Callable[[bytes], bytes]) -> Path:
        writer(dict(_graphs())["a graph with ports"], whole)
        if not whole.is_file():
            raise InputError("the writer writes more than one file: check what becomes of damaged ones yourself")
        bad = folder / f"bad{suffix}"
        bad.write_bytes(change(whole.read_bytes()))
        return bad

    yield "refuses no file", lambda: _refuses(reader, folder / f"none{suffix}")
    yield "refuses an empty file", lambda: _refuses(reader, spoilt(lambda _: b""))
    yield "refuses half a file", lambda: _refuses(reader, spoilt(lambda raw: raw[: len(raw) // 2]))
    yield "refuses foreign bytes", lambda: _refuses(reader, spoilt(lambda _: bytes(range(256)) * 4))


def _graphs() -> list[tuple[str, AttributionGraph]]:
    """Graphs of whole components with scores of either sign, about half of their edges kept."""
    made = []
    for name, ports, options in (
        ("a graph without ports", False, {}),
        ("a graph with ports", True, {}),
        ("a parallel model", True, {"parallel": True}),
        ("an attention-only model", True, {"attn_only": True}),
    ):
        index = component_index(n_layers=2, n_heads=2, **options)
        ends = [(s, t) for s, t in product(index.names, index.names) if index.may_feed(s, t)]
        edges = {(s, t, port): 0.0 for s, t in ends for port in (("q", "k", "v") if ports and t[0] == "a" else ("",))}
        generator = torch.Generator().manual_seed(len(edges))
        scores = torch.randn(len(edges), generator=generator).float().tolist()
        made.append((name, AttributionGraph.from_edges(index, dict(zip(edges, scores))).threshold(0.6)))
    return [*made, ("an empty circuit", made[1][1].top_k(0))]


def _round_trip(reader: Any, writer: Any, graph: AttributionGraph, path: Path, scores: bool) -> None:
    names = ("source", "target", "port", "score", "weight", "kept")
    columns = [getattr(graph, name).clone() for name in names]
    writer(graph, path)
    unchanged = all(torch.equal(old, getattr(graph, name)) for old, name in zip(columns, names))
    expect(unchanged, "writing has changed the graph")
    again = reader(path)
    expect(isinstance(again, AttributionGraph), f"the reader gives a {type(again).__name__}")
    expect(again.kept_edges() == graph.kept_edges(), "other edges are kept")
    wanted, found = graph.adjacency(), again.adjacency()
    for edge in graph.kept_edges() if scores else ():
        here, there = (tuple(map(one.index.position, edge)) for one in (graph, again))
        expect(
            abs(float(found[there] - wanted[here])) <= 1e-6 * abs(float(wanted[here])),
            f"{'->'.join(edge)} has another score",
        )


def _refuses(reader: Any, path: Path) -> None:
    try:
        reader(path)
    except FormatError:
        return
    raise CheckFailure("it was read, where FormatError is expected")
