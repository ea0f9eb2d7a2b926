"""Finding a circuit from whatever people hold: the same prompts give the same graph."""

import threading
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt

TOKENS = architectures.prompts(batch=24)


@pytest.fixture(scope="module")
def model() -> Any:
    return architectures.small(architectures.tokenizer())


def found(model: Any, tokens: Any = TOKENS, **options: Any) -> tcl.AttributionGraph:
    return tcl.circuit_lasso(
        model, tokens, progress=False, **{"refined": False, "target": tcl.LogitDiff(3, 4), **options}
    )


@pytest.fixture(scope="module")
def reference(model: Any) -> tcl.AttributionGraph:
    return found(model, target=tcl.Values([0.5, 1.0, 2.0] * 8))


@pytest.mark.parametrize("form", ["loader", "generator of batches", "rows"])
def test_a_stream_gives_the_graph_of_the_tensor(model: Any, reference: tcl.AttributionGraph, form: str) -> None:
    """Pairs are drawn again and again from few prompts, so all have to be known, and a probe reads them twice."""
    given: Any = {
        "loader": lambda: torch.utils.data.DataLoader(TOKENS, batch_size=8),
        "generator of batches": lambda: iter(TOKENS.split(8)),
        "rows": lambda: [row.tolist() for row in TOKENS],
    }[form]()
    graph = found(model, given, target=tcl.Values([0.5, 1.0, 2.0] * 8))
    assert torch.equal(graph.score, reference.score) and torch.equal(graph.kept, reference.kept)
    assert graph.provenance["prompt_pairs"] == reference.provenance["prompt_pairs"] >= 90
    assert graph.provenance["data_hash"] == reference.provenance["data_hash"]


def test_a_stream_is_drawn_from_as_a_tensor_is(model: Any) -> None:
    graphs = [found(model, tokens, max_prompts=10) for tokens in (TOKENS, iter(TOKENS.split(7)))]
    assert torch.equal(graphs[0].score, graphs[1].score)
    assert [graph.provenance["prompts"] for graph in graphs] == [10, 10]


def test_one_prompt_at_a_time_and_one_left_over(model: Any) -> None:
    """Two prompts make a pair, so none is left alone in a batch, and no pair is lost."""
    small, odd = found(model, batch_size=1), found(model, TOKENS[:17], batch_size=16)
    assert small.provenance["batch_size"] == 2 and small.provenance["forward_passes"] == 1.0
    assert small.provenance["prompt_pairs"] % 24 == 0 and odd.provenance["prompt_pairs"] % 17 == 0


@pytest.mark.parametrize("design", ["read", "activation"])
def test_words_and_several_answers_are_what_their_logits_are(model: Any, design: str) -> None:
    by_id = found(model, target=tcl.LogitDiff([3] * 24, [[4, 5]] * 24), design=design)
    words = found(model, target=tcl.LogitDiff("w3", [["w4", "w5"]] * 24), design=design)
    assert torch.equal(words.score, by_id.score)
    shared = found(model, target=tcl.LogitDiff("w3", "w4"), design=design)
    assert torch.equal(shared.score, found(model, target=tcl.LogitDiff([3] * 24, [4] * 24), design=design).score)
    assert not torch.equal(shared.score, words.score)


def test_a_logit_difference_is_target_and_metric(model: Any) -> None:
    target = tcl.LogitDiff("w3", [["w4", "w5"]] * 24)
    other = architectures.prompts(batch=24, seed=1)
    graph = tcl.baselines.eap(model, TOKENS, other, target)

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 4:6].mean(1)).sum()

    torch.testing.assert_close(graph.score, tcl.baselines.eap(model, TOKENS, other, metric).score)
    judged = tcl.evaluate.faithfulness(model, graph.top_k(9), TOKENS, other, target)
    expected = tcl.evaluate.faithfulness(model, graph.top_k(9), TOKENS, other, metric)
    torch.testing.assert_close(judged.per_prompt["circuit"], expected.per_prompt["circuit"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("w3 w4", r"'w3 w4', which is 2 tokens to the tokenizer \('w3' 'w4'\)"),
        ("", "which is 0 tokens"),
        ("mary", "'mary', which the tokenizer doesn't know"),
    ],
)
def test_words_of_other_than_one_token_are_named(model: Any, word: str, message: str) -> None:
    with pytest.raises(InputError, match=f"`correct` has .*{message}" if word else message):
        found(model, target=tcl.LogitDiff(word, "w3"))
    with pytest.raises(InputError, match="no tokenizer"):
        found(architectures.small(), target=tcl.LogitDiff("w3", "w4"))


# ---- what disturbs a model ------------------------------------------------------------------------------------------


def test_a_tokenizer_that_was_never_set_is_named() -> None:
    model = architectures.hooked("gpt2")
    model.tokenizer = architectures.tokenizer()
    with pytest.raises(InputError, match=r"call `model\.set_tokenizer\(model\.tokenizer\)`"):
        tcl.circuit_lasso(model, ["w3 w4", "w5 w6"])


def test_a_hook_that_changes_the_model_is_named() -> None:
    model = architectures.hooked("gpt2")
    model.blocks[1].hook_resid_mid.add_hook(lambda activation, hook: activation + 1)
    with pytest.raises(ModelError, match=r"a hook of yours is attached at `blocks\.1\.hook_resid_mid`"):
        found(model)


def test_autocast_is_named() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ModelError, match="autocast is on"):
        found(architectures.hooked("gpt2"))


def test_derivatives_under_inference_mode_are_refused(model: Any) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode is on"):
        tcl.baselines.eap(model, TOKENS[:2], TOKENS[2:4], tcl.LogitDiff(3, 4))


def test_compiled_models_are_named() -> None:
    model = architectures.hooked("gpt2")
    with pytest.raises(ModelError, match=r"what torch\.compile returned"):
        adapt(torch.compile(model))
    model.compile()
    with pytest.raises(ModelError, match=r"compiled in place \(model\.compile\(\)\)"):
        adapt(model)


def test_a_default_device_without_values_is_named(model: Any) -> None:
    torch.set_default_device("meta")
    try:
        with pytest.raises(InputError, match="default device is 'meta'"):
            adapt(model)
    finally:
        torch.set_default_device(None)


def test_a_model_at_work_in_another_thread_is_named(model: Any) -> None:
    messages = []

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        def other() -> None:
            try:
                adapt(model).run(TOKENS[:1], None, ["logits"])
            except ModelError as error:
                messages.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return logits[:, -1, 3].sum()

    tcl.baselines.eap(model, TOKENS[:2], TOKENS[2:4], metric)
    assert messages and "at work in another thread" in messages[0]
    assert adapt(model).run(TOKENS[:1], None, ["logits"])["logits"].shape == (1, 9, 31)
