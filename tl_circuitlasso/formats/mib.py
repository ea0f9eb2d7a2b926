"""MIB circuit track: submission folders of EAP-IG files, and a checker that says why one would be turned down.

A submission is one folder with a sub-folder per task and model (`ioi_gpt2`, `arc_easy_llama3`; dashes do as well),
each with either one file of scores (`importances.json`, or `.pt`), of edges or of nodes, or nine files of membership,
holding at most .1, .2, .5, 1, 2, 5, 10, 20 and 50 % of the model's edges. Folders whose name has `abs` and `True` or
`False` in it (`abs_True`) are looked into: what is in them is ranked by |score|, or by the signed score, only. At least
two tasks and two models are asked for. InterpBench is judged by its known circuit and isn't on the board.

What is lost: what EAP-IG's files lose (see `formats.eap`); the nine circuits hold 1 and 0 in place of scores, as
EAP-IG's loader insists on a number. A graph with few scored edges gives circuits smaller than their limit: an edge of
score 0 is never added to fill one up.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats import _read
from tl_circuitlasso.formats._grid import Grid, graph_of, grid_of
from tl_circuitlasso.formats.eap import from_eap, to_eap
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import Components

PERCENTAGES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
MODELS: Mapping[str, Components] = {
    "gpt2": Components(12, 12),
    "qwen2.5": Components(24, 14),
    "gemma2": Components(26, 8),
    "llama3": Components(32, 32),
    "interpbench": Components(6, 4),
}
_MODELS_OF_TASK = {
    "ioi": ("gpt2", "qwen2.5", "gemma2", "llama3"),
    "mcqa": ("qwen2.5", "gemma2", "llama3"),
    "arithmetic-addition": ("llama3",),
    "arithmetic-subtraction": ("llama3",),
    "arc-easy": ("gemma2", "llama3"),
    "arc-challenge": ("llama3",),
}
COLUMNS = frozenset(f"{task}_{model}" for task, models in _MODELS_OF_TASK.items() for model in models)


def to_mib(
    graph: AttributionGraph,
    path: str | Path | None = None,
    *,
    task: str = "ioi",
    model: str = "gpt2",
    method: str = "CircuitLasso",
    ablation: str = "patching",
    level: str = "edge",
    circuits: bool = False,
    suffix: str = ".json",
    d_model: int | None = None,
) -> dict[str, AttributionGraph]:
    """One task's part of a submission: graphs by the file they go to, written under the folder `path` if one is given.

    The graph must be of `model`, where that is one of MIB's; the files of any other can't be judged there.

    The layout is `{method}_{ablation}_{level}/{task}_{model}/importances.json`; with `circuits=True` nine files
    `circuit_0.1.json` ... `circuit_50.json` of membership instead. Each file is what `to_eap` writes.

    Raises
    ------
    InputError: a name with a slash, an unknown suffix, a graph that isn't of components, or one of another model.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> files = to_mib(demo.circuit, task="ioi", model="demo")
    >>> list(files)
    ['CircuitLasso_patching_edge/ioi_demo/importances.json']
    """
    task = task.replace("_", "-")
    names = {"task": task, "model": model, "method": method, "ablation": ablation, "level": level}
    for key, name in names.items():
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise InputError(f"`{key}` is {name!r}: letters, digits and . _ + - only, as it names a folder")
    if suffix not in (".json", ".pt"):
        raise InputError(f"`suffix` is {suffix!r}: MIB reads .json and .pt")
    if model in MODELS and (found := grid_of(graph).parts) != MODELS[model]:
        raise InputError(
            f"`graph` has {_described(found)}, but {model} has {_described(MODELS[model])}: name the graph's own model "
            f"with `model` ({', '.join(MODELS)} are MIB's)"
        )
    folder = f"{method}_{ablation}_{level}/{task}_{model}"
    parts = _circuits(graph) if circuits else {"importances": graph}
    files = {f"{folder}/{name}{suffix}": part for name, part in parts.items()}
    if path is not None:
        for name, part in files.items():
            to_eap(part, Path(path) / name, d_model=d_model)
    return files


def from_mib(path: str | Path) -> dict[str, AttributionGraph]:
    """Every graph of a submission folder by its file's place in it, `ioi_gpt2/importances.json`.

    Raises
    ------
    FormatError: no such folder, no circuits in it, or a file that EAP-IG couldn't load.

    >>> import tempfile
    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = to_mib(demo.circuit, folder, model="demo")
    ...     graphs = from_mib(folder)
    >>> list(graphs)
    ['CircuitLasso_patching_edge/ioi_demo/importances.json']
    """
    root = Path(path)
    if not root.is_dir():
        raise FormatError(f"{root}: no such folder; give the folder that holds task_model folders")
    files = sorted(file for file in root.rglob("*") if file.suffix in (".json", ".pt") and file.is_file())
    if not files:
        raise FormatError(f"{root}: no .json or .pt files in it; give the folder that holds task_model folders")
    return {file.relative_to(root).as_posix(): from_eap(file) for file in files}


def check_mib(path: str | Path) -> list[str]:
    """Why the leaderboard would turn this submission down: one sentence per fault, none where it would be taken.

    Judged as the leaderboard's own evaluator does: it looks for a task's and a model's name at the start of a folder's
    name or behind an underscore, walks into folders with `abs` and `true` or `false` in their names, fetches .json and
    .pt files only, and takes the nine circuits without scores. A single file it reads as EAP-IG does, so that one needs
    a score for every edge, be it 0 beside scores of nodes. Checked: tasks and models known to MIB and how many, file
    counts, that every file loads, that its model has the right shape, scores that can be ranked, and the size of each
    of the nine circuits.

    >>> check_mib("nowhere")
    ['nowhere: no such folder; give the folder that holds one folder per task and model']
    """
    root = Path(path)
    if not root.is_dir():
        return [f"{root}: no such folder; give the folder that holds one folder per task and model"]
    folders = list(_folders(root))
    if not folders:
        return [f"{root}: no folders such as ioi_gpt2 in it: one folder per task and model is expected"]
    faults = [fault for folder in folders for fault in _folder_faults(folder)]
    known = [column for folder in folders if (column := _column(folder.name)) is not None]
    for what, place in (("tasks", 0), ("models", 1)):
        found = sorted({name[place] for name in known})
        if len(found) < 2:
            faults.append(f"{root}: {what}: {', '.join(found) or 'none'}; at least two {what} are asked for")
    return faults


def _circuits(graph: AttributionGraph) -> dict[str, AttributionGraph]:
    """Nine nested circuits: the edges of largest |score|, ports apart, at most the named share of all edges."""
    grid = replace(grid_of(graph), merged=False)
    row, column = grid.parts.edges()
    size = grid.score[row, column].abs()
    order = size.argsort(descending=True, stable=True)[: int((size > 0).sum())]
    provenance = dict(graph.provenance)
    result: dict[str, AttributionGraph] = {}
    for percent in PERCENTAGES:
        chosen = order[: int(percent * size.numel() / 100 + 1e-9)]
        kept = torch.zeros_like(grid.kept)
        kept[row[chosen], column[chosen]] = True
        member = Grid(grid.parts, kept.double(), kept, absent=grid.absent, sink=grid.sink)
        result[f"circuit_{percent:g}"] = graph_of(member, provenance=provenance | {"mib_percent": percent})
    return result


def _folders(root: Path) -> Iterator[Path]:
    """The folders of circuits, also those within folders such as `abs_True`."""
    for child in sorted(root.iterdir()):
        name = child.name.lower()
        if not child.is_dir() or name.startswith("."):
            continue
        if "abs" in name and ("true" in name or "false" in name):
            yield from _folders(child)
        else:
            yield child


def _column(name: str) -> tuple[str, str] | None:
    """The task (with dashes) and model that the evaluator finds in a folder's name; None where it finds no column."""
    lower = name.lower()

    def first(names: Iterable[str]) -> str | None:
        return next((one for one in names if lower.startswith(one) or f"_{one}" in lower), None)

    task = first(spelling for one in _MODELS_OF_TASK for spelling in (one.replace("-", "_"), one))
    model = first(name for name in MODELS if name != "interpbench")
    if task is None or model is None or f"{task.replace('_', '-')}_{model}" not in COLUMNS:
        return None
    return task.replace("_", "-"), model


