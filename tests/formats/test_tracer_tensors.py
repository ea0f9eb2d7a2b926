"""circuit-tracer's .pt: its own objects there and back without loss, against a stand-in and against the package."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.formats.helpers import ERROR, GOLDEN, feature_graph, graph_with_an_error, small_graph
from tl_circuitlasso import formats
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.formats import _tracer_tensors
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index

FIELDS = (
    "input_string", "input_tokens", "logit_targets", "active_features", "adjacency_matrix", "selected_features",
    "activation_values", "logit_probabilities", "vocab_size", "scan",
)  # fmt: skip


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


@dataclass
class UnifiedConfig:
    n_layers: int
    d_model: int
    d_head: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    tokenizer_name: str
    model_name: str
    original_architecture: str
    n_key_value_heads: int | None = None
    dtype: Any | None = None


class Graph:
    """Keeps its fields and writes them, as the package's does."""

    def __init__(self, cfg: UnifiedConfig, vocab_size: int | None = None, scan: Any = None, **fields: Any) -> None:
        assert isinstance(cfg, UnifiedConfig)
        self.__dict__ |= fields | {"cfg": cfg, "vocab_size": vocab_size, "scan": scan}

    def to_pt(self, path: str) -> None:
        torch.save({name: getattr(self, name) for name in (*FIELDS, "cfg")}, path)


PLACES = {
    "circuit_tracer.graph": (Graph,),
    "circuit_tracer.utils.tl_nnsight_mapping": (UnifiedConfig,),
    "circuit_tracer.attribution.targets": (LogitTarget,),
}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, classes in PLACES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            if (whole := ".".join(parts[:end])) not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
        for one in classes:
            monkeypatch.setattr(one, "__module__", name)
            setattr(sys.modules[name], one.__name__, one)


