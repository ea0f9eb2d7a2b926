"""Collection: token batches in, statistics out, one forward pass per batch and nothing else.

The first batch is the pilot: the closure check runs on it, and bases choose their directions on it. Every batch is run,
encoded, added and freed. With a `checkpoint` path the statistics are written every so often, and a collection that
finds such a file goes on where it stopped. Several processes deal the batches out among themselves: each looks at the
pilot, takes the pilot's choices from process 0, runs its own batches, and all get the sum.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tl_circuitlasso.data.checkpoint import check_identity
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Target, check_length
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.closure import check_finite, closure_check
from tl_circuitlasso.models.designs import Design, Sample
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.progress import bar as counting

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
CHECKED = 2  # prompts of the first batch that the closure check runs on: it looks at every layer, port and position
SAMPLE = 128  # prompts kept to be looked at again


Some = TypeVar("Some", bound=Design)


@dataclass(frozen=True, eq=False)
class Plan(Generic[Some]):
    """What to collect: the design, the target, and how to sample.

    last: read a per-prompt target at each prompt's last kept position; folds: parts to keep the moments in.
    """

    design: Some
    target: Target
    last: bool
    folds: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics with the cost of making them.

    sample: the first prompts (up to `SAMPLE`), for whatever is looked at again; forward_passes: those of all processes;
    closure: the largest relative error of the closure check; forward_seconds: processor time of the model itself in the
    passes of this process.
    """

    statistics: Statistics
    sample: tuple[Batch, ...]
    prompts: int
    forward_passes: int
    seconds: float
    closure: float
    forward_seconds: float = 0.0


def collect(
    adapter: Adapter,
    prompts: Prompts,
    plan: Plan,
    *,
    twins: Prompts | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    start: Statistics | None = None,
    ranks: Ranks = ALONE,
) -> Collected:
    """Stream `prompts` through the model into the statistics that `plan` asks for, with their counterparts (`twins`, of
    the same masks) where the design compares them with those.

    `start` gives the pilot directions of another worker's statistics (`statistics.fresh()`), so that the two merge.
    `ranks` share the batches, each with the same prompts and a model of its own; all return the same statistics, and
    each has its own checkpoint file beside the one named.

    Raises
    ------
    ModelError: the closure check fails, or activations turn NaN or infinite; the message names the place.
    InputError: no samples at all, a target of the wrong length, or a checkpoint of another collection.
    """
    began = time.perf_counter()
    file = None if checkpoint is None else own_file(Path(checkpoint), ranks)
    own = _Own(adapter, prompts, twins, plan, file, start, ranks).collected(progress and ranks.rank == 0)
    statistics, passes = own.statistics.shared(ranks), ranks.count(own.forward_passes)
    return replace(own, statistics=statistics, forward_passes=passes, seconds=time.perf_counter() - began)


class _Own:
    """This process's part of a collection, as far as it has come."""

    def __init__(
        self,
        adapter: Adapter,
        prompts: Prompts,
        twins: Prompts | None,
        plan: Plan,
        file: Path | None,
        start: Statistics | None,
        ranks: Ranks,
    ) -> None:
        self.adapter, self.prompts, self.twins, self.plan = adapter, prompts, twins, plan
        self.file, self.ranks = file, ranks
        self.began = self.saved = time.perf_counter()
        statistics = (None if file is None else _resume(file, identity_of(adapter, plan))) or start
        self.statistics = None if statistics is None else statistics.to(adapter.device)
        self.done = 0 if statistics is None else statistics.done  # batches that are behind a resumed collection
        self.sample: list[Batch] = []
        self.seen = self.passes = 0
        self.closure = self.forward = 0.0

    def collected(self, progress: bool) -> Collected:
        """Every batch run, encoded, added and freed."""
        number = -1
        if self.plan.target is not None and self.prompts.n_prompts is not None:
            check_length(self.plan.target, self.prompts.n_prompts)
        with counting(total=self.prompts.n_prompts, desc="collect", unit="prompt", progress=progress) as bar:
            for number, batch in enumerate(_batches(self.prompts, self.twins)):
                bar.update(self.seen - bar.n)  # those of the batches that are done
                self._take(number, left_aligned(batch))
            bar.update(self.seen - bar.n)
        check_length(self.plan.target, self.seen)
        assert self.statistics is not None  # Prompts never yields nothing
        if number + 1 < self.done:
            _check_origin(self.statistics, self._origin)
        self.statistics = replace(self.statistics, done=number + 1, origin=self._origin)
        if self.file and self.passes:
            self.statistics.save(self.file)
        seconds = time.perf_counter() - self.began
        return Collected(
            self.statistics, tuple(self.sample), self.seen, self.passes, seconds, self.closure, self.forward
        )

    @property
    def _origin(self) -> str:
        return _origin(self.prompts, self.twins, self.plan)

    def _take(self, number: int, batch: Batch) -> None:
        """A batch, run where it's this process's and not behind it yet."""
        if self.seen < SAMPLE:
            self.sample.append(batch)
        self.seen += len(batch.tokens)
        if number == 0:
            self._look(batch)
        if number == self.done - 1:
            _check_origin(self.statistics, self._origin)
        if number >= self.done and self.ranks.mine(number):
            self._add(number, batch)

    def _look(self, pilot: Batch) -> None:
        """At the first batch, also of a resumed collection: its second look runs this very model."""
        few = pilot.tokens[:CHECKED], pilot.mask[:CHECKED]
        self.closure = closure_check(self.adapter, *few, ports=self.plan.design.paired)
        self.statistics, tried = _agreed_start(self.statistics, self.adapter, self.plan, pilot, self.ranks)
        self.passes += tried

    def _add(self, number: int, batch: Batch) -> None:
        before = self.adapter.model_seconds
        new = sample_of(self.adapter, self.plan, batch, number)
        self.forward += self.adapter.model_seconds - before
        self.statistics = _add(self.statistics, self.adapter, self.plan, new, number)
        self.passes += 1
        if self.file and time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
            replace(self.statistics, origin=self._origin).save(self.file)
            self.saved = time.perf_counter()


