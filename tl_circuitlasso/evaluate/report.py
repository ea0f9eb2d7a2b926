"""Several graphs put to the test on the same prompts, in one table; and prompts for that from a file.

A file of prompt pairs is .csv, .tsv, .json or .jsonl with the columns `clean`, `corrupted` (may be missing with
ablation "mean" or "zero"), `correct` and `incorrect` (answers of one token each, as the metric needs them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from typing_extensions import Unpack

from tl_circuitlasso.baselines.observational import random_edges
from tl_circuitlasso.data import storage
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.evaluate.curves import Curve, curves, magnitude
from tl_circuitlasso.evaluate.faithfulness import Faithfulness, completeness, faithfulness
from tl_circuitlasso.evaluate.features import has_features
from tl_circuitlasso.evaluate.metrics import (
    Metric,
    accuracy,
    cross_entropy,
    kl,
    logit_diff,
    next_token,
    prob_diff,
)
from tl_circuitlasso.experiment import Ablation, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.metric import token_of
from tl_circuitlasso.models.pairs import last_places
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.naming import COLUMNS

METRICS = ("logit-diff", "prob-diff", "cross-entropy", "accuracy", "kl", "next-token")


@dataclass(frozen=True, eq=False)
class Report:
    """What each graph's circuit keeps of the behaviour.

    Attributes
    ----------
    table: one row per graph: edges (after pruning, ports apart), faithfulness with its interval, completeness (the
        faithfulness of everything but the circuit: near 0 is good), CPR and CMD of its ranking. The last rows are
        "magnitude" (`evaluate.magnitude`; not for features) and "random": what a ranking has to beat.
    faithfulness, curves: the figures behind it, by name.
    """

    table: pd.DataFrame
    faithfulness: Mapping[str, Faithfulness]
    curves: Mapping[str, Curve]

    def __repr__(self) -> str:
        return self.table.round(4).to_string(na_rep="")


@verb
def report(
    model: Any,
    graphs: Mapping[str, AttributionGraph],
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    seed: int = 0,
    **options: Unpack[FeatureOptions],
) -> Report:
    """Faithfulness, completeness and curve of each graph, beside two rankings of the same sizes that know nothing.

    Arguments and errors as in `faithfulness`; some 16 forward passes per prompt and graph, and 22 for the two.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> found = report(demo.model, {"planted": demo.circuit}, demo.tokens, demo.corrupted, demo.target)
    >>> list(found.table.index)
    ['planted', 'magnitude', 'random']
    """
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    drawn = curves(setup, {**graphs, **_ignorant(setup, graphs, seed)}, seed=seed)
    kept = {name: faithfulness(setup, graph, seed=seed) for name, graph in graphs.items()}
    rest = {name: completeness(setup, graph, seed=seed) for name, graph in graphs.items()}
    rows = {
        name: {
            "edges": found.edges,
            "faithfulness": found.faithfulness,
            "low": found.low,
            "high": found.high,
            "completeness": rest[name].faithfulness,
        }
        for name, found in kept.items()
    }
    areas = {name: {"cpr": curve.cpr, "cmd": curve.cmd} for name, curve in drawn.items()}
    table = pd.DataFrame([{"graph": name, **rows.get(name, {}), **area} for name, area in areas.items()])
    return Report(table.set_index("graph").astype({"edges": "Int64"}), kept, drawn)


def _ignorant(setup: Experiment, graphs: Mapping[str, AttributionGraph], seed: int) -> dict[str, AttributionGraph]:
    """Edges by the size of what their source changes, and at random; of features, the first graph's nodes at random."""
    first = next(iter(graphs.values()), None)
    if first is not None and has_features(first):
        drawn = torch.rand(len(first.index), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return {"random": replace(first, score=drawn[first.source])}
    own = replace(setup, ablation="mean") if setup.cut == "optimal" else setup  # optimal constants belong to a circuit
    return {"magnitude": magnitude(own), "random": random_edges(setup.adapter, seed=seed)}


# ---- prompts from a file --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairFile:
    """The columns of a file of prompt pairs; None for those that it doesn't have."""

    clean: list[str]
    corrupted: list[str] | None
    correct: list[str] | None
    incorrect: list[str] | None


def read_pairs(path: str | Path, limit: int | None = None) -> PairFile:
    r"""Prompt pairs from a .csv, .tsv, .json or .jsonl file, in the columns clean, corrupted, correct and incorrect.

    Columns may also have the names of `discover`'s files: prompt or text, answer or right, wrong.

    Raises
    ------
    InputError: no such file, another kind of file, no rows, or no column of prompts.
    FormatError: a line that isn't JSON, or rows of different columns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "pairs.csv"
    ...     _ = path.write_text("clean,corrupted,correct,incorrect\nTom and Ann,Tom and Tom, Ann, Tom\n")
    ...     pairs = read_pairs(path)
    >>> pairs.clean, pairs.correct
    (['Tom and Ann'], [' Ann'])
    """
    path = Path(path)
    rows = _rows(path)[:limit]
    columns = {name: _column(rows, (name, *known), path) for name, known in COLUMNS.items()}
    if (clean := columns["clean"]) is None:
        has = f" (it has {', '.join(rows[0])})" if rows else ""
        raise InputError(f"{path} has no rows with `clean`{has}: name the columns clean, corrupted, correct, incorrect")
    return PairFile(clean, columns["corrupted"], columns["correct"], columns["incorrect"])


def _rows(path: Path) -> list[dict[str, Any]]:
    text = storage.read_text(path, "")
    if not storage.is_table(path):
        raise InputError(f"{path} is a {path.suffix or 'nameless'} file: give a .csv, .tsv, .json or .jsonl file")
    return storage.parse_table(text, path)


def _column(rows: Sequence[Mapping[str, Any]], known: Sequence[str], path: Path) -> list[str] | None:
    name = next((name for name in known if rows and name in rows[0]), None)
    if name is None:
        return None
    values = [row.get(name) for row in rows]
    if missing := [number for number, value in enumerate(values, 1) if not value]:
        raise FormatError(f"{path}, row {missing[0]}: no `{name}`, which other rows have")
    return [str(value) for value in values]


def metric_by_name(name: str, model: Any, prompts: PairFile) -> Metric:
    """A metric of METRICS at each prompt's last real token ("next-token": at all), with answers from the file.

    Raises
    ------
    InputError: an unknown name, a missing column, or an answer that isn't one token.

    >>> metric_by_name("logit-diff", model, read_pairs("pairs.csv"))  # doctest: +SKIP
    """
    if name not in METRICS:
        raise InputError(f"`metric` is {name!r}: write one of {', '.join(METRICS)}")
    adapter = adapt(model)
    tokens, mask = adapter.to_tokens(prompts.clean)
    if name == "next-token":
        return next_token(tokens.cpu(), mask.cpu())
    if name == "kl":
        logits = adapter.run(tokens, mask, ["logits"])["logits"]
        return kl(logits[torch.arange(len(tokens)), last_places(mask)].cpu())
    right = _answers(adapter, prompts.correct, "correct")
    if name in ("cross-entropy", "accuracy"):
        return (cross_entropy if name == "cross-entropy" else accuracy)(right)
    wrong = _answers(adapter, prompts.incorrect, "incorrect")
    return (logit_diff if name == "logit-diff" else prob_diff)(right, wrong)


def _answers(adapter: Adapter, answers: list[str] | None, name: str) -> list[int]:
    if answers is None:
        raise InputError(f"the prompts have no column `{name}`, which this metric needs")
    known = {word: token_of(adapter, word, name) for word in dict.fromkeys(answers)}
    return [known[word] for word in answers]
