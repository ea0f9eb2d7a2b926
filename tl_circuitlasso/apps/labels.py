"""Names for SAE features from Neuronpedia, where there is network, kept in a file where there isn't.

    labels = tcl.apps.neuronpedia_labels(graph, {"blocks.8.hook_resid_pre": "gpt2-small/8-res-jb"}, cache="labels.json")
    graph = tcl.apps.with_labels(graph, labels)

The cache is a JSON object {"<model>/<set>/<feature>": text}; features that Neuronpedia has no text for are in it with
an empty text, so that nobody asks twice.
"""

import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.progress import bar as counting

log = logging.getLogger(__name__)

HOST = "https://www.neuronpedia.org"
LARGEST_ANSWER = 4 << 20  # bytes; a feature's page has its activations too
SAVE_EVERY = 50


def neuronpedia_labels(
    nodes: AttributionGraph | Iterable[str],
    sets: Mapping[str, str],
    *,
    cache: str | Path,
    host: str = HOST,
    timeout: int | float = 10.0,
    api_key: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """{node name: text} for the features that Neuronpedia knows, asked for once each and cached.

    nodes: a graph (its kept features) or names "<hook>#<feature>". sets: {hook: "<model>/<set>"} as in
    `sae.cfg.metadata.neuronpedia_id`. The first explanation counts. Without network the cache's texts are returned, and
    a warning is logged.

    Raises
    ------
    InputError: a set that isn't "<model>/<set>", a host that isn't http(s), or a cache that can't be written.
    FormatError: a cache file that isn't a JSON object of texts.

    >>> import tempfile
    >>> hook = "blocks.7.hook_resid_pre"
    >>> cache = Path(tempfile.mkdtemp()) / "labels.json"
    >>> _ = cache.write_text('{"gpt2-small/7-res-jb/79": "names of months"}')    # asked for before: not asked again
    >>> neuronpedia_labels([f"{hook}#79"], {hook: "gpt2-small/7-res-jb"}, cache=cache)
    {'blocks.7.hook_resid_pre#79': 'names of months'}
    """
    _check(sets, host)
    known = _read(Path(cache))
    names = sorted(nodes.kept_nodes()) if isinstance(nodes, AttributionGraph) else list(dict.fromkeys(nodes))
    keys = {name: key for name in names if (key := _key(name, sets))}
    missing = [key for key in dict.fromkeys(keys.values()) if key not in known]
    try:
        for number, key in enumerate(counting(missing, progress=progress, desc="labels", unit="label"), 1):
            known[key] = _ask(f"{host}/api/feature/{urllib.parse.quote(key)}", timeout, api_key)
            if number % SAVE_EVERY == 0:
                _write(Path(cache), known)
    except (OSError, ValueError) as error:  # no network, no such host, a time-out, an answer that isn't JSON
        log.warning("Neuronpedia gave no more labels (%s): %d of %d are known", error, len(known), len(keys))
    if missing:
        _write(Path(cache), known)
    return {name: known[key] for name, key in keys.items() if known.get(key)}


def with_labels(graph: AttributionGraph, labels: Mapping[str, str]) -> AttributionGraph:
    """The graph with `labels`, {node name: text}, in its `node_info`.

    Raises
    ------
    InputError: a label of a node that the graph doesn't have.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> named = with_labels(demo.circuit, {"a2.h0": "name mover"})
    >>> print(tcl.explain(named, "a2.h0"))
    a2.h0 name mover
    parents
      +1.4335  m0
      +1.4157  a1.h2
    children
      +1.4390  logits
    """
    for name in labels:
        graph.index.position(name)
    info = {name: dict(facts) for name, facts in graph.node_info.items()}
    for name, text in labels.items():
        info[name] = {**info.get(name, {}), "label": str(text)}
    return replace(graph, node_info=info)


def _check(sets: Mapping[str, str], host: str) -> None:
    if urllib.parse.urlsplit(host).scheme not in ("http", "https"):
        raise InputError(f"`host` is {host!r}: give an http or https address")
    for hook, name in sets.items():
        if name.count("/") != 1 or not all(name.split("/")):
            raise InputError(f"`sets` has {name!r} for {hook}: write '<model>/<set>' such as 'gpt2-small/8-res-jb'")


def _key(name: str, sets: Mapping[str, str]) -> str:
    hook, mark, feature = name.rpartition("#")
    return f"{sets[hook]}/{feature}" if mark and hook in sets else ""


def _ask(address: str, timeout: int | float, api_key: str | None) -> str:
    headers = {"Accept": "application/json", **({"X-Api-Key": api_key} if api_key else {})}
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            page = json.loads(answer.read(LARGEST_ANSWER))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise
    return _explanation(page)


def _explanation(page: Any) -> str:
    some = page.get("explanations") if isinstance(page, dict) else None
    texts = [entry.get("description") for entry in some or () if isinstance(entry, dict)]
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"`cache` {path} isn't readable JSON ({error}): remove it, or name another file") from error
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        raise FormatError(f"`cache` {path} isn't an object of texts: remove it, or name another file")
    return data


def _write(path: Path, known: Mapping[str, str]) -> None:
    storage.write_text(path, json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False))
