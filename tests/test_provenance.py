"""One record for every method, old records read as well, and graphs that answer different questions told apart."""

from dataclasses import replace
from typing import Any

import pytest

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.comparison import compare
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import asked, cost, differences

SMALL = {"d_model": 8, "d_head": 2, "d_mlp": 12}
KEYS = {"method", "model", "architecture", "d_model", "config_hash", "weights_hash", "versions", "target", "positions",
        "prompts", "prompt_pairs", "unit", "forward_passes", "backward_passes", "seconds"}  # fmt: skip
TOKENS = architectures.prompts(batch=12)
TARGET = tcl.LogitDiff(3, 4)
METHODS: dict[str, Any] = {
    "ours": lambda model: circuit_lasso(model, TOKENS, progress=False, batch_size=4),
    "pairs": lambda model: circuit_lasso(model, TOKENS, corrupted=TOKENS.flip(0), target=TARGET, progress=False),
    "activation": lambda model: circuit_lasso(model, TOKENS, design="activation", progress=False, batch_size=4),
    "neurons": lambda model: circuit_lasso(model, TOKENS, basis="neuron", target=TARGET, progress=False),
    "eap": lambda model: baselines.eap(model, TOKENS, TOKENS.flip(0), TARGET),
    "relp": lambda model: baselines.relp(model, TOKENS, TOKENS.flip(0), TARGET),
    "correlation": lambda model: baselines.correlation(model, TOKENS),
    "random": lambda model: baselines.random_edges(model),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, AttributionGraph]:
    model = architectures.hooked("gpt2", **SMALL)
    return {name: find(model) for name, find in METHODS.items()}


@pytest.mark.filterwarnings("ignore:the circuit is empty")
def test_every_method_leaves_the_same_record(graphs: dict[str, AttributionGraph]) -> None:
    for name, graph in graphs.items():
        assert graph.provenance.keys() >= KEYS, name
        assert graph.provenance["seconds"]["total"] >= 0 and graph.provenance["d_model"] == 8
    passes = {name: cost(graph.provenance)["forward_passes"] for name, graph in graphs.items()}
    assert passes["activation"] == 1.0 and passes["eap"] == 2.0 and passes["random"] == 0.0
    assert 1.0 <= passes["ours"] < 3.0  # three batches are no three passes
    assert passes["pairs"] >= 2.0  # each prompt and its counterpart
    said = {name: (graph.provenance["target"], graph.provenance["positions"]) for name, graph in graphs.items()}
    assert said["ours"] == said["activation"] == ("logits", "all") and said["random"] == (None, None)
    assert {said[name] for name in ("pairs", "neurons", "eap", "relp")} == {("LogitDiff", "last")}
    assert graphs["pairs"].provenance["unit"] == "expected cost of the cut, logits"
    assert graphs["ours"].provenance["unit"] == "expected cost of the cut, nats"


@pytest.mark.filterwarnings("ignore:the circuit is empty")
def test_graphs_of_other_questions_are_compared_with_a_warning(graphs: dict[str, AttributionGraph]) -> None:
    with pytest.warns(UserWarning, match=r"target differs: logits \(ours\), LogitDiff \(eap\)"):
        found = compare({"ours": graphs["ours"], "eap": graphs["eap"], "random": graphs["random"]}, edges=5)
    assert "their positions differ: all (ours), last (eap)" in repr(found) and len(found.unlike) == 2
    assert compare({"pairs": graphs["pairs"], "eap": graphs["eap"]}, edges=5).unlike == ()


def test_models_are_told_apart_by_name_and_by_weights() -> None:
    record = {"model": "toy", "weights_hash": "a"}
    assert differences({"one": record, "other": record, "mute": {}}) == []
    assert differences({"one": record, "other": record | {"weights_hash": "b"}}) == [
        "their models have other weights, though one name"
    ]
    assert differences({"one": record, "other": {"model": "toy 2"}}) == [
        "their model differs: toy (one), toy 2 (other)"
    ]


def test_records_of_earlier_releases_are_read() -> None:
    old = {"method": "CircuitLasso", "forward_passes": 40, "seconds": {"total": 3.0}, "arguments": {"target": "Labels"}}
    assert cost(old)["forward_passes"] is None and cost(old)["seconds"] == 3.0  # of batches, not of prompts
    assert cost(old | {"passes_per_prompt": {"forward": 1.5, "backward": 0.0}})["forward_passes"] == 1.5
    assert asked(old) == {"target": "Labels"}
    assert differences({"old": old, "new": {"target": "logits"}}) == [
        "their target differs: Labels (old), logits (new)"
    ]


def test_a_record_survives_its_file(graphs: dict[str, AttributionGraph], tmp_path: Any) -> None:
    for name in ("ours", "eap", "neurons"):
        graphs[name].save(tmp_path / name)
        assert dict(AttributionGraph.load(tmp_path / name).provenance) == dict(graphs[name].provenance)
    bare = replace(graphs["eap"], provenance={})
    assert cost(bare.provenance) == {"seconds": None, "forward_passes": None, "backward_passes": None, "peak_mib": None}
