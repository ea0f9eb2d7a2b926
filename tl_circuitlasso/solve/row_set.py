"""Working sets of rows around any inner solver: what group penalties use, one target block at a time.

repeat:  certify the block from -grad f over all rows; stop within the tolerance
         rows = support + the row groups that pull hardest;  inner solver on those rows only
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import fair_start, relative_gap
from tl_circuitlasso.solve.fista import Fista
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.prox import block_norms


@dataclass(frozen=True)
class RowSet(AbstractSolver):
    """Each target block is solved on a growing set of row groups; `inner` solves the small problems."""

    inner: AbstractSolver = field(default_factory=Fista)
    max_iter: int = 50
    least: int = 4

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(penalty, Group):
            return self.inner.solve(loss, penalty, strength, tol=tol, init=init)
        nothing = torch.zeros(loss.shape, dtype=strength.dtype, device=strength.device)
        value = nothing if init is None else fair_start(loss, penalty, init, strength)
        gap = torch.full_like(strength, torch.inf)
        iterations = torch.zeros(loss.shape[1], dtype=torch.long, device=strength.device)
        for group in range(int(penalty.target_groups.max()) + 1 if loss.shape[1] else 0):
            columns = (penalty.target_groups == group).nonzero()[:, 0]
            if len(columns):
                part = penalty.restrict(None, columns)
                answer = self._one_block(loss.restrict(None, columns), part, strength[columns], value[:, columns], tol)
                value[:, columns], gap[columns], iterations[columns] = answer.value, answer.gap, answer.iterations
        return Answer(value, gap, iterations)

    def _one_block(
        self,
        loss: AbstractLoss,
        penalty: Group,
        strength: Float[Tensor, " target"],
        value: Float[Tensor, "source target"],
        tol: float,
    ) -> Answer:
        iterations = torch.zeros(loss.shape[1], dtype=torch.long, device=value.device)
        share, previous = 0.3, torch.inf
        for step in range(self.max_iter + 1):
            pull = loss.negative_gradient(value)
            gap = relative_gap(loss, penalty, value, strength, pull)
            if bool((gap <= tol).all()) or step == self.max_iter:
                break
            # the small problem was solved and the large one has not moved: ask more of the inner solver
            share = share / 4 if float(gap.max()) > 0.5 * previous else share
            previous = float(gap.max())
            rows = self._choose(penalty, value, pull, strength)
            if 2 * len(rows) > loss.shape[0]:  # not sparse after all: growing further would only repeat the work
                rows = torch.arange(loss.shape[0], device=value.device)
            answer = self.inner.solve(
                loss.restrict(rows, None), penalty.restrict(rows, None), strength, tol=share * tol, init=value[rows]
            )
            value = torch.zeros_like(value).index_copy_(0, rows, answer.value)
            iterations += answer.iterations
        return Answer(value, gap, iterations)

    def _choose(
        self,
        penalty: Group,
        value: Float[Tensor, "source target"],
        pull: Float[Tensor, "source target"],
        strength: Float[Tensor, " target"],
    ) -> Int[Tensor, " kept_source"]:
        """Rows of the support and of the row groups whose pull exceeds their threshold most."""
        one = torch.zeros_like(penalty.target_groups)
        weight = torch.ones_like(value[:1]) if penalty.weights is None else penalty.weights[:, :1]
        groups = int(penalty.row_groups.max()) + 1
        support = block_norms(value, penalty.row_groups, one, (groups, 1))[:, 0] > 0
        pulled = pull.clamp(min=0) if penalty.non_negative else pull
        excess = block_norms(pulled, penalty.row_groups, one, (groups, 1))[:, 0] / weight[:, 0] - strength[0]
        excess = torch.where(support, -torch.inf, excess)
        room = min(max(self.least, 2 * int(support.sum())), int((excess > 0).sum()))
        chosen = support.index_fill(0, excess.topk(room).indices, True)
        return chosen[penalty.row_groups].nonzero()[:, 0]
