"""networkx, and through it GraphML, GEXF and Cytoscape JSON.

`to_networkx` gives a `DiGraph` where every pair of nodes has one edge, a `MultiDiGraph` keyed by port where q, k and
v are apart. Nodes carry `rank` (order of computation), `site`, `kind` and `layer`; edges `score`, `weight`, `kept`,
`port` and the extras. All candidates are written unless `kept_only=True`. networkx and Cytoscape JSON lose nothing;
GraphML loses nothing; GEXF has no place for provenance, certificates and what is known of nodes.

On the way in, nodes need names of sites (`a5.h3`, `m7`, `blocks.4.hook_resid_post#17`) and edges a number `score`
(or, failing that, `weight`). Without `rank` on every node, components take the transformer's order and other graphs
the order that their edges give; a cycle is an error.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_networkx(graph).edges["a0.h1", "m0"]["score"]
0.5
>>> from_networkx(to_networkx(graph)).kept_edges()
{('a0.h1', 'm0')}
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from tl_circuitlasso.data import storage
from tl_circuitlasso.data.sites import PORTS, Site, parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

_NOTE = "tl_circuitlasso"
_NOTE_ESCAPED = "tl_circuitlasso_escaped"
_OWN = {"source", "target", "id", "key", "label", "score", "weight", "kept", "port"}


def to_networkx(
    graph: AttributionGraph, path: str | Path | None = None, *, kept_only: bool = False
) -> "nx.DiGraph | nx.MultiDiGraph":
    """The graph in networkx, written to `path` if one is given: .graphml, .gexf, or Cytoscape JSON (.cyjs, .json).

    Raises
    ------
    InputError: an unknown suffix, or a `path` that can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> to_networkx(demo.circuit, kept_only=True).number_of_edges()
    6
    """
    rows = graph.kept.nonzero()[:, 0] if kept_only else torch.arange(len(graph))
    pairs = graph.source[rows] * len(graph.index) + graph.target[rows]
    result = nx.MultiDiGraph() if pairs.unique().numel() < pairs.numel() else nx.DiGraph()
    note = {"node_info": graph.node_info, "provenance": graph.provenance, "certificates": list(graph.certificates)}
    result.graph[_NOTE] = json.dumps(storage.plain(note, "graph"))
    for block in graph.index.blocks:
        attributes = {"rank": block.rank, "site": str(block.site), "kind": block.site.kind, "layer": block.site.layer}
        result.add_nodes_from(block.names, **attributes)
    _add_edges(result, graph, rows.tolist())
    if path is not None:
        _write(result, Path(path))
    return result


def from_networkx(source: Source) -> AttributionGraph:
    """The graph in a networkx object.

    Raises
    ------
    FormatError: undirected, names that aren't sites, missing or infinite scores, cycles, edges against the order.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> from_networkx(to_networkx(demo.circuit)).kept_edges() == demo.circuit.kept_edges()
    True
    """
    if not isinstance(source, nx.Graph):
        raise FormatError(f"the given data: a {type(source).__name__} where a networkx graph is expected")
    return _from_networkx(source, "the given networkx graph")


def to_graphml(graph: AttributionGraph, path: str | Path, *, kept_only: bool = False) -> None:
    """Write GraphML (yEd, Gephi, igraph).

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_graphml(demo.circuit, Path(folder) / "g.graphml")
    ...     again = from_graphml(Path(folder) / "g.graphml")
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    _write_graphml(to_networkx(graph, kept_only=kept_only), Path(path))


def from_graphml(path: str | Path) -> AttributionGraph:
    """Read GraphML; raises FormatError as `from_networkx` does, and for anything that isn't GraphML.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_graphml(demo.circuit, Path(folder) / "g.graphml")
    ...     again = from_graphml(Path(folder) / "g.graphml")
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    return _from_networkx(_unescaped(_read_xml(path, nx.read_graphml)), str(path))


def to_gexf(graph: AttributionGraph, path: str | Path, *, kept_only: bool = False) -> None:
    """Write GEXF (Gephi).

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_gexf(demo.circuit, Path(folder) / "g.gexf")
    ...     again = from_gexf(Path(folder) / "g.gexf")
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    _write_gexf(to_networkx(graph, kept_only=kept_only), Path(path))


