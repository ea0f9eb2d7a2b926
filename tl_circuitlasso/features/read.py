"""Penalty "read": the Lasso between SAE features, told what each does to the other.

A parent whose feature, taken out, leaves the child's code alone (`models.feature_replay`: S_ij, what the code of j does
per unit of that of i) is dear, and none can act against the direction of what it does:

    min_A  1/(2M) ||Y - Z A||^2 + sum_j lambda_j sum_i |A_ij| / |S_ij|,       A_ij S_ij >= 0

and likewise for what is seen of i through attention. |S_ij| counts as at least `FLOOR` of the child's largest, because
it is measured on some prompts. The sign rule is kept by forbidding the entries that break it and solving again, which
ends after a few rounds. The certificate is that of the last solve.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.features.fit import Entries, nonzeros

FLOOR = 0.05
ROUNDS = 5


@dataclass(frozen=True, eq=False)
class Read:
    """What parents do to their children: S_ij of the first sources, and what every source costs.

    The sources behind those (directions of the SAE's error) have no S.
    """

    reads: Float[Tensor, "known target"]
    weights: Float[Tensor, "source target"]

    @classmethod
    def of(cls, reads: Float[Tensor, "known target"], source: Float[Tensor, " source"]) -> "Read":
        """From S in the caller's units and the standard deviations of all sources (inf where one doesn't vary)."""
        return cls(reads, read_weights(reads, source))


def read_lasso(
    data: solve.Moments, read: Read, *, strength: float | Tensor, tol: float
) -> tuple[solve.Solution, solve.L1]:
    """The signed, weighted Lasso above, and its penalty; `data` in standard units. Sources without S are free in sign.

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
    """Where coefficients act against what their source does."""
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
    """1 / |S_ij| in standard deviations of the parent, as a multiple of the child's smallest, so that strengths stay in
    their range; |S_ij| counts as at least `FLOOR` of the child's largest.

    Sources without S cost what the child's root mean square |S| does; those that don't vary (`source` is inf), and all
    of a child that nothing does anything to, cost 1.

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
