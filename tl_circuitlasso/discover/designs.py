"""Designs as wholes: what each collects, how it learns from that, whether it looks again, and what its scores say.

>>> sorted(DESIGNS)
['activation', 'paper', 'read', 'routed']
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import LogitDiff, Target, Values
from tl_circuitlasso.discover.learning import learn_children, learn_in_one, whole_strength
from tl_circuitlasso.discover.learning_read import learn_read
from tl_circuitlasso.discover.refining import refine
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.bases import Basis, Component
from tl_circuitlasso.models.designs import Activation, Design, Routed
from tl_circuitlasso.models.read import ReadDesign

UNITS = {LogitDiff: "logits", Values: "units of the numbers"}  # of targets that are numbers


@dataclass(frozen=True)
class Way:
    """One design, from the model to the graph.

    collects: makes the design that collection asks, for a basis; learn: from its statistics to a graph; unit: what a
    score says, for a target; check: refuses strengths that it has no use for.
    look_again: a second look at the kept edges, on the model; None: there is none.
    component: the basis of that name; others: whether it takes any other; bends: whether it has a nonlinear variant.
    neurons: neurons have a circuit of their own kind (neurons/); features: it goes with SAEFeatures.
    """

    collects: Callable[..., Design]
    learn: Callable[..., AttributionGraph]
    unit: Callable[[Target], str]
    check: Callable[[Design, str | float], object]
    look_again: Callable[..., tuple[AttributionGraph, int]] | None = None
    component: Callable[[], Basis] = Component
    others: bool = False
    bends: bool = False
    neurons: bool = False
    features: bool = False


def expected_cost(target: Target) -> str:
    """What a score of design "read" says.

    >>> expected_cost(None)
    'expected cost of the cut, nats'
    """
    return f"expected cost of the cut, {UNITS.get(type(target), 'nats')}"


def single_coefficients(design: Design, strength: str | float) -> None:
    """Refuse "mcp", which weighs coefficients one by one, where they come in groups."""
    grouped = design.functions > 1 or getattr(design.basis, "directions", 1) != 1
    if strength == "mcp" and grouped:
        raise InputError(
            f"`strength` 'mcp' weighs single coefficients, and in design {design.name!r} components and functions are "
            "groups of them: use 'ebic', or basis=Component(1)"
        )


DESIGNS: dict[str, Way] = {
    "activation": Way(
        Activation,
        learn_children,
        lambda target: "share of the target's variance",
        single_coefficients,
        others=True,
        bends=True,
        features=True,
    ),
    "paper": Way(
        partial(Activation, name="paper"),
        learn_in_one,
        lambda target: "norm of coefficients",
        lambda design, strength: whole_strength(strength),
        component=partial(Component, None),
        others=True,
        bends=True,
    ),
    "read": Way(
        ReadDesign,
        learn_read,
        expected_cost,
        lambda design, strength: None,
        look_again=refine,
        neurons=True,
        features=True,
    ),
    "routed": Way(Routed, learn_children, lambda target: "share of the target's variance", single_coefficients),
}


def way_of(design: Any) -> Way:
    """The design that a user named.

    Raises
    ------
    InputError: none of that name.
    """
    if not isinstance(design, str) or design not in DESIGNS:
        raise InputError(f"`design` {shortened(design)} is unknown: use one of {', '.join(map(repr, DESIGNS))}")
    return DESIGNS[design]


def learn(
    statistics: Statistics,
    *,
    strength: float | str = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
    process_group: Any = None,
) -> AttributionGraph:
    """The attribution graph of `statistics` at a `strength`, a fraction of lambda_max, or a rule that chooses one.

    How depends on the design: `learn_children` (activation, routed), `learn_in_one` (paper), `learn_read` (read). All
    prove each regression's duality gap, and keep edges that are on a path from the input to the target. The processes
    of a `process_group` ("world", or a group of torch.distributed), which all hold the same statistics, deal the
    children out.

    Raises
    ------
    InputError: fewer than two samples, a strength that needs folds the statistics don't have, or one that the design
    doesn't have.

    >>> from tl_circuitlasso.synthetic import planted
    >>> problem = planted(layers=1, heads=2, prompts=64, seed=1)
    >>> graph = learn(problem.statistics())
    >>> ("m0", "target") in graph.kept_edges()
    True
    """
    way = way_of(statistics.meta["design"])
    ranks = as_ranks(process_group)
    shown = progress and ranks.rank == 0
    return way.learn(statistics, strength=strength, tol=tol, seed=seed, progress=shown, ranks=ranks)
