"""The bench over small self-made case folders: figures, thresholds, broken cases, the published layout, pickles."""

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import architectures
from tests.helpers import CASES
from tl_circuitlasso import bench
from tl_circuitlasso.bench.cases import all_candidates, load_case
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.bench.published import METADATA, head_edges, read_pairs
from tl_circuitlasso.bench.report import Curve, best_threshold
from tl_circuitlasso.errors import FormatError, InputError, ModelError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index

CONFIG = {
    "n_layers": 1,
    "d_model": 8,
    "n_ctx": 6,
    "d_head": 4,
    "n_heads": 2,
    "d_mlp": 16,
    "act_fn": "gelu",
    "d_vocab": 9,
    "d_vocab_out": 3,
    "normalization_type": None,
    "seed": 0,
    "dtype": "float32",
    "n_params_actual": 1,
}
TRUTH = [["input", "a0.h0"], ["a0.h0", "m0"], ["m0", "logits"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cases: one edge-certified classification, one regression whose edges aren't certified."""
    write_case(tmp_path / "case_1", certified=True)
    write_case(tmp_path / "case_2", certified=False, d_vocab_out=1)
    return tmp_path


def planted(**changes: Any) -> Any:
    """A model in which a0.h1 writes nothing and only m0 reaches the logits through its output."""
    model = architectures.hooked("no_norm", **{k: v for k, v in (CONFIG | changes).items() if k in SIZES})
    model.blocks[0].attn.W_O.data[1] = 0
    return model


SIZES = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out")


def write_case(path: Path, *, certified: bool, **changes: Any) -> None:
    path.mkdir()
    save_file({name: w.contiguous() for name, w in planted(**changes).named_parameters()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    edges = {
        "gt_edges": TRUTH,
        "flow_edges": TRUTH,
        "flow_edges_qkv": [["input", "a0.h0.v"], *TRUTH[1:]],
        "effective_edges": TRUTH,
        "false_effective_edges": [] if certified else [["input", "m0"]],
        "candidate_edges": [list(edge) for edge in sorted(all_candidates(1, 2))],
        "circuit_nodes": ["a0.h0", "m0"],
    }
    (path / "edges.json").write_text(json.dumps(edges))
    kind = "regression" if changes.get("d_vocab_out") == 1 else "classification"
    (path / "meta.json").write_text(json.dumps({"output_type": kind}))
    clean, corrupt = torch.randint(9, (2, 12, 5), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    save_file({"clean_tokens": clean.clone(), "corrupt_tokens": corrupt.clone()}, path / "data.safetensors")


def run(folder: Path, *methods: str, **options: Any) -> bench.Report:
    return bench.interpbench(folder, methods, progress=False, **options)


def test_every_baseline_gives_a_row_per_case(folder):
    names = [name for name in bench.METHODS if not name.startswith("circuit-lasso")]
    report = run(folder, *names)
    assert not report.failures and len(report.rows) == 2 * len(names)
    assert report.methods == names
    exact = report.cases[report.cases.method == "exact"].set_index("case")
    assert exact.forward_passes["case_1"] == 2 + 3 * 2 + 3 and exact.backward_passes["case_1"] == 0
    assert (report.cases.seconds >= 0).all() and list(exact.empty_shd) == [3, 3]
    silent = next(row for row in report.rows if row.method == "eap-ig")
    assert silent.structure.auroc > 0.5


def test_edge_means_are_over_certified_cases_and_node_means_over_all(folder):
    report = run(folder, "exact")
    summary, cases = report.summary, report.cases.set_index("case")
    assert summary.loc["exact", "cases"] == 2 and summary.loc["exact", "certified"] == 1
    assert summary.loc["exact", "shd_global"] == cases.shd_global["case_1"]
    assert summary.loc["exact", "node_shd_global"] == cases.node_shd_global.mean()
    assert summary.loc["(empty graph)", "shd_default"] == 3
    assert summary.loc["(empty graph)", "node_shd_default"] == 4
    assert "(empty graph)" in str(report) and "exact" in str(report)


def test_a_method_that_chooses_is_scored_at_its_own_choice(folder, monkeypatch):
    def perfect(case, prompts, seed):
        made = bench.METHODS["random"].run(case, prompts, seed)
        pairs = [(made.index.names[s], made.index.names[t]) for s, t in zip(made.source.tolist(), made.target.tolist())]
        return made.keep(torch.tensor([pair in case.truth for pair in pairs]))

    method = bench.methods.Method("perfect", perfect, chooses=True)
    monkeypatch.setitem(bench.METHODS, "perfect", method)
    report = run(folder, "perfect", "eap")
    assert report.summary.loc["perfect", "shd_default"] == 0
    assert math.isnan(report.summary.loc["eap", "shd_default"])
    assert sorted(report.rows[0].kept) == sorted(map(tuple, TRUTH))
    assert "SHD, perfect (default) - eap (global)" in str(report)
    assert report.test(("perfect", "shd_default"), ("eap", "shd_global")).difference <= 0


def test_circuit_lasso_runs_on_a_case(folder):
    pytest.importorskip("tl_circuitlasso.discover.run")
    report = run(folder, "circuit-lasso")
    assert not report.failures, report.failures
    assert report.rows[0].chooses and report.rows[0].forward_passes >= 1


def test_a_budget_is_the_most_edges_that_are_measured(folder, monkeypatch):
    """Of a circuit of six edges: each measured one is a forward pass."""
    edges = [
        ("input", "a0.h0"),
        ("a0.h0", "m0"),
        ("input", "a0.h1"),
        ("a0.h1", "m0"),
        ("input", "m0"),
        ("m0", "logits"),
    ]

    def skeleton(case, prompts, seed):
        index = component_index(n_layers=1, n_heads=2)
        made = AttributionGraph.from_edges(index, {edge: 1.0 + place for place, edge in enumerate(edges)})
        return replace(made, provenance={"forward_passes": 0.0})

    monkeypatch.setitem(bench.METHODS, "circuit-lasso", bench.methods.Method("circuit-lasso", skeleton, chooses=True))
    whole, some = (run(folder, "circuit-lasso+confirm", budget=budget) for budget in (None, 2))
    assert not whole.failures and not some.failures
    assert whole.rows[0].forward_passes - some.rows[0].forward_passes == 4
    assert set(edges[2:]) <= set(some.rows[0].kept) and some.settings["budget"] == 2  # only the weakest are measured
    assert ("a0.h1", "m0") not in whole.rows[0].kept  # a0.h1 writes nothing


def test_seeds_are_rows_of_their_own_and_one_case_in_the_means(folder):
    report = run(folder, "random", "eap", seeds=3)
    assert len(report.rows) == 12 and sorted(report.cases.seed.unique()) == [0, 1, 2]
    assert report.summary.loc["random", "cases"] == 2 and report.summary.loc["random", "certified"] == 1
    mine = report.cases[(report.cases.method == "random") & report.cases.certified]
    assert mine.auroc.nunique() == 3
    interval = report.interval("random", "auroc")  # one certified case: nothing to resample
    assert interval.low == interval.mean == interval.high == pytest.approx(mine.auroc.mean())
    assert "mean SHD of each" not in str(report)


def choosing(monkeypatch, stability):
    """A method that keeps the truth with seed 0 and nothing otherwise; `stability` by truth of an edge."""

    def run(case, prompts, seed):
        made = bench.METHODS["random"].run(case, prompts, seed)
        pairs = [(made.index.names[s], made.index.names[t]) for s, t in zip(made.source.tolist(), made.target.tolist())]
        true = torch.tensor([pair in case.truth for pair in pairs])
        extras = {"stability": torch.where(true, *(torch.tensor(value) for value in stability)).double()}
        return replace(made.keep(true if seed == 0 else torch.zeros_like(true)), extras=extras)

    monkeypatch.setitem(bench.METHODS, "choosing", bench.methods.Method("choosing", run, chooses=True))


def test_a_choice_that_hangs_on_the_seed_is_told(folder, monkeypatch):
    choosing(monkeypatch, (1.0, 0.0))
    report = run(folder, "choosing", seeds=2)
    assert "mean SHD of each of 2 seeds 0.00 to 3.00; cases whose seeds differ: case_1 0 to 3" in str(report)
    assert report.summary.loc["choosing", "shd_default"] == 1.5


def test_stability_is_held_against_the_truth(folder, monkeypatch, tmp_path):
    choosing(monkeypatch, (0.95, 0.2))
    report = run(folder, "choosing", json_path=tmp_path / "bench.json")
    edges = len(load_case(folder / "case_1").candidates)
    assert report.calibration("choosing").values.tolist() == [[0.1, edges - 3, 0, 0.0], [0.9, 3, 3, 1.0]]
    assert "of 3 edges with stability >= 0.9, 100.0% are true" in str(report)
    assert json.loads((tmp_path / "bench.json").read_text())["calibration"]["choosing"][1]["share true"] == 1.0
    assert "stability" not in str(run(folder, "random"))


def test_the_papers_figures_stand_beside_its_own_truth_only(folder):
    assert "3.16" in str(run(folder, "eap", truth="gt")) and "3.16" not in str(run(folder, "eap"))
    *_, note, heads, empty, ours, _eap, _ig, linear, nonlinear = str(run(folder, "eap", truth="gt")).splitlines()
    assert "not the published weights" in note and heads.split()[0] == "method"
    assert empty.split() == ["(empty", "graph)", "3.00", "-", "-"] and ours.split()[:2] == ["eap", "-"]
    assert linear.split()[-2:] == ["3.16", "16.30"] and nonlinear.split()[-2:] == ["2.84", "60.00"]


def test_json_has_everything_and_no_nan(folder, tmp_path):
    path = tmp_path / "out" / "bench.json"
    run(folder, "eap", "correlation", json_path=path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {row["method"] for row in data["cases"]} == {"eap", "correlation"}
    assert data["settings"]["truth"] == "effective" and data["failures"] == []
    assert next(row for row in data["summary"] if row["method"] == "eap")["shd_default"] is None


def test_ports_of_the_truth_are_read_from_suffixes(folder):
    case = load_case(folder / "case_1")
    assert case.port_truth == {("input", "a0.h0", "v"), ("a0.h0", "m0", ""), ("m0", "logits", "")}
    report = run(folder, "exact")
    assert (report.cases.port_auroc > 0.5).all() and math.isnan(run(folder, "correlation").rows[0].port_auroc)


def test_curves_count_like_a_threshold_on_the_graph(folder):
    case = load_case(folder / "case_1")
    made = bench.METHODS["eap"].run(case, None, 0)
    found = Curve.of(made, case)
    scores = {edge: score for edge, score in made.pair_scores().items() if edge in case.candidates}
    for threshold in (0.0001, 0.1, 0.5, 1.0, 2.0):
        kept = {edge for edge, score in scores.items() if score >= threshold * max(scores.values())}
        assert found.at(threshold) == len(kept ^ case.truth)
        assert found.at(threshold, "node_shd") == len({n for e in kept for n in e} ^ case.true_nodes)


def test_tied_scores_enter_together():
    thresholds, shd = np.array([math.inf, 1.0, 0.5]), np.array([3, 1, 2])
    tied = Curve(thresholds, shd, shd)
    assert [tied.at(t) for t in (2.0, 1.0, 0.7, 0.5, 0.1)] == [3, 1, 1, 2, 2]


def test_best_threshold_serves_all_cases_at_once():
    first = Curve(np.array([math.inf, 1.0, 0.4]), np.array([2, 1, 0]), np.zeros(3, int))
    second = Curve(np.array([math.inf, 1.0, 0.2]), np.array([1, 0, 5]), np.zeros(3, int))
    threshold = best_threshold([first, second])
    assert 0.2 < threshold <= 0.4 and first.at(threshold) + second.at(threshold) == 0


# ---- what can be wrong with a case ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("edges.json", None, "edges.json missing"),
        ("model.safetensors", b"not tensors", "isn't a whole safetensors file"),
        ("edges.json", b"{", "not valid JSON"),
        ("edges.json", b'{"candidate_edges": [["input", "m0"]], "effective_edges": []}', "no true edges"),
        ("edges.json", b'{"candidate_edges": [["input", "m0"]]}', "no `effective_edges`"),
        (
            "edges.json",
            b'{"candidate_edges": [["input", "m0"]], "effective_edges": [["m0", "logits"]]}',
            "m0->logits isn't among its candidate edges",
        ),
        (
            "edges.json",
            b'{"candidate_edges": [["input", "x9"]], "effective_edges": [["input", "x9"]], "circuit_nodes": ["x9"]}',
            "'x9'",
        ),
        (
            "edges.json",
            b'{"candidate_edges": [["input", "m0"]], "effective_edges": [["input", "m0"]]}',
            "circuit_nodes",
        ),
        ("meta.json", b"{}", "output_type"),
        ("config.json", b'{"n_layers": 1}', "can't be built"),
    ],
)
def test_a_broken_case_is_named_and_the_others_stay(folder, file, content, message):
    path = folder / "case_1" / file
    path.unlink() if content is None else path.write_bytes(content)
    report = run(folder, "random")
    assert [row.case for row in report.rows] == ["case_2"]
    assert [failure.case for failure in report.failures] == ["case_1"]
    assert message in report.failures[0].reason and "case_1" in str(report)


def test_weights_of_another_model_are_refused(folder):
    save_file({"W": torch.zeros(2)}, folder / "case_1" / "model.safetensors")
    with pytest.raises(ModelError, match="case case_1: the weights lack"):
        load_case(folder / "case_1")


def test_a_failing_method_does_not_lose_the_others(folder, monkeypatch):
    def fails(case, prompts, seed):
        raise RuntimeError("no luck")

    monkeypatch.setitem(bench.METHODS, "fails", bench.methods.Method("fails", fails))
    report = run(folder, "fails", "random")
    assert [(f.case, f.method) for f in report.failures] == [("case_1", "fails"), ("case_2", "fails")]
    assert "RuntimeError: no luck" in report.failures[0].reason and len(report.rows) == 2


def test_a_report_of_nothing_but_failures_prints(folder, tmp_path):
    for case in ("case_1", "case_2"):
        (folder / case / "meta.json").unlink()
    report = run(folder, "random", json_path=tmp_path / "empty.json")
    assert "no results" in str(report) and json.loads((tmp_path / "empty.json").read_text())["cases"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["eap", "nonsense"]}, "`methods` ['nonsense']"),
        ({"methods": []}, "`methods`"),
        ({"truth": "certain"}, "`truth`"),
        ({"prompts": 0}, "`prompts`"),
        ({"seeds": 0}, "`seeds`"),
        ({"budget": 3}, "`budget` is of circuit-lasso+confirm"),
        ({"budget": 0, "methods": ["circuit-lasso+confirm"]}, "`budget` is 0"),
        ({"folder": "no-such-folder"}, "`folder`"),
    ],
)
def test_bad_arguments_are_named(folder, options, message):
    arguments = {"folder": folder, "methods": ["random"], "progress": False} | options
    with pytest.raises(InputError) as caught:
        bench.interpbench(**arguments)
    assert message in str(caught.value)


def test_a_folder_without_cases_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no cases"):
        run(tmp_path, "random")


def test_figures_asked_for_wrongly_are_named(folder):
    report = run(folder, "random")
    with pytest.raises(InputError, match="no results"):
        report.of("eap")
    with pytest.raises(InputError, match="`figure`"):
        report.interval("random", "beauty")


# ---- the published repository -----------------------------------------------------------------------------------

HOOKS = [
    ("hook_embed", "blocks.0.hook_v_input[0]"),
    ("hook_pos_embed", "blocks.0.hook_q_input[0]"),
    ("blocks.0.hook_v_input[0]", "blocks.0.attn.hook_v[0]"),
    ("blocks.0.attn.hook_v[0]", "blocks.0.attn.hook_result[0]"),
    ("blocks.0.attn.hook_result[0]", "blocks.0.hook_mlp_in"),
    ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"),
    ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"),
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder laid out as the repository on the hub, with two cases of the same model."""
    cases = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        torch.save(planted().state_dict(), tmp_path / name / "ll_model_510.pth")
        (tmp_path / name / "edges.pkl").write_bytes(pickle.dumps(HOOKS))
        words = ["J", "LB", "V", "a", "b", "c", "no"]
        cases.append({"case_id": name, "vocab": words, "max_seq_len": 5, "transformer_cfg": CONFIG})
    (tmp_path / METADATA).write_text(json.dumps({"name": "InterpBench", "cases": cases}))
    return tmp_path


def test_the_published_layout_runs(published):
    report = run(published, "exact", prompts=20)
    assert not report.failures and [row.case for row in report.rows] == ["1", "2"]
    assert report.rows[0].structure.empty_shd == len(TRUTH)
    assert "The models here are the published weights" in str(report)


def test_published_prompts_begin_with_bos_and_hold_words_only(published):
    entry = bench.case_entries(published)[0]
    case = bench.load_published(published, entry)
    # Sorted: BOS, J, LB, PAD, V, a, b, c, no
    assert bool((case.clean[:, 0] == 0).all()) and not {0, 3} & set(case.clean[:, 1:].unique().tolist())
    assert case.clean.shape == (1000, 5) and not torch.equal(case.clean, case.corrupted)


class Dangerous:
    """Would write a file if its pickle were run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["edges.pkl", "ll_model_510.pth"])
def test_pickles_that_would_run_code_are_refused_and_not_run(published, tmp_path, file):
    trap = tmp_path / "trap"
    if file.endswith("pkl"):
        (published / "1" / file).write_bytes(pickle.dumps(Dangerous(trap)))
    else:
        torch.save({"W": Dangerous(trap)}, published / "1" / file)
    report = run(published, "random")
    assert not trap.exists()
    assert [f.case for f in report.failures] == ["1"] and [row.case for row in report.rows] == ["2"]


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({"a"}), pickle.dumps([("a", 1)])])
def test_pickles_of_something_else_are_refused(tmp_path, data):
    (tmp_path / "edges.pkl").write_bytes(data)
    with pytest.raises(FormatError, match="not a plain list of edges"):
        read_pairs(tmp_path / "edges.pkl")


