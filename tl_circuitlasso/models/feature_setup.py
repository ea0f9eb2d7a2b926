"""What the first batch decides before all are encoded: the order of the hooks, the pairs, and what to read.

On it shapes and metadata of the SAEs are checked, the order of the hooks is heard, and the directions of the SAEs'
errors and of the logits are fitted; of several processes all take those of process 0.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.closure import MAX_PROMPTS
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import LOGIT_DIRECTIONS, CodePlan, fit_errors
from tl_circuitlasso.models.feature_store import CodeStore
from tl_circuitlasso.models.hook_order import attention_between, computing_order
from tl_circuitlasso.models.memory import free_bytes
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.sae_checks import (
    check_cross_layer,
    check_hooks,
    check_labels,
    check_shapes,
    warn_of_mismatches,
)
from tl_circuitlasso.models.tokens import Batch, first_prompts

TARGET = "target"
DIRECTIONS = "directions.safetensors"  # in a checkpoint
THROUGH_ATTENTION = ("mean", "heads")  # ways of mixing
UNKNOWN_LIMIT = 4 << 30  # bytes of codes in memory where the system doesn't say what is free


@dataclass(frozen=True, eq=False)
class Setup:
    """What the first batch decides.

    encoders: the SAEs by hook, in the order of computation; order: every hook's rank; pairs: what is regressed on what;
    routes: for each pair the layers whose attention stands between, as text; plan: what to read of every batch;
    store: where codes are put; identity: what makes a checkpoint belong to this collection; first: a few prompts.
    """

    encoders: Mapping[str, Encoder]
    order: Mapping[str, int]
    pairs: tuple[tuple[str, str], ...]
    routes: Mapping[tuple[str, str], str | None]
    plan: CodePlan
    store: CodeStore
    identity: Mapping[str, Any]
    first: Batch


def set_up(
    adapter: Adapter, basis: SAEFeatures, target: Target, batch: Batch, last: bool, checkpoint: Path | None,
    ranks: Ranks,
) -> Setup:  # fmt: skip
    """Look at the first batch: are the SAEs these hooks', in which order are they computed, what is to be read?

    Raises
    ------
    InputError: an SAE of another width, an unknown hook, pairs against the order of computation, or a checkpoint of
        another collection. ModelError: NaN or infinite activations or codes.
    """
    loaded = basis.encoders(cross_layer=True)
    hooks = [name for encoder in loaded.values() for name in (encoder.hook, *encoder.outputs)]
    order = computing_order(adapter, batch, hooks)
    encoders = dict(sorted(loaded.items(), key=lambda item: order[item[0]]))
    check_cross_layer(encoders, order, error=basis.error)
    check_hooks(encoders)
    check_labels(encoders, basis.labels)
    check_shapes(encoders, adapter.run(batch.tokens[:1], batch.mask[:1], hooks))
    warn_of_mismatches(adapter, encoders, batch)
    pairs = resolve_pairs(basis.pairs, encoders, order)
    routes = {pair: _route(pair, encoders, adapter.shape.n_layers, basis.mixing) for pair in pairs}
    wants_target = any(child == TARGET for _, child in pairs)
    plan = CodePlan(
        encoders=encoders,
        routes=_by_parent(routes),
        by_head=basis.mixing == "heads",
        errors={},
        target=target,
        last=last,
        metric=None,
        wants_target=wants_target,
    )
    identity = _identity(adapter, basis, encoders, routes)
    fitted = _fitted(adapter, basis, plan, pairs, batch, checkpoint, identity, ranks)
    folder = own_folder(checkpoint, ranks)
    free = free_bytes()
    limit = basis.memory or (UNKNOWN_LIMIT if free is None else free // 2 // ranks.beside)
    store = CodeStore(folder, limit, identity)
    first = first_prompts(batch, MAX_PROMPTS)
    return Setup(encoders, order, pairs, routes, fitted, store, identity, first)


def own_folder(checkpoint: Path | None, ranks: Ranks) -> Path | None:
    """Where this process keeps its codes: which batches are its own depends on how many share them."""
    return checkpoint if checkpoint is None or ranks.size == 1 else checkpoint / f"rank-{ranks.rank}-of-{ranks.size}"


def resolve_pairs(pairs: Any, encoders: Mapping[str, Encoder], order: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """The (parent, child) pairs that a basis asks for, children ordered as the model computes them.

    Raises
    ------
    InputError: a pair whose child is computed before what its parent writes.
    """
    hooks = list(encoders)

    def may_feed(parent: str, child: str) -> bool:
        written, read = order[encoders[parent].hook_out], order[child]
        return written < read or (written == read and encoders[parent].is_transcoder)

    if isinstance(pairs, str):
        found = [(parent, child) for parent in hooks for child in hooks if may_feed(parent, child)]
        if pairs == "adjacent":
            first = {parent: min(order[child] for p, child in found if p == parent) for parent, _ in found}
            found = [(parent, child) for parent, child in found if order[child] == first[parent]]
    else:
        found = list(pairs)
        for parent, child in found:
            if child != TARGET and not may_feed(parent, child):
                raise InputError(f"`pairs` has {parent} -> {child}, which runs against the order of computation")
    if isinstance(pairs, str) or all(child != TARGET for _, child in found):
        feeding = {parent for parent, _ in found}
        found += [(hook, TARGET) for hook in hooks if hook not in feeding]
    last = max(order.values()) + 1
    return tuple(sorted(found, key=lambda pair: (order.get(pair[1], last), order[pair[0]])))


def _route(pair: tuple[str, str], encoders: Mapping[str, Encoder], n_layers: int, mixing: str) -> str | None:
    """The layers whose attention stands between the two, as text; None where there is none or nobody asked."""
    if mixing not in THROUGH_ATTENTION:
        return None
    between = attention_between(encoders[pair[0]].hook_out, pair[1], n_layers)
    return f"{between.start}-{between.stop}" if len(between) else None


def _by_parent(routes: Mapping[tuple[str, str], str | None]) -> dict[str, dict[str, range]]:
    found: dict[str, dict[str, range]] = {}
    for (parent, _), route in routes.items():
        if route is not None:
            start, stop = map(int, route.split("-"))
            found.setdefault(parent, {})[route] = range(start, stop)
    return found


def _fitted(
    adapter: Adapter, basis: SAEFeatures, plan: CodePlan, pairs: Sequence[tuple[str, str]], batch: Batch,
    checkpoint: Path | None, identity: Mapping[str, Any], ranks: Ranks,
) -> CodePlan:  # fmt: skip
    """The plan with what the pilot decides, in process 0: directions of errors and logits."""
    kept = None if checkpoint is None else Checkpoint(checkpoint, "feature directions", "collection", identity)
    stored = None if kept is None or ranks.rank else kept.read(DIRECTIONS)
    own = {} if ranks.rank else stored[0] if stored else _directions(adapter, basis, plan, pairs, batch)
    if kept is not None and ranks.rank == 0 and stored is None:
        kept.write(DIRECTIONS, own)
    tensors = ranks.gather(own)[0]
    errors = {name.removeprefix("error/"): value for name, value in tensors.items() if name.startswith("error/")}
    if basis.error and set(errors) != _parents(pairs):
        raise FormatError(f"`checkpoint` {checkpoint}: {DIRECTIONS} lacks entries; delete the folder")
    metric = tensors["logits"].to(adapter.device) if "logits" in tensors else None
    return CodePlan(**{**vars(plan), "errors": errors, "metric": metric})


def _parents(pairs: Sequence[tuple[str, str]]) -> set[str]:
    return {parent for parent, _ in pairs}


def _directions(
    adapter: Adapter, basis: SAEFeatures, plan: CodePlan, pairs: Sequence[tuple[str, str]], batch: Batch
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if basis.error:
        parents = {hook: plan.encoders[hook] for hook in sorted(_parents(pairs))}
        fitted = fit_errors(adapter, batch, parents, basis.error_directions)
        found |= {f"error/{hook}": value for hook, value in fitted.items()}
    if plan.wants_target and plan.target is None:
        acts = adapter.run(batch.tokens, batch.mask, readout.wanted(adapter, None))
        found["logits"] = readout.fit(adapter, acts, batch.keep, LOGIT_DIRECTIONS)
    return found


def _identity(
    adapter: Adapter, basis: SAEFeatures, encoders: Mapping[str, Encoder], routes: Mapping[tuple[str, str], str | None]
) -> dict[str, Any]:
    return {
        "model": adapter.name,
        "config": adapter.config_hash(),
        "weights": adapter.weights_hash(),
        "saes": {hook: encoder_hash(encoder) for hook, encoder in encoders.items()},
        "mixing": basis.mixing,
        "routes": sorted(f"{parent}>{route}" for (parent, _), route in routes.items() if route),
        "error": basis.error_directions if basis.error else 0,
    }


def encoder_hash(encoder: Encoder) -> str:
    """sha256 of an SAE's class and a thin sample of its weights."""
    digest = hashlib.sha256(type(encoder.sae).__name__.encode())
    digest.update(" ".join(encoder.later or ()).encode())
    weights = [getattr(encoder.sae, name, None) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")]
    for weight in weights:
        if isinstance(weight, Tensor):
            flat = weight.detach().flatten()
            digest.update(str(tuple(weight.shape)).encode())
            digest.update(flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
