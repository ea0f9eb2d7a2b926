"""Neuronpedia and circuit-tracer: the page's schema and rules, supernodes, Cantor ids, tensors and refusals."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.helpers import ERROR, GOLDEN, feature_graph, graph_with_an_error, small_graph
from tl_circuitlasso import formats
from tl_circuitlasso.data.sites import Site, is_missed
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats._tracer_tensors import tensors_of_page
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

GRAPHS = [small_graph, feature_graph]


def foreign_page() -> dict:
    """A page as circuit-tracer writes it: two tokens, two features, an error node and a logit."""

    def node(node_id: str, feature: int, kind: str, **more) -> dict:
        layer, _, position = node_id.split("_")
        entry = {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": int(position), "feature_type": kind}
        return entry | {"jsNodeId": node_id, "clerp": "", "influence": 0.5} | more

    nodes = [
        node("E_464_0", 0, "embedding"),
        node("E_3797_1", 1, "embedding"),
        node("0_5_1", formats.cantor_pair(0, 5), "cross layer transcoder", activation=1.5),
        node("0_-1_1", -1, "mlp reconstruction error"),
        node("1_3_1", formats.cantor_pair(1, 3), "cross layer transcoder"),
        node("3_11_1", 11, "logit", clerp='Output "x" (p=0.500)', token_prob=0.5, is_target_logit=True),
    ]
    ends = [("E_464_0", "0_5_1", 1.5), ("0_5_1", "1_3_1", -0.5), ("0_-1_1", "1_3_1", 0.25), ("1_3_1", "3_11_1", 3.0)]
    return {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["The", " cat"], "prompt": "The cat"},
        "qParams": {"pinnedIds": ["0_5_1"], "supernodes": [["cats", "0_5_1"]]},
        "nodes": nodes,
        "links": [{"source": s, "target": t, "weight": w} for s, t, w in ends],
    }


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_cantor_pairs_are_exact(first: int, second: int) -> None:
    assert formats.cantor_unpair(formats.cantor_pair(first, second)) == (first, second)


def test_golden_files() -> None:
    page = formats.to_neuronpedia(feature_graph(), scan="gpt2-small", source_set="res-jb")
    assert page == json.loads((GOLDEN / "neuronpedia.json").read_text())
    assert formats.to_circuit_tracer(small_graph()) == json.loads((GOLDEN / "circuit_tracer.json").read_text())


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize(
    ("write", "suffix"),
    [(formats.to_neuronpedia, ".json"), (formats.to_circuit_tracer, ".json")],
)
def test_kept_circuit_comes_back(make, write, suffix: str, tmp_path) -> None:
    graph, path = make(), tmp_path / f"graph{suffix}"
    write(graph, path)
    again = formats.from_circuit_tracer(path)
    kept = {pair: score for pair, score in graph.pair_scores().items() if pair in graph.kept_edges()}
    assert again.pair_scores() == kept
    assert again.kept_edges() == graph.kept_edges()
    assert again.provenance == graph.provenance and again.node_info == graph.node_info


@pytest.mark.parametrize("make", GRAPHS)
def test_page_keeps_the_rules_of_the_viewer(make) -> None:
    page = formats.to_neuronpedia(make())
    formats.check_neuronpedia(page)
    tokens, nodes = page["metadata"]["prompt_tokens"], page["nodes"]
    ids = [node["node_id"] for node in nodes]
    assert len(set(ids)) == len(ids) and len(tokens) >= 2
    assert all(0 <= node["ctx_idx"] < len(tokens) for node in nodes)
    assert all("error" not in node["feature_type"] for node in nodes)
    assert all("(p=" in node["clerp"] for node in nodes if node["feature_type"] == "logit")
    seen = {(n["layer"], n["feature"]): {m["ctx_idx"] for m in nodes if m["feature"] == n["feature"]} for n in nodes}
    assert all(len(places) <= 2 / 3 * len(tokens) for places in seen.values())
    assert max(int(node["layer"]) for node in nodes if node["layer"] != "E") > 0
    for node in nodes:
        if node["layer"] != "E":
            assert formats.cantor_unpair(node["feature"]) == tuple(map(int, node["node_id"].split("_")[:2]))


def test_labels_groups_and_source_set() -> None:
    page = formats.to_neuronpedia(feature_graph(), source_set="res-jb", description="plural circuit")
    by_name = {node["tl_name"]: node for node in page["nodes"]}
    assert by_name["blocks.0.hook_resid_post#17"]["clerp"] == "plural"
    ((label, *members),) = page["qParams"]["supernodes"]
    assert label == "number" and len(members) == 2 and set(members) <= set(page["qParams"]["pinnedIds"])
    assert page["metadata"]["feature_details"] == {"neuronpedia_source_set": "res-jb"}
    assert page["metadata"]["info"]["description"] == "plural circuit"
    assert page["metadata"]["generation_settings"] == {"seed": 1}


def test_supernodes_of_the_caller() -> None:
    page = formats.to_neuronpedia(feature_graph(), supernodes={"ends": ["input", "logits"]}, pinned=["input"])
    assert page["qParams"]["supernodes"] == [["ends", "E_0_0", "3_0_3"]]
    assert page["qParams"]["pinnedIds"] == ["E_0_0", "3_0_3"]
    with pytest.raises(InputError, match="no kept edge"):
        formats.to_neuronpedia(feature_graph(), supernodes={"x": ["blocks.0.hook_resid_post#20"]})


def test_a_target_is_not_a_logit() -> None:
    index = NodeIndex((Block(Site("input"), 0), Block(Site("target"), 1)))
    page = formats.to_neuronpedia(AttributionGraph.from_edges(index, {("input", "target"): 1.0}))
    assert page["nodes"][1]["feature_type"] == "target"


@pytest.mark.parametrize("read", [formats.from_neuronpedia, formats.from_circuit_tracer])
def test_a_strangers_page_is_written_back_as_it_was(read) -> None:
    page = foreign_page()
    graph = read(json.loads(json.dumps(page)))
    assert ("blocks.0.hook_features.pos1#5", "blocks.1.hook_features.pos1#3") in graph.kept_edges()
    assert ("blocks.0.hook_error.pos1", "blocks.1.hook_features.pos1#3") in graph.kept_edges()
    assert formats.to_neuronpedia(graph) == page


def openmoss_page() -> dict:
    """A page as Neuronpedia has it of OpenMOSS's attention and MLP features: the kind stands in the id, errors and
    biases of both have no number, the logit's layer is the number of layers."""

    def node(node_id: str, feature: int | None, kind: str) -> dict:
        layer, position = node_id.split("_")[0], int(node_id.split("_")[-1])
        entry = {"node_id": node_id, "jsNodeId": node_id, "feature": feature, "feature_type": kind, "clerp": ""}
        return entry | {"layer": layer if layer == "E" else int(layer), "ctx_idx": position, "activation": None}

    nodes = [
        node("E_464_0", None, "embedding"),
        node("0_lor_7_0", formats.cantor_pair(0, 7), "lorsa"),
        node("0_cro_7_0", formats.cantor_pair(0, 7), "cross layer transcoder"),
        node("0_error_attn_0", None, "lorsa error"),
        node("0_error_mlp_0", None, "mlp reconstruction error"),
        node("0_bias_attn_bO_0", None, "bias"),
        node("0_bias_mlp_bout_0", None, "bias"),
        node("1_11_0", 11, "logit") | {"token_prob": 0.75, "clerp": 'Logit "x" (p=0.750)'},
    ]
    sources = ("0_lor_7_0", "0_error_attn_0", "0_bias_attn_bO_0")  # all of which the layer's MLP reads
    ends = [("E_464_0", "0_lor_7_0"), *((one, "0_cro_7_0") for one in sources)]
    ends += [(one, "1_11_0") for one in ("0_cro_7_0", "0_error_mlp_0", "0_bias_mlp_bout_0")]
    links = [{"source": s, "target": t, "weight": 0.5 + number} for number, (s, t) in enumerate(ends)]
    metadata = {"slug": "s", "scan": "m", "prompt_tokens": ["The"], "prompt": "The", "schema_version": 1}
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def test_a_page_with_attention_features_errors_and_biases_is_read_and_written_back() -> None:
    page = openmoss_page()
    graph = formats.from_neuronpedia(page)
    mlp = "blocks.0.hook_features.pos0#7"
    assert graph.kept_edges() == {
        ("hook_embed.pos0#464", "blocks.0.hook_lorsa.pos0#7"),
        ("blocks.0.hook_lorsa.pos0#7", mlp),
        ("blocks.0.hook_lorsa.hook_error.pos0", mlp),
        ("blocks.0.hook_bias_attn_bO.pos0", mlp),
        (mlp, "hook_unembed.pos0#11"),
        ("blocks.0.hook_error.pos0", "hook_unembed.pos0#11"),
        ("blocks.0.hook_bias_mlp_bout.pos0", "hook_unembed.pos0#11"),
    }
    assert is_missed("blocks.0.hook_lorsa.hook_error.pos0") and not is_missed(mlp)
    assert formats.to_neuronpedia(graph) == page
    with pytest.raises(InputError, match="0_bias_attn_bO_0, a node without a number"):
        tensors_of_page(formats.to_circuit_tracer(graph), graph)


