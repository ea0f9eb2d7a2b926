"""EAP-IG (`eap.graph.Graph`): its JSON, its .pt and, where the package is installed, its live object.

What is kept: score and membership of every real edge; the model's shape; node scores; provenance, under
`cfg["tl_circuitlasso"]`, the one place that EAP-IG carries through its own load and save.

What is lost on the way out: weights, extras (stability, effect), certificates and what is known of nodes; which edges
weren't candidates (all real edges are written); coordinates within a component (projected: the score of largest size).
On the way in, neuron masks (EAP-IG's "neurons" are output dimensions of a component) and other extra keys are dropped.

Ports: an edge into a head without a port is written three times, as q, k and v. Reading a file gives q, k and v apart;
they merge to one edge again only if the file says that the graph had no ports and the three copies still agree.

A score is stored in full: fp64 in JSON, in .pt fp32 where that loses nothing and else fp64 (EAP-IG reads both as fp32).

>>> import torch
>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(
...     component_index(n_layers=1, n_heads=1), {("input", "a0.h0", "v"): .5, ("a0.h0", "logits"): -1.})
>>> data = to_eap(graph, d_model=16)
>>> data["edges"]["input->a0.h0<v>"]
{'score': 0.5, 'in_graph': True}
>>> from_eap(data).kept_edges() == graph.kept_edges()
True
"""

import json
import logging
import math
from collections.abc import Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._grid import Grid, checked_components, graph_of, grid_of
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import Components

_log = logging.getLogger(__name__)

_SHAPE = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")
_NOTE = "tl_circuitlasso"
_PT_KEYS = ("cfg", "src_nodes", "dst_nodes", "edges_in_graph", "nodes_in_graph")
_CHUNK = 1 << 16


def to_eap(graph: AttributionGraph, path: str | Path | None = None, *, d_model: int | None = None) -> dict[str, Any]:
    """The graph as EAP-IG's plain data, written to `path` if one is given: `.pt` in its tensor layout, else JSON.

    `d_model` (the width of the residual stream) is taken from the graph's provenance where that has it; EAP-IG only
    uses it for neuron masks, so an unknown width is written as 0.

    Raises
    ------
    InputError: the graph has nodes that aren't components, or `path` can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> data = to_eap(demo.circuit)
    >>> sorted(data)
    ['cfg', 'edges', 'nodes']
    """
    if path is not None and Path(path).suffix.lower() in (".pt", ".pth"):
        data = _tensors(graph, d_model)
        _read.write_pt(path, data)
        return data
    data = _rows(graph, d_model)
    if path is not None:
        storage.write_atomically(Path(path), lambda temporary: _stream(temporary, data))
    return data


def from_eap(source: Source) -> AttributionGraph:
    """The graph in a file of EAP-IG (`.json` or `.pt`), or in its plain data.

    Edges that a JSON file leaves out have score 0 and aren't kept. The file's `cfg` is kept under
    `provenance["eap"]`, so that writing an unchanged graph gives the same file again. Circuits without scores (no
    `score`, no `edges_scores`), which MIB takes, have score 0 everywhere. Scores that are NaN, as EAP-IG's information
    flow routes write them for edges without any flow, are 0, and a warning counts them.

    Raises
    ------
    FormatError: not EAP-IG's data: missing keys, unknown nodes or edges, infinite scores, wrong shapes.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> from_eap(to_eap(demo.circuit)).kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.expect_mapping(_read.read_source(source, constants=True), label, "the file")
    with _read.reading(label):
        return _from_tensors(data, label) if "src_nodes" in data else _from_rows(data, label)


# ---- out ------------------------------------------------------------------------------------------------------------


def _rows(graph: AttributionGraph, d_model: int | None) -> dict[str, Any]:
    grid = grid_of(graph)
    row, column = grid.parts.edges()
    scores, kept = grid.score[row, column].tolist(), grid.kept[row, column].tolist()
    names = grid.parts.edge_names()
    return {
        "cfg": _cfg(graph, grid, d_model),
        "nodes": _node_rows(graph, grid),
        "edges": {n: {"score": s, "in_graph": k} for n, s, k in zip(names, scores, kept)},
    }


def _tensors(graph: AttributionGraph, d_model: int | None) -> dict[str, Any]:
    grid = grid_of(graph)
    sources = grid.parts.sources()
    data = {
        "cfg": _cfg(graph, grid, d_model),
        "src_nodes": sources,
        "dst_nodes": grid.parts.inputs(),
        "edges_scores": _read.exact_dtype(grid.score),
        "edges_in_graph": grid.kept,
        "nodes_in_graph": _nodes_kept(graph, grid),
    }
    scores = [graph.node_info.get(name, {}).get("eap_score") for name in sources]
    if any(score is not None for score in scores):
        data["nodes_scores"] = torch.tensor([float("nan") if score is None else score for score in scores])
    return data


def _cfg(graph: AttributionGraph, grid: Grid, d_model: int | None) -> dict[str, Any]:
    """The file's own cfg where the graph came from one and has its shape; else a new one."""
    parts = grid.parts
    eap = graph.provenance.get("eap")
    known = dict(eap["cfg"]) if isinstance(eap, Mapping) and isinstance(eap.get("cfg"), Mapping) else {}
    width = known.get("d_model", _width(graph)) if d_model is None else d_model
    shape = dict(zip(_SHAPE, (parts.n_layers, parts.n_heads, parts.parallel, width)))
    rest = {key: value for key, value in graph.provenance.items() if key != "eap"}
    note = grid.note() | ({"provenance": rest} if rest else {})
    return storage.plain(known | shape | ({_NOTE: note} if note else {}), "graph.provenance")


