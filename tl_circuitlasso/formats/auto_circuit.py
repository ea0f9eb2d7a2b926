"""AutoCircuit: `PruneScores`, a tensor of scores per destination module, which is its live object as well.

`blocks.1.hook_q_input` holds (heads, sources before layer 1), `blocks.1.hook_mlp_in` (sources before that MLP,), and
`blocks.{last}.hook_resid_post` all sources; the sources are `Resid Start`, then per layer the heads `A1.0 ...` and
`MLP 1`.

What is lost: which edges are kept (scores only; `membership=True` writes 1 and 0 instead), weights, extras,
provenance, positions (a `PruneScores` with a token axis isn't read). `Resid Start` is the embedding *with* positions.
An edge without a port is copied to q, k and v; with `separate_qkv=False` ports merge to the score of largest size. On
the way in, edges with a score other than 0 are kept, and a model with `hook_attn_in` has no ports.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=2), {("a0.h1", "m0"): .5})
>>> to_auto_circuit(graph)["blocks.0.hook_mlp_in"]
tensor([0.0000, 0.0000, 0.5000])
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._grid import Grid, checked_components, graph_of, grid_of
from tl_circuitlasso.formats._read import Source
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import QKV, Components

_log = logging.getLogger(__name__)

_MODULE = re.compile(r"blocks\.(\d{1,5})\.hook_(q_input|k_input|v_input|attn_in|mlp_in|resid_post)\Z")


def to_auto_circuit(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    separate_qkv: bool = True,
    membership: bool = False,
) -> dict[str, Tensor]:
    """The graph's scores (or its membership as 1 and 0) as `PruneScores`, written to `path` (`.pt`) if one is given.

    Raises
    ------
    InputError: the graph has nodes that aren't components, or `path` can't be written.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> to_auto_circuit(demo.circuit)["blocks.1.hook_q_input"].shape
    torch.Size([4, 6])
    """
    grid = grid_of(graph)
    if not membership and not bool(grid.kept.any()) and bool(grid.score.any()):
        _log.warning("AutoCircuit's scores can't say that the circuit is empty: write it with membership=True")
    values = grid.kept.double() if membership else grid.score
    scores = {name: _read.exact_dtype(tensor) for name, tensor in _modules(grid, values, separate_qkv).items()}
    if path is not None:
        _read.write_pt(path, scores)
    return scores


def from_auto_circuit(source: Source, *, task: str | None = None, algo: str | None = None) -> AttributionGraph:
    """The graph in `PruneScores`, or in a file that AutoCircuit's `save_cache` wrote of them.

    Its caches hold `{task: {algorithm: PruneScores}}`: `task` and `algo` say which, where there are several.

    Raises
    ------
    FormatError: several scores and no choice, unknown modules, tensors of the wrong shape (another model, or a token
        axis), scores that aren't finite.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> again = from_auto_circuit(to_auto_circuit(demo.circuit, membership=True))
    >>> again.kept_edges() == demo.circuit.kept_edges()
    True
    """
    label = _read.label_of(source)
    data = _read.expect_mapping(_read.read_source(source), label, "the file")
    with _read.reading(label):
        for what, name in (("task", task), ("algo", algo)):
            data = _one_of(data, what, name, label)
        parts, attn_only = _shape(data, label)
        merged = not any("hook_q_input" in name for name in data)
        score = torch.zeros(parts.n_sources, parts.n_readers, dtype=torch.float64)
        for name, tensor in data.items():
            _place(name, tensor, score, parts, label)
        absent = tuple(f"m{layer}" for layer in range(parts.n_layers)) if attn_only else ()
        return graph_of(Grid(parts, score, score != 0, merged=merged, absent=absent))


def to_auto_circuit_edges(graph: AttributionGraph, model: Any) -> set[Any]:
    """The kept edges as the live `Edge` objects of a `PatchableModel`, for its `circuit_prune_scores` and `patch_mode`.

    Raises
    ------
    InputError: the model has no such edge: another shape, or ports where the graph has none to offer.

    >>> edges = to_auto_circuit_edges(graph, patchable)  # doctest: +SKIP
    """
    by_name = {edge.name: edge for edge in getattr(model, "edges", ())}
    if not by_name:
        raise InputError("`model` has no edges: give AutoCircuit's patchable_model(...)")
    names = _kept_names(grid_of(graph), bool(getattr(model, "separate_qkv", True)))
    missing = sorted(names - by_name.keys())
    if missing:
        raise InputError(f"`model` has no edge {missing[0]}: it isn't the model that the graph was made of")
    return {by_name[name] for name in names}


def from_auto_circuit_edges(model: Any, prune_scores: Mapping[str, Tensor]) -> AttributionGraph:
    """The graph of live `PruneScores`, with the shape checked against the `PatchableModel` they belong to.

    Raises
    ------
    FormatError: the scores belong to another model.

    >>> graph = from_auto_circuit_edges(patchable, prune_scores)  # doctest: +SKIP
    """
    expected = {name: tuple(mask.shape) for name, mask in model.patch_masks.items()}
    given = {name: tuple(tensor.shape) for name, tensor in prune_scores.items()}
    if expected != given:
        name = next(iter(set(expected.items()) ^ set(given.items())))[0]
        raise FormatError(f"`prune_scores` and `model` differ at {name}: {given.get(name)} and {expected.get(name)}")
    return from_auto_circuit(prune_scores)


# ---- out ------------------------------------------------------------------------------------------------------------


def _modules(grid: Grid, values: Float[Tensor, "source column"], separate_qkv: bool) -> dict[str, Tensor]:
    parts = grid.parts
    no_mlps = all(f"m{layer}" in grid.absent for layer in range(parts.n_layers))
    modules: dict[str, Tensor] = {}
    for layer in range(parts.n_layers):
        before, ports = parts.before(layer), slice(parts.columns(layer, "q").start, parts.columns(layer, "v").stop)
        heads = values[:before, ports].view(before, 3, parts.n_heads)
        if separate_qkv:
            modules |= {f"blocks.{layer}.hook_{port}_input": heads[:, p].T for p, port in enumerate(QKV)}
        else:
            largest = heads.abs().argmax(1, keepdim=True)
            modules[f"blocks.{layer}.hook_attn_in"] = heads.gather(1, largest)[:, 0].T
        if not no_mlps:
            column = values[:, parts.columns(layer, "").start]
            modules[f"blocks.{layer}.hook_mlp_in"] = column[: parts.sources_of(layer, "")]
    modules[f"blocks.{parts.n_layers - 1}.hook_resid_post"] = values[:, -1]
    return {name: _without_mlps(tensor, parts) if no_mlps else tensor.contiguous() for name, tensor in modules.items()}


def _without_mlps(tensor: Tensor, parts: Components) -> Tensor:
    return tensor[..., ~parts.is_mlp()[: tensor.shape[-1]]].contiguous()


def _kept_names(grid: Grid, separate_qkv: bool) -> set[str]:
    """Kept edges as AutoCircuit names them: `A0.1->A1.0.Q`."""
    sources = [_name(name) for name in grid.parts.sources()]
    node, port = grid.parts.column_nodes()
    row, column = grid.kept.nonzero(as_tuple=True)
    nodes = [*sources, "Resid End"]
    return {
        f"{nodes[r]}->{nodes[t]}" + (f".{PORTS[p].upper()}" if p and separate_qkv else "")
        for r, t, p in zip(row.tolist(), node[column].tolist(), port[column].tolist())
    }


def _name(component: str) -> str:
    if component == "input":
        return "Resid Start"
    head = re.fullmatch(r"a(\d+)\.h(\d+)", component)
    return f"A{head[1]}.{head[2]}" if head else f"MLP {component[1:]}"


# ---- in -------------------------------------------------------------------------------------------------------------


def _shape(data: Mapping[Any, Any], label: str) -> tuple[Components, bool]:
    """The model's shape from names and sizes, and whether it has no MLPs."""
    found = {name: _MODULE.match(name) if isinstance(name, str) else None for name in data}
    _check_token_axis(data, label)
    unknown = [name for name, match in found.items() if match is None]
    if unknown or not found:
        what = f"{str(unknown[0])[:80]!r} isn't" if unknown else "there is not one"
        raise FormatError(f"{label}: {what} a module such as blocks.0.hook_q_input or blocks.1.hook_resid_post")
    layers = 1 + max(int(match[1]) for match in found.values() if match)
    name = next((name for name in data if "attn_in" in name or "q_input" in name), None)
    if name is None or not isinstance(data[name], Tensor) or data[name].ndim != 2:
        raise FormatError(f"{label}: no two-dimensional blocks.*.hook_q_input or hook_attn_in: nothing gives the heads")
    heads = data[name].shape[0]
    mlp = next((name for name in data if "mlp_in" in name), None)
    parallel = mlp is not None and isinstance(data[mlp], Tensor) and data[mlp].numel() == _before(mlp, heads)
    return checked_components(layers, max(heads, 1), parallel, label), mlp is None


