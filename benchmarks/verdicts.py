"""In, out or abstain: what verdicts on single edges are worth, on circuits that they weren't learnt from.

    python -m benchmarks.verdicts FOLDER                         certified cases of FOLDER and 20 planted transformers
    python -m benchmarks.verdicts FOLDER --planted 30 --resamples 5 --methods CircuitLasso EAP --json FILE

Each method's circuits are found on resampled prompts; `evaluate.calibrate` learns from all models but one which share
of resamples calls an edge in or out, and the edges of that one are judged. Methods that only rank are cut to as many
edges as the truth has. Planted transformers are made fresh, with 2 or 3 layers of 2 to 4 heads; their planted edges
have a strength of .2 to 1, all others of .03. What FILE holds isn't run again.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.rivals import CHOOSE, Setting, case_setting
from tl_circuitlasso import evaluate
from tl_circuitlasso.bench.cases import Case, case_folders, load_case
from tl_circuitlasso.data.storage import write_text
from tl_circuitlasso.evaluate.stability import Edge, Stability
from tl_circuitlasso.synthetic import planted_transformer

METHODS = ("CircuitLasso", "EAP", "EAP-IG", "RelP", "magnitude", "random")
BOOTSTRAP = 20
SEED = 100  # of the first planted transformer


@dataclass(frozen=True, eq=False)
class Known:
    """How steady a method is on a model whose circuit is known; kind: how the model came to be."""

    kind: str
    found: Stability
    truth: frozenset[Edge]

    def judged(self, others: Sequence["Known"], confidence: float) -> pd.DataFrame:
        """Verdicts on its edges by thresholds from others."""
        learnt = evaluate.calibrate([(one.found, one.truth) for one in others], confidence=confidence)
        return learnt.judge(self.found, self.truth)


def planted_case(seed: int, prompts: int) -> Case:
    """A planted transformer as a case."""
    made = planted_transformer(
        layers=2 + seed % 2, heads=2 + seed % 3, prompts=prompts, weakest=0.2, leak=0.03, seed=seed
    )
    return Case(
        name=f"planted_{seed}",
        model=made.model,
        clean=made.clean,
        corrupted=made.corrupted,
        first=1,
        regression=False,
        truth=made.circuit,
        candidates=made.candidates,
        true_nodes=frozenset(end for edge in made.circuit for end in edge),
        certified=True,
    )


def settings(folder: Path, planted: int, prompts: int) -> Iterator[tuple[str, Setting]]:
    """The certified cases and so many planted transformers, each with its kind."""
    for one in case_folders(folder):
        if (case := load_case(one)).certified:
            yield "trained", case_setting(case, prompts, BOOTSTRAP)
    for seed in range(SEED, SEED + planted):
        yield "planted", case_setting(planted_case(seed, prompts), prompts, BOOTSTRAP)


def shares(setting: Setting, method: str, resamples: int) -> list[list[Any]]:
    """Of every candidate edge the share of resamples that keep it, and whether it's true."""
    assert setting.truth is not None  # certified cases only
    size = None if method in CHOOSE else setting.size
    given = (setting.methods[method], setting.model, *setting.found, setting.metrics(method))
    steady = evaluate.stability(*given, resamples=resamples, k=size, progress=False)
    return [[*edge, share, edge in setting.truth] for edge, share in steady.shares.items()]


def known(line: dict[str, Any]) -> Known:
    """A line of the file as `calibrate` takes it."""
    kept = pd.DataFrame([row[:3] for row in line["shares"] if row[2] > 0], columns=["source", "target", "share"])
    everything = frozenset((source, target) for source, target, *_ in line["shares"])
    truth = frozenset((source, target) for source, target, _, is_true in line["shares"] if is_true)
    return Known(line["kind"], Stability(float("nan"), kept, (), everything), truth)


def table(lines: Sequence[dict[str, Any]], confidence: float) -> pd.DataFrame:
    """Of each method and kind of model: how many edges got which verdict, and how many of the verdicts are right."""
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        each = [known(line) for line in lines if line["method"] == method]
        learnt = evaluate.calibrate([(one.found, one.truth) for one in each], confidence=confidence)
        counts = [one.judged([*each[:i], *each[i + 1 :]], confidence) for i, one in enumerate(each)]
        for kind in [*dict.fromkeys(one.kind for one in each), "all"]:
            some = [count for one, count in zip(each, counts) if kind in (one.kind, "all")]
            thresholds = {"in from": learnt.keep, "out to": learnt.drop} if kind == "all" else {}
            rows.append({"method": method, "models": kind, **_figures(some), **thresholds})
    return pd.DataFrame(rows)


def by_share(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """How many edges were kept in which share of the resamples, and how many of them are true."""
    edges = pd.DataFrame(
        [(line["method"], line["kind"], share, true) for line in lines for *_, share, true in line["shares"]],
        columns=["method", "models", "share", "true"],
    )
    counted = edges.groupby(["method", "models", "share"], sort=False)["true"].agg(["sum", "count"])
    cells = counted["sum"].astype(str) + " of " + counted["count"].astype(str)
    return cells.unstack("share", fill_value="").sort_index(axis=1)


def _figures(counts: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """Counts and shares over all edges, and per model the two errors that `calibrate` bounds."""
    total = sum(counts[1:], start=counts[0])
    each = [(count, count.sum(axis=1)) for count in counts]
    called = total.sum(axis=1)
    return {
        "in": called["in"],
        "true": total.loc["in", "true"] / called["in"] if called["in"] else None,
        "out": called["out"],
        "absent": total.loc["out", "false"] / called["out"] if called["out"] else None,
        "true edges lost": total.loc["out", "true"] / total["true"].sum(),
        "false in, per model": _mean(count.loc["in", "false"] / max(1, called["in"]) for count, called in each),
        "true out, per model": _mean(
            count.loc["out", "true"] / max(1, min(called["out"], count["true"].sum())) for count, called in each
        ),
        "abstained": called["abstain"] / called.sum(),
    }


def _mean(shares: Iterable[float]) -> float:
    some = list(shares)
    return sum(some) / len(some)


def main() -> None:
    """Measure, print and save."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    lines = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else []
    done = {(line["case"], line["method"], line["prompts"], line["resamples"]) for line in lines}
    for kind, setting in settings(options.folder, options.planted, options.prompts):
        for method in options.methods:
            asked = (setting.name, method, options.prompts, options.resamples)
            if asked in done:
                continue
            about = dict(zip(("case", "method", "prompts", "resamples"), asked))
            lines.append(about | {"kind": kind, "shares": shares(setting, method, options.resamples)})
            print(*asked, flush=True)
            if options.json:
                write_text(options.json, json.dumps(lines))
    mine = [line for line in lines if (line["prompts"], line["resamples"]) == (options.prompts, options.resamples)]
    print(f"\n{len({line['case'] for line in mine})} models, confidence {options.confidence}, each by the others:")
    print(table(mine, options.confidence).to_string(index=False, float_format="{:.3f}".format))
    print("\nTrue edges of those that this share of the resamples keeps:")
    print(by_share(mine).to_string())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of cases")
    parser.add_argument("--planted", type=int, default=20, help="transformers made fresh; default %(default)s")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="by their names in benchmarks.rivals")
    parser.add_argument("--prompts", type=int, default=32, help="of each model, half of them used; default %(default)s")
    parser.add_argument("--resamples", type=int, default=5, help="default %(default)s")
    parser.add_argument("--confidence", type=float, default=0.9, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="shares by edge; what it holds already isn't run again")
    return parser


if __name__ == "__main__":
    main()