def own_file(checkpoint: Path, ranks: Ranks) -> Path:
    """Every process has a checkpoint of its own: its part of the batches depends on how many share them."""
    if ranks.size == 1:
        return checkpoint
    return checkpoint.with_name(f"{checkpoint.stem}-{ranks.rank}-of-{ranks.size}{checkpoint.suffix}")


def _agreed_start(
    statistics: Statistics | None, adapter: Adapter, plan: Plan, pilot: Batch, ranks: Ranks
) -> tuple[Statistics | None, int]:
    """Where every process starts from: process 0's choices on the pilot batch; and the passes that this took.

    All look at the pilot at the same time; alone, `_add` does both at once.
    """
    if ranks.size == 1:
        return statistics, 0
    look = statistics is None and plan.design.pilots
    own = statistics or _start(adapter, plan, sample_of(adapter, plan, pilot, 0, run=look))
    fixed = {key: ranks.first(value) for key, value in own.fixed.items()}
    if statistics is not None and any(not torch.equal(value, fixed[key]) for key, value in own.fixed.items()):
        raise InputError("`checkpoint` files of the processes come from different runs: delete them all")
    return replace(own, fixed=fixed), int(look)


def left_aligned(batch: Batch) -> Batch:
    """The same prompts with their pads behind them, so that position by position two prompts are comparable."""
    if bool(batch.mask[:, :-1].ge(batch.mask[:, 1:]).all()):
        return batch
    order = batch.mask.logical_not().long().argsort(dim=1, stable=True)[:, : int(batch.mask.sum(1).max())]
    return batch.each(lambda part: part.gather(1, order))


def _batches(prompts: Prompts, twins: Prompts | None) -> Iterator[Batch]:
    """The prompts by batch, each with its counterpart where there are any."""
    if twins is None:
        yield from prompts
        return
    for batch, other in zip(prompts, twins, strict=True):
        yield replace(batch, partners=other.tokens)


def _add(statistics: Statistics | None, adapter: Adapter, plan: Plan, sample: Sample, number: int) -> Statistics:
    if statistics is None:
        statistics = _start(adapter, plan, sample)
    return replace(plan.design.add(statistics, adapter, sample), done=number + 1)


def _start(adapter: Adapter, plan: Plan, pilot: Sample) -> Statistics:
    statistics = plan.design.start(adapter, pilot)
    return replace(statistics, meta={**statistics.meta, **identity_of(adapter, plan)})


def sample_of(adapter: Adapter, plan: Plan, batch: Batch, number: int, *, run: bool = True) -> Sample:
    """A batch as a design sees it, with its activations if the model is to `run`.

    Raises
    ------
    InputError: the target has fewer entries. ModelError: activations are NaN or infinite.
    """
    if plan.target is not None and batch.start + len(batch.tokens) > len(plan.target):
        check_length(plan.target, batch.start + len(batch.tokens))
    wanted = set(plan.design.wanted(adapter, plan.target))
    acts = adapter.run(*batch.run, wanted, gathered=False) if run else {}
    check_finite(adapter, acts, batch.keep if batch.partners is None else torch.cat([batch.keep, batch.keep]))
    return Sample(
        acts=acts,
        mask=batch.mask,
        keep=batch.keep,
        target_keep=readout.last_only(batch.keep) if plan.last else batch.keep,
        target=plan.target,
        prompts=torch.arange(batch.start, batch.start + len(batch.tokens)),
        folds=plan.folds,
        generator=torch.Generator().manual_seed(plan.seed + number),
    )


def identity_of(adapter: Adapter, plan: Plan) -> dict[str, Any]:
    """What must agree before statistics may be continued or merged."""
    return {
        "model": adapter.name,
        "config": adapter.config_hash(),
        "weights": adapter.weights_hash(),
        "design": plan.design.name,
        "basis": plan.design.basis.name,
        "target": "logits" if plan.target is None else type(plan.target).__name__,
        "folds": plan.folds,
        "seed": plan.seed,
    } | ({"functions": plan.design.functions} if plan.design.functions > 1 else {})


def _origin(prompts: Prompts, twins: Prompts | None, plan: Plan) -> str:
    """A hash of the data read so far and of what was asked about them."""
    digest = hashlib.sha256(prompts.hash_so_far().encode())
    if twins is not None:
        digest.update(twins.hash_so_far().encode())
    asked = [prompts.positions, plan.last, *(vars(plan.target).values() if plan.target is not None else ())]
    for part in asked:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()


def _check_origin(statistics: Statistics | None, origin: str) -> None:
    if statistics is not None and statistics.origin != origin:
        raise InputError(
            "`checkpoint` holds other data: `tokens`, `batch_size`, `positions` or `target` have changed since; delete "
            "it, or name another file"
        )


def _resume(checkpoint: Path, identity: dict[str, Any]) -> Statistics | None:
    if not checkpoint.exists():
        return None
    statistics = Statistics.load(checkpoint)
    check_identity(checkpoint, "collection", statistics.meta, {"functions": None, **identity})
    logger.info("resuming %s after %d batches", checkpoint, statistics.done)
    return statistics
