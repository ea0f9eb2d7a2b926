"""Design `read`: what each child reads of each parent through its own weights, in pairs of prompts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch

from tl_circuitlasso.data.schema import COUNT, FOLDS, ports
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Labels, LogitDiff, Target, Values, take
from tl_circuitlasso.discover.designs.collected import Collecting
from tl_circuitlasso.discover.drawing import Drawn, draw_by_output
from tl_circuitlasso.discover.learning_read import learn_read
from tl_circuitlasso.discover.looks import Looks
from tl_circuitlasso.discover.probing import CAPACITY, fit_probe
from tl_circuitlasso.discover.refining import CHEAP, ROUNDS, SHARE, refine
from tl_circuitlasso.discover.refining import PAIRS as LOOKED_AT
from tl_circuitlasso.discover.stages import (
    ALLOCATOR,
    all_batches,
    bare_passes,
    batches,
    confirm_stage,
    run_sizes,
)
from tl_circuitlasso.discover.way import Job, Stage, batch_sizes
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import footprint, outcome, read, sweep
from tl_circuitlasso.models.bases import Basis
from tl_circuitlasso.models.collect import CHECKED, Collected, Plan, identity_of, own_file
from tl_circuitlasso.models.outcome import Probe
from tl_circuitlasso.models.pairs import PAIR, Pairs
from tl_circuitlasso.models.read import ReadDesign, affordable_draws

UNITS = {LogitDiff: "logits", Values: "units of the numbers"}  # of targets that are numbers
HELD = 64 << 20  # bytes that the activations of the prompts that run together may always take
HELD_SHARE = 0.4  # of the weights' bytes, what they may take in a large model
SEEN_TOGETHER = 16  # prompts that share a batch for all that: each is compared with another of its batch

SWEEP_PEAK = 3  # what a part of a sweep has at its peak, in units of `sweep.memory`
OUTCOME_COPIES = 8  # predictions of both prompts of a pair, logarithms, signs and shares of a large vocabulary
DIVERGENCE_COPIES = 6  # the same at every position of one pair, while positions are drawn
ROW_COPIES = 3  # rows held, rows joined, and the rows that stay
CHECK_COPIES = 3  # activations of the closure check's prompts, and what they are compared with
PROBE_COPIES = 6  # of a probe's samples: as they are, standardised, halved, and what the solver makes of them
CHILD_COPIES = 4  # of a child's rows, and of its Gram


class Read(Collecting[ReadDesign]):
    """Prompts are compared in pairs, and kept edges get a second, exact look."""

    name = "read"
    spread = True

    def collects(self, basis: Basis, *, nonlinear: bool) -> ReadDesign:
        return ReadDesign(basis)

    def learn(
        self, statistics: Statistics, *, strength: float | str, tol: float, seed: int, progress: bool, ranks: Ranks
    ) -> AttributionGraph:
        return learn_read(statistics, strength=strength, tol=tol, seed=seed, progress=progress, ranks=ranks)

    def unit(self, target: Target) -> str:
        """What a score of design "read" says.

        >>> Read().unit(None)
        'expected cost of the cut, nats'
        """
        return f"expected cost of the cut, {UNITS.get(type(target), 'nats')}"

    def sides(self, job: Job[ReadDesign]) -> int:
        return 1 if job.pairs is None else 2  # a prompt and its counterpart run together

    def with_counterparts(self, job: Job[ReadDesign], pairs: Pairs) -> Job[ReadDesign]:
        most = min(job.batch_size // PAIR, _at_once(job, pairs.clean.width, sides=PAIR))
        pairs = pairs.batched(max(1, most), fewest=1)
        return replace(job, prompts=pairs.clean, pairs=pairs, what=replace(job.what, contrast=True))

    def in_room(self, job: Job[ReadDesign]) -> Job[ReadDesign]:
        """Batches whose activations have room, of several prompts at least, among which partners are drawn."""
        most = max(SEEN_TOGETHER, _at_once(job, job.prompts.width, sides=1))
        return job.batched(most) if most < job.batch_size else job

    def drawn(self, job: Job[ReadDesign]) -> tuple[Job[ReadDesign], Drawn | None]:
        """Of more than `max_prompts` so many, by what the model says on all of them."""
        most, given = job.max_prompts, job.prompts.n_prompts
        if most is None or given is None or given <= most:
            return job, None
        options = {"progress": job.progress, "ranks": job.ranks}
        found = draw_by_output(job.adapter, job.prompts, job.target, most, job.seed, **options)
        pairs = None if job.pairs is None else job.pairs.take(found.rows)
        prompts = job.prompts.take(found.rows) if pairs is None else pairs.clean
        weighed = replace(job.what, weight=found.weight)
        return replace(job, prompts=prompts, target=take(job.target, found.rows), pairs=pairs, what=weighed), found

    def plan(self, job: Job[ReadDesign]) -> tuple[Plan[ReadDesign], int]:
        design, passes = job.what, 0
        if job.prompts.n_prompts is not None:
            design = replace(design, draws=draws(job))
        if isinstance(job.target, Labels | Values):
            options = {"last": job.last, "progress": job.progress, "ranks": job.ranks}
            probe, passes = fit_probe(job.adapter, job.prompts, job.target, **options)
            design = replace(design, probe=probe)
        plan, _ = super().plan(job)
        return replace(plan, design=design), passes

    def rehearsed(self, job: Job[ReadDesign]) -> ReadDesign:
        """With a probe that says nothing where one would be fitted first."""
        design = replace(job.what, draws=draws(job))
        if not isinstance(job.target, Labels | Values):
            return design
        columns = int(job.target.y.max()) + 1 if isinstance(job.target, Labels) else 1
        options = {"device": job.adapter.device, "dtype": job.adapter.compute_dtype}
        like = torch.zeros(job.adapter.shape.d_model, columns, **options)
        return replace(design, probe=Probe(like, like[0]))

    def look_again(
        self, job: Job[ReadDesign], collected: Collected, plan: Plan[ReadDesign], graph: AttributionGraph
    ) -> tuple[AttributionGraph, int]:
        options: dict[str, Any] = {"prompts": collected.prompts, "ranks": job.ranks, "progress": job.progress}
        if job.checkpoint is not None:
            identity = {**identity_of(job.adapter, plan), "data": collected.statistics.origin}
            options["looks"] = Looks.beside(own_file(job.checkpoint, job.ranks), identity)
        return refine(job.adapter, collected.sample, plan, graph, **options)

    def facts(self, job: Job[ReadDesign], collected: Collected) -> Mapping[str, Any]:
        pairs = int(collected.statistics.sums[COUNT].sum())
        return {"prompt_pairs": pairs, "partners": "random" if job.twins is None else "corrupted"}

    def arguments(self, job: Job[ReadDesign]) -> Mapping[str, Any]:
        return {**super().arguments(job), "max_prompts": job.max_prompts, "refined": job.refined}

    def stages(self, job: Job[ReadDesign]) -> list[Stage]:
        probed = isinstance(job.target, Labels | Values)
        stages = [_outputs_stage(job)] if job.used < job.given and not probed else []
        stages += [_probe_stage(job)] if probed else []
        stages += [_statistics_stage(job), _solve_stage(job)]
        stages += [_second_look_stage(job)] if job.refined else []
        return [*stages, *confirm_stage(job)]

    def smaller(self, job: Job[ReadDesign]) -> Iterator[Job[ReadDesign]]:
        """First pairs one by one, then batches, last the rows that the regressions see."""
        sizes = batch_sizes(job)
        one_by_one = replace(job, what=replace(job.what, swept=1))
        yield from (one_by_one.batched(size) for size in sizes)
        yield replace(job, what=replace(job.what, swept=1, rows=read.FEWEST_ROWS)).batched(sizes[-1])

    def roomier(self, job: Job[ReadDesign], fits: Callable[[Job[ReadDesign]], bool]) -> Job[ReadDesign]:
        """As many pairs swept at once as there is room for."""
        one = _one_swept(job)
        while fits(larger := _sweeping(job, 2 * (job.what.swept or 1), one)) and larger.what != job.what:
            job = larger
        return job

    def cuts(self, asked: Job[ReadDesign], cut: Job[ReadDesign]) -> tuple[str, ...]:
        one, default = _one_swept(cut), read.swept_bytes(asked.adapter)
        many, few = (max(1, (job.what.swept or default) // one) for job in (asked, cut))
        found = [f"pairs swept at once {many} to {few}"] if few < many else []
        found += [f"rows kept {asked.what.rows} to {cut.what.rows}"] if cut.what.rows < asked.what.rows else []
        return tuple(found)


def draws(job: Job[ReadDesign]) -> int:
    """How often every batch is paired anew; at how many positions a prompt and its counterpart are compared."""
    return affordable_draws(job.adapter, job.used, job.prompts.width)


def directions(job: Job[ReadDesign]) -> int:
    """How many directions of the target a sweep follows."""
    if isinstance(job.target, Labels):
        return int(job.target.y.max()) + 1
    return outcome.count(job.adapter, job.target, None)


def _at_once(job: Job[ReadDesign], width: int, *, sides: int) -> int:
    """How many prompts of so many positions (with their counterparts: two `sides`) run together without their
    activations taking more than two fifths of what the weights do."""
    one = sides * footprint.held(job.adapter, job.what.wanted(job.adapter, job.target), 1, width)
    return int(max(HELD, HELD_SHARE * job.adapter.weight_bytes) / one)


def _one_swept(job: Job[ReadDesign]) -> int:
    """Bytes of one pair that is swept."""
    return sweep.memory(job.adapter, job.prompts.width, directions(job))


def _sweeping(job: Job[ReadDesign], swept: int, one: int) -> Job[ReadDesign]:
    return replace(job, what=replace(job.what, swept=min(max(swept, one), read.swept_bytes(job.adapter))))


# ---- stages ----------------------------------------------------------------------------------------------------------


def _outputs_stage(job: Job[ReadDesign]) -> Stage:
    """What every prompt's model says, by which those that are looked at are drawn."""
    rows, positions = min(job.batch_size, job.given), job.prompts.width
    logits = footprint.held(job.adapter, ["logits"], rows, positions)
    need = ALLOCATOR + logits + footprint.passing(job.adapter, rows, positions, logits=True)
    passes = ceil(job.given / job.batch_size)
    return Stage("outputs", need, passes, paced=bare_passes(job, passes))


