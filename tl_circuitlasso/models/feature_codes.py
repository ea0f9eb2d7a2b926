"""Forward passes in, sparse codes out: what every later step of an SAE circuit reads instead of the model.

A `Chunk` holds tens of thousands of samples: each hook's codes in CSR (float32 values, so 8 bytes an entry), the SAE's
errors in a few directions, the target's columns, and the tokens for contexts. At 50 active features a sample, a million
tokens take 0.4 GB a hook; dense they would take 131 GB at 32k features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import principal_directions
from tl_circuitlasso.models.codes import Codes, sparse_codes, stacked
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.tokens import Batch

LEAST_ATTENTION = 0.01  # a smaller share of attention moves next to nothing, and would make mixed codes dense
LOGIT_DIRECTIONS = 16


@dataclass(frozen=True, eq=False)
class Chunk:
    """The samples of some prompts.

    Attributes
    ----------
    codes: by hook, and by (hook, route) as "hook>route" where a parent is seen through attention.
    errors: by hook, what the SAE misses, in its leading directions; target: the target's columns at `target_rows`.
    prompt, position: each sample's prompt number and place among the real tokens.
    tokens, ends: the real tokens of all prompts one after another, and where each prompt ends; numbers: the prompts',
        rising; there may be others between them.
    batches: how many batches of the data are in chunks up to and with this one.
    """

    codes: Mapping[str, Codes]
    errors: Mapping[str, Float[Tensor, "sample direction"]]
    target: Float[Tensor, "target_sample column"]
    target_rows: Int[Tensor, " target_sample"]
    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]
    tokens: Int[Tensor, " token"]
    ends: Int[Tensor, " prompt"]
    numbers: Int[Tensor, " prompt"]
    batches: int

    def places(self, prompt: Int[Tensor, " sample"]) -> Int[Tensor, " sample"]:
        """Where prompts of these numbers stand among the chunk's."""
        return torch.searchsorted(self.numbers, prompt)

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.prompt)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        dense = (*self.errors.values(), self.target, self.prompt, self.position, self.tokens)
        sparse = (part for codes in self.codes.values() for part in (codes.starts, codes.columns, codes.values))
        return sum(part.nbytes for part in (*dense, *sparse))


@dataclass(frozen=True, eq=False)
class CodePlan:
    """What to read in each forward pass.

    encoders: the SAEs; routes: for a parent hook the layers whose attention carries it to some child, by route name;
    by_head: each head's pattern apart; errors: directions by hook (empty: no error nodes); target, last, metric: as
    in `readout`, `metric` the logits' directions where the target is the model's own logits.
    """

    encoders: Mapping[str, Encoder]
    routes: Mapping[str, Mapping[str, Sequence[int]]]
    by_head: bool
    errors: Mapping[str, Float[Tensor, "width direction"]]
    target: Target
    last: bool
    metric: Tensor | None
    wants_target: bool

    def wanted(self, adapter: Adapter) -> set[str]:
        """The activations that a forward pass must give; layers that none of them needs are not run."""
        hooks = {name for encoder in self.encoders.values() for name in (encoder.hook, *encoder.outputs)}
        layers = {layer for routes in self.routes.values() for some in routes.values() for layer in some}
        target = readout.wanted(adapter, self.target) if self.wants_target else ()
        return {*hooks, *(act("pattern", layer) for layer in layers), *target}


def fit_errors(
    adapter: Adapter, batch: Batch, encoders: Mapping[str, Encoder], count: int
) -> dict[str, Float[Tensor, "width direction"]]:
    """The leading principal directions of each SAE's error on the first batch."""
    hooks = {name for encoder in encoders.values() for name in (encoder.hook, encoder.hook_out)}
    acts = adapter.run(batch.tokens, batch.mask, hooks)
    found = {}
    for hook, encoder in encoders.items():
        parts = [
            encoder.encode_with_error(acts[hook][rows], acts[encoder.hook_out][rows])[1]
            for rows in _slices(batch.keep, encoder)
        ]
        found[hook] = principal_directions(torch.cat(parts), min(count, encoder.width))
    return found


def encode_batch(adapter: Adapter, plan: CodePlan, batch: Batch, number: int) -> Chunk:
    """One forward pass, encoded; `number` is the batch's number in the data."""
    acts = adapter.run(batch.tokens, batch.mask, plan.wanted(adapter))
    _check_finite(acts, plan, batch)
    codes: dict[str, Codes] = {}
    errors: dict[str, Tensor] = {}
    for hook, encoder in plan.encoders.items():
        found, missed = [], []
        for rows in _slices(batch.keep, encoder):
            dense, error = _encode(encoder, acts, rows, plan.errors.get(hook))
            found.append(sparse_codes(dense))
            missed.append(error)
        codes[hook] = stacked(found)
        if hook in plan.errors:
            errors[hook] = torch.cat(missed).cpu()
        if hook in plan.routes:
            codes |= _through_attention(plan, acts, batch, hook)
    target, rows = _target(adapter, plan, acts, batch)
    place = (batch.mask.cumsum(1) - 1)[batch.keep]
    prompt = torch.arange(batch.start, batch.start + len(batch.tokens), device=batch.keep.device)
    return Chunk(
        codes=codes,
        errors=errors,
        target=target,
        target_rows=rows,
        prompt=prompt[:, None].expand(batch.keep.shape)[batch.keep].cpu(),
        position=place.cpu().int(),
        tokens=batch.tokens[batch.mask].cpu().int(),
        ends=batch.mask.sum(1).cumsum(0).cpu(),
        numbers=torch.arange(batch.start, batch.start + len(batch.tokens)),
        batches=number + 1,
    )


