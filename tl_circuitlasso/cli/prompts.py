"""Models and prompts for the command line."""

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import FormatError, InputError


def model_and_prompts(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model that a command names, and the prompts in its file; the bundled model brings its own.

    Raises
    ------
    InputError: no prompts, or prompts that the model can't read.
    """
    import torch

    if arguments.model == "demo":
        from tl_circuitlasso.demo import load_demo

        bundled = load_demo(prompts=arguments.limit or 512)
        if arguments.prompts is None:
            return bundled.model, bundled.tokens
        given = read_prompts(arguments.prompts, arguments.column, arguments.limit)
        rows = [bundled.encode(prompt) for prompt in given]
        if len({row.shape[1] for row in rows}) > 1:
            raise InputError("`prompts` differ in length: the bundled model reads sentences of one form, word by word")
        return bundled.model, torch.cat(rows)
    from tl_circuitlasso.models.loading import load_model

    if arguments.prompts is None:
        raise InputError("`prompts` is missing: name a .txt, .csv, .tsv or .jsonl file (only `demo` brings its own)")
    return load_model(arguments.model), read_prompts(arguments.prompts, arguments.column, arguments.limit)


def read_prompts(path: Path, column: str | None, limit: int | None) -> list[str]:
    """The prompts of a text file (one a line), a CSV or TSV (a column), or JSON lines (a field).

    Raises
    ------
    InputError: no such file or column, or no prompts in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"`--prompts` {path} can't be read ({error}): give a .txt, .csv, .tsv or .jsonl file"
        ) from None
    if path.suffix in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    elif path.suffix == ".jsonl":
        rows = [_json_row(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        return _some([line for line in text.splitlines() if line.strip()], path, limit)
    names = list(rows[0]) if rows else []
    column = column or (names[0] if names else "")
    if rows and column not in names:
        raise InputError(f"`--column` {column!r} isn't in {path}: it has {', '.join(names)}")
    return _some([str(row[column]) for row in rows if row.get(column)], path, limit)


def _some(prompts: list[str], path: Path, limit: int | None) -> list[str]:
    if not prompts:
        raise InputError(f"`--prompts` {path} holds no prompts: put one on each line")
    return prompts[:limit]


def _json_row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise FormatError(f"{path}, line {number}: a {type(row).__name__} where an object is expected")
    return row
