"""What nodes of a stranger's page are called here, and in which order they are computed.

| entry                                      | name                                      |
|--------------------------------------------|-------------------------------------------|
| token 464 at place 3                       | `hook_embed.pos3#464`                     |
| feature 17 of layer 4's (transcoder)       | `blocks.4.hook_features.pos3#17`          |
| the same of its attention (lorsa)          | `blocks.4.hook_lorsa.pos3#17`             |
| what the one, the other misses             | `blocks.4.hook_error.pos3`, `blocks.4.hook_lorsa.hook_error.pos3` |
| any other without a number (`4_bias_attn_bO_3`) | `blocks.4.hook_bias_attn_bO.pos3`    |
| token 11's logit                           | `hook_unembed.pos9#11`                    |

A feature's number is in its id, `{layer}_{number}_{place}` or, as OpenMOSS's graphs on Neuronpedia have it,
`{layer}_{kind}_{number}_{place}`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tl_circuitlasso.data.sites import parse_site
from tl_circuitlasso.errors import FormatError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.graph.nodes import Block, NodeIndex

_NUMBER = re.compile(r"[^_]+_(?:[A-Za-z]+_)?(\d{1,15})_\d+")
_MIDDLE = re.compile(r"[^_]+_(\w{1,80})_\d+")
_ATTENTION = ("lorsa", "attention", "attn")


def site_name(node: Mapping[str, Any], label: str) -> str:
    """The name of a page's node.

    Raises
    ------
    FormatError: a layer that is neither a number nor E, or a place that isn't a number.
    """
    layer, position, kind = str(node["layer"]), node["ctx_idx"], node["feature_type"]
    _read.expect_int(position, label, "ctx_idx")
    feature = number_of(node, label)
    number = "" if feature is None else f"#{feature}"
    if kind == "embedding" or layer == "E":
        return f"hook_embed.pos{position}{number}"
    if not re.fullmatch(r"\d{1,6}", layer):
        raise FormatError(f"{label}: `layer` of {node['node_id'][:80]} is {layer[:40]!r}; a number or E is expected")
    if kind == "logit":
        return f"hook_unembed.pos{position}{number}"
    if "error" in kind:
        return f"blocks.{layer}.{'hook_lorsa.' if _is_attention(kind) else ''}hook_error.pos{position}"
    middle = _MIDDLE.fullmatch(node["node_id"]) if feature is None else None
    hook = middle[1] if middle else "lorsa" if _is_attention(kind) else "features"
    return f"blocks.{layer}.hook_{hook}.pos{position}{number}"


def number_of(node: Mapping[str, Any], label: str) -> int | None:
    """The number of a feature, token or logit; None for nodes that have none."""
    found = _NUMBER.fullmatch(node["node_id"])
    feature = int(found[1]) if found else node["feature"]
    if feature is None:
        return None
    feature = _read.expect_int(feature, label, "feature", -1 << 60, 1 << 60)
    return feature if feature >= 0 else None


def _is_attention(text: str) -> bool:
    return any(word in text.lower() for word in _ATTENTION)


def index_of(names: Sequence[str], label: str) -> NodeIndex:
    """Tokens first, then each layer's attention features and its MLP features and errors, logits last.

    Raises
    ------
    FormatError: no nodes, or nodes of one place with and without a number.
    """
    if not names:
        raise FormatError(f"{label}: `nodes` is empty; a graph has at least one node")
    features: dict[str, list[int | None]] = {}
    for name in names:
        site, _, number = name.partition("#")
        features.setdefault(site, []).append(int(number) if number else None)
    blocks = []
    for text, numbers in features.items():
        if None in numbers and len(numbers) > 1:
            raise FormatError(f"{label}: {text} has nodes with and without a feature number; number all of them")
        named = tuple(sorted(number for number in numbers if number is not None))
        blocks.append(Block(parse_site(text), _rank(text), named or None))
    return NodeIndex(tuple(sorted(blocks, key=lambda block: block.rank)))


def _rank(site: str) -> int:
    if site.startswith("hook_embed"):
        return 0
    if site.startswith("hook_unembed"):
        return 1 << 40
    _, layer, kind = site.split(".", 2)
    return 1 + 2 * int(layer) + (not _is_attention(kind))
