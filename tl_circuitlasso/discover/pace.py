"""How fast a job goes here: its first batch is run and added to statistics, and the clock is read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.data.targets import Labels, Values, take
from tl_circuitlasso.discover.job import Job
from tl_circuitlasso.discover.planning import RunPlan, unplanned
from tl_circuitlasso.discover.refining import CHEAP, ROUNDS, SHARE
from tl_circuitlasso.discover.stages import Stage
from tl_circuitlasso.models import read
from tl_circuitlasso.models.bases import Neuron
from tl_circuitlasso.models.collect import Plan, left_aligned, sample_of
from tl_circuitlasso.models.outcome import Probe
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Batch, first_prompts
from tl_circuitlasso.neurons import Behaviour, neuron_circuit
from tl_circuitlasso.progress import EVERY, say

FEW = 2  # prompts that are run to be warm
TOLD = 4  # prompts that are run where all that is wanted is a line ahead of a long run
WORTH = 1e10  # multiplications and additions of all forward passes: what takes fewer isn't long on any machine
USUAL = 4  # forward-equivalents of most runs: what is short even so isn't measured further
SIZE = 512  # rows of the matrices whose product tells how fast matrix products are


@dataclass(frozen=True)
class Pace:
    """Seconds per prompt of a bare forward pass, and of a pass with all that is made of its activations; seconds of one
    multiplication and addition of the regressions (double precision, on the CPU), and of the model's own."""

    forward: float
    whole: float
    regressing: float
    running: float


def tell_ahead(asked: Job, job: Job) -> None:
    """Say what a long run will take, before it starts, where progress is wanted and it can be known."""
    with job.ranks.together():
        if job.progress and job.ranks.rank == 0 and unplanned(job) is None and _may_be_long(job):
            ahead = with_times(RunPlan.of(asked, job, (), None), job, TOLD)
            if ahead.seconds >= EVERY:
                say(f"circuit_lasso: {ahead.brief()}")


def _may_be_long(job: Job) -> bool:
    if read.operations(job.adapter)[2] * job.prompts.width * job.given < WORTH:
        return False
    told = first_prompts(_first(job), TOLD)
    if not bool(told.keep.any(1).all()):  # some of them have nothing that could be timed
        return False
    few = first_prompts(told, FEW)
    return _timed(job, _bare(job), few) / len(few.tokens) * job.given * USUAL >= EVERY


def with_times(plan: RunPlan, job: Job, most: int | None = None) -> RunPlan:
    """The plan with seconds and forward-equivalents, by the clock: from the first batch, or `most` of its prompts."""
    pace = measure(job, most)
    bare = pace.forward * plan.prompts
    stages = []
    for stage in plan.stages:
        seconds = _seconds(stage, job, pace)
        stages.append(stage if seconds is None else replace(stage, seconds=seconds, forwards=seconds / bare))
    return replace(plan, stages=tuple(stages))


def measure(job: Job, most: int | None = None) -> Pace:
    """Run `most` prompts of the first batch (None: all of it); a few of them before, to be warm."""
    batch = first_prompts(_first(job), min(job.used, most or job.used))
    return Pace(
        forward=_timed(job, _bare(job), batch) / len(batch.tokens),
        whole=_timed(job, _whole(job, batch), batch) / len(batch.tokens),
        regressing=_product(job, torch.zeros(SIZE, SIZE, dtype=torch.float64)),
        running=_product(job, torch.zeros(SIZE, SIZE, dtype=job.adapter.compute_dtype, device=job.adapter.device)),
    )


def _first(job: Job) -> Batch:
    batch = next(iter(job.prompts))
    if job.twins is None:
        return left_aligned(batch)
    return left_aligned(replace(batch, partners=next(iter(job.twins)).tokens))


def _timed(job: Job, work: Callable[[Batch], None], batch: Batch) -> float:
    work(first_prompts(batch, FEW))
    _drain(job)
    began = time.perf_counter()
    work(batch)
    _drain(job)
    return time.perf_counter() - began


