"""Working sets without a compiler: the same rounds as `working_set` in batched torch, for graphics cards.

All targets of a batch sweep together over a padded working set, so a coordinate step costs a few small kernels for
the whole batch and can't skip zeros. Targets that sweeps don't finish, as beside near-copies of a column, get Newton
steps on their nonzeros; those that nothing moves any more are given up as stalled. Equal to the compiled solver up to
ten nonzeros a target, several times slower at a hundred (the `--fallback` section of benchmarks/solvers.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss, AbstractPenalty, AbstractSolver, Answer
from tl_circuitlasso.solve.certificate import fair_start, relative_gap
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like
from tl_circuitlasso.solve.prox import threshold

WORKSPACE = 1 << 26  # entries of all small Grams of a batch (512 MB in float64)
SWEEPS = 20  # between two certificates
SWEPT = 3  # rounds of sweeps alone
LEAPS = 8  # Newton steps in a round; each but the last takes a coefficient to 0 or to its bound
PATIENCE = 8  # rounds after which there are as many as it takes
RIDGE = 1e-12  # keeps the Gram of exact copies factorisable; they share what is theirs alike
STALE = 20  # rounds without a gap a tenth smaller after which rounding is all that is left


@dataclass(frozen=True)
class TorchSet(AbstractSolver):
    """Batched working sets in torch; `max_iter` bounds the rounds. On CUDA a Triton program sweeps each target."""

    max_iter: int = 200
    least: int = 32

    def solve(
        self,
        loss: AbstractLoss,
        penalty: AbstractPenalty,
        strength: Float[Tensor, " target"],
        *,
        tol: float,
        init: Float[Tensor, "source target"] | None = None,
    ) -> Answer:
        if not isinstance(loss, QuadraticGram) or not isinstance(penalty, L1):
            raise InputError("`working_set` needs a Gram and an elementwise penalty: use solver='auto' or 'fista'")
        value = torch.zeros_like(loss.cross) if init is None else fair_start(loss, penalty, init, strength)
        gap = torch.full_like(strength, torch.inf)
        rounds = torch.zeros(len(strength), dtype=torch.long, device=strength.device)
        todo = torch.arange(len(strength), device=strength.device)
        best, stale = gap.clone(), torch.zeros_like(rounds)
        sweep = sweeper(loss.gram.device)
        for step in range(self.max_iter + 1):
            part, shape = loss.restrict(None, todo), penalty.restrict(None, todo)
            pull = part.negative_gradient(value[:, todo])
            gap[todo] = relative_gap(part, shape, value[:, todo], strength[todo], pull)
            stale[todo] = torch.where(gap[todo] < 0.9 * best[todo], 0, stale[todo] + 1)
            best[todo] = torch.minimum(best[todo], gap[todo])
            open_ = (gap[todo] > tol) & (stale[todo] < STALE)
            if not bool(open_.any()) or step == self.max_iter:
                break
            todo, pull = todo[open_], pull[:, open_]
            rounds[todo] += 1
            value[:, todo] = self._round(loss, penalty, strength, value, pull, todo, sweep, rounds[todo])
        return Answer(value, gap, rounds, bool((stale >= STALE).any()))

    def _round(
        self,
        loss: QuadraticGram,
        penalty: L1,
        strength: Float[Tensor, " target"],
        value: Float[Tensor, "source target"],
        pull: Float[Tensor, "source open"],
        todo: Int[Tensor, " open"],
        sweep: Callable[..., Tensor],
        rounds: Int[Tensor, " open"],
    ) -> Float[Tensor, "source open"]:
        """One round on the open targets, in batches whose small Grams fit the workspace; Newton steps for slow ones."""
        current, shape = value[:, todo], penalty.restrict(None, todo)
        work, valid = self._choose(shape, current, pull, strength[todo])
        batch = max(1, WORKSPACE // max(1, work.shape[1] ** 2))
        for start in range(0, len(todo), batch):
            some = torch.arange(start, min(start + batch, len(todo)), device=todo.device)
            at, mine = work[some], shape.restrict(None, some)  # at: (target, work)
            small = loss.gram[at[:, :, None], at[:, None, :]]
            like, column = current[:, some], torch.arange(len(some), device=todo.device)[:, None]
            weight = mine.weight(like).expand_as(like)[at, column]
            upper = entries_like(torch.inf if mine.upper is None else mine.upper, like).expand_as(like)[at, column]
            ridge = mine.ridge(strength[todo[some]])
            added = torch.zeros_like(weight) if ridge is None else ridge.expand_as(like)[at, column]
            cut = torch.where(valid[some], strength[todo[some], None] * weight, torch.inf)
            new = sweep(
                small, like[at, column], pull[:, some][at, column], cut, added, upper, penalty.non_negative, SWEEPS
            )
            if bool((hard := rounds[some] > SWEPT).any()):
                moved = pull[:, some][at, column] - (small @ (new - like[at, column])[:, :, None])[:, :, 0]
                parts = (entry[hard] for entry in (small, new, moved, cut, added, upper))
                patient = int(rounds[some].max()) <= PATIENCE
                new[hard] = leap_torch(*parts, leaps=LEAPS if patient else work.shape[1])
            # padding repeats row 0 of a target: it is written first and overwritten by nothing but real entries
            like = torch.zeros_like(like).index_put_(
                (at, column.expand_as(at)), torch.where(valid[some], new, 0.0), True
            )
            current[:, some] = like
        return current

    def _choose(
        self,
        penalty: L1,
        value: Float[Tensor, "source open"],
        pull: Float[Tensor, "source open"],
        strength: Float[Tensor, " open"],
    ) -> tuple[Int[Tensor, "open work"], Bool[Tensor, "open work"]]:
        """Indices of each target's support and worst violators, padded to the widest; and which are real."""
        weight = penalty.weight(value)
        over = ((pull if penalty.non_negative else pull.abs()) / weight - strength).clamp(min=0)
        if penalty.upper is not None:
            over = torch.where(entries_like(penalty.upper, value) > 0, over, 0)
        support = value != 0
        size = support.sum(0)
        room = torch.maximum(torch.full_like(size, self.least), 4 * size + 16)
        wanted = torch.minimum(size + ((over > 0) & ~support).sum(0), room)
        rank = torch.where(support, torch.inf, over)
        width = max(1, int(wanted.max()))
        work = rank.topk(width, dim=0).indices.T.contiguous()
        valid = torch.arange(width, device=value.device) < wanted[:, None]
        return work, valid


