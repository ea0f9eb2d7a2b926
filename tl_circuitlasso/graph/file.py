"""The two files of a graph: safetensors (columns as tensors, the rest in its header) and readable JSON (edge by edge).

Neither loses anything, both are written whole or not at all, and reading them runs no code.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_circuitlasso.data import storage
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph.nodes import NodeIndex

KIND, VERSION = "attribution graph", 1
COLUMNS = ("source", "target", "port", "score", "weight", "kept")
_ENDS = ("source", "target", "port")


@dataclass(frozen=True, eq=False)
class Parts:
    """A graph as plain data: `COLUMNS` and `extras` with one value per edge; `header` holds index and provenance."""

    columns: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    header: Mapping[str, Any]


def write(path: Path, parts: Parts, table: Callable[[], pd.DataFrame]) -> None:
    """Write `parts` by the suffix of `path`, without a suffix both forms into a folder.

    `table` makes the edges as rows with names, for JSON.

    Raises
    ------
    InputError: the path can't be written to, or the header holds something that isn't plain data.
    """
    header = {"kind": KIND, "version": VERSION, **{key: storage.plain(part, key) for key, part in parts.header.items()}}
    if path.suffix == ".json":
        rows = [_known(row) for row in table().to_dict(orient="records")]
        storage.write_text(path, json.dumps(header | {"edges": rows}, allow_nan=False, indent=1))
    elif path.suffix == ".safetensors":
        extras = {f"extra.{name}": column for name, column in parts.extras.items()}
        storage.write_tensors(path, {**parts.columns, **extras}, header)
    else:
        write(path / "graph.safetensors", parts, table)
        write(path / "graph.json", parts, table)


def _known(row: dict[Any, Any]) -> dict[Any, Any]:
    """The row with None for NaN, which JSON doesn't have: an extra of which nothing is known."""
    if endless := [key for key, value in row.items() if isinstance(value, float) and math.isinf(value)]:
        raise InputError(f"`extras` has an infinite {endless[0]!r}, which JSON doesn't have: write .safetensors")
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def read(path: Path) -> Parts:
    """What `write` wrote at `path`; of a folder, its safetensors file.

    Raises
    ------
    FormatError: missing, truncated, foreign, of another version, or a row that makes no sense.
    """
    if path.is_dir():
        path = path / "graph.safetensors"
    if path.suffix == ".json":
        return _read_json(path)
    tensors, header = storage.read_tensors(path, KIND)
    _check_version(header, path)
    extras = {name[6:]: column for name, column in tensors.items() if name.startswith("extra.")}
    return Parts({name: tensors[name] for name in COLUMNS if name in tensors}, extras, header)


def _read_json(path: Path) -> Parts:
    try:
        data = storage.parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: can't be read ({error})") from error
    if data.get("kind") != KIND:
        raise FormatError(f"{path}: not a graph of tl_circuitlasso; use formats.from_... for other tools' files")
    _check_version(data, path)
    try:
        return Parts(*_columns(NodeIndex.from_json(data["index"]), data["edges"]), data)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise FormatError(f"{path}: a graph with missing or wrong entries ({error!r})") from error


def _columns(index: NodeIndex, rows: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ends = {
        "source": [index.position(row["source"]) for row in rows],
        "target": [index.position(row["target"]) for row in rows],
        "port": [PORTS.index(row["port"]) for row in rows],
    }
    columns = {name: torch.tensor(values, dtype=torch.long) for name, values in ends.items()}
    columns["kept"] = torch.tensor([bool(row["kept"]) for row in rows], dtype=torch.bool)
    names = [name for name in (rows[0] if rows else {"score": 0, "weight": 0}) if name not in (*_ENDS, "kept")]
    numbers = {n: torch.tensor([_float(row[n]) for row in rows], dtype=torch.float64) for n in names}
    return columns | {name: numbers.pop(name) for name in ("score", "weight") if name in numbers}, numbers


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _check_version(header: Mapping[str, Any], path: Path) -> None:
    if header.get("version") != VERSION:
        raise FormatError(f"{path}: graph format {header.get('version')!r}, this release reads {VERSION}; upgrade")
