"""One self-contained HTML page per circuit: opens offline, anywhere, for as long as there are browsers.

The page's own scripts and d3-zoom (ISC licence, kept inside the page) lie in `web/`; the graph is embedded as JSON in
which no text can end the element that holds it. A content security policy in the page forbids every network request.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.data import storage
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import asked, cost
from tl_circuitlasso.plot.circuit import node_look
from tl_circuitlasso.plot.rows import ENDS, columns_of, node_label, row_label, site_ranks

_SCRIPTS = (  # in this order: each uses what stands before it while it loads
    "d3.min", "model", "filter", "notes", "layout", "scene", "pane", "panel", "app", "search", "keys", "export",
    "start",
)  # fmt: skip
_ROW_WIDTH = 16  # heads; more of them take several rows
_WHOLE_INDEX = 2000  # nodes; in a larger graph nodes without an embedded edge stay out of the page


def interactive(
    graph: AttributionGraph,
    path: str | Path,
    *,
    title: str | None = None,
    other: AttributionGraph | None = None,
    names: Sequence[str] | None = None,
    max_edges: int = 20_000,
) -> Path:
    """Write `graph` as an interactive page to `path` and return the path.

    The page opens on the graph's own kept edges; a slider goes from no edge to every candidate edge by |score|. It has
    pan, zoom, search, what is known of every node and edge under the pointer, and on a click all paths to the target.
    With `other`, two graphs stand side by side in one shared layout, at equal numbers of edges; `names` entitles them
    (default: the `method` of their provenance). At most `max_edges` candidate edges per graph are embedded, strongest
    first; kept ones always.

    Raises
    ------
    InputError: the two graphs disagree on the order of computation, `max_edges` is below 1, or `path` isn't an .html
        file that can be written to.

    >>> import tempfile
    >>> from tl_circuitlasso.graph import AttributionGraph
    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> edges = {("input", "m0"): 1.0, ("m0", "logits"): -0.5, ("input", "logits"): 0.1}
    >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), edges)
    >>> interactive(graph, Path(tempfile.mkdtemp()) / "circuit.html", title="A circuit").name
    'circuit.html'
    """
    max_edges = whole_number("max_edges", max_edges, what="of edges to embed")
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"`path` is {str(path)!r}: the page is an .html file; pictures are drawn by plot.circuit")
    storage.write_text(path, page(graph, title=title, other=other, names=names, max_edges=max_edges))
    return path


def page(
    graph: AttributionGraph,
    *,
    title: str | None,
    other: AttributionGraph | None,
    names: Sequence[str] | None,
    max_edges: int,
) -> str:
    """The text of the page."""
    graphs = [graph] if other is None else [graph, other]
    data = _data(graphs, _names(graphs, names), site_ranks(graph, other), max_edges)
    parts = {
        "<!--TITLE-->": html.escape(title or _title(graph)),
        "/*STYLE*/": _asset("page.css"),
        "<!--LICENCE-->": _asset("d3.LICENSE.txt").strip(),
        "/*SCRIPTS*/": "\n".join(_asset(f"{name}.js") for name in _SCRIPTS),
        "<!--DATA-->": embed(data),
    }
    text = _asset("page.html")
    for marker, part in parts.items():
        text = text.replace(marker, part)
    return text


def embed(data: Any) -> str:
    """`data` as JSON that is safe inside a script element, whatever its strings hold.

    >>> embed("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """`value` with only what JSON can say: other numbers become null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


@cache
def _asset(name: str) -> str:
    return (resources.files("tl_circuitlasso.plot") / "web" / name).read_text(encoding="utf-8")


def _title(graph: AttributionGraph) -> str:
    model = graph.provenance.get("model")
    if not isinstance(model, str) or model in ("", "custom"):  # what TransformerLens calls a model without a name
        return "Circuit"
    return f"Circuit of {Path(model).name if Path(model).is_absolute() else model}"  # a folder of somebody's machine


def _names(graphs: Sequence[AttributionGraph], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != 2:
            raise InputError(f"`names` has {len(names)} entries: give one name to each of the two graphs")
        return list(names)
    found = [str(graph.provenance.get("method") or f"graph {n + 1}") for n, graph in enumerate(graphs)]
    return found if len(set(found)) == len(found) else [f"{name} ({n + 1})" for n, name in enumerate(found)]


def _data(
    graphs: Sequence[AttributionGraph], names: Sequence[str], ranks: Mapping[Site, Any], max_edges: int
) -> dict[str, Any]:
    chosen = [_chosen(graph, max_edges) for graph in graphs]
    scales = sorted(set(ranks.values()))
    rank_of = {site: scales.index(rank) for site, rank in ranks.items()}
    nodes = _nodes(graphs, chosen, rank_of)
    numbered = _number(nodes)
    position = {node["name"]: number for number, node in enumerate(nodes)}
    extras = ["weight", *dict.fromkeys(name for graph in graphs for name in graph.extras)]
    left_out = sum(int((graph.score != 0).sum()) - len(rows) for graph, rows in zip(graphs, chosen))
    return {
        "nodes": nodes,
        "numbered": numbered,
        "n_nodes": len({name for graph in graphs for name in graph.index.names}),
        "bands": [row_label(site for site, rank in rank_of.items() if rank == n) for n in range(len(scales))],
        "extras": extras,
        "note": f"{left_out:,} weakest candidate edges left out" if left_out > 0 else "",
        "graphs": [
            {"name": name, "edges": _edges(graph, rows, position, extras), "about": _about(graph)}
            for name, graph, rows in zip(names, graphs, chosen)
        ],
    }


def _chosen(graph: AttributionGraph, max_edges: int) -> list[int]:
    """The rows to embed: all kept ones and the strongest others with a score, strongest first."""
    order = graph.score.abs().argsort(descending=True, stable=True)
    kept = graph.kept[order]
    room = (~kept).cumsum(0) <= max_edges - int(kept.sum())
    wanted = kept | (room & (graph.score[order] != 0))
    return order[wanted].tolist()


def _nodes(
    graphs: Sequence[AttributionGraph], chosen: Sequence[Sequence[int]], rank_of: Mapping[Site, int]
) -> list[dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = {}
    top = max(rank_of.values())
    for graph, rows in zip(graphs, chosen):
        touched = set(graph.source[rows].tolist()) | set(graph.target[rows].tolist())
        whole = len(graph.index) <= _WHOLE_INDEX
        for number, name in enumerate(graph.index.names):
            if whole or number in touched or name in ENDS:
                info = dict(graph.node_info.get(name, {}))
                known = nodes.setdefault(name, _node(graph, name, rank_of[graph.index.site(name)]))
                known["info"] = info | known["info"]
                known["label"] = node_label(name, known["info"])
    if not any(node["goal"] for node in nodes.values()):
        for node in nodes.values():
            node["goal"] = node["rank"] == top
    return sorted(nodes.values(), key=lambda node: node["rank"])


def _number(nodes: Sequence[dict[str, Any]]) -> bool:
    """Give every node its column and its row within the layer, if all nodes are components; whether they are."""
    found = columns_of([node["name"] for node in nodes], _ROW_WIDTH)
    columns, deal = found or ({}, 1)
    for node in nodes:
        head = parse_site(node["name"]).head if found and node["name"] not in ENDS else -1
        node |= {"column": columns.get(node["name"]), "fold": max(head, 0) % deal}
    return found is not None


def _node(graph: AttributionGraph, name: str, rank: int) -> dict[str, Any]:
    return {
        "name": name,
        "rank": rank,
        "layer": None if name in ENDS else graph.index.site(name).layer,
        "look": node_look(graph, name),
        "end": name in ENDS,
        "goal": name in ("logits", "target"),
        "info": {},
        "label": name,
    }


def _edges(
    graph: AttributionGraph, rows: Sequence[int], position: Mapping[str, int], extras: Sequence[str]
) -> list[list[float | int | None]]:
    """Per edge: source, target, port, score, kept (1 or 0), then the extras; null where a graph lacks one."""
    names = graph.index.names
    columns = {"weight": graph.weight} | dict(graph.extras)
    ends = [[position[names[n]] for n in column[rows].tolist()] for column in (graph.source, graph.target)]
    numbers = [graph.port[rows].tolist(), _short(graph.score[rows].tolist()), graph.kept[rows].long().tolist()]
    more = [_short(columns[name][rows].tolist()) if name in columns else [None] * len(rows) for name in extras]
    return [list(row) for row in zip(*ends, *numbers, *more)]


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


_CALLED = {"closure_error": "error of the reading", "d_model": "width"}  # where the key would puzzle a reader


def _told(key: str, value: Any) -> bool:
    """Whether a fact tells a reader something: not a fingerprint, the unit (the score says it), or one process."""
    return not (key.endswith("_hash") or key == "unit" or (key == "processes" and value == 1))


def _prompts(known: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """How many prompts, of how many where some were left out, and what they were compared with."""
    if "prompts" not in known:
        return None
    used, partners = known["prompts"], known.get("partners")
    offered = known.get("prompts_given", given.get("prompts", used))
    count = f"{used}" if offered == used else f"{used} of {offered}"
    beside = {"random": ", each beside random others", "corrupted": ", each beside its corrupted one"}
    return count + beside.get(str(partners), "")


def _about(graph: AttributionGraph) -> list[list[str]]:
    """What was asked and how the graph was made, in few words, for the page's side panel."""
    known = graph.provenance
    arguments = known.get("arguments")
    given = arguments if isinstance(arguments, Mapping) else {}
    told = asked(known)
    first: dict[str, Any] = {name: told.get(name) for name in ("target", "positions")}
    first |= {"prompts": _prompts(known, given), "score": known.get("unit"), **told}
    flat = {**first, **given, **known, **first, "seconds": cost(known)["seconds"]}
    rows = [(key, value) for key, value in flat.items() if isinstance(value, (str, int, float, bool)) and value != ""]
    shown = [(_CALLED.get(key, key.replace("_", " ")), value) for key, value in rows if _told(key, value)]
    return [[str(key), f"{value:.4g}" if isinstance(value, float) else str(value)[:60]] for key, value in shown[:16]]
