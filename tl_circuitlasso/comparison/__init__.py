"""Several graphs of one model side by side: what they agree on, how true and how faithful they are, what they cost.

>>> from tl_circuitlasso.graph import AttributionGraph
>>> from tl_circuitlasso.graph.nodes import component_index
>>> index = component_index(n_layers=1, n_heads=2)
>>> edges = {("input", "a0.h0"): 3., ("input", "a0.h1"): 2., ("a0.h0", "logits"): 1., ("a0.h1", "logits"): .5}
>>> ours = AttributionGraph.from_edges(index, edges)
>>> found = compare({"ours": ours.threshold(2), "theirs": ours.threshold(1)}, [("input", "a0.h0")])
>>> found.table[["edges", "jaccard", "shd"]].to_dict("index")["theirs"]
{'edges': 3, 'jaccard': 0.6666666666666666, 'shd': 2}
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from typing_extensions import Unpack

from tl_circuitlasso import evaluate
from tl_circuitlasso._checks import warn, whole_or_none
from tl_circuitlasso.baselines.observational import random_edges
from tl_circuitlasso.comparison import report
from tl_circuitlasso.comparison.common import Common
from tl_circuitlasso.comparison.figures import agreement, circuit, overlap, ranking_size, table
from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate import Curve
from tl_circuitlasso.experiment import Ablation, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHOLE = ("head", "mlp")  # sites that every graph of a model has in common


@dataclass(frozen=True, eq=False)
class Comparison:
    """Graphs side by side, over the candidate edges that all of them have, q, k and v merged.

    Attributes
    ----------
    table: one row per graph. `edges` in its circuit; agreement with the first graph: `jaccard` of the two circuits,
        `jaccard_top` of the `equal` strongest edges of each, `rank_correlation` (Spearman) of |score| over all
        candidates and `rank_correlation_top` over those that are among the strongest of either; against the truth:
        `shd`, `precision`, `recall`, `auroc`; on the model: `faithfulness` of the circuit, `cpr` and `cmd` of the
        ranking; costs: `seconds`, `forward_passes` and `backward_passes` per prompt, `peak_mib`. Columns that nothing
        is known for are left out.
    overlap: one row per edge of any circuit (and of the truth): source, target, `where` ("all", or the names of the
        graphs whose circuit has it, or "truth only"), each graph's score, and `true` where the truth is known.
    pairs: one row per two graphs: edges of both, of the one only, of the other only, and the agreements of `table`.
    graphs: the graphs, each with exactly its circuit kept.
    candidates: how many candidate edges the graphs share; equal: how many edges are taken where sizes are made equal.
    curves: faithfulness against size, with a random ranking, where a model was given; else empty.
    n_true: the number of true edges, which is what an empty graph's SHD would be; None where the truth isn't known.
    unlike: what the graphs should have in common and haven't, by their provenance: target, positions or model.
    """

    table: pd.DataFrame
    overlap: pd.DataFrame
    pairs: pd.DataFrame
    graphs: Mapping[str, AttributionGraph]
    candidates: int
    equal: int
    curves: Mapping[str, Curve]
    n_true: int | None
    unlike: tuple[str, ...] = ()

    def plot(self, path: str | Path | None = None, *, title: str | None = None) -> "Figure":
        """The edges of every circuit beside each other, scores against scores, and faithfulness curves if there are."""
        from tl_circuitlasso.plot.sidebyside import side_by_side

        return side_by_side(self, path, title=title)

    def save(self, path: str | Path) -> None:
        """Write the table and the overlap as one `.csv` after the other, or with the figure as an offline `.html` page,
        or the figure alone, by the suffix of `path`.

        Raises
        ------
        InputError: an unknown suffix, or a path that can't be written to.
        """
        path = Path(path)
        if path.suffix == ".csv":
            storage.write_text(path, f"{self.table.to_csv()}\n{self.overlap.to_csv(index=False)}")
        elif path.suffix == ".html":
            storage.write_text(path, report.page(self))
        else:
            self.plot(path)

    def note(self) -> str:
        """What the figures refer to, in one sentence, and what stands in the way of comparing them."""
        text = f"{self.candidates:,} candidate edges in common; top = the {self.equal:,} strongest of each"
        text = text if self.n_true is None else f"{text}; an empty graph's SHD is {self.n_true:,}"
        return "; ".join([text, *self.unlike])

    def __repr__(self) -> str:
        return f"{self.table.round(3).to_string(na_rep='')}\n({self.note()})"

    def _repr_html_(self) -> str:
        return report.fragment(self)


@verb
def compare(
    graphs: Mapping[str, AttributionGraph | Callable[[], AttributionGraph]],
    true_edges: Collection[Sequence[str]] | AttributionGraph | None = None,
    *,
    candidate_edges: Collection[Sequence[str]] | None = None,
    edges: int | None = None,
    model: Any = None,
    clean: Any = None,
    corrupted: Any = None,
    metric: Any = None,
    ablation: Ablation = "patch",
    absolute: bool = True,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> Comparison:
    """Put graphs of one model side by side, the first one being what the others are compared with.

    A graph's circuit is its kept edges. A graph that keeps every candidate edge is a ranking that hasn't chosen (the
    baselines return such graphs): its circuit is its strongest edges, as many as the smallest circuit among the others.

    Parameters
    ----------
    graphs: at least two, by name; a function without arguments is called here, and its seconds and peak memory noted.
    true_edges: the known circuit as (source, target) pairs, or a graph whose kept edges it is.
    candidate_edges: compare over these pairs instead of the candidates that all graphs have in common.
    edges: cut every circuit to so many edges (kept ones first, then by |score|) instead of taking it as it is.
    model, clean, corrupted, metric, ablation, options: as in `tcl.Experiment`, or `model` an experiment alone, to
        measure every circuit and ranking on the model; `absolute` ranks by |score|, else by the signed score, as in
        `evaluate.curve`.

    Raises
    ------
    UserWarning: graphs that differ in target, positions or model, as far as their provenance says; so does the note.
    InputError: fewer than two graphs, graphs of different models, no candidate edge in common, true edges that aren't
        candidates, rankings only without `edges` or a truth to say how many edges to take, or a model without prompts
        or metric.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graphs = {"planted": demo.circuit, "chance": tcl.baselines.random_edges(demo.model)}
    >>> found = compare(graphs, demo.true_edges)
    >>> found.equal, found.n_true, list(found.table.index)
    (6, 6, ['planted', 'chance'])
    """
    made = _made(graphs)
    edges = whole_or_none("edges", edges, what="of edges to compare")
    setup = _experiment(model, clean, corrupted, metric, ablation, options)
    if candidate_edges is None:
        _check_same_model(made)
    common = Common.of(made, candidate_edges)
    truth = None if true_edges is None else common.marks(true_edges)
    size = ranking_size(common, edges, truth)
    circuits = np.stack([circuit(common, n, edges, size) for n in range(len(made))])
    shown = {name: common.cut(n, circuits[n]) for n, name in enumerate(made)}
    measured, curves = ({}, {}) if setup is None else _on_model(shown, setup, absolute, seed)
    equal = int(circuits.sum(1).min())
    unlike = differences({name: graph.provenance for name, graph in made.items()})
    if unlike:
        warn(f"these graphs answer different questions: {'; '.join(unlike)}")
    pairs = pd.DataFrame([agreement(common, circuits, equal, a, b) for a, b in combinations(range(len(made)), 2)])
    return Comparison(
        table=table(common, circuits, truth, pairs, measured, shown),
        overlap=overlap(common, circuits, truth),
        pairs=pairs,
        graphs=shown,
        candidates=len(common.key),
        equal=equal,
        curves=curves,
        n_true=None if truth is None else int(truth.sum()),
        unlike=tuple(unlike),
    )


# ---- checking what is given -----------------------------------------------------------------------------------------


def _made(graphs: Mapping[str, AttributionGraph | Callable[[], AttributionGraph]]) -> dict[str, AttributionGraph]:
    """The graphs; those given as functions are made now, and what that took is added to their provenance."""
    if not isinstance(graphs, Mapping) or len(graphs) < 2:
        raise InputError('`graphs` must be at least two graphs by name: compare({"ours": graph, "EAP-IG": other})')
    return {str(name): _one(str(name), given) for name, given in graphs.items()}


def _one(name: str, given: Any) -> AttributionGraph:
    cost: dict[str, Any] = {}
    if callable(given) and not isinstance(given, AttributionGraph):
        from tl_circuitlasso.bench.measure import measured

        given, spent = measured(given)
        cost = {"seconds": {"total": spent.seconds}, "peak_mib": spent.peak_mib}
    if not isinstance(given, AttributionGraph):
        raise InputError(f"`graphs[{name!r}]` is a {type(given).__name__}: give an AttributionGraph, e.g. from formats")
    return replace(given, provenance={**given.provenance, **cost}) if cost else given


def _experiment(
    model: Any, clean: Any, corrupted: Any, metric: Any, ablation: Ablation, options: FeatureOptions
) -> Experiment | None:
    """What circuits and rankings are measured on, if they are."""
    given = {"model": model, "clean": clean, "metric": metric}
    missing = [name for name, value in given.items() if value is None]
    if not isinstance(model, Experiment) and 0 < len(missing) < 3:
        raise InputError(f"`{missing[0]}` is missing: faithfulness needs `model`, `clean` and `metric` together")
    if model is None:
        if options:
            raise InputError(f"`{next(iter(options))}` is for measuring on a model: give `model`, `clean` and `metric`")
        return None
    return Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)


def _check_same_model(graphs: Mapping[str, AttributionGraph]) -> None:
    (first, one), *others = graphs.items()
    for name, other in others:
        hashes = [graph.provenance.get("config_hash") for graph in (one, other)]
        if None not in hashes and hashes[0] != hashes[1]:
            raise InputError(f"`graphs` {first!r} and {name!r} were made of different models: their configs differ")
        here, there = ({str(b.site) for b in g.index.blocks if b.site.kind in _WHOLE} for g in (one, other))
        if here and there and here != there:
            node, owner = min((node, first if node in here else name) for node in here ^ there)
            raise InputError(
                f"`graphs` {first!r} and {name!r} have different nodes (only {owner!r} has {node}): of different "
                "models? Give `candidate_edges` to compare over a part that they share"
            )


# ---- on the model ---------------------------------------------------------------------------------------------------


def _on_model(
    graphs: Mapping[str, AttributionGraph], setup: Experiment, absolute: bool, seed: int
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Curve]]:
    """Each circuit's faithfulness and each ranking's curve, with a random ranking beside them."""
    rankings = graphs if "random" in graphs else {**graphs, "random": random_edges(setup.adapter, seed=seed)}
    curves = evaluate.curves(setup, rankings, absolute=absolute, seed=seed)
    found = {name: evaluate.faithfulness(setup, graph, seed=seed) for name, graph in graphs.items()}
    rows = {
        name: {"faithfulness": one.faithfulness, "cpr": curves[name].cpr, "cmd": curves[name].cmd}
        for name, one in found.items()
    }
    return rows, curves
