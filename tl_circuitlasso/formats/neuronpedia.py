"""Neuronpedia: the graph JSON that its page and its uploader take.

`scan` is Neuronpedia's model id (`gpt2-small`, `gemma-2-2b`); with `source_set` every feature links to its dashboard,
`{layer}-{source_set}`, at the index that `feature` encodes as a Cantor pair, so ordinary SAEs work where the set
exists.

What is lost: edges that aren't kept, ports (merged: the score of largest size), weights, extras, certificates.
Provenance is written to `metadata.generation_settings` for readers and to `metadata.tl_circuitlasso` for
`from_neuronpedia`. The columns of the picture are kinds of site, not tokens (see `formats._frontend`).

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_neuronpedia(graph)["links"]
[{'source': '0_1_1', 'target': '0_0_2', 'weight': 0.5}]
>>> from_neuronpedia(to_neuronpedia(graph)).kept_edges()
{('a0.h1', 'm0')}
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.formats import _frontend, _read
from tl_circuitlasso.formats._frontend import Supernodes
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph


def to_neuronpedia(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    slug: str = "circuit-lasso",
    scan: str | None = None,
    prompt: str = "(a data set)",
    source_set: str | None = None,
    saes: Mapping[str, Any] | None = None,
    supernodes: Supernodes | None = None,
    pinned: Iterable[str] = (),
    description: str = "",
) -> dict[str, Any]:
    """The kept circuit as Neuronpedia's graph JSON, written to `path` if one is given.

    `supernodes` groups nodes under a label, `{label: names}`; left out, the `group` in `graph.node_info` is taken.
    Labels of nodes come from the `label` there. `saes`, {hook: SAE}, fill in `scan` and `source_set` from what SAELens
    knows of them (`sae.cfg.metadata.neuronpedia_id`, such as `gpt2-small/8-res-jb`); without a `scan` it is "unknown".

    Raises
    ------
    InputError: SAEs of several models or sets, or of none, a supernode of unknown nodes, two nodes that share an id, or
        a `path` that can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> page = to_neuronpedia(demo.circuit)
    >>> len(page["links"])
    6
    """
    if saes is not None:
        known = _ids_of(saes)
        scan, source_set = scan or known[0], source_set or known[1]
    scan = scan or "unknown"
    data = _frontend.page(graph, slug=slug, scan=scan, prompt=prompt, supernodes=supernodes, pinned=pinned)
    if "page" not in graph.provenance:
        info = {"generator": {"name": "tl_circuitlasso"}} | ({"description": description} if description else {})
        data["metadata"] |= {"info": info, "generation_settings": storage.plain(dict(graph.provenance), "provenance")}
        if source_set is not None:
            data["metadata"]["feature_details"] = {"neuronpedia_source_set": source_set}
    if path is not None:
        _read.write_json(path, data)
    return data


def _ids_of(saes: Mapping[str, Any]) -> tuple[str, str]:
    """The model and the set of sources that all SAEs belong to."""
    found = {}
    for hook, sae in saes.items():
        metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
        text = (
            metadata.get("neuronpedia_id")
            if isinstance(metadata, Mapping)
            else getattr(metadata, "neuronpedia_id", None)
        )
        parts = re.fullmatch(r"([^/\s]+)/(\d+)-(\S+)", str(text))
        if parts is None:
            raise InputError(
                f"`saes`: the SAE at {hook} has no Neuronpedia id ({text!r}): give `scan` and `source_set`"
            )
        found.setdefault((parts[1], parts[3]), hook)
    if len(found) != 1:
        listed = ", ".join(f"{model}/{sources}" for model, sources in found) or "none"
        raise InputError(
            f"`saes` are of {listed}, where a page has one model and set: leave some out, or give both names"
        )
    return next(iter(found))


def from_neuronpedia(source: Source) -> AttributionGraph:
    """The graph in a Neuronpedia or circuit-tracer JSON file, or in its plain data; every link is a kept edge.

    Raises
    ------
    FormatError: entries missing or of the wrong type, unknown ends, ids given twice, links against the layers, weights
        that aren't finite.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> from_neuronpedia(to_neuronpedia(demo.circuit)).kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.read_json(source) if isinstance(source, (str, Path)) else source
    with _read.reading(label):
        return _frontend.graph_of_page(data, label)


def check_neuronpedia(source: Source) -> None:
    """Check a file or plain data against the page's schema.

    Raises
    ------
    FormatError: names the first entry that is missing, of the wrong type or points nowhere.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> check_neuronpedia(to_neuronpedia(demo.circuit))
    """
    label = _read.label_of(source)
    data = _read.read_json(source) if isinstance(source, (str, Path)) else source
    with _read.reading(label):
        _frontend.check_page(data, label)
