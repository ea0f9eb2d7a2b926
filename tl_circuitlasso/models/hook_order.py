"""In which order a model computes its hooks, and which attention stands between two of them."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.tokens import Batch

_LAYER = re.compile(r"\bblocks\.(\d+)\.")
_SIDES = re.compile(r"\.(attn\b|hook_attn|ln1\b|hook_[qkv]_input|mlp\b|hook_mlp|ln2\b)")
_PROJECTIONS = re.compile(r"\.attn\.hook_(rot_)?[qkv]$|\.hook_[qkv]_input$")
_BEHIND_ATTENTION = re.compile(r"\.attn\.hook_(z|result)$|\.hook_(attn_out|resid_mid|resid_post|mlp\w*)$|\.(mlp|ln2)\b")
_RESIDUAL_WIDTH = re.compile(r"hook_(resid_(pre|mid|post)|mlp_out|attn_out|embed|pos_embed)$")


def computing_order(adapter: Adapter, batch: Batch, hooks: Iterable[str]) -> dict[str, int]:
    """Each hook's rank, as heard in a forward pass over one token: a hook may feed those of larger rank only.

    Queries, keys and values of a layer share a rank, and so do attention and MLP of a layer that computes them in
    parallel.

    Raises
    ------
    InputError: a name that the model doesn't have, or two names of one hook. ModelError: a hook that never fires.
    """
    names = list(dict.fromkeys(hooks))
    token = batch.tokens[:1][batch.mask[:1]][None, :1]
    heard: list[str] = []
    adapter.run(token, None, names, edits=[(name, _noting(heard, name)) for name in names])
    _check_twins({name: point for name in names if (point := adapter.point(name)) is not None})
    return _ranked(list(dict.fromkeys(heard)), adapter.shape.parallel)


def attention_between(source: str, target: str, n_layers: int) -> range:
    """The layers whose attention moves information from one hook to the other.

    >>> attention_between("blocks.0.hook_resid_post", "blocks.2.hook_resid_post", 4)
    range(1, 3)
    """
    first, last = hook_layer(source, n_layers), hook_layer(target, n_layers)
    return range(
        first + 1 if _BEHIND_ATTENTION.search(source) else first, last + 1 if _BEHIND_ATTENTION.search(target) else last
    )


def hook_layer(hook: str, otherwise: int) -> int:
    """The layer of a hook; 0 for embeddings, `otherwise` for what stands behind all layers."""
    found = _LAYER.search(hook)
    return int(found[1]) if found else (0 if "embed" in hook else otherwise)


def writes_to_stream(hook: str) -> bool:
    """Whether an activation at `hook` is in the coordinates of the residual stream, which the unembedding reads."""
    return _RESIDUAL_WIDTH.search(hook) is not None


def _check_twins(points: dict[str, nn.Module]) -> None:
    seen: dict[int, str] = {}
    for name, point in points.items():
        twin = seen.setdefault(id(point), name)
        if twin != name:
            raise InputError(f"`saes` names one hook twice, as {twin} and as {name}: keep one of them")


def _ranked(heard: list[str], parallel: bool) -> dict[str, int]:
    sides = [_side(name, parallel) for name in heard]
    ranks: dict[str, int] = {}
    for number, (name, side) in enumerate(zip(heard, sides)):
        joins = number > 0 and side is not None and side == sides[number - 1]
        ranks[name] = ranks[heard[number - 1]] + (not joins) if number else 0
    return ranks


def _side(name: str, parallel: bool) -> tuple[str, int] | None:
    """Neighbours of one side share a rank; None for a hook with a rank of its own."""
    layer = hook_layer(name, -1)
    if parallel and _SIDES.search(name):
        return ("parallel", layer)
    return ("projections", layer) if _PROJECTIONS.search(name) else None


def _noting(heard: list[str], name: str) -> Callable[[Tensor], None]:
    return lambda activation: heard.append(name)