def joined(parts: Sequence[Chunk]) -> Chunk:
    """Chunks as one, in the order of their prompts."""
    if len(parts) == 1:
        return parts[0]
    samples = [0]
    tokens = [0]
    for part in parts:
        samples.append(samples[-1] + part.samples)
        tokens.append(tokens[-1] + len(part.tokens))
    whole = parts[0]
    return replace(
        whole,
        codes={key: stacked([part.codes[key] for part in parts]) for key in whole.codes},
        errors={key: torch.cat([part.errors[key] for part in parts]) for key in whole.errors},
        target=torch.cat([part.target for part in parts]),
        target_rows=torch.cat([part.target_rows + at for part, at in zip(parts, samples)]),
        prompt=torch.cat([part.prompt for part in parts]),
        position=torch.cat([part.position for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        ends=torch.cat([part.ends + at for part, at in zip(parts, tokens)]),
        numbers=torch.cat([part.numbers for part in parts]),
        batches=parts[-1].batches,
    )


def route_key(hook: str, route: str, head: int | None = None) -> str:
    """Under which name codes seen through attention are kept."""
    return f"{hook}>{route}" if head is None else f"{hook}>{route}.{head}"


def _encode(
    encoder: Encoder, acts: Mapping[str, Tensor], rows: tuple[Tensor, ...], directions: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = acts[encoder.hook][rows]
    if directions is None:
        return encoder.encode(x), x.new_zeros(0)
    dense, error = encoder.encode_with_error(x, acts[encoder.hook_out][rows])
    return dense, error @ directions.to(error)


def _slices(where: Bool[Tensor, "batch pos"], encoder: Encoder) -> list[tuple[Tensor, ...]]:
    """The true places, as many at once as dense codes have room for."""
    places = where.nonzero()
    return [tuple(some.T) for some in places.split(encoder.rows_at_once())] or [tuple(places.T)]


def _through_attention(plan: CodePlan, acts: Mapping[str, Tensor], batch: Batch, hook: str) -> dict[str, Codes]:
    """sum_q P[p, q] z[q] at every sample p, P the mean pattern of the layers (and heads, unless `by_head`) of a route.

    q runs over all real tokens but BOS, which heads attend to where they have nothing to say.
    """
    found: dict[str, list[Codes]] = {}
    for prompt, (seen, kept) in enumerate(zip(batch.words, batch.keep)):
        codes = plan.encoders[hook].encode(acts[hook][prompt, seen])
        for route, layers in plan.routes[hook].items():
            pattern = torch.stack([acts[act("pattern", layer)][prompt] for layer in layers]).mean(0)
            pattern = pattern if plan.by_head else pattern.mean(0, keepdim=True)
            pattern = torch.where(pattern < LEAST_ATTENTION, 0, pattern)[:, kept][:, :, seen].to(codes)
            for head in range(len(pattern)):
                key = route_key(hook, route, head if plan.by_head else None)
                found.setdefault(key, []).append(sparse_codes(pattern[head] @ codes))
    return {key: stacked(parts) for key, parts in found.items()}


def _target(
    adapter: Adapter, plan: CodePlan, acts: Mapping[str, Tensor], batch: Batch
) -> tuple[Float[Tensor, "target_sample column"], Int[Tensor, " target_sample"]]:
    """The target's columns, and which of the batch's samples they belong to."""
    if not plan.wants_target:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    where = readout.last_only(batch.keep) if plan.last else batch.keep
    prompts = torch.arange(batch.start, batch.start + len(batch.tokens))
    values = readout.columns(adapter, acts, where, plan.target, prompts, plan.metric)
    return values.float().cpu(), where[batch.keep].nonzero().flatten().cpu()


def _check_finite(acts: Mapping[str, Tensor], plan: CodePlan, batch: Batch) -> None:
    for encoder in plan.encoders.values():
        for hook in (encoder.hook, *encoder.outputs):
            _refuse(hook, acts[hook][batch.keep])


def _refuse(hook: str, values: Shaped[Tensor, "..."]) -> None:
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise ModelError(f"activations at {hook} are NaN or infinite: check the model's weights and its dtype")
