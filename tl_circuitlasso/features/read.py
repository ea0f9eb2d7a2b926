"""Penalty "read": the Lasso between SAE features, told what the weights know.

Through the residual stream, feature i of an earlier hook adds z_i D_ij to the pre-activation of feature j of a later
one, D_ij = d_i . e_j (decoder direction of i, encoder direction of j). As in the design `read`, each such contribution
gets one non-negative coefficient a_ij, which is a Lasso on A_ij = a_ij D_ij:

    min_A  1/(2M) ||Y - Z A||^2 + sum_j lambda_j sum_i |A_ij| / |D_ij|,       A_ij D_ij >= 0

A parent that the child hardly reads is dear, and none can act against the direction in which it is read. |D_ij| counts
as at least `FLOOR` of the child's largest, because layers in between read as well. The sign rule is kept by forbidding
the entries that break it and solving again, which ends after a few rounds. The certificate is that of the last solve.
"""

import re
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.features.fit import Entries
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hook_order import writes_to_stream

FLOOR = 0.05
ROUNDS = 5
_READS_STREAM = re.compile(r"hook_resid_(pre|mid|post)\Z")


def direct_reads(
    parent: Encoder,
    child: Encoder,
    features: Int[Tensor, " source"],
    child_features: Int[Tensor, " target"],
) -> Float[Tensor, "source target"] | None:
    """D_ij = d_i . e_j, `floored`, or None where the residual stream doesn't lead from the one to the other.

    That is where the parent doesn't write to the stream, the child's SAE doesn't read it, or has no encoder matrix
    `W_enc` of (width, feature).
    """
    encoder = getattr(child.sae, "W_enc", None)
    if not (writes_to_stream(parent.hook_out) and _READS_STREAM.search(child.hook)):
        return None
    if not isinstance(encoder, Tensor) or encoder.shape != (parent.width, child.features):
        return None
    directions = parent.decoder[features.to(parent.decoder.device)]
    if getattr(getattr(parent.sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    columns = encoder.detach()[:, child_features.to(encoder.device)].float()
    return floored((directions.to(columns) @ columns).double().cpu())


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
    weights = _weights(reads)
    for _ in range(ROUNDS):
        solution = solve.lasso(
            data.gram,
            data.cross,
            target_sq_norm=data.target_sq_norm,
            strength=strength,
            penalty=solve.L1(weights),
            tol=tol,
            check=False,
        )
        wrong = solution.value.to(reads) * reads < 0  # never at NaN
        if not bool(wrong.any()):
            return solution, solve.L1(weights)
        weights = weights.masked_fill(wrong, torch.inf)
    kept = solution.value.masked_fill(wrong.to(solution.value.device), 0.0)
    return replace(solution, value=kept), solve.L1(weights)


def keeping_signs(entries: Entries) -> Entries:
    """The same coefficients, with the Lasso's own value wherever unshrinking would turn its sign."""
    return replace(entries, refit=torch.where(entries.refit * entries.lasso >= 0, entries.refit, entries.lasso))


def floored(reads: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
    """Every |D_ij| raised to at least `FLOOR` of its child's largest, signs kept."""
    return torch.copysign(reads.abs().maximum(FLOOR * reads.abs().amax(0)), reads)


def _weights(reads: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
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
