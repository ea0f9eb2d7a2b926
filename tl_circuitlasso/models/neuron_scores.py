"""From prompts to one number per node: the multiplier of what a node puts out, times how much it differs.

    score(u) = mean over prompts of sum_p <m_u[p], u[p] - r_u[p]>

m is the target's multiplier (sweep or gradient), r the reference: what u does on the corrupted prompt, its mean at that
position, or zero. A positive score helps the target. Nothing here grows with the number of prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.metric import as_objective
from tl_circuitlasso.models.names import Kind, act
from tl_circuitlasso.models.neuron_sweep import Ends, Layer, Rules, sweep, unembedded, wanted
from tl_circuitlasso.models.passes import ForwardPass, differentiable
from tl_circuitlasso.models.rotary import position_ids

Multiplied = tuple[str, Tensor]  # an activation's key and the multiplier there, (prompt pos *width)

NODE_BASES: Mapping[str, Kind] = {"neuron": "mlp_post", "mlp_out": "mlp_out", "head": "z", "residual": "resid_pre"}
REFERENCES = ("corrupted", "mean", "zero")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts with their partners (None where there are none) and their numbers in the data set.

    keep: where the target is read, for goals that ask.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"] | None
    mask: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, " batch"]
    keep: Bool[Tensor, "batch pos"] | None = None


Goal = Callable[[Tensor, Batch], Tensor]  # (logits, the batch they are of) -> sum over its prompts
Contrast = Callable[[Tensor, Tensor, Batch], Tensor]  # (logits of both runs, batch) -> what the target reads of logits


@dataclass
class Count:
    """Passes per prompt (a sweep counts as a backward pass), and the sum over prompts of what the target differs by."""

    forward: float = 0.0
    backward: float = 0.0
    difference: float = 0.0


@dataclass(frozen=True)
class Reading:
    """A target that is linear in the logits: what it reads of them, given both runs of each pair.

    oriented: every pair counts from its lower to its higher value. Partners drawn at random need it: over a random
    cycle of prompts the differences themselves add up to nothing.
    """

    contrast: Contrast
    oriented: bool


@dataclass(frozen=True, eq=False)
class Scoring:
    """What is scored, and against what.

    basis: a key of `NODE_BASES`; reference: one of `REFERENCES`; goal: the target as a function of the logits, or as
        what it reads of them in each pair (`Reading`).
    """

    adapter: Adapter
    goal: Goal | Reading
    basis: str
    reference: str
    count: Count = field(default_factory=Count)

    def __post_init__(self) -> None:
        if self.basis not in NODE_BASES:
            raise InputError(f"`basis` is {self.basis!r}: write one of {', '.join(map(repr, NODE_BASES))}")
        if self.reference not in REFERENCES:
            raise InputError(f"`reference` is {self.reference!r}: write one of {', '.join(map(repr, REFERENCES))}")
        shape, name = self.adapter.shape, self.adapter.name
        if shape.attn_only and self.basis in ("neuron", "mlp_out"):
            raise ModelError(f"`basis` {self.basis!r}: {name} has no MLPs; use basis='head' or 'residual'")
        if shape.moe:
            raise ModelError(
                f"`basis` {self.basis!r}: {name} routes tokens through experts, whose neurons change from token to "
                "token; use basis='component'"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The activations whose coordinates are nodes."""
        return tuple(act(NODE_BASES[self.basis], layer) for layer in range(self.adapter.shape.n_layers))

    def run(self, tokens: Tensor, mask: Tensor, more: tuple[str, ...] = (), share: float = 0.0) -> dict[str, Tensor]:
        """One forward pass for the nodes' activations and `more`; `share` is the part of the prompts that it ran."""
        self.count.forward += share
        return self.adapter.run(tokens, mask, dict.fromkeys((*self.keys, *more)))


