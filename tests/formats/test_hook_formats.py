"""ACDC, AutoCircuit and circuits-benchmark: keys, shapes, names, round trips and refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

from tests.formats.helpers import GOLDEN, GRAPHS, REFERENCE, nonzero, random_graph, rows, small_graph
from tests.helpers import shared_folder
from tl_circuitlasso import formats
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


def ports_kept(graph: AttributionGraph) -> set[tuple[str, str, str]]:
    """Kept edges, those without a port at a head as q, k and v."""
    edges = {edge for edge, (_, kept) in rows(graph).items() if kept}
    whole = {edge for edge in edges if edge[1].startswith("a") and not edge[2]}
    return (edges - whole) | {(source, target, port) for source, target, _ in whole for port in "qkv"}


# ---- ACDC -----------------------------------------------------------------------------------------------------------


def test_acdc_golden_file() -> None:
    lines = sorted(f"{key} {present}" for key, present in formats.to_acdc(small_graph()).items())
    assert lines == (GOLDEN / "acdc.txt").read_text().splitlines()


@pytest.mark.parametrize("use_pos_embed", [False, True])
def test_acdc_has_every_edge_of_the_correspondence(use_pos_embed: bool) -> None:
    subgraph = formats.to_acdc(small_graph(), use_pos_embed=use_pos_embed)
    roots = 2 if use_pos_embed else 1
    to_heads, to_mlp, to_end, within = roots * 6, roots + 2, roots + 3, 2 * 6 + 1
    assert len(subgraph) == to_heads + to_mlp + to_end + within


def test_acdc_keys_name_the_child_first() -> None:
    subgraph = formats.to_acdc(small_graph())
    key = ("blocks.0.hook_mlp_in", (None,), "blocks.0.attn.hook_result", (None, None, 1))
    assert subgraph[key] is True
    assert subgraph["blocks.0.attn.hook_v", (None, None, 1), "blocks.0.hook_v_input", (None, None, 1)] is True
    assert subgraph["blocks.0.attn.hook_q", (None, None, 0), "blocks.0.hook_q_input", (None, None, 0)] is False


@given(GRAPHS)
def test_acdc_round_trip(arguments) -> None:
    graph = random_graph(*arguments)
    sequential = formats.from_acdc(formats.to_acdc(graph))
    assert ports_kept(sequential) == ports_kept(graph)
    assert set(sequential.index.names) == set(graph.index.names)


def test_acdc_file_and_effects(tmp_path) -> None:
    graph = small_graph()
    formats.to_acdc(graph, tmp_path / "subgraph.pth", use_pos_embed=True)
    effects = formats.to_acdc_effects(graph, use_pos_embed=True)
    again = formats.from_acdc(tmp_path / "subgraph.pth", effects=effects)
    assert {e: v for e, v in rows(again).items() if v[1]} == {e: v for e, v in rows(graph).items() if v[1]}


BAD_KEYS = {
    "not a key": ({"a": True}, "isn't a key"),
    "unknown hook": ({("blocks.0.hook_z", (None,), "hook_embed", (None,)): True}, "hook_z"),
    "no head": ({("blocks.0.hook_q_input", (None,), "hook_embed", (None,)): True}, "number of a head"),
    "against the order": (
        {("blocks.0.hook_mlp_in", (None,), "blocks.1.hook_mlp_out", (None,)): True},
        "order of computation",
    ),
    "not a bool": ({("blocks.0.hook_mlp_in", (None,), "hook_embed", (None,)): 2}, "present"),
    "odd index": ({("blocks.0.hook_mlp_in", (1, 2), "hook_embed", (None,)): True}, "isn't a key"),
    "giant": ({("blocks.99999.hook_q_input", (None, None, 60000), "hook_embed", (None,)): True}, "wrong `cfg`"),
    "infinite head": ({("blocks.0.hook_q_input", (None, None, -1), "hook_embed", (None,)): True}, "number of a head"),
}


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_acdc_faults_are_named(fault: str) -> None:
    data, message = BAD_KEYS[fault]
    with pytest.raises(FormatError, match=message):
        formats.from_acdc(data)


def test_acdc_effects_must_be_finite() -> None:
    graph = small_graph()
    effects = dict.fromkeys(formats.to_acdc_effects(graph), float("nan"))
    with pytest.raises(FormatError, match="finite"):
        formats.from_acdc(formats.to_acdc(graph), effects=effects)


# ---- AutoCircuit ----------------------------------------------------------------------------------------------------


def test_auto_circuit_golden_file() -> None:
    scores = {name: tensor.tolist() for name, tensor in formats.to_auto_circuit(small_graph()).items()}
    assert scores == json.loads((GOLDEN / "auto_circuit.json").read_text())


def test_auto_circuit_shapes() -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=2, n_heads=4), {})
    shapes = {name: tuple(tensor.shape) for name, tensor in formats.to_auto_circuit(graph).items()}
    assert shapes["blocks.0.hook_q_input"] == (4, 1) and shapes["blocks.0.hook_mlp_in"] == (5,)
    assert shapes["blocks.1.hook_v_input"] == (4, 6) and shapes["blocks.1.hook_resid_post"] == (11,)


@given(GRAPHS)
def test_auto_circuit_round_trip(arguments) -> None:
    graph = random_graph(*arguments)
    again = formats.from_auto_circuit(formats.to_auto_circuit(graph))
    assert set(again.index.names) == set(graph.index.names)
    assert all(torch.equal(again.adjacency(port=p), by_port(graph, p)) for p in "qkv")
    merged = formats.from_auto_circuit(formats.to_auto_circuit(graph, separate_qkv=False))
    assert torch.equal(merged.adjacency(), graph.adjacency())
    assert formats.from_auto_circuit(formats.to_auto_circuit(graph, membership=True)).kept_edges() == graph.kept_edges()


def by_port(graph: AttributionGraph, port: str) -> torch.Tensor:
    """Scores of one port, edges without a port at a head among them."""
    is_head = torch.tensor([name.startswith("a") for name in graph.index.names])
    return graph.adjacency(port=port) + graph.adjacency(port="") * is_head


def test_auto_circuit_file(tmp_path) -> None:
    formats.to_auto_circuit(small_graph(), tmp_path / "scores.pkl")
    again = formats.from_auto_circuit(tmp_path / "scores.pkl")
    assert {e: v[0] for e, v in nonzero(again).items()} == {e: v[0] for e, v in nonzero(small_graph()).items()}


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


def test_auto_circuit_live_edges() -> None:
    kept = ["Resid Start->A0.1.V", "A0.1->MLP 0", "MLP 0->Resid End"]
    model = SimpleNamespace(edges=[_Named(name) for name in [*kept, "Resid Start->MLP 0"]], separate_qkv=True)
    assert {edge.name for edge in formats.to_auto_circuit_edges(small_graph(), model)} == set(kept)


def test_auto_circuit_live_edges_of_another_model() -> None:
    with pytest.raises(InputError, match=r"A0\.1->MLP 0"):
        formats.to_auto_circuit_edges(small_graph(), SimpleNamespace(edges=[_Named("MLP 0->Resid End")]))
    with pytest.raises(InputError, match="patchable_model"):
        formats.to_auto_circuit_edges(small_graph(), object())


def test_auto_circuit_live_scores_are_checked_against_the_model() -> None:
    model = SimpleNamespace(patch_masks=formats.to_auto_circuit(small_graph()))
    graph = formats.from_auto_circuit_edges(model, formats.to_auto_circuit(small_graph()))
    assert graph.pair_scores()["input", "a0.h1"] == 2.0
    other = formats.to_auto_circuit(AttributionGraph.from_edges(component_index(n_layers=2, n_heads=2), {}))
    with pytest.raises(FormatError, match="differ at"):
        formats.from_auto_circuit_edges(model, other)


@pytest.mark.parametrize("model", REFERENCE)
def test_auto_circuit_holds_every_score_of_a_real_graph(model: str) -> None:
    graph = formats.from_eap(next(shared_folder("reference", model).glob("graph_*.json")))
    assert torch.equal(formats.from_auto_circuit(formats.to_auto_circuit(graph)).score, graph.score)


def test_auto_circuit_caches_hold_scores_by_task_and_algorithm(tmp_path) -> None:
    cache = {"IOI": {"EAP": formats.to_auto_circuit(small_graph())}}
    torch.save(cache, tmp_path / "cache.pkl")
    assert formats.read(tmp_path / "cache.pkl").pair_scores()["input", "a0.h1"] == 2.0
    cache["IOI"]["Random"] = formats.to_auto_circuit(small_graph(), membership=True)
    with pytest.raises(FormatError, match="EAP, Random: name one with `algo`"):
        formats.from_auto_circuit(cache)
    assert formats.from_auto_circuit(cache, algo="Random").pair_scores()["input", "a0.h1"] == 1.0
    with pytest.raises(FormatError, match="`task`"):
        formats.from_auto_circuit(cache, task="Docstring")


BAD_SCORES = {
    "empty": (lambda d: d.clear(), "not one"),
    "unknown module": (lambda d: d.update({"blocks.0.hook_z": torch.zeros(1)}), "hook_z"),
    "a number for a name": (lambda d: d.update({3: torch.zeros(1)}), "3"),
    "another shape": (lambda d: d.update({"blocks.0.hook_mlp_in": torch.zeros(7)}), "shape"),
    "a token axis": (lambda d: d.update({"blocks.0.hook_q_input": torch.zeros(9, 2, 1)}), "token axis"),
    "a token axis at the end": (lambda d: d.update({"blocks.0.hook_resid_post": torch.zeros(9, 4)}), "token axis"),
    "NaN": (lambda d: d.update({"blocks.0.hook_mlp_in": torch.full((3,), float("nan"))}), "finite"),
    "a list": (lambda d: d.update({"blocks.0.hook_mlp_in": [0.0, 0.0, 0.0]}), "tensor"),
    "a scalar": (lambda d: d.update({"blocks.0.hook_mlp_in": torch.tensor(1.0)}), "shape"),
    "an end too early": (lambda d: d.update({"blocks.3.hook_mlp_in": torch.zeros(9)}), "last layer"),
    "no heads": (lambda d: [d.pop(f"blocks.0.hook_{port}_input") for port in "qkv"], "nothing gives the heads"),
}


@pytest.mark.parametrize("fault", BAD_SCORES)
def test_auto_circuit_faults_are_named(fault: str) -> None:
    spoil, message = BAD_SCORES[fault]
    data = formats.to_auto_circuit(small_graph())
    spoil(data)
    with pytest.raises(FormatError, match=message):
        formats.from_auto_circuit(data)


# ---- circuits-benchmark ---------------------------------------------------------------------------------------------


def test_circuits_benchmark_golden_file(tmp_path) -> None:
    formats.to_circuits_benchmark(small_graph(), tmp_path / "edges.json")
    golden = json.loads((GOLDEN / "circuits_benchmark.json").read_text())
    assert json.loads((tmp_path / "edges.json").read_text()) == golden


@given(GRAPHS)
def test_circuits_benchmark_round_trip(arguments) -> None:
    graph = random_graph(*arguments)
    again = formats.from_circuits_benchmark(formats.to_circuits_benchmark(graph), n_layers=3, n_heads=3)
    assert ports_kept(again) == ports_kept(graph)


def test_circuits_benchmark_skips_steps_within_a_component() -> None:
    edges = [
        ("hook_embed", "blocks.0.hook_q_input[1]"),
        ("blocks.0.hook_q_input[1]", "blocks.0.attn.hook_q[1]"),
        ("blocks.0.attn.hook_q[1]", "blocks.0.attn.hook_result[1]"),
        ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"),
        ("blocks.0.attn.hook_result[1]", "blocks.0.hook_resid_post"),
    ]
    assert formats.from_circuits_benchmark(edges).kept_edges() == {("input", "a0.h1"), ("a0.h1", "logits")}


def test_circuits_benchmark_ends_at_a_head_without_port() -> None:
    graph = formats.from_circuits_benchmark([("blocks.0.hook_resid_pre", "blocks.0.attn.hook_result[0]")])
    assert nonzero(graph) == {("input", "a0.h0", ""): (1.0, True)}


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ("no list", "no such file"),
        ([("a",)], "isn't a pair"),
        ([("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_in[x]")], "isn't a hook point"),
        ([("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_in")], "order of computation"),
        ([("blocks.0.attn.hook_result", "blocks.0.hook_mlp_in")], "number of a head"),
        ([(3, 4)], "isn't a hook point"),
        ({}, "list of pairs"),
        (3, "list of pairs"),
    ],
)
def test_circuits_benchmark_faults_are_named(edges, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        formats.from_circuits_benchmark(edges)


def test_circuits_benchmark_refuses_edges_beyond_the_shape_given() -> None:
    with pytest.raises(FormatError, match="beyond the shape"):
        formats.from_circuits_benchmark([("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_in")], n_layers=2)
