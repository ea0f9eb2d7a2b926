"""What people hold as prompts, in one form: token ids and a mask of real tokens, checked.

| given                                                            | read as                                        |
|------------------------------------------------------------------|------------------------------------------------|
| int tensor or array (prompt, pos)                                | token ids; `attention_mask` says which are real |
| list, tuple, Series, array or generator of strings               | text, tokenised as the model does by default   |
| ... of lists of ints, of 1-d or (1, n) tensors or arrays         | token ids of prompts, of any lengths           |
| `tokenizer(...)` output, with or without `return_tensors`        | its `input_ids` and `attention_mask`           |
| DataLoader, or any iterable, of tensors, 1-tuples, dicts, pairs  | batches, one after the other                   |

Lists and tuples are held as a whole; what can only be walked through (a DataLoader, a generator) is a stream.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter

AnyPrompts = Any  # whatever the table above names
Held = tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]  # token ids, and which of them are real


def held_or_stream(
    adapter: Adapter, given: AnyPrompts, attention_mask: Any, name: str
) -> tuple[Held | None, Iterable[Any], bool]:
    """Either all prompts, checked, or a stream of items for `pieces`; and whether they say themselves what is a pad.

    Raises
    ------
    InputError: no prompts, or prompts that the model can't read; the message begins with the argument's `name`.
    """
    if isinstance(given, str):
        raise InputError(f"`{name}` is one string; put it in a list")
    given = plain(given, name)
    if isinstance(given, Mapping) and attention_mask is not None:
        raise InputError(f"`attention_mask` is given, but `{name}` has a mask of its own: leave one of them out")
    if isinstance(given, list | tuple) and attention_mask is not None:
        given = _rectangle(given, name)
    if isinstance(given, Tensor):
        return checked_pair(adapter, given, attention_mask, name), (), attention_mask is not None
    if attention_mask is not None:
        raise InputError(
            f"`attention_mask` goes with `{name}` as one tensor; strings and lists know their lengths, in an iterable "
            "give pairs (tokens, mask)"
        )
    if isinstance(given, Mapping):
        return joined(pieces(adapter, [given], 1, name), name), (), True
    if isinstance(given, list | tuple):
        if not given:
            raise InputError(f"`{name}` is empty; give at least one prompt")
        return joined(pieces(adapter, given, len(given), name), name), (), not _equal_lists(given)
    if not isinstance(given, Iterable):
        raise InputError(f"`{name}` is a {type(given).__name__}; give an int tensor, a list of strings, or batches")
    return None, given, True


def plain(given: Any, name: str) -> Any:
    """Arrays as tensors, columns of a table and arrays of objects as lists, everything else as it is.

    Raises
    ------
    InputError: a table of objects with more than one column.
    """
    if not isinstance(given, Tensor | Mapping | list | tuple | str) and hasattr(given, "to_numpy"):
        given = given.to_numpy()
    if not isinstance(given, np.ndarray):
        return given
    if given.dtype.kind in "OUST":
        if given.ndim != 1:
            raise InputError(f"`{name}` is a table of shape {given.shape}; give the one column that holds the prompts")
        return given.tolist()
    return torch.from_numpy(np.array(given, order="C"))  # a copy: those of tables are read-only


def pieces(adapter: Adapter, items: Iterable[Any], size: int, name: str) -> Iterator[Held]:
    """The items of a list or stream as checked pairs; single prompts are put together, so many at a time."""
    singles: list[Any] = []
    number = -1
    for number, item in enumerate(items):
        item = _unwrapped(plain(item, name), name)
        if _is_single(item):
            singles.append(item)
            if len(singles) == size:
                yield _together(adapter, singles, number + 1 - size, name)
                singles = []
            continue
        if singles:
            yield _together(adapter, singles, number - len(singles), name)
            singles = []
        yield _batch(adapter, item, number, name)
    if singles:
        yield _together(adapter, singles, number + 1 - len(singles), name)


def joined(parts: Iterable[Held], name: str) -> Held:
    """All pieces as one; narrower ones get pads on the right.

    Raises
    ------
    InputError: there are none.
    """
    held = list(parts)
    if not held:
        raise InputError(f"`{name}` has no prompts")
    if len(held) == 1:
        return held[0]
    width = max(tokens.shape[1] for tokens, _ in held)
    if len({tokens.device for tokens, _ in held}) > 1:
        held = [(tokens.cpu(), mask.cpu()) for tokens, mask in held]
    wide = [(_widened(tokens, width), _widened(mask, width)) for tokens, mask in held]
    return torch.cat([tokens for tokens, _ in wide]), torch.cat([mask for _, mask in wide])


def _widened(part: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, width - part.shape[1]))


# ---- items ----------------------------------------------------------------------------------------------------------


def _unwrapped(item: Any, name: str) -> Any:
    """What a 1-tuple holds, and the one prompt of a (1, n) tensor or of a mapping."""
    if isinstance(item, list | tuple) and len(item) == 1 and isinstance(item[0], Tensor | np.ndarray):
        return _unwrapped(plain(item[0], name), name)
    if isinstance(item, Tensor) and item.ndim == 2 and len(item) == 1:
        return item[0]
    if isinstance(item, Mapping) and _is_single(ids := plain(item.get("input_ids"), name)) and not isinstance(ids, str):
        mask = plain(item.get("attention_mask"), name)
        return ids if mask is None else torch.as_tensor(ids)[as_mask(mask)]
    return item


def _is_single(item: Any) -> bool:
    """Whether an item is one prompt, not a batch."""
    if isinstance(item, str):
        return True
    if isinstance(item, Tensor):
        return item.ndim == 1
    return _is_ids(item)


def _is_ids(item: Any) -> bool:
    return isinstance(item, list | tuple) and all(isinstance(token, int | np.integer) for token in item)


def _together(adapter: Adapter, singles: Sequence[Any], first: int, name: str) -> Held:
    """Prompts of one kind, text or token ids, as one checked pair."""
    texts = [isinstance(prompt, str) for prompt in singles]
    if all(texts):
        return _tokenised(adapter, singles, first, name)
    if any(texts):
        odd = first + texts.index(not texts[0])
        raise InputError(
            f"`{name}`: item {odd} isn't of the kind of item {first}; a list must hold strings only, or none"
        )
    rows = [torch.as_tensor(row) for row in singles]
    if empty := [number for number, row in enumerate(rows, first) if not row.numel()]:
        raise InputError(f"`{name}`: prompt {empty[0]} is empty; leave it out")
    width = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.stack([_widened(row.cpu()[None], width)[0] for row in rows])
    return checked_pair(adapter, tokens, torch.arange(width) < lengths[:, None], name)


def _tokenised(adapter: Adapter, prompts: Sequence[str], first: int, name: str) -> Held:
    for index, prompt in enumerate(prompts, first):
        if not prompt:
            raise InputError(f"`{name}`: prompt {index} is empty; leave it out")
    return checked_pair(adapter, *adapter.to_tokens(list(prompts)), name)


def _batch(adapter: Adapter, item: Any, number: int, name: str) -> Held:
    """An item that holds several prompts."""
    if isinstance(item, Mapping):
        return _of_mapping(adapter, item, number, name)
    if isinstance(item, Tensor):
        return checked_pair(adapter, item, None, name)
    if isinstance(item, list | tuple):
        parts = [plain(part, name) for part in item]
        if len(parts) == 2 and all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
            return checked_pair(adapter, parts[0], parts[1], name)
        rows = [_unwrapped(part, name) for part in parts]
        alike = len({part.ndim for part in parts if isinstance(part, Tensor)}) <= 1  # else tokens with labels
        if rows and alike and all(map(_is_single, rows)):
            return _together(adapter, rows, 0, name)
    raise InputError(
        f"`{name}`: item {number} is a {type(item).__name__}; each item must be a prompt (a string, or its token ids), "
        "or a batch: an int tensor (batch, pos), a pair (tokens, mask), or a mapping with `input_ids`"
    )


def _of_mapping(adapter: Adapter, item: Mapping[str, Any], number: int, name: str) -> Held:
    if "input_ids" not in item:
        raise InputError(f"`{name}`: item {number} has {', '.join(map(repr, item))}, but no 'input_ids'")
    ids, mask = (plain(item.get(part), name) for part in ("input_ids", "attention_mask"))
    if isinstance(ids, list | tuple) and mask is not None:
        ids = _rectangle(ids, name)
    if isinstance(ids, Tensor):
        return checked_pair(adapter, ids, mask, name)
    rows = [_unwrapped(row, name) for row in ids] if isinstance(ids, list | tuple) else []
    if not rows or not all(map(_is_single, rows)):
        raise InputError(f"`{name}`: the 'input_ids' of item {number} aren't lists of token ids")
    if mask is not None:
        rows = [torch.as_tensor(row)[as_mask(seen)] for row, seen in zip(rows, mask, strict=True)]
    return _together(adapter, rows, 0, name)


def _equal_lists(given: Sequence[Any]) -> bool:
    """Whether lists of token ids are of one length, so that they say nothing of pads."""
    return all(_is_ids(row) for row in given) and len({len(row) for row in given}) == 1


def _rectangle(given: Sequence[Any], name: str) -> Any:
    """Lists of ints as a tensor where they are of one length, else as they are."""
    return torch.tensor([list(row) for row in given]) if _equal_lists(given) else given


# ---- checks ---------------------------------------------------------------------------------------------------------


def checked_pair(adapter: Adapter, tokens: Tensor, mask: Any, name: str = "tokens") -> Held:
    """Tokens as int64 and mask as bool; raises InputError for what can't be run."""
    tokens = _checked_tokens(adapter, tokens, name)
    if mask is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    mask = as_mask(mask)
    if tuple(mask.shape) != tuple(tokens.shape):
        raise InputError(
            f"`attention_mask` has shape {tuple(mask.shape)}, `{name}` has {tuple(tokens.shape)}; they must be equal"
        )
    mask = mask.to(tokens.device)
    empty = (~mask.any(1)).nonzero().flatten()
    if len(empty):
        raise InputError(f"`attention_mask`: all positions of prompt {int(empty[0])} are masked; leave the prompt out")
    return tokens, mask