def sweeper(device: torch.device) -> Callable[..., Tensor]:
    """Triton on CUDA where it is installed, batched torch elsewhere."""
    if device.type == "cuda":
        try:
            from tl_circuitlasso.solve.triton_set import sweep_triton
        except ImportError:
            return sweep_torch
        return sweep_triton
    return sweep_torch


def sweep_torch(
    gram: Float[Tensor, "open work work"],
    coef: Float[Tensor, "open work"],
    pull: Float[Tensor, "open work"],
    cut: Float[Tensor, "open work"],
    ridge: Float[Tensor, "open work"],
    upper: Float[Tensor, "open work"],
    non_negative: bool,
    sweeps: int,
) -> Float[Tensor, "open work"]:
    """Cyclic coordinate descent on a batch of unit-diagonal problems; `cut` = lambda * weight, inf for padding."""
    coef, pull = coef.clone(), pull.clone()
    for _ in range(sweeps):
        before = coef.clone()
        for k in range(coef.shape[1]):
            here = slice(k, k + 1)
            old = coef[:, here]
            z = pull[:, here] + old  # what the residual without this source pulls with: the diagonal is 1
            new = threshold(z, cut[:, here], ridge[:, here], upper[:, here], one_sided=non_negative)
            pull -= (new - old) * gram[:, k]
            coef[:, here] = new
        if torch.equal(before, coef):
            break
    return coef


def leap_torch(
    gram: Float[Tensor, "open work work"],
    coef: Float[Tensor, "open work"],
    pull: Float[Tensor, "open work"],
    cut: Float[Tensor, "open work"],
    ridge: Float[Tensor, "open work"],
    upper: Float[Tensor, "open work"],
    leaps: int,
) -> Float[Tensor, "open work"]:
    """Newton steps on the nonzeros, each as far as no sign changes and no bound is met.

    Inside one orthant the objective is a convex quadratic: a step goes down, and is exact where the support is right.
    """
    for _ in range(leaps):
        free = (coef != 0) & (coef < upper)
        slope = torch.where(free, pull - ridge * coef - cut * coef.sign(), 0)
        system = torch.where(free[:, :, None] & free[:, None], gram, 0)
        system = system + torch.diag_embed(torch.where(free, ridge + RIDGE, 1))
        factor, failed = torch.linalg.cholesky_ex(system)
        step = torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
        step = torch.where(free & (failed == 0)[:, None], step, 0)
        shrinks = coef * step < 0
        reach = torch.where(shrinks, -coef / step, torch.where(step > 0, (upper - coef) / step, torch.inf))
        share = reach.amin(1, keepdim=True).clamp(max=1)
        stopped = (reach <= share) & (step != 0)
        new = torch.where(stopped, torch.where(shrinks, 0, upper), coef + share * step)
        pull = pull - (gram @ (new - coef)[:, :, None])[:, :, 0]
        coef = new
        if not bool(stopped.any()):
            break
    return coef
