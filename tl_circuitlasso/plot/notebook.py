"""A graph where its user is: drawn under a notebook's cell, or opened in the web browser."""

import base64
import html
import io
import sys
import tempfile
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.plot.circuit import circuit
from tl_circuitlasso.plot.interactive import interactive

_MOST_EDGES = 120  # in the small drawing under a cell; the strongest


@dataclass(frozen=True)
class Page:
    """An interactive page in a file; a notebook shows it under the cell."""

    path: Path
    height: int

    def __repr__(self) -> str:
        return f"interactive page: {self.path}"

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        style = "border:1px solid #d9dfe6;border-radius:6px"
        return f'<iframe srcdoc="{text}" style="{style}" width="100%" height="{self.height}"></iframe>'


def show(graph: AttributionGraph, *, height: int = 620, **options: Any) -> Page:
    """The interactive page, shown: in a notebook under the cell, elsewhere in the web browser.

    The page lies in a file of the system's temporary folder. `options` are those of `plot.interactive`; `height` is
    that of the cell, in pixels.

    Raises
    ------
    InputError: as `plot.interactive`.

    >>> import tl_circuitlasso as tcl
    >>> show(tcl.load_demo(prompts=1).circuit, title="A circuit")
    interactive page: ...circuit.html
    """
    path = Path(tempfile.mkdtemp(prefix="circuit-")) / "circuit.html"
    page = Page(interactive(graph, path, **options), height)
    if "ipykernel" not in sys.modules:
        webbrowser.open(path.as_uri())
    return page


def drawing(graph: AttributionGraph) -> str:
    """The layered drawing as one HTML image that holds all it needs; nothing in it can run."""
    file = io.BytesIO()
    circuit(graph, max_edges=_MOST_EDGES).savefig(file, format="svg")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<br><img alt="the circuit" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