def _product(job: Job, matrix: Float[Tensor, "size size"]) -> float:
    def multiplied(_: Batch) -> None:
        torch.mm(matrix, matrix)

    return _timed(job, multiplied, _first(job)) / SIZE**3


def _drain(job: Job) -> None:
    if job.adapter.device.type == "cuda":
        torch.cuda.synchronize(job.adapter.device)


def _bare(job: Job) -> Callable[[Batch], None]:
    """The model's own pass over a batch."""

    def run(batch: Batch) -> None:
        job.adapter.run(batch.tokens, batch.mask, ["scale.final"])

    return run


def _whole(job: Job, pilot: Batch) -> Callable[[Batch], None]:
    """What is made of a batch before anything is solved."""
    if isinstance(job.what, Neuron):
        return lambda batch: _scored(job, job.what, len(batch.tokens))  # type: ignore[arg-type]
    if isinstance(job.what, SAEFeatures):
        encoders = job.what.encoders()

        def encoded(batch: Batch) -> None:
            acts = job.adapter.run(batch.tokens, batch.mask, list(encoders))
            for hook, encoder in encoders.items():
                for rows in batch.keep.nonzero().split(encoder.rows_at_once()):
                    encoder.encode(acts[hook][tuple(rows.T)])

        return encoded
    plan = Plan(_unprobed(job), job.target, last=job.last, seed=job.seed)
    statistics = plan.design.start(job.adapter, sample_of(job.adapter, plan, pilot, 0))

    def added(batch: Batch) -> None:
        plan.design.add(statistics.fresh(), job.adapter, sample_of(job.adapter, plan, batch, 0))

    return added


def _scored(job: Job, basis: Neuron, count: int) -> None:
    rows = torch.arange(count)
    pairs = None if job.pairs is None else job.pairs.take(rows)
    behaviour = Behaviour(job.adapter, job.prompts.take(rows), take(job.target, rows), pairs, job.last, job.seed)
    neuron_circuit(behaviour, replace(basis, linked=0), strength="auto", progress=False)


def _unprobed(job: Job) -> Any:
    """The design, with a probe that says nothing where one would be fitted first."""
    if not isinstance(job.what, ReadDesign):
        return job.what
    design = replace(job.what, draws=job.draws)
    if not isinstance(job.target, Labels | Values):
        return design
    columns = int(job.target.y.max()) + 1 if isinstance(job.target, Labels) else 1
    like = torch.zeros(job.adapter.shape.d_model, columns, device=job.adapter.device, dtype=job.adapter.compute_dtype)
    return replace(design, probe=Probe(like, like[0]))


def _seconds(stage: Stage, job: Job, pace: Pace) -> float | None:
    """What a stage takes at this pace; None where it can't be told."""
    prompts, adapter = job.used, job.adapter
    if stage.name in ("outputs", "probe"):
        return pace.forward * (job.prompts.n_prompts or 0) * (stage.passes or 0.0)
    if stage.name in ("statistics", "encode", "forward and sweep"):
        return pace.whole * prompts / job.ranks.size
    if stage.name == "second look":
        operations = max(CHEAP, SHARE * read.operations(adapter)[2] * job.prompts.width * prompts)
        return ROUNDS * operations / 2 * pace.running
    if stage.name == "solve" and isinstance(job.what, ReadDesign):
        return pace.regressing * _products(job, job.what)
    return None


def _products(job: Job, design: ReadDesign) -> float:
    """Multiplications of the Grams of all children, where no parent is left out beforehand."""
    rows = min(read.row_capacity(job.adapter, design.rows), job.used * job.draws)
    sizes = [(heads, sources * (3 if key.startswith("a") else 1)) for key, heads, sources in read.children(job.adapter)]
    return float(sum(heads * rows * columns**2 for heads, columns in sizes)) / job.ranks.size
