"""Hook points as ACDC and circuits-benchmark name them, and the sites they stand for."""

import re

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import FormatError
from tl_circuitlasso.graph.components import Components

Hook = tuple[str, int | None]  # hook name, head

EMBED: Hook = ("blocks.0.hook_resid_pre", None)
TOKENS: Hook = ("hook_embed", None)
POSITIONS: Hook = ("hook_pos_embed", None)

_BLOCK = re.compile(r"blocks\.(\d{1,5})\.(attn\.hook_result|attn\.hook_[qkv]|hook_[qkv]_input|hook_\w+)\Z")


def source_hooks(site: Site, use_pos_embed: bool) -> list[Hook]:
    """The hook points at which a source's output is read; `input` has two where positions are apart."""
    match site.kind:
        case "head":
            return [(f"blocks.{site.layer}.attn.hook_result", site.head)]
        case "mlp":
            return [(f"blocks.{site.layer}.hook_mlp_out", None)]
        case _:
            return [TOKENS, POSITIONS] if use_pos_embed else [EMBED]


def target_hook(site: Site, port: str, parts: Components) -> Hook:
    """The hook point of one input."""
    match site.kind:
        case "head":
            return f"blocks.{site.layer}.hook_{port}_input", site.head
        case "mlp":
            return f"blocks.{site.layer}.hook_mlp_in", None
        case _:
            return f"blocks.{parts.n_layers - 1}.hook_resid_post", None


def parse_source(hook: Hook, label: str) -> Site | None:
    """The site whose output this hook point reads; None for a step within a component."""
    name, _ = hook
    if hook in (EMBED, TOKENS, POSITIONS):
        return Site("input")
    layer, kind = _split(name, label)
    if kind == "attn.hook_result":
        return Site("head", layer, _head(hook, label))
    if kind == "hook_mlp_out":
        return Site("mlp", layer)
    if kind in ("hook_mlp_in", "hook_resid_mid") or re.fullmatch(r"(attn\.)?hook_[qkv](_input)?", kind):
        return None
    raise FormatError(f"{label}: {name!r} isn't the output of a component: hook_result, hook_mlp_out or an embedding")


def parse_target(hook: Hook, label: str) -> tuple[Site, str] | None:
    """The site and port that this hook point feeds; None for a step within a component."""
    name, _ = hook
    layer, kind = _split(name, label)
    if port := re.fullmatch(r"hook_([qkv])_input", kind):
        return Site("head", layer, _head(hook, label)), port[1]
    if kind == "attn.hook_result":
        return Site("head", layer, _head(hook, label)), ""
    if kind in ("hook_mlp_in", "hook_resid_mid", "hook_mlp_out"):
        return Site("mlp", layer), ""
    if kind == "hook_resid_post":
        return Site("logits"), ""
    if re.fullmatch(r"attn\.hook_[qkv]", kind):
        return None
    raise FormatError(
        f"{label}: {name!r} isn't an input of a component: hook_q_input, hook_mlp_in, hook_resid_post ..."
    )


def layer_of(hook: Hook, label: str) -> int:
    """The layer in a hook name; 0 for the embeddings."""
    return 0 if hook in (TOKENS, POSITIONS) else _split(hook[0], label)[0]


def _split(name: str, label: str) -> tuple[int, str]:
    match = _BLOCK.match(name) if isinstance(name, str) else None
    if match is None:
        raise FormatError(f"{label}: {str(name)[:80]!r} isn't a hook point such as blocks.0.attn.hook_result")
    return int(match[1]), match[2]


def _head(hook: Hook, label: str) -> int:
    name, head = hook
    if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < 1 << 16:
        raise FormatError(f"{label}: {name} needs the number of a head, not {head!r}")
    return head