def from_gexf(path: str | Path) -> AttributionGraph:
    """Read GEXF; raises FormatError as `from_networkx` does, and for anything that isn't GEXF.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_gexf(demo.circuit, Path(folder) / "g.gexf")
    ...     again = from_gexf(Path(folder) / "g.gexf")
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    return _from_networkx(_unescaped(_read_xml(path, nx.read_gexf)), str(path))


def to_cytoscape(graph: AttributionGraph, path: str | Path | None = None, *, kept_only: bool = False) -> dict[str, Any]:
    """Cytoscape JSON (Cytoscape, cytoscape.js), written to `path` if one is given.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> data = to_cytoscape(demo.circuit, kept_only=True)
    >>> len(data["elements"]["edges"])
    6
    """
    data = nx.cytoscape_data(to_networkx(graph, kept_only=kept_only))
    data["data"] = list(map(list, data["data"]))  # pairs, as JSON gives them back
    if path is not None:
        _read.write_json(path, data)
    return data


def from_cytoscape(source: Source) -> AttributionGraph:
    """Read Cytoscape JSON; raises FormatError as `from_networkx` does, and for anything that isn't Cytoscape JSON.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> from_cytoscape(to_cytoscape(demo.circuit)).kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.read_json(source) if isinstance(source, (str, Path)) else source
    with _read.reading(label):
        data = _read.expect_mapping(data, label, "the file")
        elements = _read.expect_mapping(data.get("elements"), label, "elements")
        nodes, edges = (_rows(elements.get(key), key, label) for key in ("nodes", "edges"))
        result = nx.MultiDiGraph()
        for node in nodes:
            result.add_node(node["id"], **{k: v for k, v in node.items() if k != "id"})
        for edge in edges:
            attributes = {k: v for k, v in edge.items() if k not in ("source", "target", "key")}
            result.add_edge(edge["source"], edge["target"], **attributes)
        notes = [row[1] for row in data.get("data") or () if isinstance(row, list) and row[:1] == [_NOTE]]
        result.graph[_NOTE] = notes[0] if notes else None
    return _from_networkx(result, label)


def _rows(value: Any, key: str, label: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise FormatError(f"{label}: `elements.{key}` is a {type(value).__name__}; a list is expected")
    return [_read.expect_mapping(row.get("data") if isinstance(row, Mapping) else row, label, key) for row in value]


# ---- out ------------------------------------------------------------------------------------------------------------


def _add_edges(result: "nx.DiGraph | nx.MultiDiGraph", graph: AttributionGraph, rows: list[int]) -> None:
    names = graph.index.names
    columns = {"score": graph.score, "weight": graph.weight, "kept": graph.kept} | dict(graph.extras)
    clash = set(graph.extras) & _OWN
    if clash:
        raise InputError(f"`graph.extras` has a column {sorted(clash)[0]!r}, a name that networkx needs; rename it")
    lists = {name: column.tolist() for name, column in columns.items()}
    source, target, port = graph.source.tolist(), graph.target.tolist(), graph.port.tolist()
    for row in rows:
        # NaN says that nothing is known of an edge, which here is the attribute left out.
        attributes = {name: column[row] for name, column in lists.items() if column[row] == column[row]}
        attributes |= {"port": PORTS[port[row]]}
        ends = names[source[row]], names[target[row]]
        if result.is_multigraph():
            result.add_edge(*ends, key=PORTS[port[row]], **attributes)
        else:
            result.add_edge(*ends, **attributes)


def _write(result: "nx.DiGraph | nx.MultiDiGraph", path: Path) -> None:
    match path.suffix.lower():
        case ".graphml":
            _write_graphml(result, path)
        case ".gexf":
            _write_gexf(result, path)
        case ".cyjs" | ".json":
            _read.write_json(path, nx.cytoscape_data(result))
        case suffix:
            raise InputError(f"`path` ends in {suffix!r}: write .graphml, .gexf, .cyjs or .json")


def _write_graphml(result: "nx.DiGraph | nx.MultiDiGraph", path: Path) -> None:
    storage.write_atomically(path, lambda temporary: nx.write_graphml_xml(_fit_for_xml(result), str(temporary)))


def _write_gexf(result: "nx.DiGraph | nx.MultiDiGraph", path: Path) -> None:
    storage.write_atomically(path, lambda temporary: nx.write_gexf(_fit_for_xml(result), str(temporary)))


# Characters that XML can't hold even as entities, and the sign that stands in front of their numbers.
_UNFIT = re.compile("[\\\\\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")


def _fit_for_xml(result: "nx.DiGraph | nx.MultiDiGraph") -> "nx.DiGraph | nx.MultiDiGraph":
    """The graph with such characters of its names written as numbers, and a mark that says so."""
    if not any(_UNFIT.search(str(text)) for node in result for text in (node, result.nodes[node].get("site", ""))):
        return result
    escaped = nx.relabel_nodes(result, {node: _escaped(node) for node in result})
    for _, attributes in escaped.nodes(data=True):
        attributes["site"] = _escaped(attributes["site"])
        attributes[_NOTE_ESCAPED] = "yes"  # GEXF has no place for it but at the nodes
    return escaped


def _escaped(text: str) -> str:
    return _UNFIT.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _unescaped(source: "nx.Graph") -> "nx.Graph":
    if not any(attributes.get(_NOTE_ESCAPED) == "yes" for _, attributes in source.nodes(data=True)):
        return source
    plain = {node: _ESCAPED.sub(lambda sign: chr(int(sign[1], 16)), str(node)) for node in source}
    return nx.relabel_nodes(source, plain)


# ---- in -------------------------------------------------------------------------------------------------------------


def _read_xml(path: str | Path, parse: Any) -> "nx.Graph":
    raw = _read.read_bytes(path)
    try:
        upper = raw.decode("utf-8").upper()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error}); export it again") from error
    if "<!DOCTYPE" in upper or "<!ENTITY" in upper:
        raise FormatError(f"{path}: declares a document type or entities, which graph files don't need; remove them")
    if raw.count(b"<") > _read.MAX_VALUES:
        raise FormatError(f"{path}: holds too many elements for a graph; is it the file you meant?")
    try:
        return parse(BytesIO(raw))
    except Exception as error:  # networkx lets whatever its parsing raises through
        raise FormatError(f"{path}: not a whole graph file ({type(error).__name__}: {str(error)[:200]})") from error


