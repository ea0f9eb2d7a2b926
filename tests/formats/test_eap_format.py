"""EAP-IG's files: the real package's own output byte for byte, round trips, ports, and every refusal."""

import filecmp
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

from tests.formats.helpers import GOLDEN, GRAPHS, REFERENCE, feature_graph, nonzero, random_graph, rows, small_graph
from tests.helpers import shared_folder
from tl_circuitlasso import formats
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index


def reference_file(model: str):
    return next(shared_folder("reference", model).glob("graph_*.json"))


@pytest.mark.parametrize("model", REFERENCE)
def test_files_of_the_real_package_come_back_byte_for_byte(model: str, tmp_path) -> None:
    theirs = reference_file(model)
    graph = formats.from_eap(theirs)
    formats.to_eap(graph, tmp_path / "ours.json")
    assert filecmp.cmp(theirs, tmp_path / "ours.json", shallow=False)
    formats.to_eap(graph, tmp_path / "ours.pt")
    formats.to_eap(formats.from_eap(tmp_path / "ours.pt"), tmp_path / "again.json")
    assert filecmp.cmp(theirs, tmp_path / "again.json", shallow=False)


@pytest.mark.parametrize("model", REFERENCE)
def test_layout_agrees_with_the_names_the_real_package_uses(model: str) -> None:
    names = json.loads((shared_folder("reference", model) / "names.json").read_text())
    data = formats.to_eap(formats.from_eap(reference_file(model)))
    assert list(data["edges"]) == names["edges_in_package_order"]
    assert [name for name in data["nodes"] if name != "logits"] == names["src_nodes"]


def test_matrix_index_agrees_with_the_real_package(tmp_path) -> None:
    names = json.loads((shared_folder("reference", "A_gpt2") / "names.json").read_text())
    graph = formats.from_eap(reference_file("A_gpt2"))
    data = formats.to_eap(graph, tmp_path / "graph.pt")
    assert data["dst_nodes"] == names["dst_nodes"]
    for edge, (row, column) in names["edge_matrix_index"].items():
        source, target = edge.split("->")
        port = target[-2] if target.endswith(">") else ""
        score, kept = rows(graph)[source, target.split("<")[0], port]
        assert float(data["edges_scores"][row, column]) == score and bool(data["edges_in_graph"][row, column]) == kept


def test_golden_file() -> None:
    assert formats.to_eap(small_graph(), d_model=16) == json.loads((GOLDEN / "eap.json").read_text())


@given(GRAPHS)
def test_round_trip_is_exact(arguments) -> None:
    graph = random_graph(*arguments)
    again = formats.from_eap(json.loads(json.dumps(formats.to_eap(graph))))
    assert again.index == graph.index
    assert rows(again) == rows(graph)
    assert again.provenance["seed"] == 3


@given(GRAPHS)
def test_tensor_layout_and_rows_say_the_same(arguments) -> None:
    graph = random_graph(*arguments)
    from tl_circuitlasso.formats.eap import _tensors

    assert rows(formats.from_eap(_tensors(graph, None))) == rows(graph)


def test_pt_round_trip_keeps_scores_that_fp32_cannot_hold(tmp_path) -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1 / 3})
    data = formats.to_eap(graph, tmp_path / "graph.pt")
    assert data["edges_scores"].dtype == torch.float64
    assert nonzero(formats.from_eap(tmp_path / "graph.pt")) == nonzero(graph)
    assert formats.to_eap(small_graph(), tmp_path / "graph.pt")["edges_scores"].dtype == torch.float32


def test_a_portless_edge_is_written_as_q_k_and_v() -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "a0.h0"): 0.5})
    data = formats.to_eap(graph)
    assert all(data["edges"][f"input->a0.h0<{port}>"] == {"score": 0.5, "in_graph": True} for port in "qkv")
    assert ("input", "a0.h0", "") in rows(formats.from_eap(data))


def test_copies_that_no_longer_agree_stay_apart() -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "a0.h0"): 0.5})
    data = formats.to_eap(graph)
    data["edges"]["input->a0.h0<k>"]["in_graph"] = False
    again = rows(formats.from_eap(data))
    assert again["input", "a0.h0", "q"] == (0.5, True) and again["input", "a0.h0", "k"] == (0.5, False)


