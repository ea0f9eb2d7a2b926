"""Every way to find a circuit in one table: known circuits, and indirect objects in a real language model.

    python -m benchmarks.rivals cases FOLDER                          models with a known truth, as in `bench`
    python -m benchmarks.rivals cases FOLDER --only 13 11 --prompts 100 --resamples 5
    python -m benchmarks.rivals demo --prompts 48 --resamples 100 --wordings 3      the bundled model, three templates
    python -m benchmarks.rivals smollm2 MODEL --prompts 16            indirect objects in SmolLM2-135M (a folder)
    python -m benchmarks.rivals smollm2 MODEL --methods EAP RelP --json FILE --wordings 1

Of each method: the edges of its circuit (of methods that only rank, as many as the truth has, or 600), its SHD, AUROC
over the candidates, CPR and CMD of the ranking by |score|, patched from the corrupted prompts (always both: CPR alone
can be gamed), stability (mean pairwise Jaccard of these circuits over resamples of the prompts), processor time in bare
forward passes over the same prompts, run before and after, and peak memory. Circuits are found on some prompts, CPR and
CMD measured on others: the second half of a case's, templates and names that weren't used of a language model's.

--wordings compares circuits of one template with another's. What FILE of --json holds is not run again, so that a long
table can be made in pieces; how many prompts and resamples each line rests on stands in it, and two of one method that
differ in this are refused. What steadiness says of the truth: `python -m benchmarks.verdicts`.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.real import tasks
from benchmarks.real.methods import bare_passes
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.bench.cases import Case, case_folders, limited, load_case
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.bench.methods import objective
from tl_circuitlasso.data.storage import write_text
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.demo import load_demo
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.loading import load_model

Metric = Callable[[Tensor, Tensor], Tensor]
Find = Callable[..., AttributionGraph]  # (model, clean, corrupted, metric)
Edges = frozenset[tuple[str, str]]
SIZE = 600  # edges of a ranking's circuit where the truth isn't known
WARM = 4  # prompts of the call that pays for imports and compilers
DIRECT = ("EAP", "RelP")  # take derivatives on the clean prompt, where a divergence from it has none
BOOTSTRAP = "bootstrap EAP-IG"
CHOOSE = ("CircuitLasso", "CircuitLasso, contrast pairs", "lasso+confirm", "ACDC", BOOTSTRAP)
SLOW = ("ACDC", "lasso+confirm")  # about a pass for each edge: small models only


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, prompts to find circuits on, other prompts to judge them on, and what is known.

    `metrics` gives each method its metric; `judge` is the metric on the fresh prompts; `groups` the prompts' wordings.
    """

    name: str
    model: Any
    found: tuple[Tensor, Tensor]
    fresh: tuple[Tensor, Tensor]
    methods: dict[str, Find]
    metrics: Callable[[str], Any]
    judge: Any
    size: int = SIZE
    truth: Edges | None = None
    candidates: Edges | None = None
    groups: Sequence[Any] = ()


# ---- the methods ----------------------------------------------------------------------------------------------------


def _named(key: str, batch_size: int, **options: Any) -> Find:
    def find(model: Any, clean: Tensor, corrupted: Tensor, metric: Any) -> AttributionGraph:
        return baselines.method(key)(model, clean, corrupted, metric, batch_size=batch_size, **options)

    return find


def _random(model: Any, clean: Tensor, corrupted: Tensor, metric: Any) -> AttributionGraph:
    """Drawn anew for each set of prompts: with one seed for all, chance would look perfectly steady."""
    return baselines.random_edges(model, seed=hash(tuple(clean.flatten().tolist())) % 2**31)


def _lasso(batch_size: int, positions: Any, *, pairs: bool = False) -> Find:
    """With a LogitDiff as metric, that is the target; without, it is the model's own logits."""

    def find(model: Any, clean: Tensor, corrupted: Tensor, metric: Any) -> AttributionGraph:
        options: dict[str, Any] = {"target": metric} if isinstance(metric, LogitDiff) else {}
        if pairs:
            options["corrupted"] = corrupted
        return circuit_lasso(model, clean, positions=positions, batch_size=batch_size, progress=False, **options)

    return find


