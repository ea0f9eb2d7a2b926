"""MIB submissions: the layout, nine nested circuits within their limits, and what the checker finds."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from tests.formats.helpers import feature_graph, nonzero, small_graph
from tl_circuitlasso import formats
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats._grid import Grid, graph_of
from tl_circuitlasso.formats.mib import COLUMNS, MODELS, PERCENTAGES
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.components import Components
from tl_circuitlasso.graph.nodes import component_index


def random_graph(parts: Components) -> AttributionGraph:
    score = torch.randn(parts.n_sources, parts.n_readers, generator=torch.Generator().manual_seed(0)).double()
    return graph_of(Grid(parts, score, score.abs() > 3))


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    """Two tasks on two models: scores for one, nine circuits for the other."""
    root = tmp_path_factory.mktemp("submission")
    formats.to_mib(random_graph(Components(12, 12)), root, task="ioi", model="gpt2", circuits=True, suffix=".pt")
    formats.to_mib(random_graph(Components(26, 8)), root, task="arc_easy", model="gemma2", suffix=".pt")
    return root / "CircuitLasso_patching_edge"


def test_known_models_have_the_edge_counts_that_mib_reports() -> None:
    counts = {name: parts.n_edges for name, parts in MODELS.items()}
    expected = {"gpt2": 32_491, "qwen2.5": 179_749, "gemma2": 74_218, "llama3": 1_592_881, "interpbench": 1_108}
    assert counts == expected
    assert {name.rpartition("_")[2] for name in COLUMNS} == set(MODELS) - {"interpbench"} and len(COLUMNS) == 12


def test_folders_are_named_and_nested_as_the_evaluator_takes_them(submission, tmp_path) -> None:
    """A method in front, underscores in the task, and folders that say by which rule to rank."""
    for absolute in ("abs_True", "abs-False"):
        shutil.copytree(submission / "ioi_gpt2", tmp_path / absolute / "Ours_patching_edge_ioi_gpt2")
        shutil.copytree(submission / "arc-easy_gemma2", tmp_path / absolute / "arc_easy_gemma2")
    assert formats.check_mib(tmp_path) == []
    (tmp_path / "abs_True" / "arc_easy_gemma2").rename(tmp_path / "abs_True" / "arc_easy_gpt2")
    assert any("no task and model" in fault for fault in formats.check_mib(tmp_path))


def test_circuits_without_scores_and_scores_of_nodes_are_taken(submission, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(submission, root)
    for file in (root / "ioi_gpt2").iterdir():
        data = torch.load(file, weights_only=True)
        torch.save({name: value for name, value in data.items() if name != "edges_scores"}, file)
    importances = root / "arc-easy_gemma2" / "importances.pt"
    data = torch.load(importances, weights_only=True)
    nodes = {"nodes_scores": torch.randn(len(data["src_nodes"]))}
    torch.save(data | nodes | {"edges_scores": torch.zeros_like(data["edges_scores"])}, importances)
    assert formats.check_mib(root) == []
    del data["edges_scores"]
    torch.save(data | nodes, importances)  # the evaluator reads a single file as EAP-IG does
    assert ["edges without scores" in fault for fault in formats.check_mib(root)] == [True]


def test_a_single_json_needs_a_score_for_every_edge(submission, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(submission, root)
    file = root / "arc-easy_gemma2" / "importances.pt"
    rows = formats.to_eap(formats.from_eap(file))
    file.unlink()
    file.with_suffix(".json").write_text(json.dumps(rows))
    assert formats.check_mib(root) == []
    for row in rows["edges"].values():
        del row["score"]
    file.with_suffix(".json").write_text(json.dumps(rows))
    assert any("edges without scores" in fault for fault in formats.check_mib(root))


def test_scores_of_neurons_are_taken_and_nan_or_nodes_without_membership_are_not(submission, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(submission, root)
    file = root / "arc-easy_gemma2" / "importances.pt"
    data = torch.load(file, weights_only=True)
    zero = data | {"edges_scores": torch.zeros_like(data["edges_scores"])}
    torch.save(zero | {"neurons_scores": torch.randn(len(data["src_nodes"]), 8)}, file)
    assert formats.check_mib(root) == []
    data["edges_scores"][0, 0] = torch.nan
    torch.save(data, file)
    assert ["1 scores of edges are NaN" in fault for fault in formats.check_mib(root)] == [True]
    file.unlink()
    rows = formats.to_eap(random_graph(Components(26, 8)))
    del rows["nodes"]["m3"]["in_graph"]
    file.with_suffix(".json").write_text(json.dumps(rows))
    assert ["`nodes` without `in_graph`" in fault for fault in formats.check_mib(root)] == [True]


def test_other_files_are_not_fetched_and_both_kinds_may_be_mixed(submission, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(submission, root)
    (root / "ioi_gpt2" / "README.md").write_text("x")
    file = root / "ioi_gpt2" / "circuit_5.pt"
    formats.to_eap(formats.from_eap(file), file.with_suffix(".json"))
    file.unlink()
    assert formats.check_mib(root) == []


def test_a_good_submission_has_no_faults(submission) -> None:
    assert formats.check_mib(submission) == []


def test_layout_of_scores(tmp_path) -> None:
    files = formats.to_mib(small_graph(), tmp_path, task="arc_easy", model="tiny", method="Ours", ablation="mean")
    assert list(files) == ["Ours_mean_edge/arc-easy_tiny/importances.json"]
    again = formats.from_mib(tmp_path / "Ours_mean_edge")
    assert nonzero(again["arc-easy_tiny/importances.json"]) == nonzero(small_graph())


def test_a_graph_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 layers of 2 heads.*gpt2 has 12 layers of 12 heads"):
        formats.to_mib(small_graph())
    with pytest.raises(InputError, match="in sequence"):
        formats.to_mib(random_graph(Components(12, 12, parallel=True)))


def test_nine_circuits_are_nested_and_within_their_limits() -> None:
    parts = Components(12, 12)
    files = formats.to_mib(random_graph(parts), circuits=True)
    circuits = [formats.from_eap(formats.to_eap(graph)) for graph in files.values()]
    sizes = [int(circuit.kept.sum()) for circuit in circuits]
    assert sizes == [int(percent * parts.n_edges / 100) for percent in PERCENTAGES]
    assert all(bool((b.kept | ~a.kept).all()) for a, b in pairwise(circuits))
    assert all(torch.equal(circuit.score, circuit.kept.double()) for circuit in circuits)


def test_the_largest_scores_are_chosen_whatever_their_sign() -> None:
    graph = random_graph(Components(2, 2))
    last = list(formats.to_mib(graph, circuits=True, model="tiny").values())[-1]
    assert float(graph.score[last.kept].abs().min()) >= float(graph.score[~last.kept].abs().max())


def test_circuits_are_never_filled_up_with_edges_of_score_zero() -> None:
    last = list(formats.to_mib(small_graph(), circuits=True, model="tiny").values())[-1]
    assert int(last.kept.sum()) == 6


def spoil(submission, tmp_path, change) -> list[str]:
    root = tmp_path / "copy"
    shutil.copytree(submission, root)
    change(root)
    return formats.check_mib(root)


def make_all_large(folder) -> None:
    largest = (folder / "circuit_50.pt").read_bytes()
    for file in folder.iterdir():
        file.write_bytes(largest)


empty = AttributionGraph.from_edges(component_index(n_layers=26, n_heads=8), {})
FAULTS = {
    "unknown task": (lambda r: (r / "ioi_gpt2").rename(r / "ioi-gpt2"), "no task and model of MIB"),
    "not on the board": (lambda r: (r / "ioi_gpt2").rename(r / "ioi_interpbench"), "no task and model of MIB"),
    "one task": (lambda r: shutil.rmtree(r / "ioi_gpt2"), "at least two"),
    "missing circuit": (lambda r: (r / "ioi_gpt2" / "circuit_5.pt").unlink(), "8 circuit files"),
    "truncated": (
        lambda r: (r / "ioi_gpt2" / "circuit_5.pt").write_bytes((r / "ioi_gpt2" / "circuit_5.pt").read_bytes()[:999]),
        "can't load it",
    ),
    "another model": (
        lambda r: shutil.copy(r / "arc-easy_gemma2" / "importances.pt", r / "ioi_gpt2" / "circuit_50.pt"),
        "but this model has 12 layers of 12 heads",
    ),
    "too large": (lambda r: make_all_large(r / "ioi_gpt2"), "more than the"),
    "no scores": (lambda r: formats.to_eap(empty, r / "arc-easy_gemma2" / "importances.pt"), "every score is 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_checker_names_the_fault(fault: str, submission, tmp_path) -> None:
    change, message = FAULTS[fault]
    found = spoil(submission, tmp_path, change)
    assert any(message in line for line in found), found


def test_folders_that_are_not_there(tmp_path) -> None:
    assert "no such folder" in formats.check_mib(tmp_path / "none")[0]
    assert "no folders" in formats.check_mib(tmp_path)[0]
    with pytest.raises(FormatError, match="no such folder"):
        formats.from_mib(tmp_path / "none")
    with pytest.raises(FormatError, match=r"no \.json"):
        formats.from_mib(tmp_path)


def test_names_that_would_leave_the_folder_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="`task`"):
        formats.to_mib(small_graph(), tmp_path, task="../ioi", model="tiny")
    with pytest.raises(InputError, match="`suffix`"):
        formats.to_mib(small_graph(), tmp_path, suffix=".txt", model="tiny")


def test_features_have_no_place_here() -> None:
    with pytest.raises(InputError, match="isn't a component"):
        formats.to_mib(feature_graph(), circuits=True, model="tiny")


def test_files_load_as_eap_data(tmp_path) -> None:
    formats.to_mib(small_graph(), tmp_path, model="tiny")
    data = json.loads((tmp_path / "CircuitLasso_patching_edge" / "ioi_tiny" / "importances.json").read_text())
    assert data["edges"]["m0->logits"] == {"score": 1.0, "in_graph": True}
