"""The benchmark of neuron circuits, on made-up pairs and a small model."""

import json

import pytest
import torch

from benchmarks.neuron_parts import agreement, cost, edges, pairs, patching, steering
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
    found = pairs.agreement_pairs(model, folder / "nounpp_train.json", 20)
    assert found.clean.shape == found.corrupted.shape == (12, 3)
    assert set(found.correct.tolist()) == {3} and set(found.incorrect.tolist()) == {4}


def test_all_neurons_are_the_model_and_every_method_runs(setting):
    model, folder = setting
    methods = [name for name in agreement.METHODS if name != "CircuitLasso, unpaired"]
    table = agreement.agreement(model, folder, ["nounpp"], methods, (10, 48, 80), 8, 8)
    assert table.method.unique().tolist() == methods
    whole = table[(table.nodes == 80) | ((table.nodes == 48) & (table.method == "RelP, MLP outputs"))]
    assert len(whole) == len(methods) and bool(((whole.faithfulness - 1).abs() < 1e-3).all())
    assert bool((whole.completeness.abs() < 1e-3).all())
    inner = table[table.nodes == 10]
    for part in ("faithfulness", "completeness"):
        assert bool((inner[f"{part} low"] <= inner[part]).all() and (inner[part] <= inner[f"{part} high"]).all())
    assert (inner.faithfulness - inner.completeness).abs().max() > 0.05
    spent = inner.set_index("method").passes
    assert spent["CircuitLasso"] == 3 and spent["RelP"] == 3 and spent["IG-10"] == 22 and spent["random"] == 0


def test_what_methods_take_is_counted(setting):
    model, folder = setting
    methods = {name: agreement.METHODS[name] for name in ("CircuitLasso", "RelP", "IG-10")}
    table = cost.costs(model, folder, "nounpp", methods, [4, 12])
    assert table.pairs.tolist() == [4, 12] * 3
    assert table["forward passes"].tolist() == [2, 2, 2, 2, 12, 12]
    assert table["sweeps or backward passes"].tolist() == [1, 1, 1, 1, 10, 10]
    assert bool((table["forward-equivalents"] > 0.5).all())


def test_scores_go_with_exact_patching(setting):
    model, folder = setting
    table = patching.patching(model, folder, ["nounpp"], 40, 8).set_index("method")
    assert table.index.tolist() == list(patching.PATCHED)
    assert table.both["CircuitLasso"] > 0.9 and table["foremost, ranks"]["RelP"] > 0.5
    assert table["both, a tenth of the step"]["gradient x activation"] > 0.99
    assert bool((table.filter(like="MLP outputs").loc["CircuitLasso"] > 0.8).all())


def test_edge_circuits_grow_with_their_share(setting):
    model, folder = setting
    table = edges.edge_circuits(model, folder, "nounpp", 10, 8, 8, shares_of=(0.3, 1.0))
    for how in edges.RANKINGS:
        own = table[table["ranked by"] == how]
        assert own.edges.is_monotonic_increasing and own.neurons.iloc[-1] <= 10


def test_each_hop_has_prompts_of_one_length_and_partners_with_other_answers(setting, monkeypatch):
    model, folder = setting
    monkeypatch.setitem(steering.HOPS, "state", ("w3 {city}", "state"))
    monkeypatch.setitem(steering.HOPS, "capital", ("{state} w4", "capital"))
    first = [int(model(model.to_tokens(f"w3 w{i}"))[0, -1].argmax()) for i in range(5, 15)]
    rows = ["city,state,capital"] + [f"w{i},w{answer},w3" for i, answer in zip(range(5, 15), first)]
    (folder / "facts.csv").write_text("\n".join([*rows, "w5 w6,w7,w8"]))
    known = steering.known_facts(model, folder / "facts.csv", "state", 8)
    assert known.clean.shape[1] == 3 and bool((known.correct != known.incorrect).all())
    assert torch.equal(model(known.clean)[:, -1].argmax(-1), known.correct)
    wrong = [f"w{i},w{answer % 20 + 5},w3" for i, answer in zip(range(5, 15), first) if answer % 20 + 5 != answer]
    (folder / "facts.csv").write_text("\n".join(["city,state,capital", *wrong]))
    with pytest.raises(SystemExit, match="knows none of these facts"):
        steering.known_facts(model, folder / "facts.csv", "state", 8)


def test_a_prompt_can_be_asked_otherwise(setting, monkeypatch):
    model, _ = setting
    monkeypatch.setitem(steering.OTHERWISE, "state", ("w3", "w4"))
    clean = torch.tensor([[3, 7, 3, 8], [5, 3, 9, 6]])
    known = pairs.Agreement(clean, clean.flip(0), model(clean)[:, -1].argmax(-1), torch.tensor([9, 9]))
    found = steering.asked_otherwise(model, "state", known)
    assert found.clean.tolist() == clean.tolist() and torch.equal(found.correct, known.correct)
    assert found.corrupted.tolist() == [[3, 7, 4, 8], [5, 4, 9, 6]]
    said = model(found.corrupted)[:, -1].sort(descending=True).indices
    first, second = said[:, 0], said[:, 1]
    assert torch.equal(found.incorrect, torch.where(first == known.correct, second, first))
    with pytest.raises(SystemExit, match="doesn't have the word"):
        steering.asked_otherwise(model, "state", pairs.Agreement(clean[:, :1], clean, clean[:, 0], clean[:, 0]))
    monkeypatch.setitem(steering.OTHERWISE, "state", ("w3", "w3 w4"))
    with pytest.raises(SystemExit, match="isn't one token"):
        steering.asked_otherwise(model, "state", known)


def test_neurons_are_scaled(setting):
    model, _ = setting
    tokens = architectures.prompts(length=6)
    assert torch.allclose(steering.scaled(model, ["m0#3", "m1#4"], 1, tokens), model(tokens), atol=1e-5)

    def halve(post, hook):
        post[..., 4] *= 0.5
        return post

    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_post", halve)])
    assert torch.allclose(steering.scaled(model, ["m1#4"], 0.5, tokens), expected, atol=1e-5)
    assert not torch.allclose(expected, model(tokens), atol=1e-3)
