"""The methods, called as a user would: from a model and a task to a graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.tasks import BATCH, Task
from tl_circuitlasso import baselines
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

Find = Callable[[Any, Task, int], AttributionGraph]


@dataclass(frozen=True)
class Method:
    """A way to find a circuit: `find(model, task, seed)`.

    chooses: whether its kept edges are a circuit by a rule of its own; if not, its scores are all there is.
    additive: whether its scores are means over prompts, so that those of any sample follow from single prompts'.
    """

    name: str
    find: Find
    chooses: bool = False
    additive: bool = False


def _lasso(model: Any, task: Task, seed: int) -> AttributionGraph:
    return circuit_lasso(model, task.clean, **_asked(task, seed))


def _lasso_pairs(model: Any, task: Task, seed: int) -> AttributionGraph:
    return circuit_lasso(model, task.clean, corrupted=task.corrupted, **_asked(task, seed))


def _asked(task: Task, seed: int) -> dict[str, Any]:
    return {"target": task.target, "positions": "last", "batch_size": BATCH, "seed": seed, "progress": False}


def _eap(model: Any, task: Task, seed: int) -> AttributionGraph:
    return baselines.eap(model, task.clean, task.corrupted, task.contrast, batch_size=BATCH)


def _eap_ig(**options: Any) -> Find:
    def find(model: Any, task: Task, seed: int) -> AttributionGraph:
        return baselines.eap_ig(model, task.clean, task.corrupted, task.metric, steps=5, batch_size=BATCH, **options)

    return find


def _random(model: Any, task: Task, seed: int) -> AttributionGraph:
    return baselines.random_edges(model, seed=seed)


METHODS = {
    "lasso": Method("CircuitLasso", _lasso, chooses=True),
    "lasso-pairs": Method("CircuitLasso, contrast pairs", _lasso_pairs, chooses=True),
    "eap": Method("EAP", _eap, additive=True),
    "eap-ig": Method("EAP-IG(5)", _eap_ig(), additive=True),
    "eap-ig-mean": Method("EAP-IG(5) towards the mean", _eap_ig(ablation="mean")),
    "random": Method("random", _random),
}
DEFAULT = ("lasso", "lasso-pairs", "eap", "eap-ig", "random")


def chosen(names: str) -> list[Method]:
    """The methods called so, commas between.

    Raises
    ------
    InputError: an unknown one.
    """
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in METHODS]:
        raise InputError(f"`methods` has {unknown[0]!r}: there are {', '.join(METHODS)}")
    return [METHODS[name] for name in wanted]


def bare_passes(model: Any, tokens: Tensor, device: torch.device) -> None:
    """One forward pass over the prompts, as the unit of cost."""
    with torch.no_grad():
        for some in tokens.split(BATCH):
            model(some.to(device))