def test_unknown_hooks_in_a_published_circuit_are_an_error():
    with pytest.raises(FormatError, match="hook_somewhere"):
        head_edges([("hook_embed", "blocks.0.hook_somewhere")])


def test_a_repository_out_of_reach_is_an_input_error():
    with pytest.raises(InputError, match="neither a folder nor a hub repository in reach"):
        run(Path("nobody/no-such-repository"), "random")


def test_metadata_without_cases_is_an_error(tmp_path):
    (tmp_path / METADATA).write_text('{"cases": 3}')
    with pytest.raises(FormatError, match="no list of cases"):
        run(tmp_path, "random")


# ---- costs, and the real cases ----------------------------------------------------------------------------------


def test_measured_gives_the_result_and_its_cost():
    total, cost = measured(lambda: float(torch.ones(1 << 16).sum()))
    assert total == 1 << 16 and cost.seconds > 0 and cost.cpu_seconds > 0


def test_measured_sees_memory_that_an_earlier_call_has_freed():
    held: list[torch.Tensor] = []

    def call() -> None:
        pieces = [torch.ones(25_000) for _ in range(640)]  # 61 MiB in blocks that the allocator holds on to
        held.append(torch.ones(10_000) + len(pieces))  # above them on the heap

    peaks = [measured(call)[1].peak_mib for _ in range(3)]
    assert all(peak is None or 55 < peak < 90 for peak in peaks), peaks


def test_eap_ig_finds_certified_circuits_and_chance_does_not():
    report = bench.interpbench(CASES, ["eap-ig", "random"], prompts=60, progress=False)
    assert not report.failures and len(report.rows) == 22
    assert report.summary.loc["eap-ig", "certified"] == 9  # those of the first page
    assert round(report.summary.loc["(empty graph)", "shd_default"], 2) == 3.22
    assert report.summary.loc["eap-ig", "auroc"] > 0.99
    assert report.summary.loc["eap-ig", "shd_global"] < 1 < report.summary.loc["random", "shd_global"]
