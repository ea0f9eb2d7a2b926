"""The bundled model: it answers, its circuit is the stated one, and it is the same on every TransformerLens."""

import json
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file

from tl_circuitlasso.baselines.exact import exact
from tl_circuitlasso.demo import Demo, load_demo
from tl_circuitlasso.demo.ioi import LENGTH, SKELETON, VOCABULARY, sentences, text
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.demo_model import build_demo_model, build_native_bridge

FOLDER = files("tl_circuitlasso.demo")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_demo(prompts=256, seed=4)


def test_answers_are_right_and_silent_before_the_last_word(demo: Demo) -> None:
    with torch.no_grad():
        said = demo.model(demo.tokens).argmax(-1)
    assert (said[:, -1] == demo.correct).float().mean() > 0.99
    assert set(demo.decode(said[:, 1:-1].flatten())) == {"<none>"}


def test_prompts_read_as_english(demo: Demo) -> None:
    prompt, answer = demo.prompts[0].split(), demo.answers[0]
    assert prompt[0] in ("When", "After", "While") and prompt[-1] == "to"
    assert answer in (prompt[1], prompt[3]) and prompt.count(answer) == 1
    assert torch.equal(demo.encode(demo.prompts[0]), demo.tokens[:1])
    said = demo.model(demo.encode("When Mary and John went to the store, John gave a drink to"))
    assert demo.vocabulary[int(said[0, -1].argmax())] == "Mary"


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    first, again, other = sentences(20, seed=1), sentences(20, seed=1), sentences(20, seed=2)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.corrupted, again.corrupted)
    assert not torch.equal(first.tokens, other.tokens)
    assert all(word in slot for line in text(first.tokens) for word, slot in zip(line.split(), SKELETON))


def test_correct_and_incorrect_are_the_two_names(demo: Demo) -> None:
    for line, right, wrong in zip(demo.prompts, demo.answers, demo.decode(demo.incorrect)):
        words = line.split()
        assert words.count(right) == 1 and words.count(wrong) == 2
    assert len(demo.target) == 256


def test_patching_every_edge_alone_finds_the_planted_circuit_and_nothing_else(demo: Demo) -> None:
    def log_probability(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        log = logits[:, -1].log_softmax(-1)
        return log.gather(1, demo.correct[rows][:, None]).sum()

    table = exact(demo.model, demo.tokens[:32], demo.corrupted[:32], log_probability, batch_size=256).edge_table()
    table = table[(table.source != "input") | (table.target != "logits")]
    effective = table[table.score.abs() > 0.01 * table.score.abs().max()]
    assert set(zip(effective.source, effective.target)) == demo.true_edges
    heads = effective[effective.port != ""]
    assert set(zip(heads.source, heads.target, heads.port)) == demo.true_ports


def test_recorded_effects_agree_with_the_circuit(demo: Demo) -> None:
    assert set(demo.effects) == demo.candidate_edges
    largest = max(demo.effects.values())
    assert {edge for edge, effect in demo.effects.items() if effect > 0.01 * largest} == demo.true_edges
    assert demo.true_nodes == {"input", "logits", *(node for edge in demo.true_edges for node in edge)}
    assert set(demo.roles) == demo.true_nodes


def test_what_is_in_the_package_is_small_and_consistent(demo: Demo) -> None:
    assert sum(path.stat().st_size for path in map(FOLDER.joinpath, ("model.safetensors", "circuit.json"))) < 400_000  # type: ignore[attr-defined]
    assert demo.vocabulary == VOCABULARY and demo.tokens.shape == (256, LENGTH)


def test_hooked_transformer_and_bridge_are_the_same_model(demo: Demo) -> None:
    pytest.importorskip("transformer_lens.model_bridge")
    bridge = build_native_bridge(
        json.loads((FOLDER / "config.json").read_text()), load_file(str(FOLDER / "model.safetensors"))
    )
    with torch.no_grad():
        logits = demo.model(demo.tokens)
        assert (bridge(demo.tokens) - logits).abs().max() < 1e-5 * logits.abs().max()


def test_bad_input_is_named(demo: Demo) -> None:
    with pytest.raises(InputError, match="`prompts`"):
        load_demo(prompts=0)
    with pytest.raises(InputError, match="Zaphod"):
        demo.encode("When Mary and Zaphod went to the store")


def test_weights_of_another_model_are_refused() -> None:
    weights = load_file(str(FOLDER / "model.safetensors"))
    del weights["blocks.0.attn.W_Q"]
    with pytest.raises(ModelError):
        build_demo_model(json.loads((FOLDER / "config.json").read_text()), weights)
    pytest.importorskip("transformer_lens.model_bridge")
    with pytest.raises(ModelError, match=r"attn.*q.*weight"):
        build_native_bridge(json.loads((FOLDER / "config.json").read_text()), weights)
    weights["unembed.b_U"] = weights["unembed.b_U"] + 1
    with pytest.raises(ModelError, match="unembedding bias"):
        build_native_bridge(json.loads((FOLDER / "config.json").read_text()), weights)
