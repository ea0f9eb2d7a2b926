"""The attribution-graph JSON that circuit-tracer's page and Neuronpedia share, and how our nodes map to it.

Out: kept edges only, ports merged. A node's id is `{layer}_{feature}_{ctx}`; `feature` is the Cantor pair of layer
and feature, as both pages expect. These pages draw one column per token of one prompt; a graph over a data set has no
such tokens, so each kind of site (`input`, `attn`, `mlp`, `resid`, a hook) becomes a pseudo token and a column. The
list of tokens is padded to twice their number, as the page deletes features that occur at more than two thirds of the
tokens. Where nodes carry positions, as those of `apps.prompt_graph` do, the columns are the prompt's tokens.

In: how a stranger's nodes are called is in `formats._page_names`. A node's entry is kept in `node_info`, so an
unchanged graph is written back as it was.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tl_circuitlasso.data import storage
from tl_circuitlasso.data.sites import UNEXPLAINED, Site, is_missed, parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._page_names import index_of, site_name
from tl_circuitlasso.formats._shared_ids import told_apart
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import NodeIndex

_NOTE = "tl_circuitlasso"
_REQUIRED = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "node": {
        "node_id": str,
        "feature": (int, type(None)),
        "layer": (str, int),
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    },
    "link": {"source": str, "target": str, "weight": (int, float)},
}
_TYPES = {"input": "embedding", "head": "attention head", "mlp": "mlp", "resid": "residual", "logits": "logit"}

_SAID = {"hook_embed": "input", "hook_unembed": "logits"}  # where nodes carry positions
_AT = re.compile(r"\.pos(\d+)\Z")

Supernodes = Mapping[str, Iterable[str]]


def cantor_pair(first: int, second: int) -> int:
    """One number for two: (a + b)(a + b + 1)/2 + b.

    >>> cantor_pair(3, 17)
    227
    """
    return (first + second) * (first + second + 1) // 2 + second


def cantor_unpair(number: int) -> tuple[int, int]:
    """The two numbers that `cantor_pair` joined; exact at any size.

    >>> cantor_unpair(227)
    (3, 17)
    """
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    second = number - diagonal * (diagonal + 1) // 2
    return diagonal - second, second


# ---- out ------------------------------------------------------------------------------------------------------------


def page(
    graph: AttributionGraph, *, slug: str, scan: str, prompt: str, supernodes: Supernodes | None, pinned: Iterable[str]
) -> dict[str, Any]:
    """Metadata, view, nodes and links, as plain data."""
    nodes = _nodes(graph)
    ids = {name: node["node_id"] for name, node in nodes.items()}
    tokens, said = _tokens(graph, nodes), graph.provenance.get("page")
    said = said if isinstance(said, Mapping) else {}
    metadata = {"slug": slug, "scan": scan, "prompt_tokens": tokens, "prompt": prompt} | dict(said.get("metadata", {}))
    view: dict[str, Any] = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    view = dict(said["qParams"]) if isinstance(said.get("qParams"), Mapping) else view
    groups = _supernodes(graph, supernodes, ids)
    if groups or pinned:
        chosen = [*_ids(pinned, ids), *(node for _, *members in groups for node in members)]
        view |= {"supernodes": groups, "pinnedIds": list(dict.fromkeys(chosen))}
    if not said:
        metadata[_NOTE] = _note(graph, nodes)
    return storage.plain(
        {"metadata": metadata, "qParams": view, "nodes": list(nodes.values()), "links": _links(graph, ids)}, "graph"
    )


def _nodes(graph: AttributionGraph) -> dict[str, dict[str, Any]]:
    """Each shown node's entry by its name: the ends of kept edges, and nodes that came from such a page."""
    shown = torch.zeros(len(graph.index), dtype=torch.bool)
    shown[graph.source[graph.kept]] = shown[graph.target[graph.kept]] = True
    levels = _levels(graph)
    columns: dict[str, int] = {"input": 0}
    nodes: dict[str, dict[str, Any]] = {}
    came_with = {name: info["page"] for name, info in graph.node_info.items() if isinstance(info.get("page"), Mapping)}
    for name in came_with:
        graph.index.position(name)
        nodes[name] = dict(came_with[name])
    for block, where in zip(graph.index.blocks, graph.index.slices):
        for offset in shown[where].nonzero()[:, 0].tolist():
            name = graph.index.names[where.start + offset]
            if name not in nodes:
                feature = None if block.features is None else block.features[offset]
                nodes[name] = _entry(name, block.site, feature, columns, levels, graph.node_info.get(name, {}))
    _check_ids(nodes)
    return nodes


def _levels(graph: AttributionGraph) -> dict[str, str]:
    """By site the page's row: its layer, E and the last one for what the model is given and what it says. Where nodes
    carry positions and a layer has several hooks, hooks are counted instead."""
    sites = [block.site for block in graph.index.blocks]
    last = str(2 + max((site.layer for site in sites), default=0))
    hooks = {}
    for site in sites:
        if _position(site) is not None and site.layer >= 0:
            hooks.setdefault(_bare(site), site.layer)
    numbers = list(hooks.values())
    if len(set(numbers)) < len(numbers):
        hooks = {hook: number for number, hook in enumerate(hooks)}
        last = str(1 + len(hooks))
    known = {"input": "E", "logits": last, "target": last}
    named = {"hook_embed": "E", "hook_unembed": last}
    return {
        str(site): named.get(_bare(site), known.get(site.kind, str(hooks.get(_bare(site), max(site.layer, 0)))))
        for site in sites
    }