def test_a_port_of_its_own_has_precedence_over_the_copy() -> None:
    index = component_index(n_layers=1, n_heads=1)
    graph = AttributionGraph.from_edges(index, {("input", "a0.h0", ""): 0.5, ("input", "a0.h0", "k"): -0.1})
    edges = formats.to_eap(graph)["edges"]
    assert [edges[f"input->a0.h0<{port}>"]["score"] for port in "qkv"] == [0.5, -0.1, 0.5]


def test_neurons_are_projected_on_their_component() -> None:
    index = NodeIndex((Block(Site("input"), 0), Block(parse_site("m0"), 1, (3, 9)), Block(Site("logits"), 2)))
    graph = AttributionGraph.from_edges(
        index, {("input", "m0#3"): 0.5, ("input", "m0#9"): -0.75, ("m0#3", "logits"): 1}
    )
    edges = formats.to_eap(graph)["edges"]
    assert edges["input->m0"] == {"score": -0.75, "in_graph": True}


def test_a_target_takes_the_place_of_the_logits_and_comes_back() -> None:
    index = NodeIndex((Block(Site("input"), 0), Block(parse_site("m0"), 1), Block(Site("target"), 2)))
    graph = AttributionGraph.from_edges(index, {("m0", "target"): 1.0})
    data = formats.to_eap(graph)
    assert data["edges"]["m0->logits"]["score"] == 1.0
    assert formats.from_eap(data).kept_edges() == {("m0", "target")}


def test_features_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="to_neuronpedia"):
        formats.to_eap(feature_graph())


def test_logits_and_target_together_are_refused() -> None:
    index = NodeIndex((Block(Site("input"), 0), Block(Site("logits"), 1), Block(Site("target"), 2)))
    with pytest.raises(InputError, match="one sink"):
        formats.to_eap(AttributionGraph.from_edges(index, {("input", "logits"): 1.0}))


def test_an_edge_that_transformers_lack_is_refused() -> None:
    index = NodeIndex((Block(parse_site("m0"), 0), Block(parse_site("a0.h0"), 1)))
    with pytest.raises(InputError, match=r"m0->a0\.h0"):
        formats.to_eap(AttributionGraph.from_edges(index, {("m0", "a0.h0"): 1.0}))


def test_a_port_at_an_mlp_is_refused() -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0", "q"): 1.0})
    with pytest.raises(InputError, match="isn't a head"):
        formats.to_eap(graph)


def test_node_scores_and_flags_come_back() -> None:
    data = formats.to_eap(small_graph())
    data["nodes"]["m0"]["score"] = 0.5
    data["nodes"]["a0.h0"]["in_graph"] = True  # no kept edge touches it
    again = formats.to_eap(formats.from_eap(data))
    assert again["nodes"] == data["nodes"]


def test_width_comes_from_the_argument_or_the_provenance() -> None:
    index = component_index(n_layers=1, n_heads=1)
    graph = AttributionGraph.from_edges(index, {("input", "m0"): 1.0}, provenance={"model": {"d_model": 64}})
    assert formats.to_eap(graph)["cfg"]["d_model"] == 64
    assert formats.to_eap(graph, d_model=32)["cfg"]["d_model"] == 32
    assert formats.from_eap(formats.to_eap(graph)).provenance["model"] == {"d_model": 64}


def test_provenance_that_json_cannot_hold_is_refused() -> None:
    graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {}, provenance={"a": object()})
    with pytest.raises(InputError, match=r"`graph\.provenance\..*`"):
        formats.to_eap(graph)


def test_edges_left_out_have_score_zero() -> None:
    data = formats.to_eap(small_graph())
    del data["edges"]["input->m0"]
    assert rows(formats.from_eap(data))["input", "m0", ""] == (0.0, False)


def test_neuron_masks_are_dropped_with_a_warning(caplog) -> None:
    data = formats.to_eap(small_graph())
    data["nodes"]["m0"]["neurons"] = [True, False]
    with caplog.at_level(logging.WARNING):
        formats.from_eap(data)
    assert "neuron masks are dropped" in caplog.text