def _probe_stage(job: Job[ReadDesign]) -> Stage:
    """A linear probe of the final stream, on as many samples as it needs."""
    rows, positions = run_sizes(job)
    stream = footprint.held(job.adapter, [job.adapter.final], rows, positions)
    samples = job.used * (1 if job.last else positions)
    need = 8 * PROBE_COPIES * min(samples, CAPACITY) * job.adapter.shape.d_model
    passing = footprint.passing(job.adapter, rows, positions, logits=False)
    passes = batches(job)
    told = bare_passes(job, passes)
    return Stage("probe", ALLOCATOR + max(stream + passing, need), passes, at_most=samples > CAPACITY, paced=told)


def _statistics_stage(job: Job[ReadDesign]) -> Stage:
    rows, positions = run_sizes(job)
    adapter, keys = job.adapter, job.what.wanted(job.adapter, job.target)
    acts = footprint.held(adapter, keys, rows, positions)
    passing = footprint.passing(adapter, rows, positions, logits=job.target is None)
    checked = CHECK_COPIES * footprint.held(adapter, keys, min(rows, CHECKED), positions)
    base = footprint.folded(adapter) + ALLOCATOR + _sums(job) + ROW_COPIES * _rows(job)
    peak = base + max(acts + passing, acts + _swept(job), checked)
    passes = job.sides * batches(job)
    return Stage("statistics", peak, passes, paced=all_batches(job))


