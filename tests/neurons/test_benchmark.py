"""The benchmark of neuron circuits, on made-up pairs and a small model."""

import json

import pytest

from benchmarks import neurons
from tests import architectures


@pytest.fixture
def setting(tmp_path):
    for split in ("train", "test"):
        rows = [
            {
                "clean_prefix": f"w{5 + i} w{7 + i}",
                "patch_prefix": f"w{6 + i} w{7 + i}",
                "clean_answer": " w3",
                "patch_answer": " w4",
            }
            for i in range(12)
        ]
        rows.append({**rows[0], "clean_prefix": "w5 w6 w7"})  # longer than its partner: left out
        (tmp_path / f"nounpp_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    return architectures.hooked("llama", tokenizer=architectures.tokenizer()), tmp_path


def test_pairs_have_one_length_and_answers_one_token(setting):
    model, folder = setting
    found = neurons.agreement_pairs(model, folder / "nounpp_train.json", 20)
    assert found.clean.shape == found.corrupted.shape == (12, 3)
    assert set(found.correct.tolist()) == {3} and set(found.incorrect.tolist()) == {4}


def test_all_neurons_are_the_model_and_every_method_runs(setting):
    model, folder = setting
    sizes = (10, 48)
    methods = [name for name in neurons.METHODS if name != "CircuitLasso, unpaired"]
    table = neurons.agreement(model, folder, ["nounpp"], methods, sizes, 8, 8)
    assert table.method.tolist() == methods
    assert table["48"][table.method == "RelP, MLP outputs"].item() == pytest.approx(1.0, abs=1e-3)
    assert float((table["48"] - 1).abs()[table.method == "CircuitLasso"].item()) < 1.0


def test_scores_go_with_exact_patching(setting):
    model, folder = setting
    table = neurons.patching(model, folder, "nounpp", ["CircuitLasso", "random"], 30, 8).set_index("method")
    assert table.Pearson["CircuitLasso"] > 0.9 > table.Pearson["random"]


def test_edge_circuits_grow_with_their_share(setting):
    model, folder = setting
    table = neurons.edge_circuits(model, folder, "nounpp", 10, 8, 8, shares=(0.3, 1.0))
    for how in ("attribution", "garrote"):
        own = table[table["ranked by"] == how]
        assert own.edges.is_monotonic_increasing and own.neurons.iloc[-1] <= 10
