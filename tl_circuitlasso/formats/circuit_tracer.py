"""circuit-tracer: the JSON of its page, and its .pt, whose matrix is the transpose of ours (row = target).

JSON is what its local server shows (`graph_data/{slug}.json`). The .pt holds its `Graph`, objects of the package among
it, so it is written only where the package is installed; `from_circuit_tracer` reads one without the package, and
without running any of its code. A .pt of the package comes back as it was: token ids, activations, logit
probabilities, labels of custom targets and the configuration are kept beside the edges (active features that weren't
selected for the matrix are left out, with a warning).

What is lost of a graph of ours: edges that aren't kept, ports (merged), weights, extras, certificates; in .pt also
labels, groups, and scores beyond fp32. Columns are kinds of site rather than tokens. What an SAE misses is an error
node there too.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_circuit_tracer(graph)["metadata"]["schema_version"]
1
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.formats import _frontend, _read
from tl_circuitlasso.formats._frontend import Supernodes
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.formats._tracer_tensors import NOTE, Logit, page_of_tensors, tensors_of_page
from tl_circuitlasso.graph import AttributionGraph


class _Config(SimpleNamespace):
    """Stands in for circuit-tracer's and TransformerLens's configuration objects: attributes and nothing else."""


class _Opaque:
    """Stands in for values that a configuration holds and that aren't needed here; takes anything, keeps nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


STAND_INS: dict[str, type] = {
    "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig": _Config,
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig": _Config,
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig": _Config,
    "transformer_lens.config.hooked_transformer_config.HookedTransformerConfig": _Config,
    "circuit_tracer.attribution.targets.LogitTarget": Logit,
    "numpy._core.multiarray.scalar": _Opaque,
    "numpy.core.multiarray.scalar": _Opaque,
    "numpy.dtype": _Opaque,
    "_codecs.encode": _Opaque,
}


def to_circuit_tracer(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    slug: str = "circuit-lasso",
    scan: str = "unknown",
    prompt: str = "(a data set)",
    supernodes: Supernodes | None = None,
    pinned: Iterable[str] = (),
) -> dict[str, Any]:
    """The kept circuit as circuit-tracer's page, written to `path` if one is given: `.pt` as its `Graph`, else JSON.

    A .pt holds objects of the package, so that one is written only where circuit-tracer is installed.

    Raises
    ------
    InputError: a supernode of unknown nodes, two nodes that share an id, a .pt without circuit-tracer or with too many
        nodes for a dense matrix, or a `path` that can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> page = to_circuit_tracer(demo.circuit, prompt="Mary and John ...")
    >>> len(page["links"])
    6
    """
    data = _frontend.page(graph, slug=slug, scan=scan, prompt=prompt, supernodes=supernodes, pinned=pinned)
    data["metadata"] = {"transcoder_list": [], "schema_version": 1} | data["metadata"]
    if path is None:
        return data
    if Path(path).suffix.lower() in (".pt", ".pth"):
        live = _live(data, graph)
        storage.write_atomically(Path(path), lambda temporary: live.to_pt(str(temporary)))
    else:
        _read.write_json(path, data)
    return data


def from_circuit_tracer(source: Source) -> AttributionGraph:
    """The graph in circuit-tracer's JSON or .pt; nonzero entries of the matrix, or links, are kept edges.

    An error node whose id is also that of a feature of layer 0 (circuit-tracer names both `0_{number}_{position}`) is
    told apart by what its links point at; where they don't say, the feature has them, and a warning is logged.

    Raises
    ------
    FormatError: entries missing or of the wrong shape, scores that aren't finite, edges against the layers.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> again = from_circuit_tracer(to_circuit_tracer(demo.circuit))
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.read_source(source, STAND_INS)
    with _read.reading(label):
        if isinstance(data, Mapping) and "adjacency_matrix" in data:
            data = page_of_tensors(data, label)
        return _frontend.graph_of_page(data, label)


def to_circuit_tracer_graph(graph: AttributionGraph, *, slug: str = "", scan: str = "unknown", prompt: str = "") -> Any:
    """The kept circuit as a live `circuit_tracer.graph.Graph`, for its pruning, scores and `to_pt`.

    Raises
    ------
    InputError: circuit-tracer isn't installed (from its repository; PyPI has a fork of that name).

    >>> live = to_circuit_tracer_graph(graph, prompt="Mary and John ...")  # doctest: +SKIP
    """
    page = _frontend.page(graph, slug=slug, scan=scan, prompt=prompt, supernodes=None, pinned=())
    return _live(page, graph)


def _live(page: dict[str, Any], graph: AttributionGraph) -> Any:
    try:
        live = import_module("circuit_tracer.graph").Graph
    except (ImportError, AttributeError) as error:
        raise InputError(
            "circuit-tracer can't be imported, and its .pt holds its own objects: install it from its repository "
            "safety-research/circuit-tracer, or write JSON (a `path` that ends in .json), which needs nothing"
        ) from error
    data = tensors_of_page(page, graph)
    own = data["cfg"].pop(NOTE, None)
    cfg = _with_dtype(data["cfg"])
    try:
        mapping = import_module("circuit_tracer.utils.tl_nnsight_mapping")
        targets = import_module("circuit_tracer.attribution.targets")
    except ImportError:  # releases before the nnsight backend take any object with n_layers, and tokens as a tensor
        tokens = {"logit_tokens": torch.tensor([logit.vocab_idx for logit in data.pop("logit_targets")])}
        del data["vocab_size"]
        return live(**data | tokens | {"cfg": SimpleNamespace(**cfg, **({NOTE: own} if own else {}))})
    config = mapping.UnifiedConfig(**cfg)
    if own:
        setattr(config, NOTE, own)  # travels through its to_pt, so that the names come back
    logits = [targets.LogitTarget(*logit) for logit in data["logit_targets"]]
    data["scan_name" if "scan_name" in live.__init__.__annotations__ else "scan"] = data.pop("scan")
    return live(**data | {"cfg": config, "logit_targets": logits})


def _with_dtype(cfg: dict[str, Any]) -> dict[str, Any]:
    dtype = cfg.get("dtype")
    return cfg | {"dtype": getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype}
