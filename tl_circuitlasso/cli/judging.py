"""What circuits are put to the test on: a model, prompt pairs and a metric, from words on the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import InputError

OWN = {"logits": "kl", "LogitDiff": "logit-diff"}  # the metric that asks what a target asks
PARTNERS = {"random": ("mean", "mean-all", "optimal", "zero"), "corrupted": ("patch",)}  # and the ablations


def other_question(name: str, graph: Any, metric: str, ablation: str) -> str | None:
    """A line that says so where a circuit that we found is judged by another question than the one it answers."""
    target, partners = (graph.provenance.get(key) for key in ("target", "partners"))
    if target not in OWN or partners not in PARTNERS:
        return None  # of another method, or a question that no metric here asks
    if metric == OWN[target] and ablation in PARTNERS[partners]:
        return None
    found = "the model's own logits" if target == "logits" else "a logit difference"
    way = "over ordinary prompts" if partners == "random" else "between prompts and their counterparts"
    return (
        f"{name} answers another question than it is judged by: it was found for {found} {way}, and is judged by "
        f"{metric} with ablation {ablation}. Its own is --metric {OWN[target]} --ablation {PARTNERS[partners][0]}; for "
        f"this one, discover with {_asking(metric, ablation)}"
    )


def say_other_questions(graphs: Mapping[str, Any], metric: str, ablation: str) -> None:
    """Print a note for each graph that answers another question than the figures above it."""
    for name, graph in graphs.items():
        if said := other_question(name, graph, metric, ablation):
            print(f"Note: {said}")


def _asking(metric: str, ablation: str) -> str:
    """The options of `discover` that ask what a metric and an ablation judge by."""
    target = "logits" if metric == OWN["logits"] else "logit-diff"
    return f"--target {target} and {'--corrupted' if ablation == 'patch' else 'without --corrupted'}"


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