@pytest.fixture(params=["stand-in", "package"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules that hold Graph, UnifiedConfig and LogitTarget."""
    if request.param == "package":
        pytest.importorskip("circuit_tracer.graph")
    else:
        stand_in(monkeypatch)
    yield [importlib.import_module(name) for name in PLACES]


def real_graph(package: Any) -> Any:
    """Two layers, two tokens: three features, errors, a token's logit and a custom target, as the package would."""
    graph, mapping, targets = package
    n_features, n_layers, n_pos, n_logits = 3, 2, 2, 2
    size = n_features + n_layers * n_pos + n_pos + n_logits
    error, token, logit = n_features, n_features + n_layers * n_pos, n_features + (n_layers + 1) * n_pos
    matrix = torch.zeros(size, size)
    edges = [(0, token, 1.5), (1, token + 1, -0.5), (2, 0, 0.25), (2, error + 1, 0.75), (2, 1, 0.1)]
    for target, source, weight in [*edges, (logit, 2, 2.0), (logit + 1, 2, -1.0), (logit, error + 3, 0.3)]:
        matrix[target, source] = weight
    cfg = mapping.UnifiedConfig(2, 8, 4, 2, 32, 50257, "gpt2", "gpt2-small", "GPT2LMHeadModel", dtype=torch.bfloat16)
    return graph.Graph(
        input_string="The cat",
        input_tokens=torch.tensor([464, 3797]),
        active_features=torch.tensor([[0, 0, 7], [0, 1, 5], [1, 1, 3]]),
        adjacency_matrix=matrix,
        cfg=cfg,
        selected_features=torch.arange(3),
        activation_values=torch.tensor([0.5, 1.25, 3.0]),
        logit_targets=[targets.LogitTarget(" sat", 3332), targets.LogitTarget("logit(sat)-logit(ran)", 50258)],
        logit_probabilities=torch.tensor([0.872, 0.062]),
        scan="gpt2-small",
        vocab_size=50257,
    )


GOLDEN_EDGES = {
    ("hook_embed.pos0#464", "blocks.0.hook_features.pos0#7"): 1.5,
    ("hook_embed.pos1#3797", "blocks.0.hook_features.pos1#5"): -0.5,
    ("blocks.0.hook_features.pos0#7", "blocks.1.hook_features.pos1#3"): 0.25,
    ("blocks.0.hook_features.pos1#5", "blocks.1.hook_features.pos1#3"): 0.1,
    ("blocks.0.hook_error.pos1", "blocks.1.hook_features.pos1#3"): 0.75,
    ("blocks.1.hook_features.pos1#3", "hook_unembed.pos1#3332"): 2.0,
    ("blocks.1.hook_error.pos1", "hook_unembed.pos1#3332"): 0.3,
    ("blocks.1.hook_features.pos1#3", "hook_unembed.pos1#50258"): -1.0,
}


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_files_that_the_package_wrote_are_read_without_it(suffix: str) -> None:
    """`real_graph` as `Graph.to_pt` of circuit-tracer 0.5.0 wrote it, and as its `create_graph_files` did."""
    graph = formats.from_circuit_tracer(GOLDEN / f"circuit_tracer_package{suffix}")
    names, scores = graph.index.names, graph.score.tolist()
    ends = zip(graph.source.tolist(), graph.target.tolist())
    assert {(names[a], names[b]): score for (a, b), score in zip(ends, scores)} == pytest.approx(GOLDEN_EDGES)
    assert len(graph.kept_edges()) == len(GOLDEN_EDGES)
    pages = {name: graph.node_info[name]["page"] for name in names}
    assert [pages[f"hook_unembed.pos1#{token}"]["token_prob"] for token in (3332, 50258)] == pytest.approx(
        [0.872, 0.062]
    )
    assert pages["blocks.1.hook_features.pos1#3"]["activation"] == 3.0
    assert "logit(sat)-logit(ran)" in pages["hook_unembed.pos1#50258"]["clerp"]  # a custom target keeps its label


def test_a_file_of_the_package_comes_back_as_it_was(package: Any, tmp_path: Path) -> None:
    theirs = real_graph(package)
    theirs.to_pt(str(tmp_path / "theirs.pt"))
    ours = formats.from_circuit_tracer(tmp_path / "theirs.pt")
    ours.save(tmp_path / "ours.json")
    formats.to_circuit_tracer(AttributionGraph.load(tmp_path / "ours.json"), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    for name in FIELDS:
        wanted, found = getattr(theirs, name), again[name]
        assert torch.equal(wanted, found) if isinstance(wanted, torch.Tensor) else wanted == found, name
    assert again["cfg"] == theirs.cfg


@pytest.mark.parametrize("make", [small_graph, feature_graph, graph_with_an_error])
def test_our_circuit_comes_back_with_its_names(package: Any, make: Any, tmp_path: Path) -> None:
    graph = make()
    formats.to_circuit_tracer(graph, tmp_path / "graph.pt")
    formats.to_circuit_tracer_graph(graph).to_pt(str(tmp_path / "live.pt"))
    for name in ("graph.pt", "live.pt"):
        again = formats.from_circuit_tracer(tmp_path / name)
        kept = {pair: score for pair, score in graph.pair_scores().items() if pair in graph.kept_edges()}
        assert again.pair_scores() == kept
        assert again.provenance == graph.provenance and again.node_info == graph.node_info


def test_matrix_has_a_row_per_target_and_no_edge_within_a_layer(package: Any) -> None:
    live = formats.to_circuit_tracer_graph(feature_graph())
    place = [row.tolist()[::2] for row in live.active_features]
    early, mlp, late = (place.index([layer, 17]) for layer in (0, 1, 2))
    size = len(live.adjacency_matrix)
    assert float(live.adjacency_matrix[mlp, early]) == -2.0 and float(live.adjacency_matrix[late, mlp]) == 1.0
    assert float(live.adjacency_matrix[early, size - len(live.input_tokens) - 1]) == 0.5
    assert live.cfg.n_layers == 3  # an MLP and the stream behind it are of one layer, but in an order


def test_component_graphs_can_be_read_without_their_names(package: Any, tmp_path: Path) -> None:
    """As after `create_graph_files`, which keeps layer, place and number only."""
    edges = {("input", "a0.h1"): 0.5, ("a0.h1", "m0"): 1.0, ("m0", "a1.h0"): 2.0, ("a1.h0", "logits"): 3.0}
    live = formats.to_circuit_tracer_graph(
        AttributionGraph.from_edges(component_index(n_layers=2, n_heads=2), edges), scan="gpt2-small"
    )
    del live.cfg.tl_circuitlasso
    live.to_pt(str(tmp_path / "graph.pt"))
    assert sorted(formats.from_circuit_tracer(tmp_path / "graph.pt").score.tolist()) == [0.5, 1.0, 2.0, 3.0]


def test_what_the_package_makes_of_a_component_graph_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its `create_graph_files`, whose pages keep layer, place and number: with a tokenizer that needs no download."""
    pytest.importorskip("circuit_tracer.graph")
    files = importlib.import_module("circuit_tracer.utils.create_graph_files")
    monkeypatch.setattr(
        files, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(decode=lambda t: f"{int(t)}"))
    )
    edges = {("input", "a0.h1"): 0.5, ("a0.h1", "m0"): 1.0, ("m0", "a1.h0"): 2.0, ("a1.h0", "logits"): 3.0}
    graph = AttributionGraph.from_edges(component_index(n_layers=2, n_heads=2), edges)
    live = formats.to_circuit_tracer_graph(graph, scan="gpt2-small")
    files.create_graph_files(live, "ours", str(tmp_path), node_threshold=1.0, edge_threshold=1.0)
    assert sorted(formats.from_circuit_tracer(tmp_path / "ours.json").score.tolist()) == [0.5, 1.0, 2.0, 3.0]


def test_errors_stand_among_the_errors(package: Any) -> None:
    live = formats.to_circuit_tracer_graph(graph_with_an_error())
    assert len(live.selected_features) == 1
    (logit,) = live.adjacency_matrix[-1].nonzero().T[:1]
    errors = range(1, 1 + live.cfg.n_layers * len(live.input_tokens))
    assert sum(int(place) in errors for place in logit) == 1
    assert ERROR in graph_with_an_error().index


def test_pruning_and_scores_of_the_package_are_what_they_were(tmp_path: Path) -> None:
    theirs = pytest.importorskip("circuit_tracer.graph")
    modules = [importlib.import_module(name) for name in PLACES]
    before = real_graph(modules)
    before.to_pt(str(tmp_path / "theirs.pt"))
    after = formats.to_circuit_tracer_graph(formats.from_circuit_tracer(tmp_path / "theirs.pt"))
    for old, new in zip(theirs.prune_graph(before), theirs.prune_graph(after)):
        assert torch.equal(old, new)
    assert theirs.compute_graph_scores(before) == theirs.compute_graph_scores(after)
    replacement, completeness = theirs.compute_graph_scores(formats.to_circuit_tracer_graph(graph_with_an_error()))
    assert replacement == pytest.approx(0.5) and completeness < 1  # half of the logit's input is what the SAE misses


def test_without_the_package_a_pt_is_refused_for_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "circuit_tracer.graph", None)
    with pytest.raises(InputError, match=r"safety-research/circuit-tracer, or write JSON"):
        formats.to_circuit_tracer(small_graph(), tmp_path / "graph.pt")
    with pytest.raises(InputError, match="safety-research/circuit-tracer"):
        formats.to_circuit_tracer_graph(small_graph())
    assert not (tmp_path / "graph.pt").exists()


def test_too_many_nodes_for_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(_tracer_tensors, "MAX_NODES", 5)
    with pytest.raises(InputError, match="top_k"):
        formats.to_circuit_tracer_graph(feature_graph())


def test_features_that_were_not_selected_are_said_to_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch)
    graph = real_graph([sys.modules[name] for name in PLACES])
    graph.active_features = torch.cat([graph.active_features, torch.tensor([[1, 0, 9]])])
    graph.activation_values = torch.tensor([0.5, 1.25, 3.0, 9.0])
    graph.to_pt(str(tmp_path / "graph.pt"))
    read = formats.from_circuit_tracer(tmp_path / "graph.pt")
    assert "1 active features that were not selected" in caplog.text
    graph.activation_values = graph.activation_values[:3]  # of the selected ones, as the package's docstring has it
    graph.to_pt(str(tmp_path / "other.pt"))
    other = formats.from_circuit_tracer(tmp_path / "other.pt")
    assert other.node_info == read.node_info and "activation_values" not in caplog.text
    data = {name: getattr(graph, name) for name in (*FIELDS, "cfg") if name != "activation_values"}
    formats.from_circuit_tracer(data)
    assert "no `activation_values`" in caplog.text
