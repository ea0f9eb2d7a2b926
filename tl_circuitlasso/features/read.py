"""Penalty "read": the Lasso between SAE features, told what the weights know.

Feature i of an earlier hook adds z_i D_ij to the pre-activation of feature j of a later one, D_ij = r_i . e_j, where
e_j is the encoder direction of j and r_i what the MLPs in between have made of the decoder direction of i, on average
where i fires (`models.feature_reads`). As in the design `read`, each such contribution gets one non-negative
coefficient a_ij, which is a Lasso on A_ij = a_ij D_ij (and likewise for what is seen of i through attention):

    min_A  1/(2M) ||Y - Z A||^2 + sum_j lambda_j sum_i |A_ij| / |D_ij|,       A_ij D_ij >= 0

A parent that the child hardly reads is dear, and none can act against the direction in which it is read. |D_ij| counts
as at least `FLOOR` of the child's largest, because it is an average, and not all is known. The sign rule is kept by
forbidding the entries that break it and solving again, which ends after a few rounds. The certificate is that of the
last solve.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.features.fit import Entries, nonzeros
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
    *,
    by_head: bool = False,
) -> Float[Tensor, "known target"] | None:
    """D_ij = r_i . e_j, or None where the residual stream doesn't lead from the one to the other.

    That is where the parent doesn't write to the stream, the child's SAE doesn't read it, or has no encoder matrix
    `W_enc` of (width, feature). Below the features at their own position stand those that are seen through attention
    (`by_head`: through each head), where `reads` know about that.
    """
    first, last = reads.encoders[parent], reads.encoders[child]
    encoder = getattr(last.sae, "W_enc", None)
    if not (writes_to_stream(first.hook_out) and reads_stream(last.hook)):
        return None
    if not isinstance(encoder, Tensor) or encoder.shape != (first.width, last.features):
        return None
    columns = encoder.detach()[:, child_features.to(encoder.device)].float().cpu()
    responses = [reads.responses(parent, child, features)]
    responses += reads.mixed(parent, child, features, by_head=by_head)
    return torch.cat([some @ columns for some in responses]).double()


@dataclass(frozen=True, eq=False)
class Read:
    """How children read their parents: D_ij of the first sources, and what every source costs.

    The sources behind those (the SAE's error, and copies seen through attention that can't be read) have no D.
    """

    reads: Float[Tensor, "known target"]
    weights: Float[Tensor, "source target"]

    @classmethod
    def of(cls, reads: Float[Tensor, "known target"], source: Float[Tensor, " source"]) -> "Read":
        """From D in the caller's units and the standard deviations of all sources (inf where one doesn't vary)."""
        return cls(reads, read_weights(reads, source))


def read_lasso(
    data: solve.Moments, read: Read, *, strength: float | Tensor, tol: float
) -> tuple[solve.Solution, solve.L1]:
    """The signed, weighted Lasso above, and its penalty; `data` in standard units. Sources without D are free in sign.

    >>> data = solve.Moments(torch.eye(2), torch.tensor([[1.0], [1.0]]), torch.tensor([2.0]), 100)
    >>> read = Read.of(torch.tensor([[0.5], [-0.5]]), torch.ones(2))
    >>> read_lasso(data, read, strength=0.5, tol=1e-6)[0].value.flatten().tolist()
    [0.5, 0.0]
    """
    weights = read.weights.to(data.gram, copy=True)
    targets = weights.shape[1]
    level = torch.as_tensor(strength, dtype=weights.dtype, device=weights.device).expand(targets)
    solution = _weighted(data, weights, level, tol, None)
    source, target = _against(solution.value, read.reads)
    for number in range(ROUNDS):
        if not len(source):
            break
        solution.value[source, target] = 0.0
        if number == ROUNDS - 1:
            break
        weights[source, target] = torch.inf
        columns = target.unique()
        some = solve.Moments(data.gram, data.cross[:, columns], data.target_sq_norm[columns], data.count)
        again = _weighted(some, weights[:, columns], level[columns], tol, solution.value[:, columns])
        solution = _with_columns(solution, columns, again)
        source, place = _against(again.value, read.reads[:, columns.to(read.reads.device)])
        target = columns[place]
    return solution, solve.L1(weights)


def _against(
    value: Float[Tensor, "source target"], reads: Float[Tensor, "known target"]
) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
    """Where coefficients act against the direction in which their source is read."""
    source, target = nonzeros(value[: len(reads)])
    wrong = value[source, target] * reads[source.to(reads.device), target.to(reads.device)].to(value) < 0
    return source[wrong], target[wrong]


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


def read_weights(
    reads: Float[Tensor, "known target"], source: Float[Tensor, " source"]
) -> Float[Tensor, "source target"]:
    """1 / |D_ij| in standard deviations of the parent, as a multiple of the child's smallest, so that strengths stay in
    their range; |D_ij| counts as at least `FLOOR` of the child's largest.

    Sources without D cost what the child's root mean square |D| does; those that don't vary (`source` is inf), and all
    of a child that reads nothing, cost 1.

    >>> read_weights(torch.tensor([[1.0], [-0.5], [0.0]]), torch.ones(3)).flatten().tolist()
    [1.0, 2.0, 20.0]
    """
    features, dead = len(reads), source.isinf()
    weights = reads.new_empty(len(source), reads.shape[1])  # filled in place: these may be gigabytes
    size = torch.abs(reads, out=weights[:features])
    torch.maximum(size, FLOOR * size.amax(0), out=size)
    size.mul_(torch.where(dead, 0.0, source)[:features, None].to(size))
    top = size.amax(0)
    typical = size.norm(dim=0) / max(features, 1) ** 0.5
    weights[features:] = typical
    torch.div(top, weights, out=weights)
    weights[dead] = 1.0
    weights[:, top == 0] = 1.0
    return weights
