"""Which method finds known circuits? Every method over a folder of models whose circuit is known, in one table.

`interpbench` does that; the repository has eleven such models in `benchmarks/cases`.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tl_circuitlasso._checks import as_seed, whole_number, whole_or_none
from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.bench.cases import TRUTHS, Case, case_folders, load_case
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.bench.methods import METHODS, Method, chosen
from tl_circuitlasso.bench.published import METADATA, case_entries, download, load_published
from tl_circuitlasso.bench.report import Curve, Failure, Report, Row
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.structure import structure
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import cost as spent_on
from tl_circuitlasso.models import adapt
from tl_circuitlasso.naming import directory as _directory
from tl_circuitlasso.progress import bar as counting

__all__ = ["METHODS", "Case", "Failure", "Report", "Row", "interpbench", "load_case"]

_log = logging.getLogger(__name__)


def interpbench(
    folder: str | Path,
    methods: Sequence[str] | None = None,
    *,
    truth: str = "effective",
    prompts: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    budget: int | None = None,
    progress: bool = True,
    json_path: str | Path | None = None,
) -> Report:
    """Run `methods` on every case in `folder` and compare what they find with the truth.

    Parameters
    ----------
    folder: a folder of cases (see `bench.cases`), a local copy of the published InterpBench repository, or the name of
        that repository on the hub (`cybershiptrooper/InterpBench`).
    methods: names among `bench.METHODS`; None runs all but the rivals that are on demand (`bench.methods.ON_DEMAND`).
    truth: "effective" (edges whose resampling changes the output), "flow" (the whole data flow) or "gt" (the circuit
        as circuits-benchmark counts it).
    prompts: how many prompts of each case to use; None takes all.
    seed: of everything drawn at random; seeds: how many, from `seed` up. Figures are means over them.
    budget: the most edges that "circuit-lasso+confirm" measures in each case, the weakest first; None measures all.
    json_path: where to write every figure.

    A case that can't be read, or a method that fails on one, is listed in `failures`; the others' results stay.

    Raises
    ------
    InputError: no such folder, no cases in it, an unknown method or truth, `prompts` or `seeds` below 1, or a budget
        for no method.

    >>> import shutil, tempfile
    >>> folder = Path(tempfile.mkdtemp())                                   # one of a checkout's cases
    >>> _ = shutil.copytree("benchmarks/cases/case_33", folder / "case_33")
    >>> report = interpbench(folder, ["eap", "random"], prompts=8)
    >>> [(row.case, row.method) for row in report.rows], report.failures
    ([('case_33', 'eap'), ('case_33', 'random')], ())
    """
    wanted = chosen(methods, budget)
    if truth not in TRUTHS:
        raise InputError(f"`truth` is {truth!r}: write 'effective', 'flow' or 'gt'")
    prompts = whole_or_none("prompts", prompts, what="of prompts per case")
    seeds, seed = whole_number("seeds", seeds, what="of runs of every method"), as_seed(seed)
    rows: list[Row] = []
    failures: list[Failure] = []
    loaders, published = _loaders(folder, truth, seed)
    drawn = range(seed, seed + seeds)
    with counting(total=len(loaders) * len(wanted) * seeds, progress=progress, desc="bench", unit="run") as bar:
        for name, load in loaders:
            for found in _one_case(name, load, wanted, prompts, drawn):
                (rows if isinstance(found, Row) else failures).append(found)  # type: ignore[arg-type]
                bar.update(len(wanted) * seeds if isinstance(found, Failure) and not found.method else 1)
    settings = {"folder": Path(folder).name, "truth": truth, "prompts": prompts, "seed": seed, "seeds": seeds}
    settings |= {"published": published, "methods": [method.name for method in wanted], "budget": budget}
    report = Report(tuple(rows), tuple(failures), settings)
    if json_path is not None:
        report.save(json_path)
    return report


def _loaders(folder: str | Path, truth: str, seed: int) -> tuple[list[tuple[str, Callable[[], Case]]], bool]:
    """What loads each case, by name; and whether they're the published models."""
    path = Path(folder)
    if not path.exists() and str(folder).count("/") == 1:
        path = download(str(folder))
    if (path / METADATA).is_file():
        entries = case_entries(path)
        return [(str(e["case_id"]), lambda e=e: load_published(path, e, seed=seed)) for e in entries], True
    return [(case.name, lambda case=case: load_case(case, truth)) for case in case_folders(path)], False


def _one_case(
    name: str, load: Callable[[], Case], methods: list[Method], prompts: int | None, seeds: range
) -> Iterator[Row | Failure]:
    try:
        case = load()
    except Exception as error:  # whatever is wrong with one case must not lose the others' results
        yield _failure(name, "", error)
        return
    for method, seed in itertools.product(methods, seeds):
        try:
            yield _run(case, method, prompts, seed)
        except Exception as error:
            yield _failure(name, method.name, error)


def _failure(case: str, method: str, error: Exception) -> Failure:
    _log.warning("case %s, %s: %s", case, method or "loading", error, exc_info=True)
    return Failure(case, method, f"{type(error).__name__}: {error}")


def _run(case: Case, method: Method, prompts: int | None, seed: int) -> Row:
    graph, cost = measured(lambda: method.run(case, prompts, seed), adapt(case.model).device)
    passes = spent_on(graph.provenance)
    return Row(
        case=case.name,
        method=method.name,
        seed=seed,
        certified=case.certified,
        chooses=method.chooses,
        structure=structure(graph, case.truth, case.candidates, true_nodes=case.true_nodes),
        curve=Curve.of(graph, case),
        port_auroc=_port_auroc(graph, case),
        seconds=cost.seconds,
        peak_mib=cost.peak_mib,
        forward_passes=_known(passes["forward_passes"]),
        backward_passes=_known(passes["backward_passes"]),
        kept=tuple(sorted(graph.kept_edges() & case.candidates)) if method.chooses else (),
        stability=_stability(graph, case),
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _stability(graph: AttributionGraph, case: Case) -> tuple[tuple[float, bool], ...]:
    """Stability and truth of every candidate edge, where the method says how stable its edges are."""
    if "stability" not in graph.extras:
        return ()
    names = graph.index.names
    pairs = [(names[s], names[t]) for s, t in zip(graph.source.tolist(), graph.target.tolist())]
    found = dict(zip(pairs, graph.extras["stability"].tolist()))  # an edge's ports share its stability
    return tuple((value, pair in case.truth) for pair, value in found.items() if pair in case.candidates)


def _port_auroc(graph: AttributionGraph, case: Case) -> float:
    """How well q, k and v are ranked against the data flow; NaN without ports or without a truth for them."""
    names = graph.index.names
    ends = zip(graph.source.tolist(), graph.target.tolist(), graph.port.tolist())
    triples = {(names[s], names[t], PORTS[p]) for s, t, p in ends if (names[s], names[t]) in case.candidates}
    if case.port_truth is None or not any(port for *_, port in triples) or not case.port_truth <= triples:
        return math.nan
    return structure(graph, case.port_truth, triples).auroc


__dir__ = _directory(__name__)
_guard(__name__, __dir__())