def _from_networkx(source: "nx.Graph", label: str) -> AttributionGraph:
    with _read.reading(label):
        if not source.is_directed():
            raise FormatError(f"{label}: undirected; give a directed graph, from cause to effect")
        edges = [(str(u), str(v), data) for u, v, data in source.edges(data=True)]
        index = _index(source, edges, label)
        note = _note(source.graph.get(_NOTE))
        scores = [_score(data, f"{u}->{v}", label) for u, v, data in edges]
        weights = [_number(data.get("weight", score)) for (_, _, data), score in zip(edges, scores)]
        name = lambda row: f"{edges[row][0]}->{edges[row][1]}"  # noqa: E731
        return AttributionGraph(
            index=index,
            source=torch.tensor([index.position(u) for u, _, _ in edges], dtype=torch.long),
            target=torch.tensor([index.position(v) for _, v, _ in edges], dtype=torch.long),
            port=torch.tensor([_port(data, label) for _, _, data in edges], dtype=torch.long),
            score=_read.number_columns(scores, label, "score", name),
            weight=_read.number_columns(weights, label, "weight", name),
            kept=torch.tensor([bool(data.get("kept", True)) for _, _, data in edges], dtype=torch.bool),
            extras=_extras([data for _, _, data in edges], label, name),
            **note,
        )


def _score(data: Mapping[str, Any], edge: str, label: str) -> Any:
    if "score" not in data and "weight" not in data:
        raise FormatError(f"{label}: edge {edge} has neither `score` nor `weight`: give every edge a number `score`")
    return _number(data.get("score", data.get("weight")))


