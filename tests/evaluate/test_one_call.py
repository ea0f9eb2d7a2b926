"""Finding a circuit and confirming it by intervention in one call."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.discover.confirming import prepare
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.metrics import PromptMetric
from tl_circuitlasso.models import Prompts, adapt


def test_one_call_is_confirming_what_the_regression_found() -> None:
    demo = tcl.load_demo(prompts=48)
    asked = {"target": demo.target, "corrupted": demo.corrupted, "progress": False}
    plain = tcl.circuit_lasso(demo.model, demo.tokens, **asked)
    found = demo.model.run_circuit_lasso(
        demo.tokens, target=demo.target, method="lasso+confirm", corrupted=demo.corrupted, progress=False
    )
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    expected = tcl.evaluate.confirm(demo.model, plain, demo.tokens, demo.corrupted, metric).prune()
    assert found.kept_edges() == expected.kept_edges() >= demo.true_edges
    torch.testing.assert_close(found.extras["effect"], expected.extras["effect"], atol=1e-5, rtol=1e-4)
    report = found.provenance["confirm"]
    assert report["forward_passes"] <= 2 + report["tested"] < report["forward_passes_all_edges"] / 10
    assert found.provenance["seconds"]["confirm"] > 0


CLEAN = ["w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12 w13", "w14 w15 w16"]
CORRUPTED = ["w6 w5 w4 w3", "w9 w8 w7", "w20 w21 w22 w23", "w24 w25 w26"]


def confirmed(metric: Any = None, budget: int | None = None) -> tuple[Any, Any, list[int]]:
    model = architectures.small(architectures.tokenizer())
    adapter = adapt(model)
    prompts = Prompts(adapter, CLEAN, positions=slice(2, None))
    graph = baselines.random_edges(adapter).top_k(12)
    found = prepare(adapter, prompts, CORRUPTED, None, metric, count=3, seed=3, budget=budget)
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(3))[:3].sort().values.tolist()
    return model, found.apply(graph, adapter, seed=0, progress=False), rows


def test_the_default_metric_is_the_divergence_at_the_chosen_positions_of_the_drawn_prompts() -> None:
    model, found, rows = confirmed()
    own = [model(model.to_tokens(text)).detach().log_softmax(-1)[0] for text in CLEAN]

    def metric(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        for run, number in zip(logits.log_softmax(-1), numbers.tolist()):
            before = own[rows[number]]
            kept = slice(2, len(before))
            total = total - (before.exp() * (before - run[: len(before)])).sum(-1)[kept].mean()
        return total

    pair = [CLEAN[row] for row in rows], [CORRUPTED[row] for row in rows]
    graph = baselines.random_edges(model).top_k(12)
    expected = tcl.evaluate.confirm(model, graph, *pair, metric)
    assert bool(expected.extras["measured"].any())
    torch.testing.assert_close(found.extras["effect"], expected.extras["effect"], atol=1e-5, rtol=1e-3)
    assert found.provenance["confirm"]["prompts"] == 3


def test_confirming_keeps_to_the_batch_size_that_was_asked_for() -> None:
    adapter, seen = adapt(architectures.small(architectures.tokenizer())), []

    def each(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return logits[:, -1, 3]

    found = prepare(
        adapter, Prompts(adapter, CLEAN, batch_size=2), CORRUPTED, None, PromptMetric(each), count=4, seed=0
    )
    found.apply(baselines.random_edges(adapter).top_k(6), adapter, seed=0, progress=False)
    assert max(seen) == 2


def test_no_more_edges_are_measured_than_the_budget_allows() -> None:
    _, found, _ = confirmed(budget=2)
    assert int(found.extras["measured"].sum()) == found.provenance["confirm"]["tested"] == 2


@pytest.mark.parametrize("plain", [True, False])
def test_the_users_metric_counts_rows_among_all_prompts(plain: bool) -> None:
    seen: set[int] = set()

    def each(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.update(rows.tolist())
        return logits[:, 2, 3]

    metric = (lambda logits, rows: each(logits, rows).sum()) if plain else PromptMetric(each)
    _, _, rows = confirmed(metric)
    assert seen == set(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "acdc"}, "`method` 'acdc' is unknown"),
        ({"method": "lasso", "design": "activation"}, "`corrupted` is compared with the prompts in design 'read'"),
        ({"method": "lasso", "corrupted": None, "metric": lambda logits, rows: 0}, "`metric` is used by"),
        ({"method": "lasso", "corrupted": None, "budget": 3}, "`budget` is used by"),
        ({"method": "lasso", "corrupted": None, "size": "auto"}, "`size` is used by"),
        ({"budget": 0}, "`budget` is 0"),
        ({"budget": 3, "size": 0.5}, "give one of the two"),
        ({"size": 40}, "`size` is 40.*top_k"),
        ({"size": "small"}, "`size` is 'small'"),
        ({"corrupted": None}, "`corrupted` is missing"),
        ({"corrupted": torch.ones(3, 8, dtype=torch.long)}, "prompt 0 has 8 tokens, its partner in `tokens` 9"),
        ({"corrupted": ["w3 w4"] * 2}, "`corrupted` has 2 prompts"),
        ({"corrupted": ["w3 w4"] * 3}, "prompt 0 has 3 tokens, its partner in `tokens` 9"),
        ({"basis": "residual", "design": "activation"}, "cuts edges between whole components"),
        ({"target": tcl.Labels([0, 1, 0])}, "a Labels target isn't a function of the logits"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], message: str) -> None:
    model = architectures.small(architectures.tokenizer())
    tokens = architectures.prompts()
    arguments = {"tokens": tokens, "method": "lasso+confirm", "corrupted": tokens.flip(0), "progress": False} | changes
    with pytest.raises(InputError, match=message):
        tcl.circuit_lasso(model, **arguments)
