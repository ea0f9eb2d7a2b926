"""Designs `activation`, `paper` and `routed`: regressions of activations on one another, from their second moments."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tl_circuitlasso.data.schema import FOLDS
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.discover.designs.collected import Collecting
from tl_circuitlasso.discover.learning import learn_children, learn_in_one, whole_strength
from tl_circuitlasso.discover.stages import ALLOCATOR, all_batches, batches, confirm_stage, run_sizes
from tl_circuitlasso.discover.way import Job, Stage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import footprint
from tl_circuitlasso.models.bases import Basis, Component, Neuron, Residual
from tl_circuitlasso.models.designs import Activation, Design, Routed
from tl_circuitlasso.solve import RESAMPLED

MOMENT_COPIES = 8  # of a Gram, while it is centred, scaled and cut to a child's parents
LOGIT_COLUMNS = 32  # directions of the logits in design `activation`


@dataclass(frozen=True)
class Moments(Collecting[Design]):
    """A regression of activations.

    made: the design that collection asks, for a basis, with its variant; learned: from its statistics to a graph;
    said: what a score is; checked: refuses strengths that it has no use for; directions: of components, None for all;
    others, bends: as `Collecting`; unmeasured: why nobody can say what it takes, None where that is known.
    """

    name: str
    made: Callable[..., Design]
    learned: Callable[..., AttributionGraph]
    said: str
    checked: Callable[[Design, str | int | float], object]
    directions: int | None = Component().directions
    others: bool = False
    bends: bool = False
    unmeasured: str | None = None

    def collects(self, basis: Basis, *, nonlinear: bool) -> Design:
        return self.made(basis, nonlinear=nonlinear) if self.bends else self.made(basis)

    def learn(
        self, statistics: Statistics, *, strength: float | str, tol: float, seed: int, progress: bool, ranks: Ranks
    ) -> AttributionGraph:
        return self.learned(statistics, strength=strength, tol=tol, seed=seed, progress=progress, ranks=ranks)

    def unit(self, target: Target) -> str:
        return self.said

    def component(self) -> Basis:
        return Component(self.directions)

    def check(self, design: Design, strength: str | int | float) -> None:
        self.checked(design, strength)

    def unplanned(self, job: Job[Design]) -> str | None:
        if job.what.functions > 1 and self.unmeasured is None:
            return "with nonlinear=True, whose memory nobody has measured: leave it out"
        return self.unmeasured

    def stages(self, job: Job[Design]) -> list[Stage]:
        rows, positions = run_sizes(job)
        adapter, keys = job.adapter, job.what.wanted(job.adapter, job.target)
        nodes, folds = _nodes(job), FOLDS if job.strength in RESAMPLED else 1
        target = LOGIT_COLUMNS if job.target is None else 1
        moments = 8 * folds * (nodes**2 + (nodes + target) ** 2 + _seen_by_heads(job))
        acts = footprint.held(adapter, keys, rows, positions)
        passing = footprint.passing(adapter, rows, positions, logits="logits" in keys)
        raw = footprint.held(adapter, [key for key in keys if key != "logits"], rows, positions)
        samples = rows * positions
        encoded = samples * (nodes + target) * (2 * adapter.compute_dtype.itemsize + 3 * 8)
        piloted = raw + samples * adapter.shape.d_model * 8 * 3
        peak = ALLOCATOR + footprint.folded(adapter) + moments + acts + max(passing, encoded, piloted)
        solved = ALLOCATOR + moments + 8 * MOMENT_COPIES * (nodes + target) ** 2
        return [
            Stage("statistics", peak, batches(job), paced=all_batches(job)),
            Stage("solve", solved, at_most=True),
            *confirm_stage(job),
        ]


def single_coefficients(design: Design, strength: str | int | float) -> None:
    """Refuse "mcp", which weighs coefficients one by one, where they come in groups."""
    grouped = design.functions > 1 or getattr(design.basis, "directions", 1) != 1
    if strength == "mcp" and grouped:
        raise InputError(
            f"`strength` 'mcp' weighs single coefficients, and in design {design.name!r} components and functions are "
            "groups of them: use 'ebic', or basis=Component(1)"
        )


def _one_for_all(design: Design, strength: str | int | float) -> None:
    whole_strength(strength)


SHARE = "share of the target's variance"
ACTIVATION = Moments("activation", Activation, learn_children, SHARE, single_coefficients, others=True, bends=True)
ROUTED = Moments("routed", Routed, learn_children, SHARE, single_coefficients)
PAPER = Moments(
    "paper",
    partial(Activation, name="paper"),
    learn_in_one,
    "norm of coefficients",
    _one_for_all,
    directions=None,
    others=True,
    bends=True,
    unmeasured="for design 'paper', whose regressions of whole outputs nobody has measured: use 'read' or 'activation'",
)


def _nodes(job: Job[Design]) -> int:
    """How many columns the regressions have, at most."""
    shape, basis = job.adapter.shape, job.what.basis
    if isinstance(basis, Component):
        most = basis.directions or shape.d_model  # None: all
        heads = shape.n_layers * shape.n_heads * min(most, shape.d_head)
        return heads + (1 + shape.n_layers * (not shape.attn_only)) * min(most, shape.d_model)
    wide = shape.n_layers * shape.d_mlp if isinstance(basis, Neuron) else (shape.n_layers + 1) * shape.d_model
    return min(basis.max_nodes, wide) if isinstance(basis, Neuron | Residual) else wide


def _seen_by_heads(job: Job[Design]) -> int:
    """Entries of the Grams of design `routed`: each head's own, of all that comes before it."""
    if not isinstance(job.what, Routed):
        return 0
    shape, all_nodes = job.adapter.shape, _nodes(job)
    layers = range(1, shape.n_layers + 1)
    return sum(shape.n_heads * (all_nodes * layer // shape.n_layers) ** 2 for layer in layers)