def _position(site: Site) -> int | None:
    """The token at which a node of one prompt stands."""
    found = _AT.search(site.hook)
    return None if found is None else int(found[1])


def _bare(site: Site) -> str:
    """The hook without position, and without the name of what its SAE misses."""
    return re.sub(r"\.hook_(sae_error|unexplained)\Z", "", _AT.sub("", site.hook))


def _entry(
    name: str, site: Site, feature: int | None, columns: dict[str, int], levels: Mapping[str, str],
    info: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    at, layer = _position(site), levels[str(site)]
    column = columns.setdefault(_column_name(site, feature), len(columns)) if at is None else at
    if is_missed(site.hook):
        return _error_entry(name, site, layer, column, info)
    number = feature if feature is not None else max(site.head, 0)
    paired = number if not layer.isdigit() else cantor_pair(int(layer), number)
    entry = {
        "node_id": f"{layer}_{number}_{column}",
        "feature": paired,
        "layer": layer,
        "ctx_idx": column,
        "feature_type": _TYPES.get(_SAID.get(_bare(site), site.kind), "target" if site.kind == "target" else "feature"),
        "jsNodeId": f"{layer}_{number}-{column}",
        "clerp": str(info.get("label", name)),
        "tl_name": name,
    }
    if entry["feature_type"] == "logit":  # the page takes a probability from a logit's label, and stops without one
        label = "logits" if feature is None else str(info.get("label", feature))
        chance = float(info.get("probability", 1.0))
        entry |= {"clerp": f'Output "{label}" (p={chance:.3f})', "is_target_logit": True, "token_prob": chance}
    return entry | ({"activation": float(info["activation"])} if "activation" in info else {})


def _error_entry(name: str, site: Site, layer: str, column: int, info: Mapping[str, Any]) -> dict[str, Any]:
    """An error node has no feature, and no number that a feature could have."""
    number = -2 if UNEXPLAINED in site.hook else -1
    return {
        "node_id": f"{layer}_{number}_{column}",
        "feature": number,
        "layer": layer,
        "ctx_idx": column,
        "feature_type": "reconstruction error",
        "jsNodeId": f"{layer}_{number}-{column}",
        "clerp": str(info.get("label", name)),
        "tl_name": name,
    }


def _column_name(site: Site, feature: int | None) -> str:
    match site.kind:
        case "head":
            return "attn" if feature is None else f"attn.h{site.head}"
        case "hook":
            return re.sub(r"\bblocks\.\d+\.", "", site.hook)
        case kind:
            return kind


def _check_ids(nodes: Mapping[str, Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for name, node in nodes.items():
        other = seen.setdefault(node["node_id"], name)
        if other != name:
            raise InputError(f"`graph` has {other} and {name}, which share the id {node['node_id']}: leave one out")


def _tokens(graph: AttributionGraph, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    prompt = graph.provenance.get("prompt_tokens")
    if isinstance(prompt, list) and any(_position(block.site) is not None for block in graph.index.blocks):
        return [str(token) for token in prompt]
    columns: dict[int, str] = {0: "input"}
    for name, node in nodes.items():
        site, _, feature = name.partition("#")
        columns.setdefault(node["ctx_idx"], _column_name(parse_site(site), int(feature) if feature else None))
    n_columns = 1 + max(columns)
    return [columns.get(number, " ") for number in range(n_columns)] + [" "] * max(n_columns, 2)


def _supernodes(graph: AttributionGraph, groups: Supernodes | None, ids: Mapping[str, str]) -> list[list[str]]:
    """Groups as given, else by the `group` that `node_info` has for nodes."""
    if groups is None:
        found: dict[str, list[str]] = {}
        for name, info in graph.node_info.items():
            if name in ids and isinstance(info.get("group"), str):
                found.setdefault(info["group"], []).append(name)
        groups = found
    return [[str(label), *_ids(names, ids)] for label, names in groups.items()]


def _ids(names: Iterable[str], ids: Mapping[str, str]) -> list[str]:
    names = list(names)
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise InputError(f"`supernodes` or `pinned` name {unknown[0]!r}, which no kept edge touches: leave it out")
    return [ids[name] for name in names]


def _links(graph: AttributionGraph, ids: Mapping[str, str]) -> list[dict[str, Any]]:
    """One link per kept pair; of q, k and v the score of largest size."""
    names = graph.index.names
    links: dict[tuple[int, int], float] = {}
    rows = graph.kept.nonzero()[:, 0]
    columns = (graph.source[rows].tolist(), graph.target[rows].tolist(), graph.score[rows].tolist())
    for source, target, score in zip(*columns):
        links[source, target] = max(links.get((source, target), 0.0), score, key=abs)
    return [{"source": ids[names[s]], "target": ids[names[t]], "weight": w} for (s, t), w in links.items()]


def _note(graph: AttributionGraph, nodes: Mapping[str, Any]) -> dict[str, Any]:
    blocks = []
    for block in graph.index.blocks:
        shown = [feature for feature, name in zip(block.features or (None,), block.names) if name in nodes]
        if shown:
            features = None if block.features is None else shown
            blocks.append({"site": str(block.site), "rank": block.rank, "features": features})
    if not blocks:  # an empty circuit, and an index has at least one block
        blocks = [block for block in graph.index.to_json() if block["features"] is None] or graph.index.to_json()[-1:]
    info = {name: dict(row) for name, row in graph.node_info.items() if name in nodes}
    return {"index": blocks, "provenance": dict(graph.provenance), "node_info": info}


# ---- in -------------------------------------------------------------------------------------------------------------


def graph_of_page(data: Any, label: str) -> AttributionGraph:
    """The graph of a page's data; every link is a kept edge.

    Raises
    ------
    FormatError: entries missing or of the wrong type, unknown ends, ids given twice, links against the layers.
    """
    data, shared = told_apart(data, label)
    check_page(data, label)
    metadata, nodes = dict(data["metadata"]), data["nodes"]
    note = metadata.get(_NOTE)
    own = isinstance(note, Mapping) and all(isinstance(node.get("tl_name"), str) for node in nodes)
    note = note if isinstance(note, Mapping) else {}
    names = {node["node_id"]: node["tl_name"] if own else site_name(node, label) for node in nodes}
    if len(set(names.values())) < len(nodes):
        raise FormatError(f"{label}: two `nodes` have the same layer, feature and token; each must be one node")
    index = NodeIndex.from_json(note["index"]) if own else index_of(list(names.values()), label)
    for name in names.values():
        index.position(name)
    links = data["links"]
    weight = _read.number_columns([link["weight"] for link in links], label, "weight", lambda row: f"link {row}")
    page_nodes = {names[node["node_id"]]: {"page": dict(node)} for node in nodes}
    page_said = {"page": {"metadata": metadata, "qParams": dict(data["qParams"])}}
    page_said |= {"shared_ids": shared} if shared else {}
    return AttributionGraph(
        index=index,
        source=torch.tensor([index.position(names[link["source"]]) for link in links], dtype=torch.long),
        target=torch.tensor([index.position(names[link["target"]]) for link in links], dtype=torch.long),
        port=torch.zeros(len(links), dtype=torch.long),
        score=weight,
        weight=weight.clone(),
        kept=torch.ones(len(links), dtype=torch.bool),
        **(_said(note) if own else {"node_info": page_nodes, "provenance": page_said}),
    )


def _said(note: Mapping[str, Any]) -> dict[str, Any]:
    """What `page` wrote of a graph beside its nodes and links."""
    info = {str(name): dict(row) for name, row in dict(note.get("node_info", {})).items()}
    return {"node_info": info, "provenance": dict(note.get("provenance", {}))}


def check_page(data: Any, label: str) -> None:
    """Check the page's schema: required entries and their types, unique ids, links whose ends exist."""
    data = _read.expect_mapping(data, label, "the file")
    _read.expect_keys(data, ("metadata", "qParams", "nodes", "links"), label, "the file")
    version = data["metadata"].get("schema_version", 1) if isinstance(data["metadata"], Mapping) else 1
    if version not in (1, None):
        raise FormatError(f"{label}: `metadata.schema_version` is {str(version)[:40]}; this release reads 1: upgrade")
    _check_entry(data["metadata"], _REQUIRED["metadata"], label, "metadata")
    _read.expect_mapping(data["qParams"], label, "qParams")
    for key, what in (("nodes", "node"), ("links", "link")):
        if not isinstance(data[key], list):
            raise FormatError(f"{label}: `{key}` is a {type(data[key]).__name__}; a list is expected")
        for number, entry in enumerate(data[key]):
            _check_entry(entry, _REQUIRED[what], label, f"{key}[{number}]")
    _check_links(data, label)


def _check_entry(entry: Any, required: Mapping[str, Any], label: str, where: str) -> None:
    entry = _read.expect_mapping(entry, label, where)
    for key, kind in required.items():
        if key not in entry:
            raise FormatError(f"{label}: `{where}` has no `{key}`; export the graph again, or add it")
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise FormatError(f"{label}: `{where}.{key}` is {str(entry[key])[:80]!r}, of the wrong type")


def _check_links(data: Mapping[str, Any], label: str) -> None:
    ids = [node["node_id"] for node in data["nodes"]]
    known = set(ids)
    if len(known) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise FormatError(f"{label}: `node_id` {twice[:80]!r} is given to two nodes, so links to it mean nothing")
    for link in data["links"]:
        for end in ("source", "target"):
            if link[end] not in known:
                raise FormatError(
                    f"{label}: a link's `{end}` is {link[end][:80]!r}, which no node has as its `node_id`"
                )