@pytest.mark.parametrize("text", ["x", 'a "quoted" one', 'say "p" (p=', ""])
def test_a_targets_label_is_taken_whole_from_its_page(text: str) -> None:
    page = foreign_page()
    page["nodes"][-1]["clerp"] = f'Output "{text}" (p=0.500)'
    graph = formats.from_circuit_tracer(page)
    (target,) = tensors_of_page(formats.to_circuit_tracer(graph), graph)["logit_targets"]
    assert target == (text, 11)


def test_layers_below_the_logits_that_no_node_shows_are_counted() -> None:
    page = foreign_page()
    page["nodes"][-1] |= {"node_id": "9_11_1", "layer": "9"}
    page["links"][-1]["target"] = "9_11_1"
    graph = formats.from_circuit_tracer(page)
    assert tensors_of_page(formats.to_circuit_tracer(graph), graph)["cfg"]["n_layers"] == 8


def test_a_strangers_page_survives_our_own_file(tmp_path) -> None:
    graph = formats.from_neuronpedia(foreign_page())
    graph.save(tmp_path / "graph.safetensors")
    assert formats.to_neuronpedia(AttributionGraph.load(tmp_path / "graph.safetensors")) == foreign_page()


BAD_PAGES = {
    "no nodes": (lambda p: p.pop("nodes"), "`nodes`"),
    "empty": (lambda p: p.update(nodes=[], links=[]), "at least one node"),
    "nodes as an object": (lambda p: p.update(nodes={}), "a list is expected"),
    "future version": (lambda p: p["metadata"].update(schema_version=9), "schema_version"),
    "no slug": (lambda p: p["metadata"].pop("slug"), "`slug`"),
    "no type": (lambda p: p["nodes"][2].pop("feature_type"), r"nodes\[2\]"),
    "feature as text": (lambda p: p["nodes"][2].update(feature="5"), "feature"),
    "position as a flag": (lambda p: p["nodes"][2].update(ctx_idx=True), "ctx_idx"),
    "negative position": (lambda p: p["nodes"][2].update(ctx_idx=-1), "ctx_idx"),
    "odd layer": (lambda p: p["nodes"][2].update(layer="top"), "layer"),
    "id twice": (lambda p: p["nodes"][2].update(node_id="1_3_1"), "two nodes"),
    "same node twice": (lambda p: p["nodes"].append(p["nodes"][4] | {"node_id": "x_3_1"}), "same layer"),
    "unknown end": (lambda p: p["links"][0].update(target="9_9_9"), "9_9_9"),
    "NaN": (lambda p: p["links"][0].update(weight=float("nan")), "finite"),
    "weight as text": (lambda p: p["links"][0].update(weight="1"), r"links\[0\]"),
    "against the layers": (lambda p: p["links"][1].update(source="3_11_1", target="0_5_1"), "order of computation"),
    "link twice": (lambda p: p["links"].append(dict(p["links"][0])), "given twice"),
    "metadata as text": (lambda p: p.update(metadata="x"), "metadata"),
}


