"""Collection: token batches in, statistics out, one forward pass per batch and nothing else.

The first batch is the pilot: the closure check runs on it, and bases choose their directions on it. Every batch is run,
encoded, added and freed. With a `checkpoint` path the statistics are written every so often, and a collection that
finds such a file goes on where it stopped.
"""

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.closure import closure_check
from tl_circuitlasso.models.designs import Design, Sample
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.statistics import Statistics
from tl_circuitlasso.targets import Target, check_length

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
SAMPLE = 128  # prompts kept to be looked at again


@dataclass(frozen=True, eq=False)
class Plan:
    """What to collect: the design, the target, and how to sample.

    last: read a per-prompt target at each prompt's last kept position; folds: parts to keep the moments in.
    """

    design: Design
    target: Target
    last: bool
    folds: int = 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics with the cost of making them.

    sample: the first prompts (up to `SAMPLE`), for whatever is looked at again; closure: the largest relative error of
    the closure check.
    """

    statistics: Statistics
    sample: tuple[Batch, ...]
    prompts: int
    forward_passes: int
    seconds: float
    closure: float


def collect(
    adapter: Adapter,
    prompts: Prompts,
    plan: Plan,
    *,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    start: Statistics | None = None,
) -> Collected:
    """Stream `prompts` through the model into the statistics that `plan` asks for.

    `start` gives the pilot directions of another worker's statistics (`statistics.fresh()`), so that the two merge.

    Raises
    ------
    ModelError: the closure check fails, or activations turn NaN or infinite; the message names the place.
    InputError: no samples at all, a target of the wrong length, or a checkpoint of another collection.
    """
    began = saved = time.perf_counter()
    statistics = _resume(checkpoint, _identity(adapter, plan)) or start
    done, passes, seen, closure = statistics.done if statistics else 0, 0, 0, 0.0
    sample: list[Batch] = []
    number = -1
    if plan.target is not None and prompts.n_prompts is not None:
        check_length(plan.target, prompts.n_prompts)
    with tqdm(total=prompts.n_prompts, desc="collect", unit="prompt", disable=None if progress else True) as bar:
        for number, batch in enumerate(prompts):
            if seen < SAMPLE:
                sample.append(batch)
            seen += len(batch.tokens)
            bar.update(len(batch.tokens))
            if number < done:
                if number == done - 1:
                    _check_origin(statistics, prompts, plan)
                continue
            batch = left_aligned(batch)
            if passes == 0:
                closure = closure_check(adapter, batch.tokens, batch.mask, ports=plan.design.name == "read")
            statistics = _add(statistics, adapter, plan, batch, number)
            passes += 1
            if checkpoint and time.perf_counter() - saved > CHECKPOINT_SECONDS:
                replace(statistics, origin=_origin(prompts, plan)).save(checkpoint)
                saved = time.perf_counter()
    check_length(plan.target, seen)
    assert statistics is not None  # Prompts never yields nothing
    if number + 1 < done:
        _check_origin(statistics, prompts, plan)
    statistics = replace(statistics, origin=_origin(prompts, plan))
    if checkpoint and passes:
        statistics.save(checkpoint)
    return Collected(statistics, tuple(sample), seen, passes, time.perf_counter() - began, closure)


def left_aligned(batch: Batch) -> Batch:
    """The same prompts with their pads behind them, so that position by position two prompts are comparable."""
    if bool(batch.mask[:, :-1].ge(batch.mask[:, 1:]).all()):
        return batch
    order = batch.mask.logical_not().long().argsort(dim=1, stable=True)[:, : int(batch.mask.sum(1).max())]
    moved = {name: getattr(batch, name).gather(1, order) for name in ("tokens", "mask", "keep")}
    return replace(batch, **moved)


def _add(statistics: Statistics | None, adapter: Adapter, plan: Plan, batch: Batch, number: int) -> Statistics:
    if plan.target is not None and batch.start + len(batch.tokens) > len(plan.target):
        check_length(plan.target, batch.start + len(batch.tokens))
    acts = adapter.run(batch.tokens, batch.mask, set(plan.design.wanted(adapter, plan.target)))
    _check_finite(acts, batch.keep)
    sample = Sample(
        acts=acts,
        mask=batch.mask,
        keep=batch.keep,
        target_keep=readout.last_only(batch.keep) if plan.last else batch.keep,
        target=plan.target,
        prompts=torch.arange(batch.start, batch.start + len(batch.tokens)),
        folds=plan.folds,
        generator=torch.Generator().manual_seed(plan.seed + number),
    )
    if statistics is None:
        statistics = plan.design.start(adapter, sample)
        statistics = replace(statistics, meta={**statistics.meta, **_identity(adapter, plan)})
    return replace(plan.design.add(statistics, adapter, sample), done=number + 1)


def _check_finite(acts: dict[str, Tensor], keep: Bool[Tensor, "batch pos"]) -> None:
    for key, value in acts.items():
        if bool(value.sum().isfinite()):  # pads may hold anything, so a failure here needs a closer look
            continue
        real = value[keep] if value.shape[:2] == keep.shape else value
        if not bool(real.isfinite().all()):
            raise ModelError(f"activations at {key} are NaN or infinite: check the model's weights and its dtype")


def _identity(adapter: Adapter, plan: Plan) -> dict[str, Any]:
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
    }


def _origin(prompts: Prompts, plan: Plan) -> str:
    """A hash of the data read so far and of what was asked about them."""
    digest = hashlib.sha256(prompts.hash_so_far().encode())
    asked = [prompts.positions, plan.last, *(vars(plan.target).values() if plan.target is not None else ())]
    for part in asked:
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()


def _check_origin(statistics: Statistics | None, prompts: Prompts, plan: Plan) -> None:
    if statistics is not None and statistics.origin != _origin(prompts, plan):
        raise InputError(
            "`checkpoint` holds other data: `tokens`, `batch_size`, `positions` or `target` have changed since; delete "
            "it, or name another file"
        )


def _resume(checkpoint: str | Path | None, identity: dict[str, Any]) -> Statistics | None:
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    statistics = Statistics.load(checkpoint)
    differ = [key for key, value in identity.items() if statistics.meta.get(key) != value]
    if differ:
        raise InputError(
            f"`checkpoint` {checkpoint} belongs to another collection (it differs in {', '.join(differ)}): "
            "delete it, or name another file"
        )
    logger.info("resuming %s after %d batches", checkpoint, statistics.done)
    return statistics