def every_method(batch_size: int, positions: Any, resamples: int) -> dict[str, Find]:
    """All methods, by the names of the table."""
    return {
        "CircuitLasso": _lasso(batch_size, positions),
        "CircuitLasso, contrast pairs": _lasso(batch_size, positions, pairs=True),
        "lasso+confirm": _named("lasso+confirm", batch_size, positions=positions),
        "EAP": _named("eap", batch_size),
        "EAP-IG": _named("eap-ig", batch_size),
        "RelP": _named("relp", batch_size),
        "EAP-GP": _named("eap-gp", batch_size),
        BOOTSTRAP: _named("bootstrap-eap-ig", batch_size, resamples=resamples),
        "ACDC": _named("acdc", batch_size),
        "magnitude": _named("magnitude", batch_size),
        "random": _random,
    }


# ---- models with a known truth --------------------------------------------------------------------------------------


def case_setting(case: Case, prompts: int | None, bootstrap: int) -> Setting:
    """The first half of a case's prompts to find circuits on, the other half to judge; as `bench` gives metrics."""
    clean, corrupted = limited(case, prompts)
    half = len(clean) // 2
    found, fresh = ((clean[part], corrupted[part]) for part in (slice(half), slice(half, None)))
    by_kind = {kind: objective(case, *found, kind) for kind in ("distance", "contrast")}
    return Setting(
        name=case.name,
        model=case.model,
        found=found,
        fresh=fresh,
        methods=every_method(256, slice(case.first, None), bootstrap),
        metrics=lambda name: by_kind["contrast" if name in DIRECT else "distance"],
        judge=objective(case, *fresh, "distance"),
        size=len(case.truth),
        truth=case.truth if case.certified else None,
        candidates=case.candidates,
    )


def demo_setting(prompts: int, bootstrap: int) -> Setting:
    """The bundled model, whose sentences come in three wordings; judged on as many others."""
    demo = load_demo(2 * prompts)
    found, fresh = slice(prompts), slice(prompts, None)
    target = LogitDiff(demo.correct[found], demo.incorrect[found])
    return Setting(
        name="demo",
        model=demo.model,
        found=(demo.tokens[found], demo.corrupted[found]),
        fresh=(demo.tokens[fresh], demo.corrupted[fresh]),
        methods=every_method(256, "last", bootstrap),
        metrics=lambda name: target,
        judge=evaluate.logit_diff(demo.correct[fresh], demo.incorrect[fresh]),
        size=len(demo.true_edges),
        truth=demo.true_edges,
        candidates=demo.candidate_edges,
        groups=_templates(demo.tokens[found]),
    )


# ---- a real language model ------------------------------------------------------------------------------------------


def smollm2_setting(folder: str, prompts: int, bootstrap: int) -> Setting:
    """Indirect objects and twins that repeat the other name; judged on templates and names kept for checking."""
    model = load_model(folder)
    found, fresh = (tasks.task(model, "ioi", prompts=prompts, split=split) for split in ("seen", "held-out"))
    methods = every_method(tasks.BATCH, "last", bootstrap)
    assert found.target is not None  # of indirect objects it's two answers
    return Setting(
        name="SmolLM2-135M, indirect objects",
        model=model,
        found=(found.clean, found.corrupted),
        fresh=(fresh.clean, fresh.corrupted),
        methods={name: find for name, find in methods.items() if name not in SLOW},
        metrics=lambda name: found.target,
        judge=fresh.metric,
        groups=_templates(found.clean),
    )


def _templates(clean: Tensor) -> list[int]:
    """Each prompt's template: no two of them begin with the same word."""
    varies = (clean != clean[0]).any(0)
    return clean[:, int(varies.nonzero()[0])].tolist()


# ---- one line -------------------------------------------------------------------------------------------------------


def line(setting: Setting, name: str, resamples: int, shuffles: int) -> dict[str, Any]:
    """What is measured of one method."""
    find, metric = setting.methods[name], setting.metrics(name)
    graph, made = _found(setting, name)
    circuit = graph if name in CHOOSE else graph.top_k(setting.size)
    made |= {"edges": circuit.n_kept}
    if setting.truth is not None:
        judged = evaluate.structure(circuit, setting.truth, setting.candidates)
        made |= {"SHD": judged.shd, "AUROC": judged.auroc}
    options: dict[str, Any] = {"batch_size": tasks.BATCH}
    curve = evaluate.curve(setting.model, graph, *setting.fresh, setting.judge, absolute=True, **options)
    made |= {"CPR": curve.cpr, "CMD": curve.cmd}
    asked = (find, setting.model, *setting.found, metric)
    size = None if name in CHOOSE else setting.size
    if resamples:
        made["stability"] = evaluate.stability(*asked, resamples=resamples, k=size).jaccard
    if shuffles and setting.groups:
        worded = evaluate.wording(*asked, setting.groups, shuffles=shuffles, k=size)
        made |= {"other words": worded.jaccard, "same words": worded.shuffled}
    return made


