"""Optimal ablation: cut edges carry the constants that hurt the behaviour least (Li & Janson 2024, arXiv 2409.09951).

A mean or a zero takes away the information that a source carries, and besides puts the model into a state that it is
never in; part of the loss is that spoofing and not the missing information. The constants a that maximise the metric,

    a* = argmax_a  mean over prompts of m(circuit whose cut edges carry a_source),

leave the least possible of it. There is one constant per source (a head's z, what an MLP or the input writes), the same
for all prompts, at each position or at all; each circuit has its own. They are found by L-BFGS from the mean, and the
best point seen is kept, so no circuit is worse than with mean ablation on the prompts that they were fitted on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.baselines.means import kept_positions
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Experiment, Optimal
from tl_circuitlasso.models.ablation import from_values
from tl_circuitlasso.models.metric import as_number
from tl_circuitlasso.models.pairs import PairBatch, Pairs
from tl_circuitlasso.models.patch import Circuits, run_circuits
from tl_circuitlasso.models.patching import Written

TOGETHER = 5  # steps between two looks at whether the metric still rises


@dataclass(frozen=True, eq=False)
class Fitted:
    """Constants, the fitted metric's mean with them and with the means that they started from, and what it took.

    Attributes
    ----------
    converged: whether the search ended because the metric had stopped rising, not because of `steps`.
    forward_passes: per prompt of the data set, each with a backward pass.
    """

    written: Written
    value: float
    start: float
    converged: bool
    forward_passes: float


def fit(setup: Experiment, circuits: Circuits | None, start: Written) -> Fitted:
    """The optimal constants of one circuit, or of the model with every edge cut (None).

    Raises
    ------
    InputError: a metric without a derivative, or one that isn't finite at the start.
    """
    problem = _Problem(setup, circuits)
    search = _Search(problem, start)
    search.run(setup.optimal.steps, setup.optimal.tolerance)
    passes = 0.0 if circuits is None else search.evaluations * problem.share
    return Fitted(search.best, search.values[-1], search.values[0], search.converged, passes)


class _Problem:
    """The metric's mean over the prompts as a function of the constants."""

    def __init__(self, setup: Experiment, circuits: Circuits | None) -> None:
        own = setup.optimal.metric
        self.adapter, self.circuits = setup.adapter, circuits
        self.metric: Metric = setup.objective if own is None else setup.pairs.metric(own)
        self.batches = [
            (batch, rows, kept_positions(setup.adapter, batch.clean, setup.input_node))
            for batch, rows in _drawn(setup.pairs, setup.optimal)
        ]
        self.count = sum(len(rows) for _, rows, _ in self.batches)
        self.share = self.count / len(setup)

    def parts(self, constants: Written) -> "list[Callable[[], Tensor]]":
        """Each batch's part of the mean, to be computed (and differentiated) one at a time."""
        return [lambda one=one: self._part(constants, *one) for one in self.batches]

    def _part(
        self, constants: Written, batch: PairBatch, rows: Int[Tensor, " batch"], positions: Tensor | None
    ) -> Float[Tensor, ""]:
        adapter = self.adapter
        values = constants.map(lambda part: part.expand(*batch.mask.shape, *part.shape[2:]))
        if positions is not None:
            values = replace(values, input=values.input + positions)
        cut = from_values(adapter, values)
        logits = cut.logits
        if self.circuits is not None:
            logits = run_circuits(adapter, batch.clean.tokens, batch.mask, self.circuits, cut, gradients=True)[0]
        value = as_number(self.metric(batch.shown(logits), rows), finite=False)
        if not value.requires_grad:
            raise InputError(
                "`metric` has no derivative, so optimal constants can't be fitted by it: give another for the fit, "
                "ablation=evaluate.Optimal(metric=...), or use ablation='mean'"
            )
        return value / self.count


def _drawn(data: Pairs, how: Optimal) -> list[tuple[PairBatch, Int[Tensor, " batch"]]]:
    """Batches of the pairs that constants are fitted on, with their numbers among all pairs."""
    if how.prompts is None or how.prompts >= len(data):
        return [(batch, batch.rows) for batch in data]
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(how.seed))[: how.prompts].sort().values
    return [(batch, rows[batch.rows]) for batch in data.take(rows)]


class _Search:
    """L-BFGS with a strong Wolfe line search that remembers the best point it has seen."""

    def __init__(self, problem: _Problem, start: Written) -> None:
        self.problem, self.evaluations, self.converged = problem, 0, False
        self.point = start.map(lambda part: part.detach().clone().requires_grad_())
        self.best = start
        self.values: list[float] = []  # the best value so far, at the start and at each look
        self.highest = -float("inf")

    def run(self, steps: int, tolerance: float) -> None:
        """At most so many steps from the start, some at a time."""
        leaves = list(self.point.in_order)
        with torch.enable_grad():
            self._evaluate()
            if not self.values:
                raise InputError("`metric` is NaN or infinite with mean ablation: check the prompts and the metric")
            optimiser = torch.optim.LBFGS(leaves, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0)
            for first in range(0, steps, TOGETHER):
                optimiser.param_groups[0]["max_iter"] = min(TOGETHER, steps - first)
                optimiser.step(self._evaluate)  # type: ignore[arg-type]
                self.values.append(self.highest)
                if self.values[-1] - self.values[-2] <= tolerance * (self.highest - self.values[0]):
                    self.converged = True
                    return

    def _evaluate(self) -> Tensor:
        """Minus the metric's mean, its gradient left at the leaves."""
        self.evaluations += 1
        total = 0.0
        for leaf in self.point.in_order:
            leaf.grad = torch.zeros_like(leaf)
        for part in self.problem.parts(self.point):
            value = part()
            (-value).backward()
            total += float(value.detach())
        if total > self.highest:
            self.highest, self.best = total, self.point.map(lambda leaf: leaf.detach().clone())
        if not self.values and total == total and abs(total) != float("inf"):
            self.values.append(total)
        return torch.tensor(-total, dtype=self.point.input.dtype)
