"""Penalty "read": the Lasso between SAE features, told what the weights know.

Feature i of an earlier hook adds z_i D_ij to the pre-activation of feature j of a later one, D_ij = r_i . e_j, where
e_j is the encoder direction of j and r_i what the MLPs in between have made of the decoder direction of i, on average
where i fires (`models.feature_reads`). As in the design `read`, each such contribution gets one non-negative
coefficient a_ij, which is a Lasso on A_ij = a_ij D_ij:

    min_A  1/(2M) ||Y - Z A||^2 + sum_j lambda_j sum_i |A_ij| / |D_ij|,       A_ij D_ij >= 0

A parent that the child hardly reads is dear, and none can act against the direction in which it is read. |D_ij| counts
as at least `FLOOR` of the child's largest, because attention reads as well. The sign rule is kept by forbidding
the entries that break it and solving again, which ends after a few rounds. The certificate is that of the last solve.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.features.fit import Entries
from tl_circuitlasso.models.feature_reads import Reads
from tl_circuitlasso.models.hook_order import reads_stream, writes_to_stream

FLOOR = 0.05
ROUNDS = 5


def pair_reads(
    reads: Reads,
    parent: str,
    child: str,
    features: Int[Tensor, " source"],
    child_features: Int[Tensor, " target"],
) -> Float[Tensor, "source target"] | None:
    """D_ij = r_i . e_j, or None where the residual stream doesn't lead from the one to the other.

    That is where the parent doesn't write to the stream, the child's SAE doesn't read it, or has no encoder matrix
    `W_enc` of (width, feature).
    """
    first, last = reads.encoders[parent], reads.encoders[child]
    encoder = getattr(last.sae, "W_enc", None)
    if not (writes_to_stream(first.hook_out) and reads_stream(last.hook)):
        return None
    if not isinstance(encoder, Tensor) or encoder.shape != (first.width, last.features):
        return None
    columns = encoder.detach()[:, child_features.to(encoder.device)].float().cpu()
    return (reads.responses(parent, child, features) @ columns).double()


def read_lasso(
    data: solve.Moments,
    reads: Float[Tensor, "source target"],
    *,
    strength: float | Tensor,
    tol: float,
) -> tuple[solve.Solution, solve.L1]:
    """The signed, weighted Lasso above, and its penalty; `reads` in the units of `data`.

    Rows of NaN are sources of which nothing is known: they are weighted by the child's root mean square |D| and free in
    sign.

    >>> data = solve.Moments(torch.eye(2), torch.tensor([[1.0], [1.0]]), torch.tensor([2.0]), 100)
    >>> read_lasso(data, torch.tensor([[0.5], [-0.5]]), strength=0.5, tol=1e-6)[0].value.flatten().tolist()
    [0.5, 0.0]
    """
    reads = reads.to(data.gram)
    weights = read_weights(reads)
    level = torch.as_tensor(strength, dtype=reads.dtype, device=reads.device).expand(reads.shape[1])
    solution = _weighted(data, weights, level, tol, None)
    columns = torch.arange(reads.shape[1], device=reads.device)
    for number in range(ROUNDS):
        wrong = solution.value[:, columns] * reads[:, columns] < 0  # never at NaN
        columns, wrong = columns[wrong.any(0)], wrong[:, wrong.any(0)]
        if not len(columns):
            break
        start = solution.value[:, columns].masked_fill_(wrong, 0.0)
        if number == ROUNDS - 1:
            solution.value[:, columns] = start
            break
        weights[:, columns] = weights[:, columns].masked_fill_(wrong, torch.inf)
        some = solve.Moments(data.gram, data.cross[:, columns], data.target_sq_norm[columns], data.count)
        again = _weighted(some, weights[:, columns], level[columns], tol, start)
        solution = _with_columns(solution, columns, again)
    return solution, solve.L1(weights)


def _weighted(
    data: solve.Moments,
    weights: Float[Tensor, "source target"],
    level: Float[Tensor, " target"],
    tol: float,
    init: Float[Tensor, "source target"] | None,
) -> solve.Solution:
    return solve.lasso(
        data.gram,
        data.cross,
        target_sq_norm=data.target_sq_norm,
        strength=level,
        penalty=solve.L1(weights),
        tol=tol,
        init=init,
        check=False,
    )


def _with_columns(whole: solve.Solution, columns: Int[Tensor, " some"], part: solve.Solution) -> solve.Solution:
    """The solution with some targets' columns in place of its own; its tensors are overwritten."""
    pairs = [(whole.value.T, part.value.T), (whole.gap, part.gap), (whole.converged, part.converged)]
    pairs += [(whole.stats[name], part.stats[name]) for name in ("strength", "strength_max", "iterations")]
    for mine, theirs in pairs:
        mine[columns] = theirs
    return whole if bool(part.converged.all()) else replace(whole, status=part.status)


def keeping_signs(entries: Entries) -> Entries:
    """The same coefficients, with the Lasso's own value wherever unshrinking would turn its sign."""
    return replace(entries, refit=torch.where(entries.refit * entries.lasso >= 0, entries.refit, entries.lasso))


def floored(reads: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
    """Every |D_ij| raised to at least `FLOOR` of its child's largest, signs kept."""
    return torch.copysign(reads.abs().maximum(FLOOR * reads.abs().amax(0)), reads)


def read_weights(reads: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
    """1 / |D_ij|, as a fraction of the child's smallest, so that strengths stay in their range; 1 where D is zero."""
    unknown = reads.isnan()
    size = reads.abs().nan_to_num(0.0)
    typical = (size.square().sum(0) / (~unknown).sum(0).clamp(min=1)).sqrt()
    size = torch.where(unknown, typical, size)
    top = size.amax(0)
    return torch.where(size > 0, top / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


def in_standard_units(
    reads: Float[Tensor, "feature target"], source: Float[Tensor, " source"], target: Float[Tensor, " target"]
) -> Float[Tensor, "source target"]:
    """D in standard deviations of parent and child, with rows of NaN for the columns behind the features: copies seen
    through attention, and the SAE's error. `source` and `target` are inf for columns that don't vary."""
    spread = torch.where(source.isinf(), 0.0, source)[: len(reads), None]
    ready = torch.where(target.isinf(), 0.0, reads * spread / target)
    return torch.cat([ready, ready.new_full((len(source) - len(reads), reads.shape[1]), torch.nan)])
