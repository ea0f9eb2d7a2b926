"""Models and prompts for the command line."""

import argparse
from pathlib import Path
from typing import Any

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError


def model_and_prompts(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model that a command names, the prompts in its file and their corrupted partners (None without).

    The bundled model brings its own prompts; partners are read where the command's method needs them.

    Raises
    ------
    InputError: no prompts, or prompts that the model can't read.
    """
    column, limit = arguments.column, arguments.limit
    wanted = arguments.method != "lasso"
    if arguments.model == "demo":
        from tl_circuitlasso.demo import load_demo

        bundled = load_demo(prompts=limit or 512)
        if arguments.prompts is None:
            return bundled.model, bundled.tokens, bundled.corrupted if wanted else None
        given = _bundled_tokens(bundled, read_prompts(arguments.prompts, column, limit))
        if not arguments.corrupted:
            return bundled.model, given, None
        return bundled.model, given, _bundled_tokens(bundled, read_prompts(arguments.corrupted, column, limit))
    from tl_circuitlasso.models.loading import load_model

    if arguments.prompts is None:
        raise InputError("`prompts` is missing: name a .txt, .csv, .tsv or .jsonl file (only `demo` brings its own)")
    corrupted = read_prompts(arguments.corrupted, column, limit) if arguments.corrupted else None
    return load_model(arguments.model), read_prompts(arguments.prompts, column, limit), corrupted


def _bundled_tokens(bundled: Any, prompts: list[str]) -> Any:
    import torch

    rows = [bundled.encode(prompt) for prompt in prompts]
    if len({row.shape[1] for row in rows}) > 1:
        raise InputError("`prompts` differ in length: the bundled model reads sentences of one form, word by word")
    return torch.cat(rows)


NAMES = ("prompt", "text", "clean")  # columns that hold prompts by their name


def read_prompts(path: Path, column: str | None, limit: int | None) -> list[str]:
    """The prompts of a text file (one a line), a table (a column), JSON lines (a field) or a JSON list.

    Without a `column`, that named prompt, text or clean is read, or the only one there is.

    Raises
    ------
    InputError: no such file or column, no prompts in it, or a table that doesn't say where they are.
    """
    text = storage.read_text(path, "`--prompts` ")
    if not storage.is_table(path):
        return _some([line for line in text.split("\n") if line.strip()], path, limit)
    rows = storage.parse_table(text, path)
    if not rows:
        return _some([], path, limit)
    found = _column(list(dict.fromkeys(name for row in rows for name in row)), column, path)
    return _some([str(row[found]) for row in rows if row.get(found)], path, limit)


def _column(names: list[str], asked: str | None, path: Path) -> str:
    """The column that holds the prompts."""
    if asked is not None:
        if asked not in names:
            raise InputError(f"`--column` {asked!r} isn't in {path}: it has {', '.join(names)}")
        return asked
    known = [name for wanted in NAMES for name in names if name.strip().lower() == wanted]
    if not known and len(names) > 1:
        raise InputError(
            f"`--column` is missing: {path} has {', '.join(names)}, none of them named {', '.join(NAMES)}; say which "
            "one holds the prompts"
        )
    return known[0] if known else names[0]


def _some(prompts: list[str], path: Path, limit: int | None) -> list[str]:
    if not prompts:
        raise InputError(f"`--prompts` {path} holds no prompts: put one on each line")
    return prompts[:limit]
