"""Designs as wholes: what each collects, how it learns from that, whether it looks again, and what its scores say.

A new design is a `Way` (discover/way.py) in a file of its own, and a line here.

>>> sorted(DESIGNS)
['activation', 'paper', 'read', 'routed']
"""

from typing import Any

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover.designs.collected import Collecting
from tl_circuitlasso.discover.designs.features import Features
from tl_circuitlasso.discover.designs.moments import ACTIVATION, PAPER, ROUTED
from tl_circuitlasso.discover.designs.neurons import Neurons
from tl_circuitlasso.discover.designs.read import Read
from tl_circuitlasso.discover.way import Way
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

DESIGNS: dict[str, Collecting[Any]] = {way.name: way for way in (ACTIVATION, PAPER, Read(), ROUTED)}
OF_BASES = (Features(), Neurons())  # ways of bases that have one of their own, whatever collects else


def named(design: Any) -> Collecting[Any]:
    """The design that a user named.

    Raises
    ------
    InputError: none of that name.
    """
    if not isinstance(design, str) or design not in DESIGNS:
        raise InputError(f"`design` {shortened(design)} is unknown: use one of {', '.join(map(repr, DESIGNS))}")
    return DESIGNS[design]


def way_for(design: Any, basis: Any) -> Way[Any]:
    """The way of a design that a user named, for the basis.

    >>> type(way_for("read", "neuron")).__name__, type(way_for("activation", "neuron")).__name__
    ('Neurons', 'Moments')

    Raises
    ------
    InputError: no design or no basis of that name.
    """
    way = named(design)
    return next((own for own in OF_BASES if own.takes(design, basis)), way)


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
    way = named(statistics.meta["design"])
    ranks = as_ranks(process_group)
    shown = progress and ranks.rank == 0
    return way.learn(statistics, strength=strength, tol=tol, seed=seed, progress=shown, ranks=ranks)
