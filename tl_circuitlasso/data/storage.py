"""Tensors and plain data in one file: safetensors whose header carries JSON; never pickle, never half-written."""

import io
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_circuitlasso.errors import FormatError, InputError

_HEADER = "tl_circuitlasso"


def plain(data: Any, what: str) -> Any:
    """`data` as JSON holds it: tuples as lists, keys and paths as text, numbers of numpy and torch as Python's.

    >>> plain({"at": Path("x/y"), 1: (2, 3)}, "provenance")
    {'at': 'x/y', '1': [2, 3]}

    Raises
    ------
    InputError: something else, or a number that isn't finite; the message says where it stands.
    """
    try:
        return _plain(data, what)
    except RecursionError as error:
        raise InputError(f"`{what}` is nested too deep, or holds itself: keep plain data") from error


def _plain(data: Any, what: str) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value, f"{what}.{key}") for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value, f"{what}[{place}]") for place, value in enumerate(data)]
    if isinstance(data, PurePath):
        return str(data)
    if isinstance(data, (np.generic, np.ndarray, Tensor)) and data.ndim == 0:
        return _plain(data.item(), what)
    if data is None or isinstance(data, (bool, int, str)):
        return data
    if isinstance(data, float) and math.isfinite(data):
        return data
    fault = f"is {data}" if isinstance(data, float) else f"holds a {type(data).__name__}"
    raise InputError(f"`{what}` {fault}, which a file can't say: keep text, finite numbers, lists and mappings of them")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary neighbour of `path`, then rename it: readers see the old file or the whole new one.

    Raises
    ------
    InputError: the folder of `path` can't be made or written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(
            f"`path` {str(path)!r} can't be written ({error.strerror}): name a folder you may write to"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; a graph is as public as any other file
        os.replace(temporary, path)
    except IsADirectoryError as error:
        raise InputError(f"`path` {str(path)!r} is a folder: name a file in it") from error
    except (OSError, SafetensorError) as error:  # a full disk, or a file that may grow no further
        why = getattr(error, "strerror", None) or error
        raise InputError(f"`path` {str(path)!r} can't be written ({why}): make room, or name another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Write `tensors` with `data` (what `plain` takes) in the header to `path` atomically."""
    header = {_HEADER: json.dumps(plain(data, "data"), allow_nan=False)}
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(copies, str(temporary), header))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, if its data says that it's of this `kind`.

    Raises
    ------
    FormatError: not safetensors, truncated, or written by something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}); write it again") from error
    if header is None:
        raise FormatError(f"{path}: a safetensors file, but not one of tl_circuitlasso; use formats.from_... to import")
    data = parse_json(header, path)
    if data.get("kind") != kind:
        raise FormatError(f"{path}: holds {data.get('kind')!r}, not {kind!r}")
    return tensors, data


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """`text` as a JSON object.

    Raises
    ------
    FormatError: not JSON, not an object, or nested past the parser's depth.
    """
    return _object(text, str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(f"{where}: holds a {type(data).__name__} where an object is expected")
    return data


TABLES = (".csv", ".tsv", ".json", ".jsonl")


def is_table(path: Path) -> bool:
    """Whether the suffix names a table, in small or capital letters."""
    return path.suffix.lower() in TABLES


def read_text(path: Path, name: str) -> str:
    """A text file in UTF-8, without the mark that some editors put in front; line ends are those of Python.

    Raises
    ------
    InputError: it can't be read; the message begins with the argument's `name`.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name}{path} can't be read ({error}): give a .txt, .csv, .tsv, .json or .jsonl file in UTF-8"
        ) from None


def parse_table(text: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a file of one of the kinds in `TABLES`, which the suffix of `path` tells; cells are text.

    A .json file is a list of rows, or of strings, which then are the column `prompt`. Lines of .jsonl end at line feeds
    only: other separators of Unicode belong to the text.

    Raises
    ------
    FormatError: a line that isn't a JSON object, or rows of different columns.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return [_object(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == ".json":
        return _json_list(text, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # cells beyond the last column would be lost
            separator = "\t" if kind == ".tsv" else ","
            table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.EmptyDataError:
        return []
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise FormatError(f"{path}: rows of different columns ({error})") from None
    return [{str(name): cell for name, cell in row.items()} for row in table.to_dict("records")]


def _json_list(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list):
        raise FormatError(f"{path}: holds a {type(rows).__name__} where a list of prompts is expected")
    named = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    if odd := [number for number, row in enumerate(named, 1) if not isinstance(row, dict)]:
        raise FormatError(f"{path}, entry {odd[0]}: neither a string nor an object")
    return named
