"""A job, and what the design behind it answers: the contract that lets a new design stand in one file.

Whatever is asked of a design (what it collects, how it learns, what it takes and how it is cut to fit) is a method of
its `Way`. The modules of discover/ ask that, and know no design by name; the ways stand in designs/.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.discover.confirming import Confirmation
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question, record
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.pairs import Pairs
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tokens import Batch, Prompts

STREAM = "for a stream, whose lengths aren't known before it is read: give a list or a tensor"

What = TypeVar("What")  # what a way explains prompts by: a design of a basis, or a basis that has a way of its own


@dataclass(frozen=True)
class Pace:
    """Seconds per prompt of a bare forward pass, and of a pass with all that is made of its activations; seconds of one
    multiplication and addition of the regressions (double precision, on the CPU), and of the model's own."""

    forward: float
    whole: float
    regressing: float
    running: float


@dataclass(frozen=True)
class Stage:
    """A part of the work: bytes at its peak beside the model's weights, and forward passes.

    passes: for each prompt given, as `provenance["forward_passes"]` counts them, counterparts included. at_most: it may
    be less, for it depends on what was found before. forwards, seconds: what it takes in passes over all prompts given,
    and by the clock. None where nothing was measured, or nobody can know.
    paced: its seconds at a pace; None where they can't be told from one.
    """

    name: str
    bytes: int
    passes: int | float | None = 0
    at_most: bool = False
    forwards: float | None = None
    seconds: float | None = None
    paced: Callable[[Pace], float] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `circuit_lasso`, as they were given."""

    model: Any
    tokens: AnyPrompts
    target: Any
    basis: Any
    design: Any
    nonlinear: Any
    strength: Any
    positions: Any
    attention_mask: Any
    batch_size: Any
    device: Any
    progress: bool
    seed: Any
    checkpoint: Any
    max_prompts: Any
    refined: bool
    method: Any
    corrupted: Any
    metric: Any
    budget: Any
    size: Any
    process_group: Any
    memory: Any


@dataclass(frozen=True, eq=False)
class Job(Generic[What]):
    """What is asked for, checked.

    way, what: the design's way, and what it works with; pairs: the prompts with their counterparts, where it compares
    them with those; causal: what method "lasso+confirm" needs; memory: the bytes that were asked for.
    """

    way: "Way[What]"
    what: What
    adapter: Adapter
    prompts: Prompts
    target: Target
    strength: str | float
    seed: int
    progress: bool
    checkpoint: Path | None
    ranks: Ranks
    max_prompts: int | None = None
    refined: bool = True
    memory: int | None = None
    pairs: Pairs | None = None
    causal: Confirmation | None = None

    @property
    def last(self) -> bool:
        """Whether the target is read at the last position, as it is where it's one entry per prompt."""
        positions = self.prompts.positions
        return self.target is not None and isinstance(positions, str) and positions == "all"

    @property
    def batch_size(self) -> int:
        """The most prompts of a batch."""
        return self.prompts.batch_size

    @property
    def given(self) -> int:
        """How many prompts there are. InputError of a stream, which doesn't know it beforehand."""
        if self.prompts.n_prompts is None:
            raise InputError(f"nothing can be planned {STREAM}")
        return self.prompts.n_prompts

    @property
    def paired(self) -> bool:
        """Whether prompts are compared in pairs."""
        return self.way.pairs(self.what)

    @property
    def used(self) -> int:
        """How many prompts are looked at."""
        return min(self.given, self.max_prompts or self.given) if self.paired else self.given

    @property
    def twins(self) -> Prompts | None:
        """The prompts' counterparts."""
        return None if self.pairs is None else self.pairs.corrupted

    @property
    def sides(self) -> int:
        """Prompts that run together for each one given: 2 where its counterpart runs along with it."""
        return self.way.sides(self)

    def batched(self, size: int) -> "Job[What]":
        """The same with at most `size` prompts in a batch."""
        causal = None if self.causal is None else replace(self.causal, pairs=self.causal.pairs.batched(size))
        pairs = None if self.pairs is None else self.pairs.batched(size)
        return replace(self, prompts=self.prompts.batched(size), pairs=pairs, causal=causal)

    def record(
        self,
        prompts: Prompts,
        arguments: Mapping[str, Any],
        *,
        looked_at: int,
        unit: str,
        forward: float,
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """The provenance of what was made of `prompts`, `looked_at` of which decided, with the target read where it
        really was."""
        where = "last" if self.last else self.prompts.positions
        return record(
            "CircuitLasso",
            self.adapter.facts(),
            question=question(self.target, where),
            prompts=looked_at,
            unit=unit,
            forward=forward,
            backward=0,
            seconds=seconds,
            arguments=dict(arguments),
            data_hash=prompts.data_hash(),
        )


class Way(ABC, Generic[What]):
    """From a request to a graph, by one design.

    A design of its own way subclasses this, or `designs.collected.Collecting` where it collects statistics and learns
    from them, and is entered in `designs.DESIGNS` by its name.
    """

    spread = False  # whether it follows a model whose layers are on several devices

    @abstractmethod
    def asked(self, request: Request, target: Target) -> What:
        """What the request's basis and design mean together; what the way doesn't use is refused."""

    @abstractmethod
    def run(self, job: Job[What], began: float) -> AttributionGraph:
        """The graph, with its record. `began`: processor seconds when the call began, whose cost counts from there."""

    @abstractmethod
    def stages(self, job: Job[What]) -> list[Stage]:
        """Bytes and time of everything that the job will do, told from shapes, with passes over batches."""

    @abstractmethod
    def timed(self, job: Job[What], pilot: Batch) -> Callable[[Batch], None]:
        """What is made of a batch before anything is solved."""

    def pairs(self, what: What) -> bool:
        """Whether prompts are compared in pairs, so that all of them must be known."""
        return False

    def sides(self, job: Job[What]) -> int:
        """How many prompts run together for each one given."""
        return 1

    def with_counterparts(self, job: Job[What], pairs: Pairs) -> Job[What]:
        """The job, its prompts compared with their counterparts."""
        return replace(job, prompts=pairs.clean, pairs=pairs)

    def in_room(self, job: Job[What]) -> Job[What]:
        """The job of prompts alone, in batches that suit the model."""
        return job

    def unplanned(self, job: Job[What]) -> str | None:
        """Why nobody can say beforehand what a job takes, in words; None where it can be said."""
        return None

    def smaller(self, job: Job[What]) -> Iterator[Job[What]]:
        """The job in smaller and smaller forms, what changes least first."""
        yield from (job.batched(size) for size in batch_sizes(job))

    def roomier(self, job: Job[What], fits: Callable[[Job[What]], bool]) -> Job[What]:
        """The job, cut to fit, with as much given back as fits."""
        return job

    def cuts(self, asked: Job[What], cut: Job[What]) -> tuple[str, ...]:
        """In words what was cut beside the batch size."""
        return ()


def batch_sizes(job: Job[Any]) -> list[int]:
    """Sizes of batches from the job's own down to the smallest, by halves."""
    sizes = [job.batch_size]
    while sizes[-1] > job.prompts.fewest:
        sizes.append(max(job.prompts.fewest, sizes[-1] // 2))
    return sizes