def _folder_faults(folder: Path) -> Iterator[str]:
    column = _column(folder.name)
    if column is None:
        yield (
            f"{folder.name}: no task and model of MIB in its name, so it's skipped: call it one of "
            f"{', '.join(sorted(COLUMNS))}"
        )
    circuits = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in (".json", ".pt"))
    if len(circuits) not in (1, len(PERCENTAGES)):
        yield f"{folder.name}: {len(circuits)} circuit files; one file of scores or nine of membership are expected"
    loaded: dict[str, AttributionGraph] = {}
    for file in circuits:
        name = f"{folder.name}/{file.name}"
        try:
            data = _read.read_source(file, constants=True)
            loaded[name] = from_eap(data)
        except FormatError as error:
            yield f"{name}: MIB can't load it: {error}"
            continue
        if "src_nodes" not in data and not all("in_graph" in row for row in data["nodes"].values()):
            yield f"{name}: `nodes` without `in_graph`: every node that is listed needs one"
        if len(circuits) == 1:
            yield from _ranking_faults(name, data, loaded[name])
    if column is not None:
        yield from _shape_faults(MODELS[column[1]], loaded)
    if len(circuits) == len(PERCENTAGES) == len(loaded):
        yield from _size_faults(loaded)


def _ranking_faults(name: str, data: Mapping[str, Any], graph: AttributionGraph) -> Iterator[str]:
    """Whether a single file's edges, nodes or neurons can be ranked."""
    if "src_nodes" in data:
        scores, of_neurons = data.get("edges_scores"), "neurons_scores" in data
    else:
        rows = data["edges"].values()
        given = [float(row["score"]) for row in rows if "score" in row]
        scores = torch.tensor(given) if len(given) == len(rows) else None
        of_neurons = any("neurons_scores" in row for row in data["nodes"].values())
    if scores is None:
        yield f"{name}: edges without scores: a single file is read as EAP-IG does, with one for each, be it 0"
    elif missing := int(scores.isnan().sum()):
        yield f"{name}: {missing} scores of edges are NaN, which EAP-IG ranks before all others: write 0"
    of_nodes = any("eap_score" in info for info in graph.node_info.values())
    if not of_neurons and not of_nodes and not bool((graph.score != 0).any()):
        yield f"{name}: every score is 0, so edges can't be ranked; write scores, or nine circuits"


def _shape_faults(wanted: Components, graphs: Mapping[str, AttributionGraph]) -> Iterator[str]:
    for name, graph in graphs.items():
        found = grid_of(graph).parts
        if found != wanted:
            yield (
                f"{name}: {_described(found)}, but this model has {_described(wanted)}: a circuit of another model, "
                "or a wrong folder name?"
            )


def _described(parts: Components) -> str:
    order = "in parallel" if parts.parallel else "in sequence"
    return f"{parts.n_layers} layers of {parts.n_heads} heads, attention and MLP {order}"


def _size_faults(graphs: Mapping[str, AttributionGraph]) -> Iterator[str]:
    sizes = sorted((int(grid_of(graph).kept.sum()), name) for name, graph in graphs.items())
    total = grid_of(next(iter(graphs.values()))).parts.n_edges
    for percent, (kept, name) in zip(PERCENTAGES, sizes):
        if kept > percent * total / 100 + 1e-9:
            yield f"{name}: {kept} of {total} edges, more than the {percent:g} % that its place among the nine allows"