def _solve_stage(job: Job[ReadDesign]) -> Stage:
    need = ALLOCATOR + _sums(job) + _rows(job) + _solved(job)
    return Stage("solve", need, at_most=True, paced=lambda pace: pace.regressing * _products(job))


def _second_look_stage(job: Job[ReadDesign]) -> Stage:
    rows, positions = run_sizes(job)
    adapter, keys = job.adapter, job.what.wanted(job.adapter, job.target)
    passing = footprint.passing(adapter, rows, positions, logits=job.target is None)
    looks = ROUNDS * job.sides * ceil(min(LOOKED_AT, job.used) / job.batch_size)
    part = footprint.held(adapter, keys, min(rows, job.sides * LOOKED_AT), positions) + max(_swept(job), passing)
    peak = footprint.folded(adapter) + ALLOCATOR + _sums(job) + _rows(job) + part
    operations = max(CHEAP, SHARE * read.operations(adapter)[2] * positions * job.used)
    told = ROUNDS * operations / 2
    return Stage("second look", peak, looks, at_most=True, paced=lambda pace: told * pace.running)


def _swept(job: Job[ReadDesign]) -> int:
    """Bytes of the pairs that are swept at once, with what is read of their logits."""
    adapter, room = job.adapter, job.what.swept or read.swept_bytes(job.adapter)
    one = _one_swept(job)
    pairs = min(max(1, room // one), _pairs_of_batch(job))
    vocabulary = adapter.shape.d_vocab_out * adapter.compute_dtype.itemsize if job.target is None else 0
    drawn = DIVERGENCE_COPIES * job.prompts.width * vocabulary
    return max(SWEEP_PEAK * pairs * one + OUTCOME_COPIES * pairs * vocabulary, drawn)


def _pairs_of_batch(job: Job[ReadDesign]) -> int:
    size = min(job.batch_size, job.used)
    once = job.what.contrast and (job.last or job.prompts.positions == "last")
    return size * (1 if once else draws(job))


def _sums(job: Job[ReadDesign]) -> int:
    """Bytes of the running sums."""
    columns, pairs = read.columns(job.adapter), _pairs_of_components(job)
    number = outcome.is_number(job.adapter, job.target)
    return 8 * FOLDS * (columns * (1 + (number and job.what.contrast)) + pairs * (1 + number))


def _pairs_of_components(job: Job[ReadDesign]) -> int:
    return sum(heads * sources for _, heads, sources in read.children(job.adapter))


def _row_count(job: Job[ReadDesign]) -> int:
    made = batches(job) * _pairs_of_batch(job) * directions(job)
    return min(read.row_capacity(job.adapter, job.what.rows), made)


def _rows(job: Job[ReadDesign]) -> int:
    """Bytes of the contributions that are kept whole."""
    return 4 * _row_count(job) * read.columns(job.adapter)


def _solved(job: Job[ReadDesign]) -> int:
    """Bytes of the largest child's regression, and of all edges side by side."""
    rows, columns = _row_count(job), read.columns(job.adapter)
    widest = max(wide for _, wide in _problems(job))
    edges = 8 * (2 * FOLDS * (columns + 2 * _pairs_of_components(job)) + 8 * columns)
    return edges + CHILD_COPIES * 8 * (rows * widest + widest**2)


def _problems(job: Job[ReadDesign]) -> list[tuple[int, int]]:
    """The regressions: how many are alike, and how many columns each has, ports told apart."""
    return [(heads, sources * len(ports(key))) for key, heads, sources in read.children(job.adapter)]


def _products(job: Job[ReadDesign]) -> float:
    """Multiplications of the Grams of all children, where no parent is left out beforehand."""
    rows = min(read.row_capacity(job.adapter, job.what.rows), job.used * draws(job))
    return float(sum(heads * rows * columns**2 for heads, columns in _problems(job))) / job.ranks.size