def as_mask(given: Any) -> Bool[Tensor, "..."]:
    """A tensor, array or nested list of 1 at real tokens and 0 at pads, as bools.

    Raises
    ------
    InputError: something else.
    """
    try:
        mask = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given, order="C"))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"`attention_mask` is a {type(given).__name__}; give a tensor (batch, pos)") from None
    if bool(((mask != 0) & (mask != 1)).any()):
        raise InputError("`attention_mask` must hold 1 at real tokens and 0 at pads only")
    return mask.detach().bool()


def _checked_tokens(adapter: Adapter, tokens: Tensor, name: str) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(
            f"`{name}` are {tokens.dtype}; they must be integer token ids (a mask goes to `attention_mask`)"
        )
    if tokens.ndim != 2:
        raise InputError(f"`{name}` has {tokens.ndim} axes; it needs two, (batch, pos): one prompt is `{name}[None]`")
    if tokens.numel() == 0:
        raise InputError(f"`{name}` has shape {tuple(tokens.shape)}: there are no prompts or they are empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= adapter.shape.d_vocab:
        raise InputError(
            f"`{name}` run from {low} to {high}, outside the vocabulary of {adapter.shape.d_vocab}; were they made by "
            "another tokenizer?"
        )
    if tokens.shape[1] > adapter.n_ctx:
        raise InputError(f"`{name}` are {tokens.shape[1]} long, the model reads {adapter.n_ctx}; shorten the prompts")
    return tokens.detach().long()
