"""What a job takes before it is started, as a table, and how it is made to fit.

A job that doesn't fit is cut, first where nothing changes but the order of random draws (pairs swept at once), then
where partners are drawn from fewer prompts (the batch size), last where the regressions see fewer rows.
"""

from dataclasses import dataclass
from typing import Any

from tl_circuitlasso.discover.stages import stages_of
from tl_circuitlasso.discover.way import STREAM, Job, Stage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.memory import free_bytes, in_words
from tl_circuitlasso.progress import clock


@dataclass(frozen=True)
class RunPlan:
    """What `circuit_lasso` will take, by stage; `print(plan)` shows a table.

    Attributes
    ----------
    stages: in the order in which they run. prompts: how many were given; used: how many are looked at.
    batch_size: prompts in a batch, their counterparts apart, as it will be; asked_batch_size: before it was cut.
    device: where the model is; free: bytes that can still be allocated there (None: unknown); budget: bytes that the
        run keeps to. cut: what was cut to fit, in words.
    """

    stages: tuple[Stage, ...]
    prompts: int
    used: int
    batch_size: int
    asked_batch_size: int
    device: str
    free: int | None
    budget: int | None
    cut: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: Job[Any], job: Job[Any], cut: tuple[str, ...], budget: int | None) -> "RunPlan":
        """The plan of a job that was cut to fit, without times."""
        return cls(
            stages=tuple(stages_of(job)),
            prompts=asked.prompts.n_prompts or 0,
            used=job.used,
            batch_size=job.batch_size,
            asked_batch_size=asked.batch_size,
            device=str(job.adapter.device),
            free=free_bytes(job.adapter.device),
            budget=budget,
            cut=cut,
        )

    @property
    def bytes(self) -> int:
        """The peak of the whole run beside the model's weights."""
        return max(stage.bytes for stage in self.stages)

    @property
    def passes(self) -> float:
        """Forward passes for each prompt given, at most, of the stages that know."""
        return sum(stage.passes or 0.0 for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of the stages whose time is known."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def forwards(self) -> float:
        """Forward-equivalents of the stages whose time is known: 1 is one pass over all prompts given."""
        return sum(stage.forwards or 0.0 for stage in self.stages)

    @property
    def open_ended(self) -> bool:
        """Whether there are stages whose time nobody can tell."""
        return any(stage.seconds is None for stage in self.stages)

    def brief(self) -> str:
        """All of it in a line, for logs."""
        least = "more than " if self.open_ended else "about "
        bound = "at least" if any(stage.passes is None for stage in self.stages) else "up to"
        known = [f"{stage.name} {clock(stage.seconds)}" for stage in self.stages if stage.seconds is not None]
        return (
            f"{least}{clock(self.seconds)} for {self.used} of {self.prompts} prompts on {self.device} "
            f"({', '.join(known)}), {bound} {self.passes:.2f} passes a prompt and {in_words(self.bytes)} beside the "
            "model's weights"
        )

    def __str__(self) -> str:
        head = ("stage", "memory", "passes a prompt", "forward-equivalents", "seconds")
        rows = [head, *(_row(stage) for stage in self.stages)]
        more = ">= " if self.open_ended else ""
        times = (f"{more}{value:.2f}" for value in (self.forwards, self.seconds))
        rows.append(("all", in_words(self.bytes), f"{self.passes:.2f}", *times))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        free = "" if self.free is None else f", {in_words(self.free)} free"
        kept = "" if self.budget is None else f", kept below {in_words(self.budget)}"
        said = f"{self.used} of {self.prompts} prompts in batches of {self.batch_size} on {self.device}{free}{kept}"
        cuts = [f"cut to fit: {what}" for what in self.cut]
        return "\n".join([said, *cuts, *table, "memory is beside the model's weights; <= where it depends on the data"])


def _row(stage: Stage) -> tuple[str, ...]:
    less = "<= " if stage.at_most else ""
    passes = "-" if stage.passes is None else f"{less if stage.passes else ''}{stage.passes:.2f}"
    times = ("-" if value is None else f"{less}{value:.2f}" for value in (stage.forwards, stage.seconds))
    return stage.name, in_words(stage.bytes), passes, *times


# ---- making it fit ---------------------------------------------------------------------------------------------------


def unplanned(job: Job[Any]) -> str | None:
    """Why nobody can say beforehand what a job takes, in words; None where it can be said."""
    return STREAM if job.prompts.n_prompts is None else job.way.unplanned(job)


def fitted(job: Job[Any], budget: int | None) -> tuple[Job[Any], tuple[str, ...]]:
    """The job, cut until its peak is within `budget` bytes (None: what is free), and what was cut, in words.

    Raises
    ------
    InputError: even the smallest doesn't fit, or a budget where nobody can say what the job takes.
    """
    room = free_bytes(job.adapter.device) if budget is None else budget
    if why := unplanned(job):
        if budget is not None:
            raise InputError(f"`memory` can't be kept to {why}, or leave `memory` out")
        return job, ()
    if room is not None and budget is None and job.adapter.device.type == "cpu":
        room //= job.ranks.beside
    if room is None or peak(job) <= room:
        return job, ()
    least = job
    for least in job.way.smaller(job):
        if peak(least) <= room:
            chosen = job.way.roomier(least, lambda larger: peak(larger) <= room)
            return chosen, differences(job, chosen)
    there = f"{in_words(room)} are free on {job.adapter.device}" if budget is None else f"`memory` is {in_words(room)}"
    raise InputError(
        f"{there}, but {_largest(least).name} takes {in_words(peak(least))} even with {least.batch_size} "
        "prompt(s) in a batch: use shorter prompts, a smaller model or basis, or a device with more memory"
    )


def peak(job: Job[Any]) -> int:
    """Bytes of the job's largest stage."""
    return max(stage.bytes for stage in stages_of(job))


def _largest(job: Job[Any]) -> Stage:
    return max(stages_of(job), key=lambda stage: stage.bytes)


def differences(asked: Job[Any], cut: Job[Any]) -> tuple[str, ...]:
    """In words what was cut."""
    own = asked.way.cuts(asked, cut)
    if cut.batch_size == asked.batch_size:
        return own
    return f"batch_size {asked.batch_size * asked.sides} to {cut.batch_size * cut.sides}", *own
