"""A method that scores edges: whether its graphs can be compared with others'."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso.demo import load_demo
from tl_circuitlasso.evaluate.circuits import check_graph
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt
from tl_circuitlasso.testing.checking import PROMPTS, Check, expect, random_tokens, run, state


@dataclass(frozen=True, eq=False)
class _Case:
    model: Any
    clean: Tensor
    corrupted: Tensor
    metric: Callable[[Tensor, Tensor], Tensor]


def check_method(method: Callable[..., AttributionGraph], model: Any = None, **options: Any) -> tuple[str, ...]:
    """Can this method stand in `baselines.METHODS`, the benchmark and `compare`?

    It is called as `method(model, clean, corrupted, metric, **options)` with tokens and a metric `(logits, rows) -> sum
    over rows`, on the bundled model unless one is given. Checked: it gives a graph of the model's components, with
    finite scores, the same twice; model and prompts are left as they were; its provenance counts forward and backward
    passes.

    Raises
    ------
    CheckFailure: names every check that failed.

    >>> import tl_circuitlasso as tcl
    >>> len(check_method(tcl.baselines.eap)) > 3
    True
    """
    return run(getattr(method, "__name__", "the method"), _method_checks(method, _case(model), options))


def _case(model: Any) -> _Case:
    if model is None:
        demo = load_demo(prompts=PROMPTS)
        model, clean, corrupted = demo.model, demo.tokens, demo.corrupted
    else:
        clean = random_tokens(adapt(model))
        corrupted = clean.flip(0)
    wanted = clean[:, -1]

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, wanted[rows].to(last.device)[:, None] % last.shape[1])).sum()

    return _Case(model, clean, corrupted, metric)


def _method_checks(method: Callable[..., AttributionGraph], case: _Case, options: dict[str, Any]) -> Iterator[Check]:
    found: list[AttributionGraph] = []

    def call() -> AttributionGraph:
        return method(case.model, case.clean, case.corrupted, case.metric, **options)

    def first() -> None:
        graph = call()
        expect(isinstance(graph, AttributionGraph), f"it gives a {type(graph).__name__}")
        check_graph(graph, adapt(case.model))
        found.append(graph)

    before, prompts = state(case.model), [tokens.clone() for tokens in (case.clean, case.corrupted)]
    yield "gives a graph of the model", first
    if not found:
        return
    graph = found[0]
    yield "finite scores", lambda: expect(bool(graph.score.isfinite().all()), "NaN or infinite scores")
    yield "leaves the model as it was", lambda: expect(state(case.model) == before, "weights, mode or hooks changed")
    yield (  # before the second call, which might undo what the first has done
        "leaves the prompts as they were",
        lambda: expect(all(map(torch.equal, prompts, (case.clean, case.corrupted))), "they have other tokens now"),
    )
    yield "same again", lambda: expect(_equal(call(), graph), "a second call gives other scores or edges")
    yield "counts its passes", lambda: _counts(graph)


def _equal(a: AttributionGraph, b: AttributionGraph) -> bool:
    return len(a) == len(b) and torch.equal(a.kept, b.kept) and torch.allclose(a.score, b.score, rtol=1e-5, atol=1e-9)


def _counts(graph: AttributionGraph) -> None:
    missing = [name for name in ("forward_passes", "backward_passes") if name not in graph.provenance]
    expect(not missing, f"its provenance has no {' and '.join(missing)}")
    for name in ("forward_passes", "backward_passes"):
        count = graph.provenance[name]
        number = isinstance(count, (int, float)) and not isinstance(count, bool) and 0 <= count < float("inf")
        expect(number, f"{name} is {count!r}: a number of passes is expected")
