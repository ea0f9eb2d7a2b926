"""Designs that collect statistics and learn from them: what they have in common, from the collection to the record."""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from tl_circuitlasso._checks import truth
from tl_circuitlasso.data.schema import FOLDS
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.discover.confirming import check_method
from tl_circuitlasso.discover.drawing import Drawn
from tl_circuitlasso.discover.provenance import confirmed, per_prompt
from tl_circuitlasso.discover.way import Job, Request, Way
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.bases import Basis, Component, Neuron, as_basis
from tl_circuitlasso.models.collect import Collected, Plan, collect, sample_of
from tl_circuitlasso.models.designs import Design
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.solve import RESAMPLED

Some = TypeVar("Some", bound=Design)


class Collecting(Way[Some]):
    """A way by statistics. `name`: how the design is called, and what its statistics say in `meta["design"]`.

    others: whether it takes any basis but components; bends: whether it has a nonlinear variant.
    """

    name: str
    others = False
    bends = False

    @abstractmethod
    def collects(self, basis: Basis, *, nonlinear: bool) -> Some:
        """The design that collection asks, for a basis."""

    @abstractmethod
    def learn(
        self, statistics: Statistics, *, strength: float | str, tol: float, seed: int, progress: bool, ranks: Ranks
    ) -> AttributionGraph:
        """The graph of its statistics."""

    @abstractmethod
    def unit(self, target: Target) -> str:
        """What a score says."""

    def component(self) -> Basis:
        """The basis of that name."""
        return Component()

    def check(self, design: Some, strength: str | int | float) -> None:
        """Refuse a strength that it has no use for."""

    def drawn(self, job: Job[Some]) -> tuple[Job[Some], Drawn | None]:
        """The job with those prompts alone that are looked at, and how they were drawn; None: all are."""
        return job, None

    def plan(self, job: Job[Some]) -> tuple[Plan[Some], int]:
        """What to collect, and the forward passes that it took to know."""
        folds = FOLDS if job.strength in RESAMPLED else 1
        return Plan(job.what, job.target, last=job.last, folds=folds, seed=job.seed), 0

    def rehearsed(self, job: Job[Some]) -> Some:
        """A design that takes as long as the planned one, without a pass to know it."""
        return job.what

    def look_again(
        self, job: Job[Some], collected: Collected, plan: Plan[Some], graph: AttributionGraph
    ) -> tuple[AttributionGraph, int]:
        """A second look at the kept edges, on the model, and the passes that it took."""
        return graph, 0

    def facts(self, job: Job[Some], collected: Collected) -> Mapping[str, Any]:
        """What else the record is to say of a collection."""
        return {}

    def arguments(self, job: Job[Some]) -> Mapping[str, Any]:
        """The arguments that decided, beside those that all designs have."""
        return {"design": self.name, "basis": job.what.basis.name}

    def asked(self, request: Request, target: Target) -> Some:
        design = self.of_basis(request.basis, nonlinear=request.nonlinear)
        asked = request.method, request.corrupted, request.metric, design.basis.name, target
        check_method(*asked, paired=design.paired, budget=request.budget, size=request.size)
        self.check(design, request.strength)
        return design

    def of_basis(self, basis: str | Basis, *, nonlinear: bool = False) -> Some:
        """The design, for the basis.

        Raises
        ------
        InputError: a basis that it doesn't take, or it has no nonlinear variant.
        """
        truth("nonlinear", nonlinear)
        chosen = self.component() if isinstance(basis, str) and basis == "component" else as_basis(basis)
        if nonlinear and not self.bends:
            raise InputError("`nonlinear` is for the designs 'activation' and 'paper': leave it out")
        if chosen.name != "component" and not self.others:
            known = "design='read' or 'activation'" if isinstance(chosen, Neuron) else "design='activation'"
            raise InputError(f"`design` {self.name!r} reads whole components: with basis={chosen.name!r} use {known}")
        if isinstance(chosen, Neuron) and (chosen.linked or chosen.reference != "mean"):
            name = "linked" if chosen.linked else "reference"
            raise InputError(
                f"`{name}` of Neuron is for design 'read': design {self.name!r} regresses neurons at one position, "
                "without seeing attention; use design='read', or leave it out"
            )
        return self.collects(chosen, nonlinear=nonlinear)

    def pairs(self, what: Some) -> bool:
        return what.paired

    def timed(self, job: Job[Some], pilot: Batch) -> Callable[[Batch], None]:
        plan = Plan(self.rehearsed(job), job.target, last=job.last, seed=job.seed)
        statistics = plan.design.start(job.adapter, sample_of(job.adapter, plan, pilot, 0))

        def added(batch: Batch) -> None:
            plan.design.add(statistics.fresh(), job.adapter, sample_of(job.adapter, plan, batch, 0))

        return added

    def run(self, job: Job[Some], began: float) -> AttributionGraph:
        some, drawn = self.drawn(job)
        plan, calls = self.plan(some)
        calls += 0 if drawn is None else drawn.forward_passes
        shared = {"progress": job.progress, "ranks": job.ranks}
        collected = collect(job.adapter, some.prompts, plan, twins=some.twins, checkpoint=job.checkpoint, **shared)
        clock = [time.perf_counter()]
        shown = job.progress and job.ranks.rank == 0
        options = {"strength": job.strength, "seed": job.seed, "tol": 1e-4, "progress": shown, "ranks": job.ranks}
        graph = self.learn(collected.statistics, **options)
        clock.append(time.perf_counter())
        graph, looks = self.look_again(job, collected, plan, graph) if job.refined else (graph, 0)
        clock.append(time.perf_counter())
        if job.causal is not None:
            graph = job.causal.apply(graph, job.adapter, seed=job.seed, **shared)
        clock.append(time.perf_counter())
        spent = _Spent(calls, looks, tuple(after - before for before, after in pairwise(clock)), began)
        return self._recorded(job, some, graph, collected, spent, drawn)

    def _recorded(
        self,
        job: Job[Some],
        some: Job[Some],
        graph: AttributionGraph,
        collected: Collected,
        spent: "_Spent",
        drawn: Drawn | None,
    ) -> AttributionGraph:
        """The graph with its record; passes are for each prompt given."""
        solve, second, measured = spent.seconds
        seconds = {"forward and statistics": collected.seconds, "solve": solve, "second look": second}
        seconds |= {} if job.causal is None else {"confirm": measured}
        given = job.prompts.n_prompts or collected.prompts
        calls = spent.before + (collected.forward_passes + spent.looks) * job.sides
        passes = per_prompt(calls, given, job.batch_size)
        for report in (graph.provenance.get(name) for name in ("confirm", "smallest") if job.causal is not None):
            passes += 0 if report is None else confirmed(report, given)
        facts = {"looked_at": collected.prompts, "unit": self.unit(job.target), "forward": passes, "seconds": seconds}
        record = job.record(some.prompts, self.arguments(job), **facts)
        own: dict[str, Any] = {"closure_error": collected.closure, "processes": job.ranks.size}
        own |= {"prompts_given": job.prompts.n_prompts, "batch_size": job.batch_size}
        if collected.forward_seconds > 0 and job.adapter.device.type == "cpu":
            bare = collected.forward_seconds * given / (collected.prompts * job.sides)
            own["forward_equivalents"] = round((time.process_time() - spent.began) / bare, 2)
        if drawn is not None:
            own["drawn"] = {"prompts": len(drawn.rows), "strata": drawn.strata}
        return replace(graph, provenance={**graph.provenance, **record, **own, **self.facts(job, collected)})


@dataclass(frozen=True)
class _Spent:
    """Passes over batches before the collection and after it; seconds of the solve, the second look and what was
    measured; processor seconds when the call began."""

    before: int
    looks: int
    seconds: tuple[float, ...]
    began: float
