"""What circuits are put to the test on: a model, prompt pairs and a metric, from words on the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import InputError


@dataclass(frozen=True, eq=False)
class Judged:
    """A model, the prompts that it is asked on, their partners where there are any, and what is measured."""

    model: Any
    clean: Any
    corrupted: Any
    metric: Any

    def as_options(self) -> dict[str, Any]:
        """As keyword arguments of `compare` and its like."""
        return {"model": self.model, "clean": self.clean, "corrupted": self.corrupted, "metric": self.metric}


def judged(model: str, prompts: Path, metric: str, limit: int | None) -> Judged:
    """The model of that name on the prompt pairs of a file; `demo` is the bundled model, on `demo`, its own prompts.

    Raises
    ------
    InputError: an unknown model, file or metric, or the bundled model on other prompts than its own.
    """
    if model == "demo":
        return _bundled(prompts, metric, limit)
    from tl_circuitlasso import evaluate
    from tl_circuitlasso.models.loading import load_model

    pairs = evaluate.read_pairs(prompts, limit)
    loaded = load_model(model)
    return Judged(loaded, pairs.clean, pairs.corrupted, evaluate.metric_by_name(metric, loaded, pairs))


def _bundled(prompts: Path, metric: str, limit: int | None) -> Judged:
    from tl_circuitlasso import evaluate
    from tl_circuitlasso.demo import load_demo

    if str(prompts) != "demo":
        raise InputError(f"`prompts` is {prompts}: the bundled model is tested on its own prompts, write demo demo")
    bundled = load_demo(prompts=limit or 512)
    right, wrong = bundled.correct, bundled.incorrect
    metrics: Mapping[str, Callable[[], Any]] = {
        "logit-diff": lambda: evaluate.logit_diff(right, wrong),
        "prob-diff": lambda: evaluate.prob_diff(right, wrong),
        "cross-entropy": lambda: evaluate.cross_entropy(right),
        "accuracy": lambda: evaluate.accuracy(right),
        "kl": lambda: evaluate.kl(bundled.model(bundled.tokens)[:, -1].detach()),
        "next-token": lambda: evaluate.next_token(bundled.tokens),
    }
    if metric not in metrics:
        raise InputError(f"`metric` is {metric!r}: write one of {', '.join(metrics)}")
    return Judged(bundled.model, bundled.tokens, bundled.corrupted, metrics[metric]())
