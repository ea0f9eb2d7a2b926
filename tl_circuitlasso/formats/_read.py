"""Reading files that strangers wrote: sizes are checked before parsing, nothing is executed, every fault is named.

A reader never raises anything but `FormatError`. Sizes and shapes are checked before memory is spent on them, so that a
small file can't ask for a large graph, and nesting or entity tricks end in an error rather than in a long wait.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError

Source = Any  # a path, or the data that the file would hold: a stranger's, so of any type

TORCH = (".pt", ".pth", ".pkl")  # how files of torch.save end
MAX_TEXT = 1 << 29  # bytes; the JSON of an 8B model's 1.6 million edges is 0.12 GB
MAX_ARCHIVE = 1 << 32
MAX_VALUES = 1 << 25  # commas in a JSON text: bounds the objects that parsing makes
MAX_OPENINGS = 1 << 23
MAX_EDGES = 1 << 23  # a 27B model has 3.4 million


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn whatever parsing raises into a `FormatError` that names the file."""
    try:
        yield
    except FormatError:
        raise
    except (CircuitLassoError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise FormatError(f"{label}: missing or wrong entries ({type(e).__name__}: {_short(str(e))})") from e
    except MemoryError as error:
        raise FormatError(f"{label}: asks for more memory than there is; is it the file you meant?") from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def label_of(source: Any) -> str:
    """How errors name the thing that is read."""
    return str(source) if isinstance(source, (str, Path)) else "the given data"


def read_bytes(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """The file's bytes, if it's a file of at most `limit` bytes."""
    try:
        size = Path(path).stat().st_size
        if size > limit:
            raise FormatError(f"{path}: {size:,} bytes, more than the {limit:,} that are read; export fewer edges")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: can't be read ({error}); name a readable file") from error


def read_json(path: str | Path, *, constants: bool = False) -> Any:
    """Any JSON value; NaN, infinities (unless `constants`), deep nesting and floods of values are refused.

    Raises
    ------
    FormatError: missing, too large, not UTF-8, truncated or not JSON.
    """
    raw = read_bytes(path)
    if raw.count(b",") > MAX_VALUES or raw.count(b"{") + raw.count(b"[") > MAX_OPENINGS:
        raise FormatError(f"{path}: holds too many values for a graph; is it the file you meant?")
    try:
        return json.loads(raw.decode("utf-8-sig"), parse_constant=float if constants else _refuse_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise FormatError(f"{path}: not whole, valid JSON ({_short(str(error))}); export it again") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON: scores must be finite")


def read_pt(path: str | Path, stand_ins: Mapping[str, type] | None = None) -> Any:
    """What `torch.save` wrote, as tensors and plain data; no code of the file runs.

    `stand_ins` maps foreign class names to data-only classes that take their place.

    Raises
    ------
    FormatError: missing, too large, truncated, compressed, or holding anything but tensors and plain data.
    """
    _check_archive(path)
    allowed: list[Callable | tuple[Callable, str]] = [(cls, name) for name, cls in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed) if allowed else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes the unpickler raise anything at all
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        fault = f"it holds a {foreign[1]}" if foreign else type(error).__name__
        raise FormatError(
            f"{path}: not a whole .pt file of tensors and plain data ({fault}); nothing else is loaded, as it could "
            "run the file's code: export it again, as JSON if you can"
        ) from error


def _check_archive(path: str | Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except Exception as error:  # zipfile raises struct, value and not-implemented errors on damaged directories
        raise FormatError(f"{path}: not a whole .pt archive ({error}); save it again with torch >= 1.6") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError(f"{path}: compressed, as torch never writes it; save it again with torch.save")
    if sum(entry.file_size for entry in entries) > MAX_ARCHIVE:
        raise FormatError(f"{path}: unpacks to more than {MAX_ARCHIVE:,} bytes; is it the file you meant?")


def read_source(source: Source, stand_ins: Mapping[str, type] | None = None, *, constants: bool = False) -> Any:
    """Plain data given as such, or read from a `.json` or a torch file (`.pt`, `.pth`, `.pkl`)."""
    if not isinstance(source, (str, Path)):
        return source
    if Path(source).suffix.lower() in (".pt", ".pth", ".pkl"):
        return read_pt(source, stand_ins)
    return read_json(source, constants=constants)


def expect_mapping(value: Any, label: str, key: str) -> Mapping[Any, Any]:
    """`value` if it's a mapping."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{label}: `{key}` is a {type(value).__name__}; an object with named entries is expected")
    return value


def expect_keys(data: Mapping[Any, Any], keys: tuple[str, ...], label: str, what: str) -> None:
    """Check that all `keys` are there."""
    missing = [key for key in keys if key not in data]
    if missing:
        found = _short(", ".join(map(str, list(data)[:8]))) or "none"
        raise FormatError(
            f"{label}: no {', '.join(f'`{key}`' for key in missing)} in {what} (found: {found}); export again"
        )


def expect_int(value: Any, label: str, key: str, low: int = 0, high: int = 1 << 40) -> int:
    """`value` if it's an integer from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FormatError(f"{label}: `{key}` is {_short(repr(value))}; an integer from {low} to {high} is expected")
    return value


def expect_tensor(value: Any, label: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """`value` if it's a dense tensor of this shape."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise FormatError(f"{label}: `{key}` is a {type(value).__name__}; a dense real tensor is expected")
    if tuple(value.shape) != shape:
        raise FormatError(
            f"{label}: `{key}` has shape {tuple(value.shape)}, but the model needs {shape}: exported for another model?"
        )
    return value


def number_columns(values: list[Any], label: str, key: str, name: Callable[[int], str]) -> Tensor:
    """A list of JSON numbers as fp64; the error names the first entry that isn't a finite number."""
    if not set(map(type, values)) <= {float, int}:
        wrong = next(i for i, value in enumerate(values) if type(value) not in (float, int))
        raise FormatError(f"{label}: `{key}` of {name(wrong)} is {_short(repr(values[wrong]))}; a number is expected")
    try:
        column = torch.tensor(values, dtype=torch.float64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise FormatError(f"{label}: a `{key}` is too large for a 64-bit float; rescale the scores") from error
    expect_finite(column, label, key, name)
    return column


def expect_finite(column: Tensor, label: str, key: str, name: Callable[[int], str]) -> None:
    """Check a flat column for NaN and infinities."""
    finite = column.isfinite()
    if not bool(finite.all()):
        wrong = int((~finite).nonzero()[0])
        raise FormatError(f"{label}: `{key}` of {name(wrong)} is {float(column[wrong])}; scores must be finite numbers")


def write_json(path: str | Path, data: Any, indent: int | None = None) -> None:
    """Write `data` as JSON, atomically."""
    try:
        text = json.dumps(data, allow_nan=False, indent=indent)
    except ValueError as error:
        raise InputError(f"`graph` has a number that JSON can't hold ({error}): make its extras finite") from None
    storage.write_text(Path(path), text)


def write_pt(path: str | Path, data: Mapping[Any, Any]) -> None:
    """Write tensors and plain data with torch.save, atomically.

    Raises
    ------
    InputError: `path` ends as files of another kind do, or can't be written.
    """
    if Path(path).suffix.lower() not in TORCH:
        raise InputError(f"`path` is {path}: torch.save writes it, so let the name end in {' or '.join(TORCH[:2])}")
    storage.write_atomically(Path(path), lambda temporary: torch.save(data, temporary))


def exact_dtype(score: Tensor) -> Tensor:
    """fp32 where that loses nothing, as the neighbours store scores; else fp64."""
    single = score.float()
    return single if torch.equal(single.double(), score) else score
