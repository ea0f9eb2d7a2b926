"""From prompts to a store of codes: one forward pass a batch, every SAE encoded, nothing attached.

The first batch decides what is to be read of all (`feature_setup`). Several processes deal the batches out among
themselves: each encodes its own, and keeps their codes to itself.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import Target, check_length
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import encode_batch
from tl_circuitlasso.models.feature_setup import Setup, set_up
from tl_circuitlasso.models.feature_store import CodeStore
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.progress import bar as counting


@dataclass(frozen=True, eq=False)
class CollectedCodes:
    """Codes with the cost of making them.

    store: the codes of this process's batches; samples, chunks_on_disk, prompts, forward_passes: of all processes;
    origin: a hash of the data. encoders: the SAEs by hook, in the order of computation; order: every hook's rank;
    pairs: what is regressed on what; routes: for each pair the codes through which a child sees its parent; errors: the
    directions of each parent's error; first: the first few prompts; target_columns: how many columns the target has.
    """

    store: CodeStore
    origin: str
    samples: int
    chunks_on_disk: int
    encoders: Mapping[str, Encoder]
    order: Mapping[str, int]
    pairs: tuple[tuple[str, str], ...]
    routes: Mapping[tuple[str, str], str | None]
    errors: Mapping[str, int]
    first: Batch
    target_columns: int
    prompts: int
    forward_passes: int
    seconds: float
    closure: float | None = None  # hooks are read as they are: nothing is assumed of how they add up


def collect_codes(
    adapter: Adapter,
    prompts: Prompts,
    basis: SAEFeatures,
    target: Target,
    *,
    last: bool,
    checkpoint: Path | None = None,
    progress: bool = True,
    ranks: Ranks = ALONE,
) -> CollectedCodes:
    """Run `prompts` through the model and its SAEs, once; `ranks` share the batches.

    Raises
    ------
    InputError: an SAE of another width, an unknown hook, pairs against the order of computation, a target of the wrong
        length, a checkpoint of another collection, or processes with different data. ModelError: NaN or infinite
        activations or codes.
    """
    began = time.perf_counter()
    setup, seen, passes = _collect_own(adapter, prompts, basis, target, last, checkpoint, progress, ranks)
    origin, store = _origin(prompts, target, last), setup.store
    ranks.agree({**setup.identity, "data": origin})
    first = next(iter(store), None)  # none where processes are more than batches
    columns = 0 if first is None else first.target.shape[1]
    totals = ranks.sum(torch.tensor([store.samples, store.on_disk, passes])).tolist()
    return CollectedCodes(
        store=store,
        origin=origin,
        samples=totals[0],
        chunks_on_disk=totals[1],
        encoders=setup.encoders,
        order=setup.order,
        pairs=setup.pairs,
        routes=setup.routes,
        errors={hook: found.shape[1] for hook, found in setup.plan.errors.items()},
        first=setup.first,
        target_columns=int(ranks.largest(torch.tensor(columns))),
        prompts=seen,
        forward_passes=totals[2],
        seconds=time.perf_counter() - began,
    )


def _collect_own(
    adapter: Adapter, prompts: Prompts, basis: SAEFeatures, target: Target, last: bool, checkpoint: Path | None,
    progress: bool, ranks: Ranks,
) -> tuple[Setup, int, int]:  # fmt: skip
    """The codes of this process's batches; how many prompts there are in all, and the passes that it took."""
    if target is not None and prompts.n_prompts is not None:
        check_length(target, prompts.n_prompts)
    setup: Setup | None = None
    number = passes = seen = 0
    shown = progress and ranks.rank == 0
    with counting(total=prompts.n_prompts, desc="encode", unit="prompt", progress=shown) as bar:
        for number, batch in enumerate(prompts):
            setup = setup or set_up(adapter, basis, target, batch, last, checkpoint, ranks)
            seen += len(batch.tokens)
            bar.update(len(batch.tokens))
            if target is not None and seen > len(target):
                check_length(target, seen)
            known = number < setup.store.batches
            if known:
                _check_data(setup.store, number, prompts, target, last)
            if ranks.mine(number) and not known:
                passes += 1
                setup.store.add(encode_batch(adapter, setup.plan, batch, number), _origin(prompts, target, last))
    assert setup is not None  # Prompts never yields nothing
    check_length(target, seen)
    if number < setup.store.batches - 1:
        _check_data(setup.store, setup.store.batches - 1, prompts, target, last)
    setup.store.flush()
    return setup, seen, passes


def _check_data(store: CodeStore, number: int, prompts: Prompts, target: Target, last: bool) -> None:
    """Behind the last batch of a checkpoint, or where the data end before it, look whether they are its data."""
    if number == store.batches - 1 and store.origin != _origin(prompts, target, last):
        raise InputError(
            "`checkpoint` holds other data: `tokens`, `batch_size`, `positions` or `target` have changed since; delete "
            "it, or name another folder"
        )


def _origin(prompts: Prompts, target: Target, last: bool) -> str:
    """A hash of the data read so far and of what was asked about them."""
    digest = hashlib.sha256(prompts.hash_so_far().encode())
    for part in (prompts.positions, last, *(vars(target).values() if target is not None else ())):
        digest.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return digest.hexdigest()
