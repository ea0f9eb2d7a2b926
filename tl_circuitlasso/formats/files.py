"""Any graph file by its format's name, or by what the file itself says.

>>> sorted(READERS) == sorted(WRITERS)
True
"""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats.acdc import from_acdc, to_acdc
from tl_circuitlasso.formats.auto_circuit import from_auto_circuit, to_auto_circuit
from tl_circuitlasso.formats.circuit_tracer import STAND_INS, from_circuit_tracer, to_circuit_tracer
from tl_circuitlasso.formats.circuits_benchmark import from_circuits_benchmark, to_circuits_benchmark
from tl_circuitlasso.formats.eap import from_eap, to_eap
from tl_circuitlasso.formats.mib import from_mib, to_mib
from tl_circuitlasso.formats.networkx_ import (
    from_cytoscape,
    from_gexf,
    from_graphml,
    to_cytoscape,
    to_gexf,
    to_graphml,
)
from tl_circuitlasso.formats.neuronpedia import from_neuronpedia, to_neuronpedia
from tl_circuitlasso.graph import AttributionGraph

OWN = "circuit-lasso"


def _own(path: str | Path) -> AttributionGraph:
    return AttributionGraph.load(path)


def _save(graph: AttributionGraph, path: str | Path) -> None:
    graph.save(path)


def _only_graph(path: str | Path) -> AttributionGraph:
    found = from_mib(path)
    if len(found) > 1:
        raise FormatError(f"{path}: {len(found)} graphs in it ({', '.join(list(found)[:3])}, ...); name one file")
    return next(iter(found.values()))


READERS: Mapping[str, Callable[..., AttributionGraph]] = {
    OWN: _own,
    "acdc": from_acdc,
    "auto-circuit": from_auto_circuit,
    "circuit-tracer": from_circuit_tracer,
    "circuits-benchmark": from_circuits_benchmark,
    "cytoscape": from_cytoscape,
    "eap": from_eap,
    "gexf": from_gexf,
    "graphml": from_graphml,
    "mib": _only_graph,
    "neuronpedia": from_neuronpedia,
}
WRITERS: Mapping[str, Callable[..., Any]] = {
    OWN: _save,
    "acdc": to_acdc,
    "auto-circuit": to_auto_circuit,
    "circuit-tracer": to_circuit_tracer,
    "circuits-benchmark": to_circuits_benchmark,
    "cytoscape": to_cytoscape,
    "eap": to_eap,
    "gexf": to_gexf,
    "graphml": to_graphml,
    "mib": to_mib,
    "neuronpedia": to_neuronpedia,
}
_BY_SUFFIX = {".safetensors": OWN, ".graphml": "graphml", ".gexf": "gexf", ".cyjs": "cytoscape"}


def read(path: str | Path, format: str | None = None) -> AttributionGraph:
    """The graph in a file of any format; `format` is a key of `READERS`, by default what the file looks like.

    Raises
    ------
    InputError: an unknown `format`. FormatError: the file can't be read, or its format can't be told.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write(demo.circuit, Path(folder) / "eap.json", "eap")
    ...     graph = read(Path(folder) / "eap.json")
    >>> graph.n_kept
    6
    """
    return READERS[_checked(format) if format else guess(path)](path)


def write(graph: AttributionGraph, path: str | Path, format: str | None = None, **options: Any) -> str:
    """Write `graph` in a format of `WRITERS` and return which; left out, the suffix of `path` has to tell.

    `options` go to the writer, such as `task="ioi"` for "mib".

    Raises
    ------
    InputError: an unknown `format` or option, a suffix that leaves the format open, or what the writer raises.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kind = write(demo.circuit, Path(folder) / "circuit.gexf")
    >>> kind
    'gexf'
    """
    name = _checked(format) if format else _of_suffix(Path(path))
    known = [p.name for p in inspect.signature(WRITERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise InputError(f"`{option}` is no option of {name!r}: it has {', '.join(known) or 'none'}")
    WRITERS[name](graph, path, **options)
    return name


def guess(path: str | Path) -> str:
    """The format of a file or folder, by its suffix where that is enough, else by what's in it.

    Raises
    ------
    FormatError: no such file, damaged, or of none of the formats.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     demo.circuit.save(Path(folder) / "circuit.json")
    ...     kind = guess(Path(folder) / "circuit.json")
    >>> kind
    'circuit-lasso'
    """
    path = Path(path)
    if path.is_dir():
        return OWN if (path / "graph.safetensors").exists() else "mib"
    suffix = path.suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix not in (".json", *_read.TORCH):
        raise FormatError(f"{path}: the suffix {suffix!r} says nothing of the format; name one of {_listed()}")
    found = _guess_torch(path) if suffix in _read.TORCH else _guess_json(path)
    if found is None:
        raise FormatError(f"{path}: looks like none of the formats {_listed()}; export it again, or name the format")
    return found


def _listed() -> str:
    return ", ".join(READERS)


def _checked(format: str) -> str:
    if format not in READERS:
        raise InputError(f"`format` is {format!r}: write one of {_listed()}")
    return format


def _of_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if not suffix:
        return OWN
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    raise InputError(f"`format` is open: several formats are written to {suffix} files; name one of {_listed()}")


def _guess_json(path: Path) -> str | None:
    head = _read.read_bytes(path)[:4096].decode("utf-8", "replace")
    if head.lstrip().startswith('{"cfg"'):  # EAP-IG's own order of keys: spares large files a second reading
        return "eap"
    data = _read.read_json(path)
    if isinstance(data, list):
        return "circuits-benchmark"
    keys = set(data) if isinstance(data, Mapping) else set()
    if data and "kind" in keys:
        return OWN
    for name, needed in (("eap", {"cfg", "edges"}), ("cytoscape", {"elements"}), ("neuronpedia", {"nodes", "links"})):
        if needed <= keys:
            return name
    return None


def _guess_torch(path: Path) -> str | None:
    data = _read.read_pt(path, STAND_INS)
    keys = list(data) if isinstance(data, Mapping) else []
    if "src_nodes" in keys:
        return "eap"
    if "adjacency_matrix" in keys:
        return "circuit-tracer"
    if keys and isinstance(keys[0], tuple):
        return "acdc"
    for _ in range(2):  # AutoCircuit's caches: by task and algorithm
        if keys and isinstance(data[keys[0]], Mapping):
            data = data[keys[0]]
            keys = list(data)
    return "auto-circuit" if keys and str(keys[0]).startswith("blocks.") else None


def option(text: str) -> tuple[str, Any]:
    """`key=value` as a pair; the value as JSON where it is JSON, else as text.

    >>> option("circuits=true"), option("task=ioi")
    (('circuits', True), ('task', 'ioi'))

    Raises
    ------
    InputError: no equals sign.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise InputError(f"`option` is {text!r}: write key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