BAD_ROWS = {
    "missing key": (lambda d: d.pop("nodes"), "`nodes`"),
    "missing cfg key": (lambda d: d["cfg"].pop("n_heads"), "`n_heads`"),
    "layers as text": (lambda d: d["cfg"].update(n_layers="1"), r"cfg\.n_layers"),
    "giant model": (lambda d: d["cfg"].update(n_layers=50_000, n_heads=60_000), "wrong `cfg`"),
    "parallel as text": (lambda d: d["cfg"].update(parallel_attn_mlp="no"), "parallel_attn_mlp"),
    "unknown edge": (lambda d: d["edges"].update({"input->a7.h0<q>": {"score": 0, "in_graph": True}}), "a7.h0"),
    "against the order": (lambda d: d["edges"].update({"m0->a0.h0<q>": {"score": 1, "in_graph": True}}), "m0->a0.h0"),
    "port missing": (lambda d: d["edges"].update({"input->a0.h0": {"score": 1, "in_graph": True}}), "input->a0.h0"),
    "unknown node": (lambda d: d["nodes"].update({"a9.h9": {"in_graph": True}}), "a9.h9"),
    "no score": (lambda d: d["edges"]["input->m0"].pop("score"), "no `score`"),
    "no membership": (lambda d: d["edges"]["input->m0"].pop("in_graph"), "no `in_graph`"),
    "score as text": (lambda d: d["edges"]["input->m0"].update(score="1"), "input->m0"),
    "NaN": (lambda d: d["edges"]["input->m0"].update(score=float("inf")), "finite"),
    "huge integer": (lambda d: d["edges"]["input->m0"].update(score=10**400), "too large|missing or wrong"),
    "membership as number": (lambda d: d["edges"]["input->m0"].update(in_graph=1), "true or false"),
    "edges as a list": (lambda d: d.update(edges=[]), "`edges`"),
    "edge as a number": (lambda d: d["edges"].update({"input->m0": 3}), "input->m0"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_faulty_rows_are_named(fault: str) -> None:
    spoil, message = BAD_ROWS[fault]
    data = json.loads(json.dumps(formats.to_eap(small_graph())))
    spoil(data)
    with pytest.raises(FormatError, match=message):
        formats.from_eap(data)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_scores_that_are_nan_count_as_nothing_with_a_warning(suffix: str, tmp_path, caplog) -> None:
    path = tmp_path / f"graph{suffix}"
    data = formats.to_eap(small_graph(), path)
    if suffix == ".json":
        data["edges"]["input->m0"]["score"] = float("nan")  # as its information flow routes leave it
        path.write_text(json.dumps(data))
        assert "NaN" in path.read_text()
    else:
        torch.save(data | {"edges_scores": data["edges_scores"].where(data["edges_scores"] != 2.0, torch.nan)}, path)
    graph = formats.read(path)
    assert "1 of" in caplog.text and "NaN" in caplog.text
    assert bool(graph.score.isfinite().all()) and graph.kept_edges() == small_graph().kept_edges()


def test_a_node_that_was_not_scored_and_a_whole_configuration_are_read(tmp_path, caplog) -> None:
    rows = formats.to_eap(small_graph())
    rows["nodes"]["input"]["score"], rows["nodes"]["m0"]["score"] = float("nan"), 0.5
    assert formats.from_eap(rows).node_info == {"m0": {"eap_score": 0.5}}
    data = formats.to_eap(small_graph(), tmp_path / "graph.pt")
    torch.save(data | {"cfg": data["cfg"] | {"dtype": torch.float32, "act_fn": "gelu"}}, tmp_path / "graph.pt")
    graph = formats.read(tmp_path / "graph.pt")
    assert nonzero(graph) == nonzero(small_graph()) and graph.provenance["eap"]["cfg"]["act_fn"] == "gelu"
    assert "`cfg.dtype` is dropped" in caplog.text
    text = json.dumps(formats.to_eap(small_graph()))
    (tmp_path / "mark.json").write_text(text, encoding="utf-8-sig")  # as Windows writes it
    assert nonzero(formats.read(tmp_path / "mark.json")) == nonzero(small_graph())


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_a_circuit_without_scores_is_one(suffix: str, tmp_path) -> None:
    path = tmp_path / f"graph{suffix}"
    data = formats.to_eap(small_graph(), path)
    if suffix == ".json":
        edges = {name: {"in_graph": edge["in_graph"]} for name, edge in data["edges"].items()}
        path.write_text(json.dumps(data | {"edges": edges}))
    else:
        torch.save({name: value for name, value in data.items() if name != "edges_scores"}, path)
    graph = formats.read(path)
    assert graph.kept_edges() == small_graph().kept_edges() and not bool(graph.score.any())


BAD_TENSORS = {
    "no membership": (lambda d: d.pop("edges_in_graph"), "edges_in_graph"),
    "other nodes": (lambda d: d.update(src_nodes=["input"]), "src_nodes"),
    "transposed": (lambda d: d.update(edges_scores=d["edges_scores"].T.contiguous()), "another model"),
    "NaN": (lambda d: d["edges_scores"][0, 0].fill_(float("inf")), "input->a0.h0<q>"),
    "against the order": (lambda d: d["edges_scores"][-1, 0].fill_(1.0), "m0->a0.h0<q>"),
    "member against the order": (lambda d: d["edges_in_graph"][-1, 0].fill_(True), "m0->a0.h0<q>"),
    "list for a tensor": (lambda d: d.update(nodes_in_graph=[True]), "nodes_in_graph"),
    "complex scores": (lambda d: d.update(edges_scores=d["edges_scores"] * 1j), "dense real"),
    "expanded over nothing": (lambda d: d.update(edges_scores=torch.zeros(1).expand(1 << 40)), "shape"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_faulty_tensors_are_named(fault: str, tmp_path) -> None:
    spoil, message = BAD_TENSORS[fault]
    data = formats.to_eap(small_graph(), tmp_path / "graph.pt")
    spoil(data)
    torch.save(data, tmp_path / "spoiled.pt")
    with pytest.raises(FormatError, match=message) as caught:
        formats.from_eap(tmp_path / "spoiled.pt")
    assert "spoiled.pt" in str(caught.value)


def test_live_object_without_the_package_says_where_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "eap", SimpleNamespace())  # PyPI's package of that name
    with pytest.raises(InputError, match="hannamw/EAP-IG"):
        formats.to_eap_graph(small_graph())


class _StandInGraph:
    """The part of `eap.graph.Graph` that the live conversion touches."""

    @classmethod
    def from_model(cls, cfg):
        self = cls()
        n_layers, n_heads = cfg["n_layers"], cfg["n_heads"]
        self.cfg, self.nodes_scores = dict(cfg), None
        n_sources, n_inputs = 1 + n_layers * (n_heads + 1), n_layers * (3 * n_heads + 1) + 1
        self.scores, self.in_graph = torch.zeros(n_sources, n_inputs), torch.zeros(n_sources, n_inputs).bool()
        self.nodes_in_graph = torch.zeros(n_sources).bool()
        heads = [f"a0.h{h}" for h in range(n_heads)]
        self.nodes = dict.fromkeys(["input", *heads, "m0", "logits"])
        self.get_dst_nodes = lambda: [f"{head}<{port}>" for port in "qkv" for head in heads] + ["m0", "logits"]
        return self


def test_live_object_round_trip(monkeypatch) -> None:
    module = SimpleNamespace(Graph=_StandInGraph)
    monkeypatch.setitem(sys.modules, "eap", SimpleNamespace(graph=module))
    monkeypatch.setitem(sys.modules, "eap.graph", module)
    live = formats.to_eap_graph(small_graph(), d_model=8)
    assert live.cfg["d_model"] == 8
    assert nonzero(formats.from_eap_graph(live)) == nonzero(small_graph())


def test_the_real_package_reads_what_is_written(tmp_path) -> None:
    real = pytest.importorskip("eap.graph", reason="EAP-IG isn't installed")
    formats.to_eap(small_graph(), tmp_path / "graph.json", d_model=16)
    formats.to_eap(small_graph(), tmp_path / "graph.pt", d_model=16)
    ours = formats.to_eap_graph(small_graph(), d_model=16)
    for theirs in (real.Graph.from_json(tmp_path / "graph.json"), real.Graph.from_pt(tmp_path / "graph.pt")):
        assert torch.equal(theirs.scores, ours.scores) and torch.equal(theirs.in_graph, ours.in_graph)
    assert nonzero(formats.from_eap_graph(ours)) == nonzero(small_graph())


def test_something_else_is_not_a_live_graph() -> None:
    with pytest.raises(FormatError, match="given eap graph"):
        formats.from_eap_graph(object())
