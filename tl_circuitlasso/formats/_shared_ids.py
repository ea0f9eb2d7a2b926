"""Error nodes and features that circuit-tracer's page calls by one name: the error of layer l at token p is
`0_{l}_{p}`, and so is feature l of layer 0 there."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)


def told_apart(data: Any, label: str) -> tuple[Any, list[str]]:
    """The page with an id of its own for every error node that shares one with a feature, and the ids that were shared.

    Links into such an id, and those to its own or an earlier layer, are the feature's, as nothing feeds an error. Of
    two equal links one is the error's. A link that could be either's is taken for the feature's; a warning counts them.
    """
    try:
        deep, layers = _clashes(data["nodes"])
        links = [(link["source"], link["target"]) for link in data["links"]]
    except (LookupError, TypeError, AttributeError, ValueError):
        return data, []  # no such page: the check that follows says what is wrong
    if not deep:
        return data, []
    count, seen, open_ended, apart = Counter(links), set(), 0, []
    for ends, link in zip(links, data["links"]):
        if ends[0] in deep and layers.get(ends[1], 0) > deep[ends[0]]:
            open_ended += count[ends] == 1
            link = dict(link) | {"source": _own(ends[0])} if ends in seen else link
        seen.add(ends)
        apart.append(link)
    _log.warning(
        "%s: %d error nodes share their ids with features of layer 0 (%s, ...); %d links could be of either and are "
        "taken for the features'", label, len(deep), next(iter(deep)), open_ended,
    )  # fmt: skip
    nodes = [
        dict(node) | {"node_id": _own(node["node_id"])} if _is_clash(node, deep) else node for node in data["nodes"]
    ]
    return {**data, "nodes": nodes, "links": apart}, list(deep)


def _clashes(nodes: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The layer of each error node whose id another node has, and of every other node."""
    count = Counter(node["node_id"] for node in nodes)
    deep = {
        node["node_id"]: int(node["layer"])
        for node in nodes
        if "error" in node["feature_type"] and count[node["node_id"]] == 2
    }
    others = [node for node in nodes if not _is_clash(node, deep)]
    return deep, {node["node_id"]: -1 if node["layer"] == "E" else int(node["layer"]) for node in others}


def _is_clash(node: Mapping[str, Any], deep: Mapping[str, int]) -> bool:
    return node["node_id"] in deep and "error" in node["feature_type"]


def _own(node_id: str) -> str:
    return f"error_{node_id}"