# ---- multipliers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pass:
    """What a way of getting multipliers may use: the batch, its share of the prompts, and the activations of both."""

    scoring: Scoring
    batch: Batch
    share: float
    own: Mapping[str, Tensor]
    other: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class BySweep:
    """Multipliers of one linear sweep: between the two runs of a pair, or (`alone`) in the clean run."""

    rules: Rules
    alone: bool

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        return ("logits", *wanted(adapter, self.rules))

    def multipliers(self, given: Pass) -> Iterator[Multiplied]:
        scoring, batch = given.scoring, given.batch
        other = given.own if self.alone or given.other is None else given.other
        ends = Ends(scoring.adapter, given.own, other, batch.mask, position_ids(batch.mask))
        at_logits, difference = read_logits(scoring.goal, given.own["logits"], other["logits"], batch)
        scoring.count.difference += difference
        start = unembedded(scoring.adapter, given.own["logits"], other["logits"], at_logits)
        scoring.count.backward += given.share
        for layer in sweep(ends, start, self.rules):
            yield act(NODE_BASES[scoring.basis], layer.layer), _at(layer, scoring.basis)


def _at(layer: Layer, basis: str) -> Float[Tensor, "prompt pos *width"]:
    if basis == "head":
        return layer.heads[:, 0].transpose(1, 2)
    found = {"neuron": layer.neurons, "mlp_out": layer.behind, "residual": layer.front}[basis]
    assert found is not None  # Scoring refuses models without MLPs
    return found[:, 0]


def read_logits(
    goal: Goal | Reading, own: Float[Tensor, "batch pos vocab"], other: Float[Tensor, "batch pos vocab"], batch: Batch
) -> tuple[Float[Tensor, "batch pos vocab"], float]:
    """What the target reads of the logits, and the sum over prompts of what it differs by between the runs."""
    if not isinstance(goal, Reading):
        value, at_logits = goal_gradient(goal, own, batch)
        return at_logits, value - float(goal(other, batch))
    at_logits = goal.contrast(own, other, batch)
    change = (at_logits * (own - other)).sum((1, 2))
    if goal.oriented:
        at_logits, change = at_logits * change.sign()[:, None, None], change.abs()
    return at_logits, float(change.sum())


def goal_gradient(
    goal: Goal, logits: Float[Tensor, "batch pos vocab"], batch: Batch
) -> tuple[float, Float[Tensor, "batch pos vocab"]]:
    """The goal's value and its derivative in the logits.

    Raises
    ------
    InputError: the goal isn't one finite number that depends on the logits.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = as_objective(goal(leaf, batch))
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]


@dataclass(frozen=True)
class ByGradient:
    """Derivatives: on the clean prompt (steps 0), or their mean over embeddings r + k/steps (clean - r), k < steps.

    r is the corrupted prompt's embedding, or nothing where there's none.
    """

    steps: int = 0

    def wanted(self, adapter: Adapter) -> tuple[str, ...]:
        return (act("resid_pre", 0),)

    def multipliers(self, given: Pass) -> Iterator[Multiplied]:
        clean = given.own[act("resid_pre", 0)]
        base = torch.zeros_like(clean) if given.other is None else given.other[act("resid_pre", 0)]
        total: dict[str, Tensor] = {}
        for k in range(max(self.steps, 1)):
            start = clean if self.steps == 0 else torch.lerp(base, clean, k / self.steps)
            for key, found in gradients(given.scoring, given.batch, start).items():
                total[key] = total.get(key, torch.zeros_like(found)) + found / max(self.steps, 1)
            given.scoring.count.forward += given.share
            given.scoring.count.backward += given.share
        yield from total.items()


def gradients(scoring: Scoring, batch: Batch, start: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
    """The goal's derivative at every node, with the residual stream in front of the first layer set to `start`."""

    def begin(activation: Tensor) -> Tensor:
        return start.to(activation).detach().clone().requires_grad_()

    made = ForwardPass(scoring.adapter, batch.clean, batch.mask, [*scoring.keys, "logits"], gradients=True)
    with differentiable(scoring.adapter):
        made.run([(act("resid_pre", 0), begin)])
        assert not isinstance(scoring.goal, Reading)  # methods by gradient are given metrics
        return made.gradients_of(as_objective(scoring.goal(made["logits"], batch)), scoring.keys)


