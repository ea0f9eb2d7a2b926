"""Pairs of prompts of unequal lengths: everything measured on them is what each pair alone gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import architectures
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Prompts, adapt
from tl_circuitlasso.models.pairs import Pairs, pairs_of

LENGTHS = (9, 6, 4, 9)
MODELS = {
    "learned positions": lambda: architectures.hooked("gpt2", dtype=torch.float64),
    "rotary, shared keys": lambda: architectures.hooked("llama", dtype=torch.float64),
    "alibi": lambda: architectures.hooked("alibi", dtype=torch.float64),
    "local attention": lambda: architectures.hooked("mistral", dtype=torch.float64),
    "bridge, learned positions": lambda: architectures.bridge("gpt2", dtype=torch.float64),
    "bridge, rotary": lambda: architectures.bridge("llama", dtype=torch.float64),
}


def prompts(seed: int = 0) -> list[Tensor]:
    rows = architectures.prompts(batch=len(LENGTHS), seed=seed)
    return [row[:length] for row, length in zip(rows, LENGTHS)]


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    tokens, mask = torch.full((len(rows), 11), 2), torch.zeros(len(rows), 11, dtype=torch.bool)
    for number, row in enumerate(rows):
        part = slice(11 - len(row), 11) if left else slice(0, len(row))
        tokens[number, part], mask[number, part] = row, True
    return tokens, mask


def forms(left: bool | None) -> tuple[Any, Any, dict[str, Any]]:
    """Lists of unequal lengths, or (left is not None) tensors padded on a side."""
    clean, corrupted = prompts(), prompts(seed=9)
    if left is None:
        return [row.tolist() for row in clean], [row[None] for row in corrupted], {}
    (tokens, mask), (others, _) = padded(clean, left), padded(corrupted, left)
    return tokens, others, {"attention_mask": mask}


def difference(logits: Tensor, rows: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        *((name, None) for name in MODELS),
        *((name, left) for name in ("learned positions", "rotary, shared keys") for left in (False, True)),
    ],
)
def test_scores_and_circuits_are_those_of_each_pair_alone(name: str, left: bool | None) -> None:
    model = MODELS[name]()
    clean, corrupted, options = forms(left)
    alone = [(a[None], b[None]) for a, b in zip(prompts(), prompts(seed=9))]
    found = baselines.eap(model, clean, corrupted, difference, **options)
    each = torch.stack([baselines.eap(model, *pair, difference).score for pair in alone])
    rough = name.startswith("bridge")  # Hugging Face's norms compute in float32
    closeness = {"atol": 1e-6, "rtol": 1e-4} if rough else {"atol": 1e-10, "rtol": 1e-7}
    torch.testing.assert_close(found.score, each.mean(0), **closeness)
    circuit = found.top_k(12)
    judged = evaluate.faithfulness(model, circuit, clean, corrupted, difference, batch_size=3, **options)
    singles = [evaluate.faithfulness(model, circuit, *pair, difference).per_prompt for pair in alone]
    for part in ("model", "ablated", "circuit"):
        torch.testing.assert_close(judged.per_prompt[part], torch.cat([one[part] for one in singles]), **closeness)


METHODS = {
    "eap_ig": baselines.eap_ig,
    "clean_corrupted": baselines.clean_corrupted,
    "eap_ig_activations": baselines.eap_ig_activations,
    "exact": baselines.exact,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_method_reads_each_prompts_end(method: str) -> None:
    model = MODELS["learned positions"]()
    clean, corrupted, options = forms(False)
    found = METHODS[method](model, clean, corrupted, difference, steps=2, **options)
    alone = zip(prompts(), prompts(seed=9))
    each = [METHODS[method](model, a[None], b[None], difference, steps=2).score for a, b in alone]
    torch.testing.assert_close(found.score, torch.stack(each).mean(0), atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("strings", [True, False])
def test_own_metrics_steering_and_constants_read_each_prompts_end(strings: bool) -> None:
    model = architectures.small(architectures.tokenizer())
    texts = [" ".join(f"w{int(token)}" for token in row[1:]) for row in prompts()]
    clean: Any = texts if strings else [row.tolist() for row in prompts()]
    alone = [model.to_tokens(text) for text in texts]
    graph = baselines.random_edges(model).top_k(10)
    metric = evaluate.logit_diff([5] * 4, [6] * 4)
    expected = torch.stack([model(tokens)[0, -1, 5] - model(tokens)[0, -1, 6] for tokens in alone]).detach().double()
    for ablation in ("zero", "mean", evaluate.Optimal(steps=2)):
        found = evaluate.faithfulness(model, graph, clean, None, metric, ablation)
        torch.testing.assert_close(found.per_prompt["model"], expected, atol=1e-5, rtol=1e-4)
    steered = evaluate.steer(model, graph, None, 0.5, clean, metric)
    assert steered.before == pytest.approx(float(expected.mean()), abs=1e-5)


# ---- metrics and pads -----------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_tokens_as_given() -> None:
    model = MODELS["learned positions"]()
    clean, corrupted, options = forms(False)
    ends = torch.tensor(LENGTHS) - 1

    def at_own_column(logits: Tensor, rows: Tensor) -> Tensor:
        last = logits[torch.arange(len(rows)), ends[rows]]
        return (last[:, 3] - last[:, 4]).sum()

    scores = [baselines.eap(model, clean, corrupted, m, **options).score for m in (difference, at_own_column)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits, rows: logits[:, -2, 3].sum(),
        lambda logits, rows: logits[:, 5, 3].sum(),
        lambda logits, rows: logits.log_softmax(-1)[..., 3].mean(1).sum(),
        evaluate.logit_diff([3] * 4, [4] * 4, position=-2),
        evaluate.accuracy([3] * 4, position=-3),
    ],
    ids=["second last", "column of a pad", "mean over pads", "logit_diff", "accuracy"],
)
def test_a_metric_that_reads_pads_is_refused(metric: Any) -> None:
    model = MODELS["learned positions"]()
    clean, corrupted, options = forms(False)
    graph = baselines.random_edges(model)
    with pytest.raises(InputError, match="`metric` reads"):
        evaluate.faithfulness(model, graph, clean, corrupted, metric, **options)


def test_means_over_real_tokens_are_taken() -> None:
    model = MODELS["learned positions"]()
    (tokens, mask), (others, _) = padded(prompts(), False), padded(prompts(seed=9), False)

    def masked(logits: Tensor, rows: Tensor) -> Tensor:
        real = mask[rows] & (torch.arange(11) < 10)
        return ((logits[..., 3] * real).sum(1) / real.sum(1)).sum()

    judged = evaluate.faithfulness(
        model, baselines.random_edges(model), tokens, others, masked, attention_mask=mask, batch_size=2
    )
    each = torch.stack([model(row[None])[0, :, 3].mean().detach() for row in prompts()])
    torch.testing.assert_close(judged.per_prompt["model"], each, atol=1e-9, rtol=1e-7)


# ---- pairing --------------------------------------------------------------------------------------------------------


def test_partners_are_put_where_the_clean_tokens_stand() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    tokens, mask = padded(prompts(), True)
    pairs = pairs_of(adapter, tokens, [row.tolist() for row in prompts(seed=9)], attention_mask=mask, batch_size=3)
    assert len(pairs) == 4 and pairs.width == 11
    for clean, corrupted in pairs:
        assert torch.equal(clean.mask, corrupted.mask) and torch.equal(clean.keep, corrupted.keep)
        for row, number in zip(corrupted.tokens, range(corrupted.start, 4)):
            assert torch.equal(row[mask[number]], prompts(seed=9)[number])
    assert [batch.rows.tolist() for batch in pairs] == [[0, 1, 2], [3]]
    some = pairs.take(torch.tensor([1, 3]))
    (batch,) = some
    assert torch.equal(batch.clean.tokens, tokens[[1, 3]]) and batch.rows.tolist() == [0, 1]


def test_pairs_that_do_not_fit_are_named() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    clean = [row.tolist() for row in prompts()]
    with pytest.raises(InputError, match="`corrupted`: prompt 1 has 4 tokens, its partner in `clean` 6"):
        pairs_of(adapter, clean, [clean[0], clean[2], clean[1], clean[3]])
    with pytest.raises(InputError, match="`corrupted` has 3 prompts, `clean` 4"):
        pairs_of(adapter, clean, clean[:3])
    with pytest.raises(InputError, match="`clean` are 33 long, the model reads 32"):
        pairs_of(adapter, torch.full((2, 33), 3))
    with pytest.raises(InputError, match="must hold 1 at real tokens"):
        pairs_of(adapter, torch.full((2, 3), 3), attention_mask=torch.full((2, 3), 2))
    with pytest.raises(InputError, match="isn't aligned"):
        Pairs(Prompts(adapter, clean), Prompts(adapter, clean[::-1]))


def test_reversed_prompts_of_unequal_lengths_are_told_apart() -> None:
    model = architectures.small(architectures.tokenizer())
    texts = ["w3 w4 w5", "w6"]
    with pytest.raises(InputError, match="prompt 0 has 2 tokens, its partner in `clean` 4"):
        baselines.eap_ig(model, texts, texts[::-1], difference)
