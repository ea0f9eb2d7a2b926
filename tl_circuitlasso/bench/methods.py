"""The methods under test: one call each, from a case to a graph.

Baselines that need a metric are given the one that suits them best on these models: how far the output is from the
clean one where the derivative is taken away from the clean run, and what tells the clean from the corrupted output
apart (a logit or output difference, which has a derivative there too) where it's taken on the clean run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso import baselines
from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.bench.cases import Case, limited
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.confirm import confirm
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt

BATCH = 256  # prompts per forward pass
HYBRID = "circuit-lasso+confirm"  # a circuit refined by intervention, on a budget of edges

Objective = Literal["distance", "contrast"]


@dataclass(frozen=True)
class Method:
    """A way to find a circuit.

    `chooses` tells whether its kept edges are a circuit by its own rule; if not, its scores are all there is.
    """

    name: str
    run: Callable[[Case, int | None, int], AttributionGraph]
    chooses: bool = False


@torch.no_grad()
def outputs(case: Case, tokens: Tensor, batch_size: int = BATCH) -> Float[Tensor, "prompt pos out"]:
    """The model's logits."""
    adapter = adapt(case.model)
    return torch.cat([adapter.run(part, None, ["logits"])["logits"] for part in tokens.split(batch_size)])


def objective(case: Case, clean: Tensor, corrupted: Tensor, kind: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric for the baselines: the sum over prompts of a mean over the positions that count, high on clean runs.

    "distance": minus the Kullback-Leibler divergence from the clean prediction, or minus the squared distance to the
    clean output. "contrast": the logit of the clean run's class minus that of the corrupted run's, or the output's
    product with the difference between the two outputs.
    """
    first = case.first
    target = outputs(case, clean)[:, first:]
    other = outputs(case, corrupted)[:, first:] if kind == "contrast" else target

    def distance(logits: Tensor, rows: Tensor) -> Tensor:
        seen = logits[:, first:]
        if case.regression:
            return -(seen - target[rows]).square().sum(-1).mean(1).sum()
        wanted, found = target[rows].log_softmax(-1), seen.log_softmax(-1)
        return -(wanted.exp() * (wanted - found)).sum(-1).mean(1).sum()

    def contrast(logits: Tensor, rows: Tensor) -> Tensor:
        seen = logits[:, first:]
        if case.regression:
            return (seen * (target[rows] - other[rows])).sum(-1).mean(1).sum()
        right, wrong = (part[rows].argmax(-1, keepdim=True) for part in (target, other))
        return (seen.gather(-1, right) - seen.gather(-1, wrong)).squeeze(-1).mean(1).sum()

    return distance if kind == "distance" else contrast


def _baseline(
    method: Callable[..., AttributionGraph], kind: Objective, **options: Any
) -> Callable[..., AttributionGraph]:
    def run(case: Case, prompts: int | None, seed: int) -> AttributionGraph:
        clean, corrupted = limited(case, prompts)
        metric = objective(case, clean, corrupted, kind)
        return method(case.model, clean, corrupted, metric, batch_size=BATCH, progress=False, **options)

    return run


def _watching(method: Callable[..., AttributionGraph], *, seeded: bool = False) -> Callable[..., AttributionGraph]:
    def run(case: Case, prompts: int | None, seed: int) -> AttributionGraph:
        clean, _ = limited(case, prompts)
        mask = torch.ones_like(clean, dtype=torch.bool)
        options = {"seed": seed} if seeded else {}
        return method(case.model, clean, attention_mask=mask, batch_size=BATCH, progress=False, **options)

    return run


def _exact(case: Case, prompts: int | None, seed: int) -> AttributionGraph:
    clean, corrupted = limited(case, prompts)
    metric = objective(case, clean, corrupted, "distance")
    return baselines.exact(case.model, clean, corrupted, metric, batch_size=2048, progress=False)


def _circuit_lasso(**options: Any) -> Callable[..., AttributionGraph]:
    def run(case: Case, prompts: int | None, seed: int) -> AttributionGraph:
        from tl_circuitlasso.discover.run import circuit_lasso

        clean, _ = limited(case, prompts)
        positions = slice(case.first, None)
        return circuit_lasso(
            case.model, clean, positions=positions, batch_size=BATCH, seed=seed, progress=False, **options
        )

    return run


def _magnitude(case: Case, prompts: int | None, seed: int) -> AttributionGraph:
    clean, corrupted = limited(case, prompts)
    return baselines.METHODS["magnitude"](case.model, clean, corrupted, batch_size=BATCH, progress=False)


def _confirmed(case: Case, prompts: int | None, seed: int, *, budget: int | None = None) -> AttributionGraph:
    """The default circuit, each of its edges then cut once in the model: all, or the `budget` weakest."""
    clean, corrupted = limited(case, prompts)
    graph = METHODS["circuit-lasso"].run(case, prompts, seed)
    if not bool(graph.prune().kept.any()):
        return graph
    metric = objective(case, clean, corrupted, "distance")
    options = {"batch_size": BATCH, "seed": seed, "progress": False, "budget": budget}
    found = confirm(case.model, graph, clean, corrupted, metric, **options).prune()
    passes = graph.provenance["forward_passes"] + found.provenance["confirm"]["forward_passes"]
    return replace(found, provenance={**found.provenance, "forward_passes": passes})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("circuit-lasso", _circuit_lasso(), chooses=True),
        Method("circuit-lasso-activation", _circuit_lasso(design="activation"), chooses=True),
        Method("circuit-lasso-nonlinear", _circuit_lasso(design="activation", nonlinear=True), chooses=True),
        Method("paper", _circuit_lasso(design="paper"), chooses=True),
        Method("paper-nonlinear", _circuit_lasso(design="paper", nonlinear=True), chooses=True),
        Method("eap", _baseline(baselines.eap, "contrast")),
        Method("eap-ig", _baseline(baselines.eap_ig, "distance")),
        Method("clean-corrupted", _baseline(baselines.clean_corrupted, "distance")),
        Method("eap-ig-activations", _baseline(baselines.eap_ig_activations, "distance")),
        Method("exact", _exact),
        Method("information-flow-routes", _watching(baselines.information_flow_routes)),
        Method("correlation", _watching(baselines.correlation, seeded=True)),
        Method("random", _watching(baselines.random_edges, seeded=True)),
        Method("magnitude", _magnitude),
        Method("relp", _baseline(baselines.METHODS["relp"], "contrast")),
        Method("eap-gp", _baseline(baselines.eap_gp, "distance")),
        Method("bootstrap-eap-ig", _baseline(baselines.bootstrap_eap_ig, "distance"), chooses=True),
        Method("acdc", _baseline(baselines.acdc, "distance"), chooses=True),
        Method(HYBRID, _confirmed, chooses=True),
    )
}
ON_DEMAND = (  # run where they are named
    "circuit-lasso-nonlinear",
    "paper",
    "paper-nonlinear",
    "magnitude",
    "relp",
    "eap-gp",
    "bootstrap-eap-ig",
    "acdc",
    HYBRID,
)
DEFAULT = tuple(name for name in METHODS if name not in ON_DEMAND)


def chosen(names: Any, budget: int | None = None) -> list[Method]:
    """The methods called `names` (None: all but `ON_DEMAND`); `budget` is the most edges that the hybrid measures.

    Raises
    ------
    InputError: an unknown method; the message lists those there are. A budget without the method that has one.
    """
    wanted = DEFAULT if names is None else tuple(names)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise InputError(f"`methods` {unknown or wanted!r}: choose among {', '.join(METHODS)}")
    if budget is None:
        return [METHODS[name] for name in wanted]
    if HYBRID not in wanted:
        raise InputError(f"`budget` is of {HYBRID}, which measures edges one by one: name it among `methods`")
    budget = whole_number("budget", budget, what="of edges to measure in each case, or None for all")
    hybrid = Method(HYBRID, partial(_confirmed, budget=budget), chooses=True)
    return [hybrid if name == HYBRID else METHODS[name] for name in wanted]