def _number(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        return value.item()
    return value


def _port(data: Mapping[str, Any], label: str) -> int:
    port = data.get("port") or ""
    if port not in PORTS:
        raise FormatError(f"{label}: an edge has `port` {str(port)[:40]!r}; write one of {PORTS} or leave it out")
    return PORTS.index(port)


def _extras(rows: list[Mapping[str, Any]], label: str, name: Any) -> dict[str, torch.Tensor]:
    """Columns beside this library's own that are numbers wherever an edge has them; NaN where one doesn't."""
    columns = {
        key: [_number(row.get(key)) for row in rows] for key in sorted({key for row in rows for key in row} - _OWN)
    }
    found = {}
    for key, values in columns.items():
        given = [place for place, value in enumerate(values) if value is not None]
        if given and all(type(values[place]) in (int, float) for place in given):
            own = [values[place] for place in given]
            column = torch.full((len(rows),), torch.nan, dtype=torch.float64)
            column[given] = _read.number_columns(own, label, key, lambda row, given=given: name(given[row]))
            found[key] = column
    return found


def _note(text: Any) -> dict[str, Any]:
    """What `to_networkx` wrote beside nodes and edges; a stranger's is ignored."""
    try:
        note = json.loads(text)
        return {
            "node_info": {str(name): dict(info) for name, info in note["node_info"].items()},
            "provenance": dict(note["provenance"]),
            "certificates": tuple(dict(row) for row in note["certificates"]),
        }
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        return {}


def _index(source: "nx.Graph", edges: Sequence[tuple[str, str, Mapping[str, Any]]], label: str) -> NodeIndex:
    nodes = {str(node): _split(str(node), label) for node in source.nodes}
    if not nodes:
        raise FormatError(f"{label}: no nodes; a graph has at least one")
    features: dict[Site, list[int | None]] = {}
    for site, feature in nodes.values():
        features.setdefault(site, []).append(feature)
    ranks = _ranks(source, nodes, edges, label)
    order = sorted(features, key=lambda site: ranks[site])
    return NodeIndex(tuple(Block(site, ranks[site], _features(site, features[site], label)) for site in order))


def _split(name: str, label: str) -> tuple[Site, int | None]:
    text, mark, feature = name.partition("#")
    if mark and not (feature.isascii() and feature.isdigit() and len(feature) < 19):
        raise FormatError(f"{label}: node {name[:80]!r} has no number after #; write <site>#<feature>")
    return parse_site(text), int(feature) if mark else None


def _features(site: Site, numbers: Iterable[int | None], label: str) -> tuple[int, ...] | None:
    numbers = list(numbers)
    if numbers == [None]:
        return None
    if None in numbers:
        raise FormatError(f"{label}: {site} is a node of its own and has features too; name one or the other")
    return tuple(number for number in numbers if number is not None)


def _ranks(
    source: "nx.Graph",
    nodes: Mapping[str, tuple[Site, int | None]],
    edges: Sequence[tuple[str, str, Mapping[str, Any]]],
    label: str,
) -> dict[Site, int]:
    said = {str(node): data.get("rank") for node, data in source.nodes(data=True)}
    if all(isinstance(rank, int) and not isinstance(rank, bool) for rank in said.values()):
        ranks: dict[Site, int] = {}
        for name, (site, _) in nodes.items():
            if ranks.setdefault(site, _read.expect_int(said[name], label, f"rank of {name}", -1 << 40)) != said[name]:
                raise FormatError(f"{label}: nodes of {site} have different ranks; one site is computed at one time")
        return ranks
    pairs = {(nodes[u][0], nodes[v][0]) for u, v, _ in edges}
    if all(site.kind in ("input", "head", "mlp", "logits") for site, _ in nodes.values()):
        return _component_ranks({site for site, _ in nodes.values()})
    return _ranks_of_edges({site for site, _ in nodes.values()}, pairs, label)


def _component_ranks(sites: set[Site]) -> dict[Site, int]:
    """The transformer's order; an MLP comes after its own heads, as in `component_index`."""
    last = 1 + 2 * (1 + max(site.layer for site in sites))
    place = {"input": lambda _: 0, "head": lambda s: 1 + 2 * s.layer, "mlp": lambda s: 2 + 2 * s.layer}
    return {site: place.get(site.kind, lambda _: last)(site) for site in sites}


def _ranks_of_edges(sites: set[Site], pairs: set[tuple[Site, Site]], label: str) -> dict[Site, int]:
    order = nx.DiGraph()
    order.add_nodes_from(sorted(sites, key=str))
    order.add_edges_from(sorted(pairs, key=str))
    try:
        return {site: rank for rank, group in enumerate(nx.topological_generations(order)) for site in group}
    except nx.NetworkXUnfeasible:
        (start, end), *_ = nx.find_cycle(order)
        raise FormatError(
            f"{label}: a cycle runs through {start}->{end}: an attribution graph has none; drop an edge or give every "
            "node its `rank` in the order of computation"
        ) from None