def _check_token_axis(data: Mapping[Any, Any], label: str) -> None:
    """Scores per token have one axis more: nothing here says which prompt's tokens they are."""
    for name, tensor in data.items():
        usual = 1 if str(name).endswith(("mlp_in", "resid_post")) else 2
        if isinstance(tensor, Tensor) and tensor.ndim == usual + 1:
            raise FormatError(
                f"{label}: {name} has a token axis ({tuple(tensor.shape)}): an edge here is one over all tokens; "
                "make the scores with seq_len=None, or sum them over that axis"
            )


def _one_of(data: Mapping[Any, Any], what: str, name: str | None, label: str) -> Mapping[Any, Any]:
    """What a cache holds under `name`, or under its only key; scores themselves as they are."""
    if not data or not all(isinstance(value, Mapping) for value in data.values()):
        return data
    keys = {str(key): key for key in data}
    chosen = name if name is not None else next(iter(keys)) if len(keys) == 1 else None
    if chosen not in keys:
        raise FormatError(f"{label}: holds the scores of {', '.join(list(keys)[:6])}: name one with `{what}`")
    return data[keys[chosen]]


def _before(module: str, heads: int) -> int:
    match = _MODULE.match(module)
    return Components(1, heads).before(int(match[1] if match else 0))


def _place(name: str, tensor: Any, score: Float[Tensor, "source column"], parts: Components, label: str) -> None:
    match = _MODULE.match(name)
    layer, kind = int(match[1] if match else 0), match[2] if match else ""
    if kind == "resid_post" and layer != parts.n_layers - 1:
        raise FormatError(f"{label}: {name} isn't the last layer's: is a layer missing?")
    rows = _source_rows(layer, kind, parts, tensor)
    heads = () if kind in ("mlp_in", "resid_post") else (parts.n_heads,)
    values = _read.expect_tensor(tensor, label, name, (*heads, rows.numel())).double()
    _read.expect_finite(values.flatten(), label, name, lambda cell: f"entry {cell}")
    if kind == "resid_post":
        score[rows, -1] = values
    elif kind == "mlp_in":
        score[rows, parts.columns(layer, "").start] = values
    else:
        for port in QKV if kind == "attn_in" else (kind[0],):
            score[rows, parts.columns(layer, port)] = values.T


def _source_rows(layer: int, kind: str, parts: Components, tensor: Any) -> Int[Tensor, " row"]:
    """The rows that feed a module; those of MLPs are left out where the tensor shows that there are none."""
    before = parts.n_sources if kind == "resid_post" else parts.sources_of(layer, "" if kind == "mlp_in" else "q")
    rows = torch.arange(before)
    heads_only = rows[~parts.is_mlp()[:before]]
    n_sources = tensor.shape[-1] if isinstance(tensor, Tensor) and tensor.ndim else 0
    return heads_only if heads_only.numel() == n_sources else rows