@pytest.mark.parametrize("fault", BAD_PAGES)
def test_faulty_pages_are_named(fault: str) -> None:
    spoil, message = BAD_PAGES[fault]
    page = foreign_page()
    spoil(page)
    with pytest.raises(FormatError, match=message):
        formats.from_neuronpedia(page)


def real_tensors() -> dict:
    """The fields of circuit-tracer's own .pt: three features, two tokens, two layers, one logit."""
    adjacency = torch.zeros(10, 10)
    adjacency[2, 0], adjacency[0, 7], adjacency[9, 2], adjacency[2, 3] = 0.5, 1.0, 2.0, 0.25
    return {
        "input_string": "The cat",
        "input_tokens": torch.tensor([464, 3797]),
        "active_features": torch.tensor([[0, 1, 5], [0, 0, 7], [1, 1, 3]]),
        "adjacency_matrix": adjacency,
        "selected_features": torch.arange(3),
        "activation_values": torch.ones(3),
        "logit_targets": torch.tensor([11]),
        "logit_probabilities": torch.tensor([1.0]),
        "vocab_size": 5000,
        "scan": "gemma",
        "cfg": {"n_layers": 2},
    }


def test_tensors_of_the_package_are_read() -> None:
    graph = formats.from_circuit_tracer(real_tensors())
    assert graph.pair_scores() == {
        ("hook_embed.pos0#464", "blocks.0.hook_features.pos1#5"): 1.0,
        ("blocks.0.hook_features.pos1#5", "blocks.1.hook_features.pos1#3"): 0.5,
        ("blocks.0.hook_error.pos0", "blocks.1.hook_features.pos1#3"): 0.25,
        ("blocks.1.hook_features.pos1#3", "hook_unembed.pos1#11"): 2.0,
    }


