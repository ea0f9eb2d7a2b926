"""Sites: *where* in the model a node lives.

A site is written the way EAP-IG and ACDC users already write it: `input`, `a5.h3` (head 3 of layer 5), `m7` (the MLP of
layer 7), `logits`, `resid.4` (the residual stream in front of layer 4), or a hook name such as
`blocks.4.hook_resid_post` where an SAE reads. `target` is the behaviour itself when it isn't the logits.

>>> parse_site("a5.h3")
Site(kind='head', layer=5, head=3, hook='')
>>> str(parse_site("m7"))
'm7'
"""

import re
from dataclasses import dataclass
from typing import Literal

from tl_circuitlasso.errors import InputError

Kind = Literal["input", "head", "mlp", "resid", "hook", "target", "logits"]
PORTS = ("", "q", "k", "v")  # "" is an edge whose ports are merged, or a child with one input

UNEXPLAINED = "hook_unexplained"  # what the edges of a prompt's graph leave over of a feature

_HEAD = re.compile(r"a(\d+)\.h(\d+)\Z")
_MLP = re.compile(r"m(\d+)\Z")
_RESID = re.compile(r"resid\.(\d+)\Z")
_HOOK_LAYER = re.compile(r"\bblocks\.(\d+)\.")
_MISSED = re.compile(rf"\b(hook_(sae_)?error|{UNEXPLAINED})\b")


@dataclass(frozen=True, order=True)
class Site:
    """One place in the model; `str(site)` and `parse_site` are inverse to each other.

    `layer` and `head` are -1 where they mean nothing; `hook` is filled for kind `hook` only.
    """

    kind: Kind
    layer: int = -1
    head: int = -1
    hook: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "head":
                return f"a{self.layer}.h{self.head}"
            case "mlp":
                return f"m{self.layer}"
            case "resid":
                return f"resid.{self.layer}"
            case "hook":
                return self.hook
            case _:
                return self.kind


def parse_site(text: str) -> Site:
    """The site that `text` names.

    Raises
    ------
    InputError: the text is neither a component name nor a dotted hook name.
    """
    if text in ("input", "logits", "target"):
        return Site(text)
    if match := _HEAD.match(text):
        return Site("head", int(match[1]), int(match[2]))
    if match := _MLP.match(text):
        return Site("mlp", int(match[1]))
    if match := _RESID.match(text):
        return Site("resid", int(match[1]))
    if "hook" in text and "#" not in text and not any(c.isspace() for c in text):
        layer = _HOOK_LAYER.search(text)
        return Site("hook", int(layer[1]) if layer else -1, hook=text)
    raise InputError(
        f"`site` {text!r} is not a site: write input, a5.h3, m7, resid.4, logits, target or a hook name "
        "such as blocks.4.hook_resid_post"
    )


def is_missed(name: str) -> bool:
    """Whether a site or node is what features don't say: an SAE's or a transcoder's error, or what edges leave over.

    >>> is_missed("blocks.2.hook_resid_post.hook_sae_error"), is_missed("blocks.2.hook_resid_post#3")
    (True, False)
    """
    return _MISSED.search(name) is not None
