"""Which row of the drawing each node stands in, for one graph or for two that share a layout.

Rows follow the order of computation, bottom up. Two graphs may hold different sites (an SAE graph of other features, a
graph with a `target` node beside one with `logits`); they share rows as long as they agree on the order of what both
hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

ENDS = ("input", "logits", "target")


def site_ranks(graph: AttributionGraph, other: AttributionGraph | None = None) -> dict[Site, Fraction]:
    """Each site's place in the order of computation, common to both graphs.

    Raises
    ------
    InputError: the graphs order the sites that both hold in different ways.
    """
    first = _ranks(graph)
    if other is None:
        return first
    second = _ranks(other)
    shared = sorted((rank, second[site], str(site)) for site, rank in first.items() if site in second)
    for (rank_a, rank_b, a), (next_a, next_b, b) in pairwise(shared):
        if rank_b > next_b or (rank_a == next_a) != (rank_b == next_b):
            raise InputError(f"`other` orders {a} and {b} differently from `graph`: draw the two graphs apart")
    return first | {site: _between(rank, first, second) for site, rank in second.items() if site not in first}


def _ranks(graph: AttributionGraph) -> dict[Site, Fraction]:
    return {block.site: Fraction(block.rank) for block in graph.index.blocks}


def _between(rank: Fraction, first: dict[Site, Fraction], second: dict[Site, Fraction]) -> Fraction:
    """Where a site that only the second graph holds stands on the first graph's scale."""
    same = [first[site] for site, r in second.items() if r == rank and site in first]
    if same:
        return same[0]
    below = max((first[site] for site, r in second.items() if r < rank and site in first), default=Fraction(-1))
    above = min((r for r in first.values() if r > below), default=below + 1)
    return below + (above - below) * (rank + 1) / (max(second.values()) + 2)


ERROR = ".hook_sae_error"  # how the node of what an SAE misses ends, behind its hook


def row_label(sites: Iterable[Site]) -> str:
    """What stands at the left of a row: `L5 heads`, `L5 mlp`, a hook's short name, or nothing for the two ends."""
    parts: dict[str, list[str]] = {}
    for site in sites:
        match site.kind:
            case "head":
                parts.setdefault(f"L{site.layer}", []).append("heads")
            case "mlp":
                parts.setdefault(f"L{site.layer}", []).append("mlp")
            case "resid":
                parts.setdefault(f"L{site.layer}", []).append("resid")
            case "hook":
                parts.setdefault(f"L{site.layer}" if site.layer >= 0 else "", []).append(short_hook(site.hook))
    return " · ".join(f"{layer} {' + '.join(dict.fromkeys(what))}".strip() for layer, what in parts.items())


def short_hook(hook: str) -> str:
    """The telling end of a hook name: `resid_post` for `blocks.4.hook_resid_post`."""
    own = hook.removesuffix(ERROR)
    words = [word for word in own.split(".") if word not in ("blocks", "hook_sae_acts_post") and not word.isdigit()]
    return ".".join(words).removeprefix("hook_").replace(".hook_", " ") or hook


def node_label(name: str, info: Mapping[str, Any] | None = None) -> str:
    """What is written on a node: its name, or the label that `node_info` gives it, or layer, number and top tokens.

    >>> node_label("blocks.2.hook_resid_post#79", {"top_tokens": ["a", " u", "o", "e"]})
    'L2 #79 a|u|o'
    >>> node_label("blocks.2.hook_resid_post.hook_sae_error")
    'L2 error'
    """
    known = info or {}
    if label := known.get("label"):
        return str(label)
    hook, mark, feature = name.rpartition("#")
    layer = parse_site(hook if mark else name).layer if mark or name.endswith(ERROR) else -1
    if not mark:
        return f"L{layer} error" if layer >= 0 else name
    tokens = "|".join(repr(str(token))[1:-1].strip() for token in list(known.get("top_tokens") or ())[:3])
    return " ".join(filter(None, (f"L{layer}" if layer >= 0 else "", f"#{feature}", tokens)))


def shorten(text: str, length: int) -> str:
    """`text` in one line of at most `length` letters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1].rstrip() + "…"


def fold(names: Sequence[str], width: int) -> list[list[str]]:
    """`names` in as many rows as needed for at most `width` in each, dealt out in turn so that neighbours stay near."""
    n_rows = max(1, -(-len(names) // width))
    return [list(names[start::n_rows]) for start in range(n_rows)]


def fold_numbered(names: Sequence[str], deal: int) -> list[list[str]]:
    """Heads in as many rows as `columns_of` deals them out to, each in the order of their numbers; others in the first.

    >>> fold_numbered(["a0.h5", "a0.h0", "a0.h1", "m0"], 2)
    [['a0.h0', 'm0'], ['a0.h1', 'a0.h5']]
    """
    sites = {name: parse_site(name) for name in sorted(names, key=_head_then_rest)}
    rows: dict[int, list[str]] = {}
    for name, site in sites.items():
        rows.setdefault(site.head % deal if site.kind == "head" else 0, []).append(name)
    return [rows[number] for number in sorted(rows)]


def _head_then_rest(name: str) -> tuple[bool, int]:
    site = parse_site(name)
    return site.kind != "head", site.head


def columns_of(names: Iterable[str], width: int) -> tuple[dict[str, int], int] | None:
    """Heads by number, the first half in columns -1, -2, ... to the left and the others to the right of column 0, in
    which all MLPs stand; and how many rows the heads of a layer are dealt out to.

    None where a node is neither a head nor an MLP nor an end of the model.

    >>> columns_of(["input", "a0.h0", "a0.h1", "a0.h3", "m0", "logits"], 16)
    ({'a0.h0': -2, 'a0.h1': -1, 'a0.h3': 2, 'm0': 0}, 1)
    """
    if any("#" in name for name in names):
        return None
    sites = {name: parse_site(name) for name in names if name not in ENDS}
    if any(site.kind not in ("head", "mlp") for site in sites.values()):
        return None
    heads = 1 + max((site.head for site in sites.values() if site.kind == "head"), default=-1)
    deal = max(1, -(-heads // width))
    half = (-(-heads // deal) + 1) // 2
    places = {name: site.head // deal - half for name, site in sites.items()}
    return {name: 0 if sites[name].kind == "mlp" else at + (at >= 0) for name, at in places.items()}, deal
