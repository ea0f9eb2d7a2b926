"""circuit-tracer: the JSON of its page, and its .pt, whose matrix is the transpose of ours (row = target).

JSON is what its local server shows (`graph_data/{slug}.json`). The .pt holds the fields of its `Graph` as tensors and
plain data: nodes in its order (features, one error node per layer and column, tokens, logits), `adjacency_matrix` (N,
N) fp32 with row = target. Its `cfg` is a plain dict; `to_circuit_tracer_graph` gives the live object where the
package is installed.

What is lost: edges that aren't kept, ports (merged), weights, extras, certificates; in .pt also labels, groups, and
scores beyond fp32; error nodes are zero, as a regression over features has none. Columns are kinds of site rather
than tokens. `from_circuit_tracer` reads .pt files of the package itself without running any of its code.

>>> from tl_circuitlasso.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_circuit_tracer(graph)["metadata"]["schema_version"]
1
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _frontend, _read
from tl_circuitlasso.formats._frontend import Supernodes, cantor_pair
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph

_MAX_NODES = 20_000
_NOTE = "tl_circuitlasso"
_KEYS = ("input_string", "input_tokens", "active_features", "adjacency_matrix", "selected_features", "cfg")


class _LogitTarget(NamedTuple):
    """Stands in for circuit-tracer's record of a logit."""

    token_str: str
    vocab_idx: int


class _Config(SimpleNamespace):
    """Stands in for circuit-tracer's and TransformerLens's configuration objects: attributes and nothing else."""


class _Opaque:
    """Stands in for values that a configuration holds and that aren't needed here; takes anything, keeps nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


STAND_INS: dict[str, type] = {
    "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig": _Config,
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig": _Config,
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig": _Config,
    "transformer_lens.config.hooked_transformer_config.HookedTransformerConfig": _Config,
    "circuit_tracer.attribution.targets.LogitTarget": _LogitTarget,
    "numpy._core.multiarray.scalar": _Opaque,
    "numpy.core.multiarray.scalar": _Opaque,
    "numpy.dtype": _Opaque,
    "_codecs.encode": _Opaque,
}


def to_circuit_tracer(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    slug: str = "circuit-lasso",
    scan: str = "unknown",
    prompt: str = "(a data set)",
    supernodes: Supernodes | None = None,
    pinned: Iterable[str] = (),
) -> dict[str, Any]:
    """The kept circuit as circuit-tracer's data, written to `path` if one is given: `.pt` as tensors, else JSON.

    Raises
    ------
    InputError: a supernode of unknown nodes, two nodes that share an id, too many nodes for a dense matrix, or a `path`
        that can't be written.
    """
    data = _frontend.page(graph, slug=slug, scan=scan, prompt=prompt, supernodes=supernodes, pinned=pinned)
    if path is not None and Path(path).suffix.lower() in (".pt", ".pth"):
        tensors = _tensors(data)
        _read.write_pt(path, tensors)
        return tensors
    data["metadata"] = {"transcoder_list": [], "schema_version": 1} | data["metadata"]
    if path is not None:
        _read.write_json(path, data)
    return data


def from_circuit_tracer(source: Source) -> AttributionGraph:
    """The graph in circuit-tracer's JSON or .pt; nonzero entries of the matrix, or links, are kept edges.

    Raises
    ------
    FormatError: entries missing or of the wrong shape, scores that aren't finite, edges against the layers.
    """
    label = _read.label_of(source)
    data = _read.read_source(source, STAND_INS)
    with _read.reading(label):
        if isinstance(data, Mapping) and "adjacency_matrix" in data:
            data = _page_of_tensors(data, label)
        return _frontend.graph_of_page(data, label)


def to_circuit_tracer_graph(graph: AttributionGraph, **names: Any) -> Any:
    """The kept circuit as a live `circuit_tracer.graph.Graph`, for its pruning, scores and `to_pt`.

    Raises
    ------
    InputError: circuit-tracer isn't installed (from its repository; PyPI has a fork of that name).
    """
    try:
        live = import_module("circuit_tracer.graph").Graph
    except (ImportError, AttributeError) as error:
        raise InputError(
            "circuit-tracer can't be imported: install it from its repository safety-research/circuit-tracer, or write "
            "JSON with to_circuit_tracer"
        ) from error
    data = _tensors(_frontend.page(graph, **({"slug": "", "scan": "unknown", "prompt": ""} | names), **_NO_GROUPS))
    cfg = {key: value for key, value in data["cfg"].items() if key != _NOTE}
    try:
        mapping = import_module("circuit_tracer.utils.tl_nnsight_mapping")
        targets = import_module("circuit_tracer.attribution.targets")
    except ImportError:  # releases before the nnsight backend take any object with n_layers, and tokens as a tensor
        tokens = {"logit_tokens": data.pop("logit_targets")}
        del data["vocab_size"]
        return live(**data | tokens | {"cfg": SimpleNamespace(**cfg)})
    logits = [targets.LogitTarget("logits", int(token)) for token in data["logit_targets"]]
    data["scan_name" if "scan_name" in live.__init__.__annotations__ else "scan"] = data.pop("scan")
    return live(**data | {"cfg": mapping.UnifiedConfig(**cfg), "logit_targets": logits})


_NO_GROUPS: dict[str, Any] = {"supernodes": None, "pinned": ()}


# ---- page to tensors ------------------------------------------------------------------------------------------------


def _tensors(page: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of circuit-tracer's `Graph`."""
    groups = _in_order(page["nodes"])
    features, tokens, logits = groups["feature"], groups["token"], groups["logit"]
    n_pos, n_layers = len(page["metadata"]["prompt_tokens"]), _n_layers(page["nodes"])
    place = {node["node_id"]: number for number, node in enumerate(features)}
    first_token = len(features) + n_layers * n_pos
    place |= {node["node_id"]: len(features) + int(node["layer"]) * n_pos + node["ctx_idx"] for node in groups["error"]}
    place |= {node["node_id"]: first_token + node["ctx_idx"] for node in tokens}
    place |= {node["node_id"]: first_token + n_pos + number for number, node in enumerate(logits)}
    size = first_token + n_pos + len(logits)
    if len(set(place.values())) < len(place):
        raise InputError("`graph` has several nodes at its input, for which a .pt has one place: write JSON")
    if size > _MAX_NODES:
        raise InputError(f"`graph` needs a dense matrix of {size:,} nodes: keep fewer edges first, with top_k")
    links = page["links"]
    ends = [torch.tensor([place[link[end]] for link in links], dtype=torch.long) for end in ("target", "source")]
    matrix = torch.zeros(size, size)
    matrix[ends[0], ends[1]] = torch.tensor([float(link["weight"]) for link in links])
    return {
        "input_string": page["metadata"]["prompt"],
        "input_tokens": torch.arange(n_pos),
        "active_features": torch.tensor(
            [[int(node["layer"]), node["ctx_idx"], _number(node)] for node in features], dtype=torch.long
        ).view(-1, 3),
        "adjacency_matrix": matrix,
        "selected_features": torch.arange(len(features)),
        "activation_values": torch.tensor([float(node.get("activation") or 0.0) for node in features]),
        "logit_targets": torch.tensor([_number(node) for node in logits], dtype=torch.long),
        "logit_probabilities": torch.tensor([float(node.get("token_prob", 1.0)) for node in logits]),
        "vocab_size": 1 + max((_number(node) for node in logits), default=0),
        "scan": page["metadata"]["scan"],
        "cfg": _config(page, n_layers, place),
    }


