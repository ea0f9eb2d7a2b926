"""How fast a job goes here: its first batch is run and added to statistics, and the clock is read."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.discover.planning import RunPlan, unplanned
from tl_circuitlasso.discover.way import Job, Pace
from tl_circuitlasso.models import read
from tl_circuitlasso.models.collect import left_aligned
from tl_circuitlasso.models.tokens import Batch, first_prompts
from tl_circuitlasso.progress import EVERY, bar, say

FEW = 2  # prompts that are run to be warm
TOLD = 4  # prompts that are run where all that is wanted is a line ahead of a long run
WORTH = 1e10  # multiplications and additions of all forward passes: what takes fewer isn't long on any machine
USUAL = 4  # forward-equivalents of most runs: what is short even so isn't measured further
SIZE = 512  # rows of the matrices whose product tells how fast matrix products are


def tell_ahead(asked: Job[Any], job: Job[Any]) -> None:
    """Say what a long run will take, before it starts, where progress is wanted and it can be known."""
    if job.progress and job.ranks.rank == 0 and unplanned(job) is None and _may_be_long(job):
        with bar(total=1, progress=True, desc="time the first prompts", unit="batch") as timing:
            ahead = with_times(RunPlan.of(asked, job, (), None), job, TOLD)
            timing.update()
        if ahead.seconds >= EVERY:
            say(f"circuit_lasso: {ahead.brief()}")


def _may_be_long(job: Job[Any]) -> bool:
    if read.operations(job.adapter)[2] * job.prompts.width * job.given < WORTH:
        return False
    told = first_prompts(_first(job), TOLD)
    if not bool(told.keep.any(1).all()):  # some of them have nothing that could be timed
        return False
    few = first_prompts(told, FEW)
    return _timed(job, _bare(job), few) / len(few.tokens) * job.given * USUAL >= EVERY


def with_times(plan: RunPlan, job: Job[Any], most: int | None = None) -> RunPlan:
    """The plan with seconds and forward-equivalents, by the clock: from the first batch, or `most` of its prompts."""
    pace = measure(job, most)
    bare = pace.forward * plan.prompts
    stages = []
    for stage in plan.stages:
        seconds = None if stage.paced is None else stage.paced(pace)
        stages.append(stage if seconds is None else replace(stage, seconds=seconds, forwards=seconds / bare))
    return replace(plan, stages=tuple(stages))


def measure(job: Job[Any], most: int | None = None) -> Pace:
    """Run `most` prompts of the first batch (None: all of it); a few of them before, to be warm."""
    batch = first_prompts(_first(job), min(job.used, most or job.used))
    return Pace(
        forward=_timed(job, _bare(job), batch) / len(batch.tokens),
        whole=_timed(job, job.way.timed(job, batch), batch) / len(batch.tokens),
        regressing=_product(job, torch.zeros(SIZE, SIZE, dtype=torch.float64)),
        running=_product(job, torch.zeros(SIZE, SIZE, dtype=job.adapter.compute_dtype, device=job.adapter.device)),
    )


def _first(job: Job[Any]) -> Batch:
    batch = next(iter(job.prompts))
    if job.twins is None:
        return left_aligned(batch)
    return left_aligned(replace(batch, partners=next(iter(job.twins)).tokens))


def _timed(job: Job[Any], work: Callable[[Batch], None], batch: Batch) -> float:
    work(first_prompts(batch, FEW))
    _drain(job)
    began = time.perf_counter()
    work(batch)
    _drain(job)
    return time.perf_counter() - began


def _product(job: Job[Any], matrix: Float[Tensor, "size size"]) -> float:
    def multiplied(_: Batch) -> None:
        torch.mm(matrix, matrix)

    return _timed(job, multiplied, _first(job)) / SIZE**3


def _drain(job: Job[Any]) -> None:
    if job.adapter.device.type == "cuda":
        torch.cuda.synchronize(job.adapter.device)


def _bare(job: Job[Any]) -> Callable[[Batch], None]:
    """The model's own pass over a batch."""

    def run(batch: Batch) -> None:
        job.adapter.run(batch.tokens, batch.mask, ["scale.final"])

    return run
