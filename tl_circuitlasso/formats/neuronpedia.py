"""Neuronpedia: the graph JSON that its page and its uploader take.

`scan` is Neuronpedia's model id (`gpt2-small`, `gemma-2-2b`); with `source_set` every feature links to its dashboard,
`{layer}-{source_set}`, at the index that `feature` encodes as a Cantor pair, so ordinary SAEs work where the set
exists.

What is lost: edges that aren't kept, ports (merged: the score of largest size), weights, extras, certificates.
Provenance is written to `metadata.generation_settings` for readers and to `metadata.tl_circuitlasso` for
`from_neuronpedia`. The columns of the picture are kinds of site, not tokens (see `formats._frontend`).

>>> from tl_circuitlasso.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_neuronpedia(graph)["links"]
[{'source': '0_1_1', 'target': '0_0_2', 'weight': 0.5}]
>>> from_neuronpedia(to_neuronpedia(graph)).kept_edges()
{('a0.h1', 'm0')}
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tl_circuitlasso.formats import _frontend, _read
from tl_circuitlasso.formats._frontend import Supernodes
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph


def to_neuronpedia(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    slug: str = "circuit-lasso",
    scan: str = "unknown",
    prompt: str = "(a data set)",
    source_set: str | None = None,
    supernodes: Supernodes | None = None,
    pinned: Iterable[str] = (),
    description: str = "",
) -> dict[str, Any]:
    """The kept circuit as Neuronpedia's graph JSON, written to `path` if one is given.

    `supernodes` groups nodes under a label, `{label: names}`; left out, the `group` in `graph.node_info` is taken.
    Labels of nodes come from the `label` there.

    Raises
    ------
    InputError: a supernode of unknown nodes, two nodes that share an id, or a `path` that can't be written.
    """
    data = _frontend.page(graph, slug=slug, scan=scan, prompt=prompt, supernodes=supernodes, pinned=pinned)
    if "page" not in graph.provenance:
        info = {"generator": {"name": "tl_circuitlasso"}} | ({"description": description} if description else {})
        data["metadata"] |= {"info": info, "generation_settings": _read.plain(dict(graph.provenance), "provenance")}
        if source_set is not None:
            data["metadata"]["feature_details"] = {"neuronpedia_source_set": source_set}
    if path is not None:
        _read.write_json(path, data)
    return data


def from_neuronpedia(source: Source) -> AttributionGraph:
    """The graph in a Neuronpedia or circuit-tracer JSON file, or in its plain data; every link is a kept edge.

    Raises
    ------
    FormatError: entries missing or of the wrong type, unknown ends, ids given twice, links against the layers, weights
        that aren't finite.
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
    """
    label = _read.label_of(source)
    data = _read.read_json(source) if isinstance(source, (str, Path)) else source
    with _read.reading(label):
        _frontend.check_page(data, label)