def _config(page: Mapping[str, Any], n_layers: int, place: Mapping[str, int]) -> dict[str, Any]:
    """The fields of circuit-tracer's `UnifiedConfig`, and this library's entries by their place in the matrix."""
    sizes = dict.fromkeys(("d_model", "d_head", "n_heads", "d_mlp", "d_vocab"), 0)
    names = dict.fromkeys(("tokenizer_name", "model_name", "original_architecture"), page["metadata"]["scan"])
    own = {"note": page["metadata"].get(_NOTE), "nodes": {place[node["node_id"]]: node for node in page["nodes"]}}
    return {"n_layers": n_layers} | sizes | names | ({_NOTE: own} if own["note"] else {})


def _in_order(nodes: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {"feature": [], "error": [], "token": [], "logit": []}
    for node in nodes:
        groups[_group(node)].append(node)
    return groups


def _group(node: Mapping[str, Any]) -> str:
    if node["feature_type"] in ("logit", "target"):
        return "logit"
    if node["layer"] == "E":
        return "token"
    return "error" if "error" in node["feature_type"] else "feature"


def _n_layers(nodes: list[dict[str, Any]]) -> int:
    return 1 + max((int(node["layer"]) for node in nodes if _group(node) in ("feature", "error")), default=0)


def _number(node: Mapping[str, Any]) -> int:
    return int(node["node_id"].split("_")[1])


# ---- tensors to page ------------------------------------------------------------------------------------------------


def _page_of_tensors(data: Mapping[Any, Any], label: str) -> Any:
    """The page's nodes and links that the tensors stand for; error nodes only where something touches them."""
    _read.expect_keys(data, _KEYS, label, "the file")
    cfg = data["cfg"] if isinstance(data["cfg"], Mapping) else vars(data["cfg"])
    n_layers = _read.expect_int(cfg.get("n_layers"), label, "cfg.n_layers", 1, 1 << 16)
    n_pos = len(data["input_tokens"])
    active = data["active_features"]
    chosen = active[_read.expect_tensor(data["selected_features"], label, "selected_features", _flat(data))]
    logits = _logits(data, label)
    size = len(chosen) + (n_layers + 1) * n_pos + len(logits)
    matrix = _read.expect_tensor(data["adjacency_matrix"], label, "adjacency_matrix", (size, size))
    _read.expect_finite(matrix.double().flatten(), label, "adjacency_matrix", lambda cell: str(divmod(cell, size)))
    nodes = [_feature(*map(int, row)) for row in chosen.tolist()]
    nodes += [_error(layer, pos) for layer in range(n_layers) for pos in range(n_pos)]
    nodes += [_token(pos, int(token)) for pos, token in enumerate(data["input_tokens"])]
    nodes += [_logit(token, n_pos - 1, n_layers) for token in logits]
    return _page(_own_entries(nodes, cfg.get(_NOTE)), matrix, data, label)


def _own_entries(nodes: list[dict[str, Any]], own: Any) -> list[dict[str, Any]]:
    """The entries that `to_circuit_tracer` put in a file of its own, in place of those read off the tensors."""
    if isinstance(own, Mapping) and isinstance(own.get("nodes"), Mapping):
        for place, node in own["nodes"].items():
            nodes[place] = dict(node)
    return nodes


def _flat(data: Mapping[Any, Any]) -> tuple[int, ...]:
    selected, active = data["selected_features"], data["active_features"]
    if not isinstance(active, Tensor) or active.ndim != 2 or active.shape[1] != 3 or active.dtype.is_floating_point:
        raise FormatError("`active_features` isn't an integer tensor of (layer, position, feature) rows")
    return (selected.numel(),) if isinstance(selected, Tensor) else (-1,)


def _logits(data: Mapping[Any, Any], label: str) -> list[int]:
    targets = data.get("logit_targets", data.get("logit_tokens"))
    if isinstance(targets, Tensor):
        return [int(token) for token in targets.flatten().tolist()]
    if not isinstance(targets, list):
        raise FormatError(f"{label}: `logit_targets` is a {type(targets).__name__}; a list or a tensor is expected")
    return [int(target.vocab_idx) for target in targets]


def _page(
    nodes: list[dict[str, Any]], matrix: Float[Tensor, "target source"], data: Mapping[Any, Any], label: str
) -> dict[str, Any]:
    target, source = matrix.nonzero(as_tuple=True)
    if target.numel() > _read.MAX_EDGES:
        raise FormatError(f"{label}: {target.numel():,} edges; prune the graph in circuit-tracer first")
    weights = matrix[target, source].double().tolist()
    ids = [node["node_id"] for node in nodes]
    touched = {*target.tolist(), *source.tolist()}
    links = [
        {"source": ids[s], "target": ids[t], "weight": w} for s, t, w in zip(source.tolist(), target.tolist(), weights)
    ]
    note = _note_of(data)
    always = (lambda node: "tl_name" in node) if note else (lambda node: "error" not in node["feature_type"])
    shown = [node for number, node in enumerate(nodes) if number in touched or always(node)]
    prompt = str(data["input_string"])
    scan = str(data.get("scan_name", data.get("scan")) or "unknown")
    metadata = {"slug": "", "scan": scan, "prompt": prompt, "prompt_tokens": ["?"] * len(data["input_tokens"])}
    metadata |= {_NOTE: note} if note else {}
    return {"metadata": metadata, "qParams": {}, "nodes": shown, "links": links}


def _note_of(data: Mapping[Any, Any]) -> Any:
    own = data["cfg"].get(_NOTE) if isinstance(data["cfg"], Mapping) else None
    return own.get("note") if isinstance(own, Mapping) else None


def _node(layer: str, number: int, position: int, kind: str, feature: int, label: str = "") -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{number}_{position}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "jsNodeId": f"{layer}_{number}-{position}",
        "clerp": label,
    }


def _feature(layer: int, position: int, number: int) -> dict[str, Any]:
    return _node(str(layer), number, position, "cross layer transcoder", cantor_pair(layer, number))


def _error(layer: int, position: int) -> dict[str, Any]:
    return _node(str(layer), -1, position, "mlp reconstruction error", -1)


def _token(position: int, token: int) -> dict[str, Any]:
    return _node("E", token, position, "embedding", position)


def _logit(token: int, position: int, n_layers: int) -> dict[str, Any]:
    return _node(str(n_layers + 1), token, position, "logit", token, f'Output "{token}" (p=1.000)')