# ---- scores ---------------------------------------------------------------------------------------------------------


def scores(
    scoring: Scoring, batches: Callable[[], Iterator[Batch]], prompts: int, way: BySweep | ByGradient, places: int = 1
) -> dict[str, Float[Tensor, "place node"]]:
    """Each node's mean signed contribution per prompt, by activation key, in float64.

    places: 1 takes all positions together, the longest prompt's length keeps them apart, from the first real token.
    `batches` is called twice where the reference is the mean.
    """
    total: dict[str, Tensor] = {}
    for batch, key, product in products(scoring, batches, prompts, way):
        if key not in total:
            total[key] = product.new_zeros(places, product.shape[2])
        at = position_ids(batch.mask)[batch.mask].clamp_max(places - 1)
        total[key].index_add_(0, at, product[batch.mask])
    return {key: total[key].cpu() / prompts for key in scoring.keys}


def products(
    scoring: Scoring, batches: Callable[[], Iterator[Batch]], prompts: int, way: BySweep | ByGradient
) -> Iterator[tuple[Batch, str, Float[Tensor, "prompt pos node"]]]:
    """Every batch's contributions, prompt by prompt and position by position, one activation at a time."""
    means = _means(scoring, batches, prompts) if scoring.reference == "mean" else None
    for batch, key, at, own, other in multiplied(scoring, batches, prompts, way):
        real = batch.mask.view(*batch.mask.shape, *[1] * (at.ndim - 2))
        product = torch.where(real, at * (own - _reference(scoring, key, other, means)), 0.0).double()
        yield batch, key, product.sum(-1) if scoring.basis == "head" else product


def multiplied(
    scoring: Scoring, batches: Callable[[], Iterator[Batch]], prompts: int, way: BySweep | ByGradient
) -> Iterator[tuple[Batch, str, Tensor, Tensor, Tensor | None]]:
    """Every batch's multipliers at each activation, with the activation in the clean run and in the partner's."""
    for batch in batches():
        share = len(batch.rows) / prompts
        own = scoring.run(batch.clean, batch.mask, way.wanted(scoring.adapter), share)
        other = None
        if batch.corrupted is not None and _reads_partner(scoring, way):
            other = scoring.run(batch.corrupted, batch.mask, way.wanted(scoring.adapter), share)
        for key, at in way.multipliers(Pass(scoring, batch, share, own, other)):
            yield batch, key, at, own[key], None if other is None else other[key]


def _reads_partner(scoring: Scoring, way: BySweep | ByGradient) -> bool:
    along = way.steps > 0 if isinstance(way, ByGradient) else not way.alone
    return scoring.reference == "corrupted" or along


def _reference(scoring: Scoring, key: str, other: Tensor | None, means: Mapping[str, Tensor] | None) -> Tensor | float:
    if scoring.reference == "zero":
        return 0.0
    if means is not None:
        return means[key]
    if other is None:
        raise InputError("`corrupted` is missing: reference='corrupted' reads it; without it use 'mean' or 'zero'")
    return other


def _means(scoring: Scoring, batches: Callable[[], Iterator[Batch]], prompts: int) -> dict[str, Tensor]:
    """Every node's mean at each position, over the corrupted prompts where there are any, else the clean ones."""
    sums: dict[str, Tensor] = {}
    count: Tensor | None = None
    for batch in batches():
        tokens = batch.clean if batch.corrupted is None else batch.corrupted
        acts = scoring.run(tokens, batch.mask, (), len(batch.rows) / prompts)
        for key in scoring.keys:
            real = batch.mask.view(*batch.mask.shape, *[1] * (acts[key].ndim - 2))
            summed = torch.where(real, acts[key], 0.0).double().sum(0)
            sums[key] = summed if key not in sums else sums[key] + summed
        seen = batch.mask.sum(0)
        count = seen if count is None else count + seen
    assert count is not None
    counts = count.clamp_min(1)
    return {
        key: (total / counts.view(-1, *[1] * (total.ndim - 1))).to(scoring.adapter.compute_dtype)
        for key, total in sums.items()
    }
