"""Linear probes: how a label or a number that the model doesn't say out loud is read from its final residual stream.

The design `read` follows contributions down from directions of the final stream. The logits have such directions of
their own; for `Labels` and `Values` they are regressed first, with the library's own certified solver.
"""

import logging
from collections.abc import Iterator
from operator import itemgetter

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import Labels, Values, check_length
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.outcome import Probe
from tl_circuitlasso.models.readout import last_only
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.progress import bar

logger = logging.getLogger(__name__)

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of lambda_max, in standardised columns: from no probe to a free one
FEWEST = 20  # samples below which none can be held out to choose a strength
CAPACITY = 16_384  # samples that a probe is fitted on


def fit_probe(
    adapter: Adapter, prompts: Prompts, target: Labels | Values, *, last: bool, progress: bool, ranks: Ranks = ALONE
) -> tuple[Probe, int]:
    """A sparse linear probe of `target` on the normalised final residual stream; and the forward passes that it took,
    one over the prompts.

    Labels: multinomial logistic regression; Values: least squares; both with the L1 penalty that predicts the second
    half of the samples best from the first: a probe that fits noise would read what every component happens to write.
    Where none predicts better than the mean, the stream doesn't say `target`: that's logged, and no edge has a cost.

    Raises
    ------
    InputError: `tokens` can be read only once, or the target has the wrong length.
    """
    if prompts.n_prompts is None:
        raise InputError(
            f"`tokens` is a stream, but a {type(target).__name__} target with design='read' needs two passes over it: "
            "give a list or a tensor, or use design='activation'"
        )
    check_length(target, prompts.n_prompts)
    x, y, passes = _samples(adapter, prompts, target, last, progress, ranks)
    mean, spread = x.mean(0), x.std(0, correction=0)
    scale = torch.where(spread > 1e-8 * spread.max().clamp_min(1e-300), 1 / spread.clamp_min(1e-300), 0.0)
    columns = (x - mean) * scale
    if isinstance(target, Labels):
        y = torch.nn.functional.one_hot(y.long()).double()
    weight, bias = _fit(columns, y, _best_strength(columns, y))
    if not bool(weight.any()):
        logger.warning("`target`: no linear probe of the final residual stream predicts it on prompts held out")
    weight = scale[:, None] * weight
    return Probe(weight, bias - mean @ weight), passes


def _fit(
    columns: Float[Tensor, "sample d_model"], y: Float[Tensor, "sample *outcome"], strength: float
) -> tuple[Float[Tensor, "d_model column"], Float[Tensor, " column"]]:
    """Weights and bias: of classes where `y` holds their probabilities, of the mean where it holds numbers."""
    if y.ndim == 2:
        solution = solve.multinomial_lasso(columns, y, strength=strength)
        return solution.value.to(columns), solution.stats["intercept"].to(columns)
    mean, centred = y.mean(), columns - columns.mean(0)
    data = solve.moments_of(centred, (y - mean)[:, None])
    solution = solve.lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=strength)
    weight = solution.value.to(columns)
    return weight, (mean - columns.mean(0) @ weight).to(columns)


def _best_strength(columns: Float[Tensor, "sample d_model"], y: Float[Tensor, "sample *outcome"]) -> float:
    """The strength whose probe of the first half of the samples predicts the second best."""
    half = len(y) // 2
    if half < FEWEST / 2:
        return STRENGTHS[-1]
    losses = []
    for strength in STRENGTHS:
        weight, bias = _fit(columns[:half], y[:half], strength)
        found, wanted = columns[half:] @ weight + bias, y[half:]
        wrong = -(wanted * found.log_softmax(1)).sum(1) if y.ndim == 2 else (wanted - found[:, 0]).square()
        losses.append(float(wrong.mean()))
    return STRENGTHS[losses.index(min(losses))]


def _samples(
    adapter: Adapter, prompts: Prompts, target: Labels | Values, last: bool, progress: bool, ranks: Ranks
) -> tuple[Float[Tensor, "sample d_model"], Shaped[Tensor, " sample"], int]:
    """The final stream where it is sampled, what it is to say there, and the passes of all processes, which deal the
    batches out among themselves."""
    values: list[Tensor] = []

    def sampled() -> Iterator[tuple[Batch, Tensor]]:
        for batch in bar(prompts, desc="probe", unit="batch", progress=progress):
            keep = last_only(batch.keep) if last else batch.keep
            rows = torch.arange(batch.start, batch.start + len(batch.tokens))
            values.append(target.y[rows][:, None].expand(keep.shape)[keep.cpu()])
            yield batch, keep
            if sum(map(len, values)) >= CAPACITY:
                return

    def stream(sample: tuple[Batch, Tensor]) -> dict[str, Tensor]:
        batch, keep = sample
        acts = adapter.run(batch.tokens, batch.mask, [adapter.final, "scale.final"])
        return {"stream": (acts[adapter.final] / acts["scale.final"])[keep].double().cpu()}

    streams = ranks.map(sampled(), stream, itemgetter("stream"))
    return torch.cat(streams), torch.cat(values), len(values)