def _width(graph: AttributionGraph) -> int:
    model = graph.provenance.get("model")
    width = model.get("d_model") if isinstance(model, Mapping) else graph.provenance.get("d_model")
    return width if isinstance(width, int) else 0


def _nodes_kept(graph: AttributionGraph, grid: Grid) -> Bool[Tensor, " source"]:
    """A source is in the graph if it touches a kept edge, or if the file it came from said so."""
    said = [bool(graph.node_info.get(name, {}).get("eap_in_graph", False)) for name in grid.parts.sources()]
    return _touched(grid) | torch.tensor(said)


def _touched(grid: Grid) -> Bool[Tensor, " source"]:
    node, _ = grid.parts.column_nodes()
    touched = torch.zeros(grid.parts.n_sources + 1, dtype=torch.bool)
    touched[node[grid.kept.any(0)]] = True
    return touched[:-1] | grid.kept.any(1)


def _node_rows(graph: AttributionGraph, grid: Grid) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, kept in zip(grid.parts.sources(), _nodes_kept(graph, grid).tolist()):
        score = graph.node_info.get(name, {}).get("eap_score")
        rows[name] = {"in_graph": kept} | ({} if score is None else {"score": score})
    return rows | {"logits": {"in_graph": True}}


def _stream(path: Path, data: Mapping[str, Any]) -> None:
    """Write as json.dump would, byte for byte, a chunk of edges at a time."""
    edges = iter(data["edges"].items())
    flag = {False: "false", True: "true"}
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"cfg": {json.dumps(data["cfg"])}, "nodes": {json.dumps(data["nodes"])}, "edges": {{')
        comma = ""
        while chunk := list(islice(edges, _CHUNK)):
            rows = [f'"{n}": {{"score": {row["score"]!r}, "in_graph": {flag[row["in_graph"]]}}}' for n, row in chunk]
            file.write(comma + ", ".join(rows))
            comma = ", "
        file.write("}}")


# ---- in -------------------------------------------------------------------------------------------------------------


def _from_rows(data: Mapping[Any, Any], label: str) -> AttributionGraph:
    _read.expect_keys(data, ("cfg", "nodes", "edges"), label, "the file")
    parts, cfg = _shape(data["cfg"], label)
    nodes = _read.expect_mapping(data["nodes"], label, "nodes")
    edges = _read.expect_mapping(data["edges"], label, "edges")
    cells = _cells_of(list(edges), parts, label)
    rows = list(edges.values())
    score = torch.zeros(parts.n_sources, parts.n_readers, dtype=torch.float64)
    kept = torch.zeros(score.shape, dtype=torch.bool)
    names = list(edges)
    if any(isinstance(row, Mapping) and "score" in row for row in rows):
        given = _without_nan(_column(rows, edges, "score", label), label)
        score[cells] = _read.number_columns(given, label, "score", names.__getitem__)
    kept[cells] = _flags(_column(rows, edges, "in_graph", label), names, label)
    return _graph(Grid(parts, score, kept), cfg, _node_info(nodes, parts, label))


def _shape(cfg: Any, label: str) -> tuple[Components, dict[str, Any]]:
    cfg = _plain(_read.expect_mapping(cfg, label, "cfg"), label)
    _read.expect_keys(cfg, _SHAPE, label, "`cfg`")
    layers = _read.expect_int(cfg["n_layers"], label, "cfg.n_layers", 1, 1 << 16)
    heads = _read.expect_int(cfg["n_heads"], label, "cfg.n_heads", 1, 1 << 16)
    _read.expect_int(cfg["d_model"], label, "cfg.d_model", 0)
    if not isinstance(cfg["parallel_attn_mlp"], bool):
        raise FormatError(
            f"{label}: `cfg.parallel_attn_mlp` is {cfg['parallel_attn_mlp']!r}; true or false is expected"
        )
    return checked_components(layers, heads, cfg["parallel_attn_mlp"], label), cfg


def _plain(cfg: Mapping[Any, Any], label: str) -> dict[str, Any]:
    """The entries that a file can say: EAP-IG keeps a model's whole configuration where it's given as a dict."""
    plain: dict[str, Any] = {}
    for key, value in cfg.items():
        try:
            plain |= storage.plain({key: value}, "cfg")
        except InputError:
            _log.warning("%s: `cfg.%s` is dropped: %.80r is neither text nor number", label, key, value)
    return plain


def _cells_of(names: list[Any], parts: Components, label: str) -> tuple[Tensor, Tensor]:
    known = parts.edge_names()
    row, column = parts.edges()
    if names == known:
        return row, column
    position = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in position]
    if unknown:
        raise FormatError(
            f"{label}: `edges` has {str(unknown[0])[:80]!r}, which a model of this `cfg` doesn't have "
            f"(unknown node, missing <q|k|v>, or against the order of computation); edges look like {known[0]}"
        )
    chosen = torch.tensor([position[name] for name in names], dtype=torch.long)
    return row[chosen], column[chosen]


def _column(rows: list[Any], edges: Mapping[str, Any], key: str, label: str) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except (KeyError, TypeError, IndexError):
        bad = next(name for name, row in edges.items() if not (isinstance(row, Mapping) and key in row))
        raise FormatError(
            f"{label}: edge {bad} has no `{key}`: every edge needs in_graph, and score if any has one"
        ) from None


def _without_nan(values: list[Any], label: str) -> list[Any]:
    missing = sum(isinstance(value, float) and math.isnan(value) for value in values)
    if missing:
        _log.warning("%s: %d of %d scores are NaN and count as 0", label, missing, len(values))
    return [0.0 if isinstance(value, float) and math.isnan(value) else value for value in values]


def _flags(values: list[Any], names: list[str], label: str) -> Bool[Tensor, " edge"]:
    if not set(map(type, values)) <= {bool}:
        wrong = next(i for i, value in enumerate(values) if type(value) is not bool)
        raise FormatError(f"{label}: `in_graph` of {names[wrong]} is {str(values[wrong])[:80]!r}; write true or false")
    return torch.tensor(values, dtype=torch.bool)


def _node_info(nodes: Mapping[Any, Any], parts: Components, label: str) -> dict[str, dict[str, Any]]:
    known = {*parts.sources(), "logits"}
    info: dict[str, dict[str, Any]] = {}
    for name, row in nodes.items():
        if name not in known:
            raise FormatError(f"{label}: `nodes` has {str(name)[:80]!r}, which a model of this `cfg` doesn't have")
        row = _read.expect_mapping(row, label, f"nodes.{name}")
        if "neurons" in row or "neurons_scores" in row:
            _log.warning("%s: neuron masks are dropped: this graph has components only", label)
        if name == "logits":
            continue
        info[name] = {"eap_in_graph": True} if row.get("in_graph") is True else {}
        score = row.get("score")
        if score is not None and score == score:  # NaN marks a node that EAP-IG didn't score
            info[name]["eap_score"] = float(_read.number_columns([score], label, "score", lambda _, name=name: name)[0])
    return info


def _from_tensors(data: Mapping[Any, Any], label: str) -> AttributionGraph:
    _read.expect_keys(data, _PT_KEYS, label, "the file")
    parts, cfg = _shape(data["cfg"], label)
    for key, names in (("src_nodes", parts.sources()), ("dst_nodes", parts.inputs())):
        if data[key] != names:
            raise FormatError(f"{label}: `{key}` aren't the nodes of a model of this `cfg`, in EAP-IG's order")
    shape = (parts.n_sources, parts.n_readers)
    score = torch.zeros(shape, dtype=torch.float64)
    if "edges_scores" in data:
        score = _read.expect_tensor(data["edges_scores"], label, "edges_scores", shape).double()
    if missing := int(score.isnan().sum()):
        _log.warning("%s: %d of %d scores are NaN and count as 0", label, missing, score.numel())
        score = score.where(~score.isnan(), 0.0)
    member = _read.expect_tensor(data["edges_in_graph"], label, "edges_in_graph", shape).bool()
    nodes = _read.expect_tensor(data["nodes_in_graph"], label, "nodes_in_graph", shape[:1]).bool()
    grid = Grid(parts, score, _only_real(parts, score, member, data, label))
    node_scores = data.get("nodes_scores")
    if node_scores is not None:
        node_scores = _read.expect_tensor(node_scores, label, "nodes_scores", shape[:1])
    if data.get("neurons_in_graph") is not None:
        _log.warning("%s: neuron masks are dropped: this graph has components only", label)
    return _graph(grid, cfg, _tensor_info(parts, nodes, node_scores, label))


def _only_real(
    parts: Components,
    score: Float[Tensor, "source column"],
    member: Bool[Tensor, "source column"],
    data: Mapping[Any, Any],
    label: str,
) -> Bool[Tensor, "source column"]:
    """Membership on the real edges; node-level selection marks further ones, to no effect, and is let pass."""
    real = torch.zeros_like(member)
    real[parts.edges()] = True
    names = parts.sources(), parts.inputs()
    cell_name = lambda flat: f"{names[0][flat // parts.n_readers]}->{names[1][flat % parts.n_readers]}"  # noqa: E731
    _read.expect_finite(score.flatten(), label, "edges_scores", cell_name)
    wrong = (score != 0) & ~real
    if "nodes_scores" not in data and "neurons_in_graph" not in data:
        wrong |= member & ~real
    if bool(wrong.any()):
        first = cell_name(int(wrong.flatten().nonzero()[0]))
        raise FormatError(f"{label}: {first} runs against the order of computation: transposed, or of another model?")
    return member & real


def _tensor_info(
    parts: Components, nodes: Bool[Tensor, " source"], scores: Float[Tensor, " source"] | None, label: str
) -> dict[str, dict[str, Any]]:
    info: dict[str, dict[str, Any]] = {name: {} for name in parts.sources()}
    for name, kept in zip(info, nodes.tolist()):
        if kept:
            info[name]["eap_in_graph"] = True
    scored = [] if scores is None else [(n, s) for n, s in zip(info, scores.double().tolist()) if not math.isnan(s)]
    column = _read.number_columns([s for _, s in scored], label, "nodes_scores", lambda row: scored[row][0])
    for (name, _), score in zip(scored, column.tolist()):
        info[name]["eap_score"] = score
    return info


def _graph(grid: Grid, cfg: dict[str, Any], info: dict[str, dict[str, Any]]) -> AttributionGraph:
    """The graph; a node's flag is remembered only where it says more than the kept edges do."""
    note = cfg.pop(_NOTE, None)
    provenance: dict[str, Any] = {}
    if isinstance(note, Mapping):
        grid = grid.with_note(note)
        own = note.get("provenance")
        provenance = dict(own) if isinstance(own, Mapping) else {}
    for name, touched in zip(grid.parts.sources(), _touched(grid).tolist()):
        if touched:
            info.get(name, {}).pop("eap_in_graph", None)
    node_info = {name: row for name, row in info.items() if row}
    return graph_of(grid, node_info=node_info, provenance=provenance | {"eap": {"cfg": cfg}})


# ---- live objects ---------------------------------------------------------------------------------------------------


def to_eap_graph(graph: AttributionGraph, *, d_model: int | None = None) -> Any:
    """The graph as a live `eap.graph.Graph`, for its `evaluate_graph`, pictures and selection.

    Raises
    ------
    InputError: EAP-IG isn't installed (from its repository; the package named `eap` on PyPI is another project).

    >>> live = to_eap_graph(graph)  # doctest: +SKIP
    >>> live.count_included_edges()  # doctest: +SKIP
    """
    try:
        live = import_module("eap.graph").Graph
    except (ImportError, AttributeError) as error:
        raise InputError(
            "EAP-IG can't be imported: install it from its repository hannamw/EAP-IG (PyPI's `eap` is another "
            "project), or write a file with to_eap"
        ) from error
    data = _tensors(graph, d_model)
    result = live.from_model(data["cfg"])
    result.scores[:] = data["edges_scores"]
    result.in_graph[:] = data["edges_in_graph"]
    result.nodes_in_graph[:] = data["nodes_in_graph"]
    if "nodes_scores" in data:
        result.nodes_scores = data["nodes_scores"]
    return result


def from_eap_graph(live: Any) -> AttributionGraph:
    """The graph in a live `eap.graph.Graph`; exact, as its fp32 scores fit in fp64.

    Raises
    ------
    FormatError: the object isn't EAP-IG's graph, or holds scores that aren't finite.

    >>> graph = from_eap_graph(live)  # doctest: +SKIP
    """
    with _read.reading("the given eap graph"):
        sources = [name for name in live.nodes if name != "logits"]
        data = {"cfg": dict(live.cfg), "src_nodes": sources, "dst_nodes": live.get_dst_nodes()}
        data |= {"edges_scores": live.scores.cpu(), "edges_in_graph": live.in_graph.cpu()}
        data |= {"nodes_in_graph": live.nodes_in_graph.cpu()}
        if live.nodes_scores is not None:
            data["nodes_scores"] = live.nodes_scores.cpu()
        return _from_tensors(data, "the given eap graph")
