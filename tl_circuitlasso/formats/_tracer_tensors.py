"""circuit-tracer's tensors: its `Graph`'s fields from a page's nodes and links, and back.

Nodes stand in its order: features, one error node per layer and column, tokens, logits; `adjacency_matrix` (N, N) has
a row per target. A feature's layer there is also its place in the order of computation, so where an edge joins nodes
of one layer (a head and the MLP above it) every rank gets a layer of its own.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._frontend import cantor_pair
from tl_circuitlasso.formats._page_names import number_of
from tl_circuitlasso.graph import AttributionGraph

MAX_NODES = 20_000
NOTE = "tl_circuitlasso"
OWN = "circuit_tracer"  # what a page's metadata keep of a .pt beside nodes and links
CONFIG = {
    **dict.fromkeys(("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab"), 0),
    **dict.fromkeys(("tokenizer_name", "model_name", "original_architecture"), ""),
    **dict.fromkeys(("n_key_value_heads", "dtype")),
}  # the fields of circuit-tracer's `UnifiedConfig`
_KEYS = ("input_string", "input_tokens", "active_features", "adjacency_matrix", "selected_features", "cfg")

_log = logging.getLogger(__name__)


class Logit(NamedTuple):
    """circuit-tracer's record of a logit: its text and token (from the vocabulary's size on, a custom target's)."""

    token_str: str
    vocab_idx: int


# ---- page to tensors ------------------------------------------------------------------------------------------------


def tensors_of_page(page: Mapping[str, Any], graph: AttributionGraph) -> dict[str, Any]:
    """The fields of circuit-tracer's `Graph`; `cfg` as a plain dict, `logit_targets` as records.

    Raises
    ------
    InputError: several nodes for one place, or too many nodes for a dense matrix.
    """
    groups = _in_order(page["nodes"])
    features, tokens, logits = groups["feature"], groups["token"], groups["logit"]
    said = page["metadata"].get(OWN, {})
    layers, n_layers = _layers(page, graph, said)
    n_pos = len(page["metadata"]["prompt_tokens"])
    place = _places(groups, layers, n_layers, n_pos)
    size = len(features) + (n_layers + 1) * n_pos + len(logits)
    if size > MAX_NODES:
        raise InputError(f"`graph` needs a dense matrix of {size:,} nodes: keep fewer edges first, with top_k")
    ends = [
        torch.tensor([place[link[end]] for link in page["links"]], dtype=torch.long) for end in ("target", "source")
    ]
    matrix = torch.zeros(size, size)
    matrix[ends[0], ends[1]] = torch.tensor([float(link["weight"]) for link in page["links"]])
    at = [[layers[node["node_id"]], node["ctx_idx"], _number(node)] for node in features]
    input_tokens = torch.zeros(n_pos, dtype=torch.long)
    for node in tokens:
        input_tokens[node["ctx_idx"]] = _number(node)
    return {
        "input_string": page["metadata"]["prompt"],
        "input_tokens": input_tokens,
        "active_features": torch.tensor(at, dtype=torch.long).view(-1, 3),
        "adjacency_matrix": matrix,
        "selected_features": torch.arange(len(features)),
        "activation_values": torch.tensor([float(node.get("activation") or 0.0) for node in features]),
        "logit_targets": [Logit(_text(node, said), _number(node)) for node in logits],
        "logit_probabilities": torch.tensor([float(node.get("token_prob", 1.0)) for node in logits]),
        "vocab_size": said.get("vocab_size", 1 + max((_number(node) for node in (*logits, *tokens)), default=0)),
        "scan": said.get("scan", page["metadata"]["scan"]),
        "cfg": _config(page, n_layers, place, said),
    }


def _places(
    groups: Mapping[str, list[dict[str, Any]]], layers: Mapping[str, int], n_layers: int, n_pos: int
) -> dict[str, int]:
    """Each node's row in the matrix, by its id."""
    features = groups["feature"]
    first_token = len(features) + n_layers * n_pos
    place = {node["node_id"]: number for number, node in enumerate(features)}
    for node in groups["error"]:
        place[node["node_id"]] = len(features) + layers[node["node_id"]] * n_pos + node["ctx_idx"]
    place |= {node["node_id"]: first_token + node["ctx_idx"] for node in groups["token"]}
    place |= {node["node_id"]: first_token + n_pos + number for number, node in enumerate(groups["logit"])}
    if len(set(place.values())) < len(place):
        raise InputError(
            "`graph` has several nodes (at the input, or errors of one layer and token) for which a .pt has one place: "
            "write JSON"
        )
    return place


