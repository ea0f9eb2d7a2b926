"""Linear probes: how a label or a number that the model doesn't say out loud is read from its final residual stream.

The design `read` follows contributions down from directions of the final stream. The logits have such directions of
their own; for `Labels` and `Values` they are regressed first, with the library's own certified solver.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuitlasso import solve
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.outcome import Probe
from tl_circuitlasso.models.readout import last_only
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.targets import Labels, Values, check_length

STRENGTH = 0.01  # of lambda_max, in standardised columns: keeps a probe on few prompts from fitting noise
CAPACITY = 16_384  # samples that a probe is fitted on


def fit_probe(adapter: Adapter, prompts: Prompts, target: Labels | Values, *, last: bool, progress: bool) -> Probe:
    """A sparse linear probe of `target` on the normalised final residual stream; one forward pass over the prompts.

    Labels: multinomial logistic regression; Values: least squares; both with an L1 penalty of 1 % of lambda_max.

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
    x, y = _samples(adapter, prompts, target, last, progress)
    mean, spread = x.mean(0), x.std(0, correction=0)
    scale = torch.where(spread > 1e-8 * spread.max().clamp_min(1e-300), 1 / spread.clamp_min(1e-300), 0.0)
    columns = (x - mean) * scale
    if isinstance(target, Labels):
        solution = solve.multinomial_lasso(columns, y, strength=STRENGTH)
        bias = solution.stats["intercept"]
    else:
        data = solve.moments_of(columns, (y - y.mean())[:, None])
        solution = solve.lasso(data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=STRENGTH)
        bias = y.mean()[None]
    weight = scale[:, None] * solution.value.to(x)
    return Probe(weight, bias.to(x) - mean @ weight)


def _samples(
    adapter: Adapter, prompts: Prompts, target: Labels | Values, last: bool, progress: bool
) -> tuple[Float[Tensor, "sample d_model"], Shaped[Tensor, " sample"]]:
    final = f"blocks.{adapter.shape.n_layers - 1}.hook_resid_post"
    streams, values, count = [], [], 0
    for batch in tqdm(prompts, desc="probe", unit="batch", disable=None if progress else True):
        keep = last_only(batch.keep) if last else batch.keep
        acts = adapter.run(batch.tokens, batch.mask, [final, "scale.final"])
        streams.append((acts[final] / acts["scale.final"])[keep].double().cpu())
        rows = torch.arange(batch.start, batch.start + len(batch.tokens))
        values.append(target.y[rows][:, None].expand(keep.shape)[keep.cpu()])
        count += len(values[-1])
        if count >= CAPACITY:
            break
    return torch.cat(streams), torch.cat(values)