def _found(setting: Setting, name: str) -> tuple[AttributionGraph, dict[str, Any]]:
    """The method's graph, and what it took."""
    find, metric, device = setting.methods[name], setting.metrics(name), adapt(setting.model).device
    clean, corrupted = setting.found
    first = torch.arange(min(WARM, max(2, len(clean) // 4)))
    few = metric.take(first) if isinstance(metric, LogitDiff) else metric
    with warnings.catch_warnings():  # so few prompts may well show no circuit
        warnings.simplefilter("ignore")
        find(setting.model, clean[first], corrupted[first], few)

    def bare() -> float:
        return measured(lambda: bare_passes(setting.model, clean, device), device)[1].cpu_seconds

    bare()
    before = bare()
    graph, cost = measured(lambda: find(setting.model, clean, corrupted, metric), device)
    return graph, {"forwards": 2 * cost.cpu_seconds / (before + bare()), "MiB": cost.peak_mib}


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """Lines that are known already, in a file that grows by one a method."""

    path: Path | None
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, path: Path | None) -> "Record":
        known = path is not None and path.exists()
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if known and path is not None else [])

    def has(self, asked: dict[str, Any]) -> bool:
        """Whether there is a line of this case and method.

        Raises
        ------
        InputError: there is one that rests on other numbers of prompts or resamples.
        """
        line = next((one for one in self.lines if all(one[key] == asked[key] for key in ("case", "method"))), None)
        if line is not None and (other := [key for key in asked if line.get(key) != asked[key]]):
            said = ", ".join(f"{key} {line.get(key)} instead of {asked[key]}" for key in other)
            raise InputError(f"`--json` {self.path}: {asked['method']} on {asked['case']} has {said}; use another file")
        return line is not None

    def add(self, made: dict[str, Any]) -> None:
        self.lines.append(made)
        if self.path is not None:
            write_text(self.path, json.dumps(self.lines))

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.lines)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """What is asked for, one at a time."""
    if options.what == "demo":
        yield demo_setting(options.prompts, options.bootstrap)
        return
    if options.folder is None:
        raise InputError(f"`folder` is missing: name the folder of the {options.what}")
    if options.what == "smollm2":
        yield smollm2_setting(str(options.folder), options.prompts, options.bootstrap)
        return
    for folder in case_folders(options.folder):
        if not options.only or folder.name.split("_")[-1] in options.only:
            yield case_setting(load_case(folder), options.prompts, options.bootstrap)


def main() -> None:
    """Measure, print and save."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    record = Record.of(options.json)
    for setting in settings(options):
        for name in options.methods or setting.methods:
            asked = {"case": setting.name, "method": name, "prompts": len(setting.found[0])}
            asked |= {"resamples": options.resamples} | ({"bootstrap": options.bootstrap} if name == BOOTSTRAP else {})
            if record.has(asked):
                continue
            record.add(asked | line(setting, name, options.resamples, options.wordings))
            print(record.frame().tail(1).to_string(index=False, header=len(record.lines) == 1), flush=True)
    frame = record.frame()
    print(f"\nMeans over {frame['case'].nunique()} cases (SHD and AUROC: those whose edges are certified):")
    print(frame.drop(columns="case").groupby("method", sort=False).mean().to_string(float_format="{:.3f}".format))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "demo", "smollm2"))
    parser.add_argument("folder", type=Path, nargs="?", help="the cases, or the model")
    parser.add_argument("--only", nargs="+", help="some of the cases, by number")
    parser.add_argument("--methods", nargs="+", help="some of the methods, by name")
    parser.add_argument("--prompts", type=int, default=100, help="of each case, or to find circuits on (%(default)s)")
    parser.add_argument("--resamples", type=int, default=0, help="for the stability; 0 leaves it out")
    parser.add_argument("--bootstrap", type=int, default=20, help="resamples of bootstrap EAP-IG; default %(default)s")
    parser.add_argument("--wordings", type=int, default=0, metavar="SHUFFLES", help="compare templates; 0 doesn't")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="every figure; what it holds already isn't run again")
    return parser


if __name__ == "__main__":
    main()