def _layers(page: Mapping[str, Any], graph: AttributionGraph, said: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Each feature's and error's layer by its id, and how many layers there are."""
    nodes = {node["node_id"]: node for node in page["nodes"] if _group(node) in ("feature", "error")}
    layers = {name: int(node["layer"]) for name, node in nodes.items()}
    within = any(layers.get(link["source"], -1) >= layers.get(link["target"], 1 << 40) for link in page["links"])
    if within:
        names = {info["page"]["node_id"]: name for name, info in graph.node_info.items() if "page" in info}
        names |= {name: str(node["tl_name"]) for name, node in nodes.items() if "tl_name" in node}
        ranks = {name: int(graph.index.ranks[graph.index.position(names[name])]) for name in nodes}
        order = sorted(set(ranks.values()))
        layers = {name: order.index(rank) for name, rank in ranks.items()}
    least = 1 + max(layers.values(), default=0)
    below = [int(node["layer"]) - 1 for node in page["nodes"] if _group(node) == "logit"]  # layers that aren't shown
    return layers, least if within else max(least, int(said.get("cfg", {}).get("n_layers", 0)), *below)


def _text(node: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """What a logit or target is called: as its file said, else as its label shows it."""
    shown = str(node["clerp"]).removeprefix('Output "').rsplit('" (p=', 1)[0]
    return said.get("labels", {}).get(node["node_id"]) or shown


def _config(
    page: Mapping[str, Any], n_layers: int, place: Mapping[str, int], said: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of `UnifiedConfig`, and this library's entries by their place in the matrix."""
    scan = page["metadata"]["scan"]
    names = dict.fromkeys(("tokenizer_name", "model_name", "original_architecture"), scan)
    cfg = CONFIG | names | dict(said.get("cfg", {})) | {"n_layers": n_layers}
    own = {"note": page["metadata"].get(NOTE), "nodes": {place[node["node_id"]]: node for node in page["nodes"]}}
    return cfg | ({NOTE: own} if own["note"] else {})


def _in_order(nodes: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
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


def _number(node: Mapping[str, Any]) -> int:
    number = number_of(node, "`graph`")
    if number is None:
        raise InputError(
            f"`graph` has {node['node_id'][:80]}, a node without a number, which a .pt can't hold: write JSON"
        )
    return number


# ---- tensors to page ------------------------------------------------------------------------------------------------


def page_of_tensors(data: Mapping[Any, Any], label: str) -> dict[str, Any]:
    """The page's nodes and links that the tensors stand for; error nodes only where something touches them.

    Raises
    ------
    FormatError: entries missing or of the wrong shape, or scores that aren't finite.
    """
    _read.expect_keys(data, _KEYS, label, "the file")
    cfg = data["cfg"] if isinstance(data["cfg"], Mapping) else vars(data["cfg"])
    n_layers = _read.expect_int(cfg.get("n_layers"), label, "cfg.n_layers", 1, 1 << 16)
    tokens = [int(token) for token in data["input_tokens"]]
    n_pos = len(tokens)
    features, activations = _selected(data, n_layers, n_pos, label)
    logits = _logits(data, label)
    size = len(features) + (n_layers + 1) * n_pos + len(logits)
    matrix = _read.expect_tensor(data["adjacency_matrix"], label, "adjacency_matrix", (size, size))
    _read.expect_finite(matrix.double().flatten(), label, "adjacency_matrix", lambda cell: str(divmod(cell, size)))
    shares = _probabilities(data, len(logits), label)
    nodes = [_feature(*row, activation) for row, activation in zip(features, activations)]
    nodes += [_error(layer, pos) for layer in range(n_layers) for pos in range(n_pos)]
    nodes += [_token(pos, token) for pos, token in enumerate(tokens)]
    nodes += [
        _logit(number, one, share, n_pos - 1, n_layers) for number, (one, share) in enumerate(zip(logits, shares))
    ]
    labels = {node["node_id"]: one.token_str for node, one in zip(nodes[len(nodes) - len(logits) :], logits)}
    said = {"cfg": _plain_config(cfg), "labels": labels, "scan": data.get("scan_name", data.get("scan"))}
    if isinstance(data.get("vocab_size"), int):
        said["vocab_size"] = data["vocab_size"]
    return _page(_own_entries(nodes, cfg.get(NOTE)), matrix, data, said, label)


def _selected(
    data: Mapping[Any, Any], n_layers: int, n_pos: int, label: str
) -> tuple[list[tuple[int, int, int]], list[float | None]]:
    """(layer, position, number) of the features in the matrix, and their activations."""
    active, selected = data["active_features"], data["selected_features"]
    if not isinstance(active, Tensor) or active.ndim != 2 or active.shape[1] != 3 or active.dtype.is_floating_point:
        raise FormatError(f"{label}: `active_features` isn't an integer tensor of (layer, position, feature) rows")
    flat = (selected.numel(),) if isinstance(selected, Tensor) else (-1,)
    chosen = _read.expect_tensor(selected, label, "selected_features", flat).long()
    if bool(((chosen < 0) | (chosen >= len(active))).any()):
        raise FormatError(f"{label}: `selected_features` points beyond the {len(active)} rows of `active_features`")
    if bool(((active < 0) | (active[:, :2] >= torch.tensor([n_layers, n_pos])).any(1, keepdim=True)).any()):
        raise FormatError(
            f"{label}: `active_features` has a layer or place beyond the {n_layers} layers of `cfg` and the {n_pos} "
            "`input_tokens`: parts of two files?"
        )
    if len(chosen) < len(active):
        _log.warning("%s: %d active features that were not selected are left out", label, len(active) - len(chosen))
    return [tuple(row) for row in active[chosen].tolist()], _activations(data, len(active), chosen, label)


def _activations(
    data: Mapping[Any, Any], active: int, chosen: Int[Tensor, " feature"], label: str
) -> list[float | None]:
    values = data.get("activation_values")
    if values is None:
        _log.warning("%s: no `activation_values`: those of features are unknown", label)
        return [None] * len(chosen)
    of_chosen = isinstance(values, Tensor) and values.shape == chosen.shape
    values = _read.expect_tensor(values, label, "activation_values", (len(chosen) if of_chosen else active,))
    return (values if of_chosen else values[chosen]).double().tolist()


def _logits(data: Mapping[Any, Any], label: str) -> list[Logit]:
    targets = data.get("logit_targets", data.get("logit_tokens"))
    if isinstance(targets, Tensor):
        return [Logit("", int(token)) for token in targets.flatten().tolist()]
    if not isinstance(targets, list):
        raise FormatError(f"{label}: `logit_targets` is a {type(targets).__name__}; a list or a tensor is expected")
    return [Logit(str(target.token_str), int(target.vocab_idx)) for target in targets]


def _probabilities(data: Mapping[Any, Any], count: int, label: str) -> list[float]:
    given = data.get("logit_probabilities")
    if given is None:
        _log.warning("%s: no `logit_probabilities`: every logit weighs 1", label)
        return [1.0] * count
    return _read.expect_tensor(given, label, "logit_probabilities", (count,)).double().tolist()


def _plain_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: cfg[key] for key in CONFIG if key in cfg}
    return {
        key: str(value) if isinstance(value, torch.dtype) else value
        for key, value in known.items()
        if value is None or isinstance(value, (int, str, torch.dtype))
    }


def _own_entries(nodes: list[dict[str, Any]], own: Any) -> list[dict[str, Any]]:
    """The entries that `to_circuit_tracer` put in a file of its own, in place of those read off the tensors."""
    if isinstance(own, Mapping) and isinstance(own.get("nodes"), Mapping):
        for place, node in own["nodes"].items():
            nodes[place] = dict(node)
    return nodes


def _page(
    nodes: list[dict[str, Any]],
    matrix: Float[Tensor, "target source"],
    data: Mapping[Any, Any],
    said: dict[str, Any],
    label: str,
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
    scan = said["scan"] if isinstance(said["scan"], str) and said["scan"] else "unknown"
    prompt = str(data["input_string"])
    metadata = {"slug": "", "scan": scan, "prompt": prompt, "prompt_tokens": ["?"] * len(data["input_tokens"])}
    metadata |= {NOTE: note} if note else {OWN: said}
    return {"metadata": metadata, "qParams": {}, "nodes": shown, "links": links}


def _note_of(data: Mapping[Any, Any]) -> Any:
    cfg = data["cfg"] if isinstance(data["cfg"], Mapping) else vars(data["cfg"])
    own = cfg.get(NOTE)
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


def _feature(layer: int, position: int, number: int, activation: float | None) -> dict[str, Any]:
    node = _node(str(layer), number, position, "cross layer transcoder", cantor_pair(layer, number))
    return node | ({} if activation is None else {"activation": activation})


def _error(layer: int, position: int) -> dict[str, Any]:
    return _node(str(layer), -1, position, "mlp reconstruction error", -1)


def _token(position: int, token: int) -> dict[str, Any]:
    return _node("E", token, position, "embedding", position)


def _logit(number: int, logit: Logit, share: float, position: int, n_layers: int) -> dict[str, Any]:
    text = f'Output "{logit.token_str or logit.vocab_idx}" (p={share:.3f})'
    node = _node(str(n_layers + 1), logit.vocab_idx, position, "logit", logit.vocab_idx, text)
    return node | {"token_prob": share, "is_target_logit": number == 0}
