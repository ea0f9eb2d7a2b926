"""From the arguments of a call to a job that is ready to be run, or to be planned: one place where they are checked."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_circuitlasso._checks import as_seed, whole_number
from tl_circuitlasso.data.sharing import Ranks, as_ranks
from tl_circuitlasso.data.targets import Target, as_target
from tl_circuitlasso.discover.asked import as_design, as_strength, check_features, check_neurons
from tl_circuitlasso.discover.confirming import Confirmation, check_method, prepare
from tl_circuitlasso.discover.designs import way_of
from tl_circuitlasso.discover.provenance import provenance
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import footprint
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.architecture import refuse_altered
from tl_circuitlasso.models.bases import Neuron, as_basis
from tl_circuitlasso.models.designs import Design
from tl_circuitlasso.models.device import on_device
from tl_circuitlasso.models.memory import as_bytes
from tl_circuitlasso.models.metric import with_tokens
from tl_circuitlasso.models.pairs import Pairs, pairs_of
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.read import ReadDesign, affordable_draws
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Prompts

PAIR = 2  # prompts in a pair, so the fewest of a batch
HELD = 64 << 20  # bytes that the activations of the prompts that run together may always take
HELD_SHARE = 0.4  # of the weights' bytes, what they may take in a large model
SEEN_TOGETHER = 16  # prompts that share a batch for all that: each is compared with another of its batch
STREAM = "for a stream, whose lengths aren't known before it is read: give a list or a tensor"


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked for, checked.

    what: a design of a basis, or neurons or SAE features, which have their own; pairs: the prompts with their
    counterparts, where design "read" compares them with those; causal: what method "lasso+confirm" needs.
    """

    adapter: Adapter
    prompts: Prompts
    target: Target
    what: Design | Neuron | SAEFeatures
    strength: str | float
    seed: int
    progress: bool
    checkpoint: str | Path | None
    ranks: Ranks
    max_prompts: int | None = None
    refined: bool = True
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
    def used(self) -> int:
        """How many prompts are looked at."""
        paired = isinstance(self.what, ReadDesign | Neuron)
        return min(self.given, self.max_prompts or self.given) if paired else self.given

    @property
    def draws(self) -> int:
        """How often every batch is paired anew."""
        return 1 if self.pairs is not None else affordable_draws(self.adapter, self.used, self.prompts.width)

    @property
    def twins(self) -> Prompts | None:
        """The prompts' counterparts."""
        return None if self.pairs is None else self.pairs.corrupted

    @property
    def sides(self) -> int:
        """Prompts that run together for each one given: 2 where its counterpart runs along with it."""
        return 1 if self.pairs is None or isinstance(self.what, Neuron) else 2

    def batched(self, size: int) -> "Job":
        """The same with at most `size` prompts in a batch."""
        causal = None if self.causal is None else replace(self.causal, pairs=self.causal.pairs.batched(size))
        pairs = None if self.pairs is None else self.pairs.batched(size)
        return replace(self, prompts=self.prompts.batched(size), pairs=pairs, causal=causal)

    def record(self, prompts: Prompts, arguments: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """The provenance of what was made of `prompts`, with the target read where it really was."""
        where = "last" if self.last else self.prompts.positions
        return provenance(self.adapter, prompts, arguments, target=self.target, positions=where, **facts)


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

    @contextmanager
    def opened(self) -> Iterator[Job]:
        """The job, while the model is on the device that was asked for.

        Raises
        ------
        InputError: an argument is wrong; the message names it. ModelError: the model can't be read truthfully.
        """
        ranks = as_ranks(self.process_group)
        as_bytes(self.memory)
        strength, target, seed = as_strength(self.strength), as_target(self.target), as_seed(self.seed)
        most = self._whole("max_prompts", "of prompts, or None for all", least=PAIR)
        self._whole("budget", "of edges to measure, or None for all")
        what = self._what(ranks, target, strength)
        paired = isinstance(what, Neuron) or (isinstance(what, Design) and what.paired)
        with ranks.together(), on_device(self.model, self.device):
            adapter = adapt(self.model)
            refuse_altered(adapter.model)
            prompts = checked_prompts(
                adapter, self.tokens, paired, self.attention_mask, self.positions, self.batch_size
            )
            asked = strength, seed, self.progress, self.checkpoint, ranks, most, self.refined
            job = Job(adapter, prompts, with_tokens(target, adapter), what, *asked)
            yield self._with_counterparts(job, paired)

    def _whole(self, name: str, what: str, least: int = 1) -> int | None:
        """The argument `name`, which is a whole number or None."""
        given = getattr(self, name)
        return None if given is None else whole_number(name, given, least=least, what=what)

    def _what(self, ranks: Ranks, target: Target, strength: str | float) -> Design | Neuron | SAEFeatures:
        """What the basis and the design mean together; what they don't use is refused."""
        if isinstance(self.basis, SAEFeatures):
            check_features(self.basis, self.design, self.method, self.strength, nonlinear=self.nonlinear)
            return self.basis
        way = way_of(self.design)
        if way.neurons and isinstance(neurons := as_basis(self.basis), Neuron):
            refused = {name: getattr(self, name) for name in ("checkpoint", "metric", "budget", "size")}
            refused |= {"process_group": None if ranks.size == 1 else ranks, "nonlinear": self.nonlinear or None}
            check_neurons(neurons, self.method, self.strength, refused)
            return neurons
        design = as_design(self.design, self.basis, nonlinear=self.nonlinear)
        asked = self.method, self.corrupted, self.metric, design.basis.name, target
        check_method(*asked, paired=design.paired, budget=self.budget, size=self.size)
        way.check(design, strength)
        return design

    def _with_counterparts(self, job: Job, paired: bool) -> Job:
        """The job with the prompts' counterparts, where it reads them, and with what its confirmation needs."""
        causal = None
        if self.method == "lasso+confirm":
            options = {"count": job.max_prompts, "seed": job.seed, "budget": self.budget, "size": self.size}
            causal = prepare(job.adapter, job.prompts, self.corrupted, job.target, self.metric, **options)
        if self.corrupted is None or not paired:
            return _in_room(replace(job, causal=causal))
        pairs = pairs_of(job.adapter, job.prompts, self.corrupted)
        if not isinstance(job.what, ReadDesign):
            return replace(job, prompts=pairs.clean, pairs=pairs, causal=causal)
        most = min(job.batch_size // PAIR, _at_once(job, pairs.clean.width, sides=PAIR))
        pairs = pairs.batched(max(1, most), fewest=1)  # a prompt and its counterpart run together
        return replace(job, prompts=pairs.clean, pairs=pairs, what=replace(job.what, contrast=True), causal=causal)


def _in_room(job: Job) -> Job:
    """The job in batches whose activations have room; of `SEEN_TOGETHER` prompts at least, among which partners are
    drawn."""
    if not isinstance(job.what, ReadDesign):
        return job
    most = max(SEEN_TOGETHER, _at_once(job, job.prompts.width, sides=1))
    return job.batched(most) if most < job.batch_size else job


def _at_once(job: Job, width: int, *, sides: int) -> int:
    """How many prompts of so many positions (with their counterparts: two `sides`) run together without their
    activations taking more than two fifths of what the weights do."""
    keys = job.what.wanted(job.adapter, job.target) if isinstance(job.what, ReadDesign) else ()
    one = sides * footprint.held(job.adapter, keys, 1, width)
    most = max(HELD, HELD_SHARE * job.adapter.weight_bytes)
    return int(most / one)


def checked_prompts(
    adapter: Adapter, tokens: AnyPrompts, paired: bool, attention_mask: Any, positions: Any, batch_size: Any
) -> Prompts:
    """The checked prompts; design "read" compares those of a batch, and draws them, so it knows all of them."""
    options = {"attention_mask": attention_mask, "positions": positions, "batch_size": batch_size}
    prompts = Prompts(adapter, tokens, **options, fewest=PAIR if paired else 1)
    return prompts.gathered() if paired else prompts
