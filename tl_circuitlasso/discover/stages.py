"""The stages of a job, each with the bytes at its peak and its forward passes, told from shapes: nothing is run.

Bytes are those beside the model's own weights, put together from what the stages allocate: activations
(models/footprint.py), pairs swept at once (models/sweep.py), sums and rows (models/read.py), moments. How much of each
stands in memory at once was measured, and is held by the tests. What the stages are, the job's design says.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import Any

from tl_circuitlasso.discover.provenance import per_prompt
from tl_circuitlasso.discover.way import Job, Pace, Stage
from tl_circuitlasso.models import footprint, sweep

ALLOCATOR = 16 << 20  # what an allocator rounds up and holds on to


def stages_of(job: Job[Any]) -> list[Stage]:
    """Bytes and passes of everything that the job will do."""

    def each(calls: int | float | None) -> float | None:
        return None if calls is None else per_prompt(calls, job.given, job.batch_size)

    return [replace(stage, passes=each(stage.passes)) for stage in job.way.stages(job)]


def run_sizes(job: Job[Any]) -> tuple[int, int]:
    """The rows of a forward pass, counterparts included, and its positions."""
    return min(job.batch_size, job.used) * job.sides, job.prompts.width


def batches(job: Job[Any]) -> int:
    """How many batches the prompts make that are looked at."""
    return ceil(job.used / job.batch_size)


def all_batches(job: Job[Any]) -> Callable[[Pace], float]:
    """Seconds of running the batches and making of them what is made before anything is solved."""
    return lambda pace: pace.whole * job.used / job.ranks.size


def bare_passes(job: Job[Any], calls: int) -> Callable[[Pace], float]:
    """Seconds of so many passes over batches that nothing is made of."""
    return lambda pace: pace.forward * job.given * per_prompt(calls, job.given, job.batch_size)


def confirm_stage(job: Job[Any]) -> Iterator[Stage]:
    """Kept edges, or circuits of some sizes, are patched: how many nobody knows before."""
    if job.causal is not None:
        rows, positions = job.causal.pairs.batch_size, job.prompts.width
        need = 2 * footprint.held(job.adapter, sweep.wanted(job.adapter), rows, positions)
        yield Stage("confirm", need + footprint.passing(job.adapter, rows, positions, logits=True), None)
