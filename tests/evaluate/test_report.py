"""Several graphs in one table, and prompt pairs from files."""

import json
import math

import pytest

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.evaluate import metric_by_name, read_pairs
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models.pairs import pairs_of

ROWS = [
    {"clean": "w3 w4 w5", "corrupted": "w6 w7 w8", "correct": "w9", "incorrect": "w10"},
    {"clean": "w11 w12", "corrupted": "w13 w14", "correct": "w15", "incorrect": "w16"},
]


def written(folder, kind):
    path = folder / f"pairs.{kind}"
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    if separator is None:
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        path.write_text("\n".join(separator.join(line) for line in [list(ROWS[0]), *(list(r.values()) for r in ROWS)]))
    return path


def test_a_report_has_a_row_per_graph_and_one_for_chance():
    demo = tcl.load_demo(prompts=24)
    truth = AttributionGraph.from_edges(component_index(n_layers=3, n_heads=4), dict.fromkeys(demo.true_edges, 1.0))
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    made = tcl.evaluate.report(demo.model, {"truth": truth}, demo.tokens, demo.corrupted, metric)
    row = made.table.loc["truth"]
    assert row.faithfulness > 0.9 and abs(row.completeness) < 0.1 and row.low <= row.faithfulness <= row.high
    others = made.table.loc[["magnitude", "random"]]
    assert row.cpr == made.curves["truth"].cpr > others.cpr.max()
    assert len({curve.requested for curve in made.curves.values()}) == 1
    assert list(made.table.index) == ["truth", "magnitude", "random"] and "faithfulness" in repr(made)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_pairs_from_a_file_give_the_metric_of_their_answers(tmp_path, kind):
    model = architectures.small(architectures.tokenizer())
    prompts = read_pairs(written(tmp_path, kind))
    assert prompts.clean == [row["clean"] for row in ROWS] and prompts.incorrect == ["w10", "w16"]
    graph = baselines.random_edges(model).top_k(20)
    metric = metric_by_name("logit-diff", model, prompts)
    found = tcl.evaluate.faithfulness(model, graph, prompts.clean, prompts.corrupted, metric)
    for number, (row, ids) in enumerate(zip(ROWS, [(9, 10), (15, 16)])):
        last = model(model.to_tokens(row["clean"]))[0, -1]
        assert float(found.per_prompt["model"][number]) == pytest.approx((last[ids[0]] - last[ids[1]]).item(), abs=1e-4)


@pytest.mark.parametrize("name", tcl.evaluate.METRICS)
def test_every_named_metric_is_best_or_plain_on_the_model(tmp_path, name):
    model = architectures.small(architectures.tokenizer())
    prompts = read_pairs(written(tmp_path, "csv"), limit=2)
    metric = metric_by_name(name, model, prompts)
    (batch,) = pairs_of(model, prompts.clean)
    assert batch.clean.tokens.tolist() == [[1, 3, 4, 5], [1, 11, 12, 2]]
    value = float(metric(batch.shown(model(batch.clean.tokens).detach()), batch.rows))
    assert value == pytest.approx(0, abs=1e-5) if name == "kl" else math.isfinite(value)
    if name in ("cross-entropy", "next-token"):
        assert value < 0


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.txt", "w3", InputError, "give a .csv"),
        ("a.csv", "id,sentence\n1,w3", InputError, r"no rows with `clean` \(it has id, sentence\)"),
        ("a.jsonl", "{", FormatError, "line 1: not valid JSON"),
        ("a.jsonl", "3", FormatError, "where an object"),
        ("a.csv", "clean,correct\nw3,w4\nw5,", FormatError, "row 2: no `correct`"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, error, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_pairs(tmp_path / name)
    with pytest.raises(InputError, match="can't be read"):
        read_pairs(tmp_path / "missing.csv")


def test_the_columns_of_a_circuit_s_file_are_known(tmp_path):
    (tmp_path / "a.csv").write_text("id,prompt,right,wrong,corrupted\n1,w3,w4,w5,w6")
    pairs = read_pairs(tmp_path / "a.csv")
    assert (pairs.clean, pairs.correct, pairs.incorrect, pairs.corrupted) == (["w3"], ["w4"], ["w5"], ["w6"])
    (tmp_path / "b.csv").write_text("prompt,clean,correct,answer\nno,w3,w4,no")
    pairs = read_pairs(tmp_path / "b.csv")
    assert (pairs.clean, pairs.correct) == (["w3"], ["w4"])


def test_bad_metrics_are_refused(tmp_path):
    model = architectures.small(architectures.tokenizer())
    path = tmp_path / "a.csv"
    path.write_text("clean,correct\nw3,w4 w5")
    prompts = read_pairs(path)
    with pytest.raises(InputError, match="`metric` is 'best'"):
        metric_by_name("best", model, prompts)
    with pytest.raises(InputError, match="which is 2 tokens to the tokenizer"):
        metric_by_name("accuracy", model, prompts)
    path.write_text("clean,correct\nw3,w4")
    with pytest.raises(InputError, match="no column `incorrect`"):
        metric_by_name("logit-diff", model, read_pairs(path))
