"""What a graph does for itself by verbs of other rooms: drawn, shown, explained, written, confirmed.

Each method is one call of the function that it names. The graph stands below those rooms and imports none of them, so a
verb is looked up when it is called.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("html", "jpg", "pdf", "png", "svg", "webp")


def _verb(room: str, name: str) -> Any:
    """The function `name` of a room above the graph."""
    return getattr(importlib.import_module(f"tl_circuitlasso.{room}"), name)


class Verbs:
    """The methods of an AttributionGraph that are done elsewhere."""

    def confirm(self, model: Any, clean: Any = None, corrupted: Any = None, metric: Any = None, **options: Any) -> Any:
        """The kept edges cut one at a time in the model, and the refuted ones dropped: see `evaluate.confirm`.

        >>> import tl_circuitlasso as tcl
        >>> demo = tcl.load_demo(prompts=4)
        >>> demo.circuit.confirm(demo.model, demo.tokens, demo.corrupted, demo.target).n_kept
        6
        """
        return _verb("evaluate", "confirm")(model, self, clean, corrupted, metric, **options)

    def explain(self, node: str, k: int = 10) -> Any:
        """What feeds a node, what it feeds, and where it fires: see `tcl.explain`; print it, or show it.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> [edge.node for edge in graph.explain("a2.h0").children]
        ['logits']
        """
        return _verb("graph.explaining", "explain")(self, node, k)

    def paths(self, source: str, k: int = 5, **options: Any) -> Any:
        """The k strongest kept paths from `source` to the target: see `graph.explaining.strongest_paths`.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> print(graph.paths("a1.h2", 1)[0])
        +2.0371  a1.h2 -> a2.h0 -> logits
        """
        return _verb("graph.explaining", "strongest_paths")(self, source, k, **options)

    def supernodes(self, similarity: int | float = 0.5) -> dict[str, tuple[str, ...]]:
        """Groups of nodes with nearly the same parents and children: see `tcl.supernodes`.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.supernodes()  # heads and MLPs are sites of their own: only features form groups
        {}
        """
        return _verb("graph.explaining", "supernodes")(self, similarity)

    def to_eap_graph(self, **options: Any) -> Any:
        """The same graph as a live `eap.graph.Graph` of the EAP-IG package: see `formats.to_eap_graph`.

        >>> graph.to_eap_graph().count_included_edges()  # doctest: +SKIP
        """
        return _verb("formats", "to_eap_graph")(self, **options)

    def plot(self, path: str | Path | None = None, **options: Any) -> "Figure":
        """The layered drawing of the kept edges, written to `path` where one is given: see `plot.circuit`.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> len(graph.plot(title="planted").axes)
        1
        """
        return _verb("plot", "circuit")(self, path, **options)

    def show(self, **options: Any) -> Any:
        """The interactive page: in a notebook under the cell, elsewhere in the web browser: see `plot.show`.

        >>> import tl_circuitlasso as tcl
        >>> tcl.load_demo(prompts=1).circuit.show()
        interactive page: ...circuit.html
        """
        return _verb("plot", "show")(self, **options)

    def to(self: Any, format: str | Path, path: str | Path | None = None, **options: Any) -> Path:
        """Write the graph to `path` as a picture ("png", "svg", "pdf", ...), as the interactive page ("html"), as a
        table of its candidate edges ("csv"), or in any format of `formats.WRITERS` ("eap", "acdc", "neuronpedia", ...);
        the path is returned.

        A path alone, `graph.to("circuit.html")`, is written as its suffix says, where that is clear. `options` go to
        `plot.circuit`, `plot.interactive` or the format's writer.

        Raises
        ------
        InputError: an unknown format, a picture's format that isn't the suffix of `path`, or what the writer raises.

        >>> import tempfile, pathlib
        >>> from tl_circuitlasso.graph import AttributionGraph
        >>> from tl_circuitlasso.graph.nodes import component_index
        >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})
        >>> graph.to("eap", pathlib.Path(tempfile.mkdtemp()) / "graph.json").name
        'graph.json'
        >>> graph.to(pathlib.Path(tempfile.mkdtemp()) / "edges.csv").read_text().splitlines()[0]
        'source,target,port,weight,score,kept'
        """
        if path is None:
            path, suffix = Path(format), Path(format).suffix.lower().removeprefix(".")
            format = suffix if suffix in (*PICTURES, "csv") else ""
        path, format = Path(path), str(format)
        if format not in (*PICTURES, "csv"):
            _verb("formats", "write")(self, path, format or None, **options)
        elif path.suffix.lower() != f".{format}":
            raise InputError(f"`path` is {str(path)!r}, which doesn't end in .{format}: name it {path.stem}.{format}")
        elif format == "csv":
            storage.write_text(path, self.edge_table().to_csv(index=False), **options)
        else:
            _verb("plot", "interactive" if format == "html" else "circuit")(self, path, **options)
        return path

    def _repr_html_(self: Any) -> str:
        """In a notebook: the circuit drawn, and its strongest edges folded away under it."""
        shown = self._strongest(25).to_html(index=False, float_format=lambda x: f"{x:.4g}")
        edges = f"<details><summary>strongest edges</summary>{shown}</details>"
        return f"<b>AttributionGraph</b>: {self._counts()}{_verb('plot.notebook', 'drawing')(self)}{edges}"


def in_order(model: Any, graphs: Any) -> tuple[Any, Any]:
    """The model and the graph, or graphs by name, told apart where they come the other way round: some functions that
    take both once took the graph first."""
    return (graphs, model) if isinstance(model, Verbs | Mapping) else (model, graphs)
