"""Models and prompts for the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.naming import COLUMNS

NAMES = COLUMNS["clean"]


@dataclass(frozen=True, eq=False)
class PromptFile:
    """Prompts as a file holds them, with the row of each where it's a table (`rows` is empty where it isn't)."""

    prompts: list[str]
    rows: list[dict[str, Any]]
    column: str | None

    @property
    def columns(self) -> list[str]:
        """The names of the table's columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True, eq=False)
class Given:
    """What a command is given: a model, prompts and their counterparts (None without).

    file: the prompts' file, None for the bundled model's own prompts; demo: the bundled model, where that is meant.
    """

    model: Any
    prompts: Any
    corrupted: Any
    file: PromptFile | None
    demo: Any

    @property
    def texts(self) -> list[str]:
        """The prompts in words."""
        return self.demo.prompts if self.file is None else self.file.prompts


def given(arguments: argparse.Namespace) -> Given:
    """The model that a command names, the prompts in its file and their counterparts.

    Files are read first, since a model may take long to load. The bundled model brings its own prompts; counterparts of
    those are read where the command's method needs them, or where `--corrupted demo` asks for them.

    Raises
    ------
    InputError: no prompts, prompts that the model can't read, or counterparts that are nowhere.
    """
    bundled = arguments.model == "demo"
    if arguments.prompts is None:
        if not bundled:
            raise InputError(
                "`prompts` is missing: name a .txt, .csv, .tsv, .json or .jsonl file (only `demo` brings its own)"
            )
        return _own(arguments)
    file = read_file(arguments.prompts, arguments.column, arguments.limit)
    corrupted = _partners(arguments, file) if arguments.corrupted else None
    if bundled:
        from tl_circuitlasso.demo import load_demo

        demo = load_demo(prompts=1)
        partners = None if corrupted is None else _bundled_tokens(demo, corrupted)
        return Given(demo.model, _bundled_tokens(demo, file.prompts), partners, file, demo)
    from tl_circuitlasso.models.loading import load_model

    return Given(load_model(arguments.model), file.prompts, corrupted, file, None)


def _own(arguments: argparse.Namespace) -> Given:
    """The bundled model on its own prompts."""
    from tl_circuitlasso.demo import load_demo

    if arguments.corrupted not in (None, "demo"):
        raise InputError(f"`--corrupted` is {arguments.corrupted}, and the prompts are the demo's own: write demo")
    demo = load_demo(prompts=arguments.limit or 512)
    wanted = arguments.corrupted or arguments.method != "lasso"
    return Given(demo.model, demo.tokens, demo.corrupted if wanted else None, None, demo)


def _partners(arguments: argparse.Namespace, file: PromptFile) -> list[str]:
    """The counterparts of the prompts: in a column beside them, or in a file of their own."""
    asked = arguments.corrupted
    if asked in file.columns:
        values = [str(row.get(asked) or "") for row in file.rows]
        if empty := [number for number, value in enumerate(values, 1) if not value]:
            raise InputError(f"`--corrupted` {asked!r} is empty for prompt {empty[0]}: fill every row of it")
        return values
    if not Path(asked).exists():
        columns = f"a column of {arguments.prompts} (it has {', '.join(file.columns)})" if file.rows else "a column"
        raise InputError(f"`--corrupted` {asked!r} is neither {columns} nor a file: name one that holds the partners")
    known = (*COLUMNS["corrupted"], *filter(None, [file.column]), *NAMES)
    return read_file(Path(asked), None, arguments.limit, known).prompts


def _bundled_tokens(bundled: Any, prompts: list[str]) -> Any:
    import torch

    rows = [bundled.encode(prompt) for prompt in prompts]
    if len({row.shape[1] for row in rows}) > 1:
        raise InputError("`prompts` differ in length: the bundled model reads sentences of one form, word by word")
    return torch.cat(rows)


def read_prompts(path: Path, column: str | None, limit: int | None) -> list[str]:
    """The prompts of `read_file`."""
    return read_file(path, column, limit).prompts


def read_file(path: Path, column: str | None, limit: int | None, known: Sequence[str] = NAMES) -> PromptFile:
    """The prompts of a text file (one a line), a table (a column), JSON lines (a field) or a JSON list.

    Without a `column`, the first of the `known` names that is there is read, or the only column.

    Raises
    ------
    InputError: no such file or column, no prompts in it, or a table that doesn't say where they are.
    """
    from tl_circuitlasso.data import storage

    text = storage.read_text(path, "`--prompts` ")
    if not storage.is_table(path):
        return PromptFile(_some([line for line in text.split("\n") if line.strip()], path)[:limit], [], None)
    rows = storage.parse_table(text, path)
    if not rows:
        _some([], path)
    found = _column(list(dict.fromkeys(name for row in rows for name in row)), column, path, known)
    filled = _some([row for row in rows if row.get(found)], path)[:limit]
    return PromptFile([str(row[found]) for row in filled], filled, found)


def _column(names: list[str], asked: str | None, path: Path, wanted: Sequence[str]) -> str:
    """The column that holds the prompts."""
    if asked is not None:
        if asked not in names:
            raise InputError(f"`--column` {asked!r} isn't in {path}: it has {', '.join(names)}")
        return asked
    known = [name for one in wanted for name in names if name.strip().lower() == one.lower()]
    if not known and len(names) > 1:
        raise InputError(
            f"`--column` is missing: {path} has {', '.join(names)}, none of them named {', '.join(wanted)}; say which "
            "one holds the prompts"
        )
    return known[0] if known else names[0]


def _some(found: list[Any], path: Path) -> list[Any]:
    if not found:
        raise InputError(f"`--prompts` {path} holds no prompts: put one on each line")
    return found
