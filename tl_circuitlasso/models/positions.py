"""Which positions of a prompt are samples, always among its real tokens.

- "all": every real token but the BOS token. BOS is the tokenizer's BOS id at a prompt's first real position. Without
  a tokenizer, a first token that is the same in every prompt and occurs nowhere else counts as BOS: in a causal model
  its activations are the same in every prompt, so no information is lost. (Of a stream, the first batch decides.)
- "last": the last real token, under left or right padding.
- an int: the token at this index among the real tokens (0 is the first, BOS included; -1 the last).
- a slice or a range: those of the real tokens, BOS included; where a prompt is too short for some, the others.
- a bool mask of shape (pos,) or (prompt, pos): its true places in `tokens`, pads left out.
- whole numbers, one for each prompt: the token at this index among the prompt's real tokens, as with an int.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.rotary import position_ids

Positions = Any  # "all", "last", an int, slice, range, mask or one index per prompt; tensors, arrays and lists alike
Checked = str | int | slice | range | Tensor


def as_positions(given: Any) -> Checked:
    """The choice in one of five forms: a word, an int, a slice or range, a bool mask, or an int64 index per prompt.

    Raises
    ------
    InputError: none of these.
    """
    if isinstance(given, slice | range) or (isinstance(given, str) and given in ("all", "last")):
        return given
    if isinstance(given, Tensor | np.ndarray | list | tuple):
        return _as_tensor(given)
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return int(given)
    raise InputError(
        f"`positions` is {shortened(given)}; it must be 'all', 'last', an int, a slice, a range, a bool mask, or one "
        "index for each prompt"
    )


def _as_tensor(given: Any) -> Tensor:
    try:
        chosen = torch.as_tensor(np.ascontiguousarray(given) if isinstance(given, np.ndarray) else given)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0)
    if chosen.ndim == 0 and chosen.dtype != torch.bool and not chosen.is_floating_point() and chosen.numel():
        raise InputError("`positions` is a tensor without axes; give it as an int")
    if chosen.dtype == torch.bool and chosen.ndim in (1, 2):
        return chosen
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if whole and chosen.ndim == 1:
        return chosen.long().cpu()
    kind = f"of {chosen.dtype} and shape {tuple(chosen.shape)}"
    raise InputError(
        f"`positions` is a {type(given).__name__} {kind}; it must be a bool mask (pos,) or (prompt, pos), or one whole "
        "number for each prompt"
    )


def check_alignment(chosen: Checked, shape: tuple[int, int] | None) -> None:
    """Raise an InputError where a mask or an index per prompt doesn't fit tokens of this shape (None: a stream)."""
    if not isinstance(chosen, Tensor):
        return
    what = "a bool mask" if chosen.dtype == torch.bool else "one index per prompt"
    if shape is None:
        raise InputError(f"`positions` as {what} needs all prompts at once; use an int, a slice or 'last'")
    fitting = (shape, shape[1:]) if chosen.dtype == torch.bool else (shape[:1],)
    if tuple(chosen.shape) not in fitting:
        raise InputError(
            f"`positions` as {what} has shape {tuple(chosen.shape)}; it must be {' or '.join(map(str, fitting))}, as "
            "tokens"
        )


def of_rows(chosen: Checked, rows: Int[Tensor, " row"] | slice, prompts: int) -> Checked:
    """The choice for some of the prompts: what is given for each goes with its prompt."""
    if not isinstance(chosen, Tensor) or (chosen.dtype == torch.bool and chosen.ndim == 1):
        return chosen
    assert len(chosen) == prompts  # `check_alignment` saw to it
    return chosen[rows.to(chosen.device) if isinstance(rows, Tensor) else rows]


def find_bos(adapter: Adapter, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> int | None:
    """The id that counts as BOS at a prompt's first real position; see the module's text for the rule."""
    if adapter.has_tokenizer:
        return adapter.special_ids()[0]
    firsts = tokens[mask & (position_ids(mask) == 0)]
    if len(firsts) < 2 or bool((firsts != firsts[0]).any()):
        return None
    later = tokens[mask & (position_ids(mask) > 0)]
    return None if bool((later == firsts[0]).any()) else int(firsts[0])


def kept_positions(
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: Checked,
    bos: int | None,
) -> Bool[Tensor, "batch pos"]:
    """Which positions are samples.

    >>> mask = torch.tensor([[False, True, True], [True, True, False]])
    >>> kept_positions(torch.zeros(2, 3, dtype=torch.long), mask, "last", None).int().tolist()
    [[0, 0, 1], [0, 1, 0]]
    """
    rank, length = position_ids(mask), mask.sum(1, keepdim=True)
    if isinstance(positions, str):
        if positions == "last":
            return mask & (rank == length - 1)
        return mask if bos is None else mask & ~((rank == 0) & (tokens == bos))
    if isinstance(positions, slice | range):
        return mask & _among(rank, length, positions)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return positions.to(mask.device).expand_as(mask) & mask
    return mask & (rank == _single(length, positions))


def _single(length: Int[Tensor, "batch 1"], positions: int | Tensor) -> Int[Tensor, "batch 1"]:
    """The place of each prompt's one token among its real tokens."""
    given = torch.full_like(length, positions) if isinstance(positions, int) else positions.to(length)[:, None]
    wanted = torch.where(given < 0, length + given, given)
    outside = ((wanted < 0) | (wanted >= length)).flatten().nonzero().flatten()
    if len(outside):
        prompt = int(outside[0])
        raise InputError(
            f"`positions` is {int(given[prompt])}, but one of the prompts has {int(length[prompt])} tokens only; use a "
            "slice, or one index for each prompt"
        )
    return wanted


def _among(rank: Tensor, length: Tensor, chosen: slice | range) -> Tensor:
    table = torch.zeros(int(length.max()) + 1, rank.shape[1], dtype=torch.bool, device=rank.device)
    for size in length.unique().tolist():
        table[size, _places(size, chosen)] = True
    return table[length.expand_as(rank), rank]


def _places(size: int, chosen: slice | range) -> list[int]:
    """Indices into so many real tokens; those of a range that lie outside are left out, as a slice leaves them out."""
    if isinstance(chosen, slice):
        return list(range(size)[chosen])
    return sorted({place % size for place in chosen if -size <= place < size})