def test_classes_of_the_package_are_read_without_the_package(tmp_path, monkeypatch) -> None:
    *parents, name = "circuit_tracer", "circuit_tracer.utils", "circuit_tracer.utils.tl_nnsight_mapping"
    config = type("UnifiedConfig", (), {"__module__": name})
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__dict__["UnifiedConfig"] = config
    instance = config()
    instance.n_layers = 2
    torch.save(real_tensors() | {"cfg": instance}, tmp_path / "graph.pt")
    monkeypatch.undo()
    assert len(formats.from_circuit_tracer(tmp_path / "graph.pt")) == 4


def test_any_other_class_is_refused_by_name(tmp_path) -> None:
    torch.save(real_tensors() | {"scan": SimpleNamespace(a=1)}, tmp_path / "graph.pt")
    with pytest.raises(FormatError, match=r"types\.SimpleNamespace"):
        formats.from_circuit_tracer(tmp_path / "graph.pt")


BAD_TENSORS = {
    "matrix of another size": (lambda d: d.update(adjacency_matrix=torch.zeros(3, 3)), "shape"),
    "NaN": (lambda d: d["adjacency_matrix"][0, 1].fill_(float("nan")), "finite"),
    "no features": (lambda d: d.pop("active_features"), "active_features"),
    "features as floats": (lambda d: d.update(active_features=torch.zeros(3, 3)), "integer tensor"),
    "selected beyond": (
        lambda d: d.update(selected_features=torch.tensor([0, 1, 99])),
        "`selected_features` points beyond",
    ),
    "layer beyond": (lambda d: d["active_features"][0, 0].fill_(2), "`active_features` has a layer or place beyond"),
    "place beyond": (lambda d: d["active_features"][0, 1].fill_(2), "`active_features` has a layer or place beyond"),
    "activations of another number": (lambda d: d.update(activation_values=torch.ones(7)), "activation_values"),
    "no layers": (lambda d: d.update(cfg={}), "n_layers"),
    "giant": (lambda d: d.update(cfg={"n_layers": 1 << 60}), "n_layers"),
    "against the layers": (lambda d: d["adjacency_matrix"][0, 2].fill_(1.0), "order of computation"),
    "logits as text": (lambda d: d.update(logit_targets="x"), "logit_targets"),
    "probabilities of another number": (lambda d: d.update(logit_probabilities=torch.ones(3)), "logit_probabilities"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_faulty_tensors_are_named(fault: str) -> None:
    spoil, message = BAD_TENSORS[fault]
    data = real_tensors()
    spoil(data)
    with pytest.raises(FormatError, match=message):
        formats.from_circuit_tracer(data)


def test_an_error_that_shares_its_id_with_a_feature_is_read_with_a_warning(caplog) -> None:
    """circuit-tracer calls the error of layer 1 at token 1 `0_1_1`, as it does feature 1 of layer 0."""

    def entry(name: str, layer: str, feature: int, kind: str, position: int = 1) -> dict:
        more = {"ctx_idx": position, "feature_type": kind, "jsNodeId": name, "clerp": ""}
        return {"node_id": name, "feature": feature, "layer": layer} | more

    page = foreign_page()
    page["nodes"] += [
        entry("0_1_1", "0", formats.cantor_pair(0, 1), "cross layer transcoder"),
        entry("0_1_1", "1", -1, "mlp reconstruction error"),
    ]
    ends = [("E_464_0", "0_1_1", 2.0), ("0_1_1", "1_3_1", 4.0), ("0_1_1", "3_11_1", 5.0), ("0_1_1", "3_11_1", 6.0)]
    page["links"] += [{"source": s, "target": t, "weight": w} for s, t, w in ends]
    graph = formats.from_circuit_tracer(page)
    assert "share their ids" in caplog.text and "0 links could be" in caplog.text
    scores, feature, error = graph.pair_scores(), "blocks.0.hook_features.pos1#1", "blocks.1.hook_error.pos1"
    assert scores["hook_embed.pos0#464", feature] == 2.0
    assert scores[feature, "blocks.1.hook_features.pos1#3"] == 4.0  # the error of layer 1 feeds only what is above it
    assert {scores[feature, "hook_unembed.pos1#11"], scores[error, "hook_unembed.pos1#11"]} == {5.0, 6.0}
    assert graph.provenance["shared_ids"] == ["0_1_1"]
    page["links"].pop()
    graph = formats.from_neuronpedia(page)
    assert "1 links could be" in caplog.text and graph.pair_scores()[feature, "hook_unembed.pos1#11"] == 5.0


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize(
    ("write", "read"),
    [
        (formats.to_neuronpedia, formats.from_neuronpedia),
        (formats.to_circuit_tracer, formats.from_circuit_tracer),
    ],
)
def test_an_empty_circuit_comes_back(make, write, read) -> None:
    again = read(write(make().top_k(0)))
    assert again.n_kept == 0 and again.provenance == make().provenance


def test_what_an_sae_misses_is_an_error_node_and_no_feature() -> None:
    page = formats.to_neuronpedia(graph_with_an_error())
    (error,) = [node for node in page["nodes"] if "error" in node["feature_type"]]
    assert error["feature"] == -1 and error["tl_name"] == ERROR
    assert len({node["node_id"] for node in page["nodes"]}) == len(page["nodes"])
    assert formats.from_neuronpedia(page).kept_edges() == graph_with_an_error().kept_edges()


def test_the_page_takes_its_model_and_set_from_the_saes() -> None:
    saes = {"blocks.0.hook_resid_post": sae_of("gpt2-small/0-res-jb"), "x": sae_of("gpt2-small/1-res-jb", mapping=True)}
    metadata = formats.to_neuronpedia(feature_graph(), saes=saes)["metadata"]
    assert metadata["scan"] == "gpt2-small"
    assert metadata["feature_details"] == {"neuronpedia_source_set": "res-jb"}
    assert formats.to_neuronpedia(feature_graph(), saes=saes, scan="mine")["metadata"]["scan"] == "mine"
    with pytest.raises(InputError, match=r"gpt2-small/res-jb, gemma-2-2b/x"):
        formats.to_neuronpedia(feature_graph(), saes=saes | {"y": sae_of("gemma-2-2b/3-x")})
    with pytest.raises(InputError, match="no Neuronpedia id"):
        formats.to_neuronpedia(feature_graph(), saes={"y": sae_of(None)})


def sae_of(neuronpedia_id: str | None, *, mapping: bool = False) -> SimpleNamespace:
    metadata = {"neuronpedia_id": neuronpedia_id}
    return SimpleNamespace(cfg=SimpleNamespace(metadata=metadata if mapping else SimpleNamespace(**metadata)))
