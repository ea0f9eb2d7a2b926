"""Regressions on the samples themselves, where they are too few for a Gram to pay."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.effects import with_effects
from tl_circuitlasso.features.fit import (
    Entries,
    Regressed,
    Units,
    dense_samples,
    deviation,
    nonzeros,
    regressed,
    with_held_out,
)
from tl_circuitlasso.features.regression import FIXED_WEIGHTED, Rule, default_strength, sound
from tl_circuitlasso.features.samples import PairData
from tl_circuitlasso.features.shared import everyones, gathered
from tl_circuitlasso.models.memory import free_bytes, in_words

BLOCK = 512  # children regressed at once


def regress_samples(pair: PairData, rule: Rule, *, memory: int | None = None, ranks: Ranks = ALONE) -> Regressed:
    """`regress_pair` by residuals: memory grows with samples times columns, not with columns squared.

    Of several processes each gets the samples of all, and solves its share of the children.

    Raises
    ------
    InputError: a strength that needs the Gram, or more than fits in memory.
    """
    clock = time.perf_counter()
    pair = gathered(pair, ranks)
    mine = ranks.dealt(len(pair.child_features))
    if rule.folds or rule.chosen is not None:
        raise InputError(
            f"`strength` {rule.strength!r} (penalty {rule.penalty!r}, {rule.draws} `draws`) needs more than half "
            f"as many samples ({pair.count(held=False)}) as columns ({pair.sources}): give more tokens or a lower "
            "`max_features`, or let `strength` be a number"
        )
    x, y, units = standardised(pair, memory)
    counted = time.perf_counter()
    found = _regressed(x, y[:, mine], units.of(mine), rule, x.shape[1] * y.shape[1])
    found = everyones(found, mine, ranks)
    seconds = {"statistics": counted - clock, "solve": time.perf_counter() - counted}
    found = with_effects(found, pair.effects, units, grow=rule.strength == "auto")
    return with_held_out(replace(found, seconds=seconds), pair, units)


def _regressed(
    x: Float[Tensor, "sample source"], y: Float[Tensor, "sample target"], units: Units, rule: Rule, entries: int
) -> Regressed:
    """The targets in `y`, some at once; `entries` are the coefficients that the whole regression could have."""
    found = [_solve(x, some, rule, entries) for some in y.split(BLOCK, 1)]
    solution = _joined([one for one, _ in found])
    refit = torch.cat([fitted for _, fitted in found], 1)
    source, target = nonzeros(solution.value)
    lasso = solution.value[source, target]
    coefficients = Entries(source, target, lasso, sound(refit[source, target], lasso, target))
    return regressed(coefficients, units, solution, stability=None, samples=len(x), seconds={})


def standardised(
    pair: PairData, memory: int | None
) -> tuple[Float[Tensor, "sample source"], Float[Tensor, "sample target"], Units]:
    """All samples that are regressed on, dense and in standard units."""
    samples, columns = pair.count(held=False), pair.sources + len(pair.child_features)
    need, room = 4 * 8 * samples * columns, memory if memory is not None else free_bytes()
    if room is not None and need > room:
        there = f"{in_words(room)} are free" if memory is None else f"`memory` allows {in_words(room)}"
        raise InputError(
            f"{pair.parent} -> {pair.child or 'the target'}: {samples} samples of {columns} columns need about "
            f"{in_words(need)}, {there}: use fewer prompts, or a lower `max_features`"
        )
    x, y = dense_samples(list(pair.parts(held=False)))
    units = Units(deviation(x.var(0, correction=0)), deviation(y.var(0, correction=0)), x.mean(0), y.mean(0))
    return x.sub_(units.source_mean).div_(units.source), y.sub_(units.target_mean).div_(units.target), units


def _solve(
    x: Float[Tensor, "sample source"], y: Float[Tensor, "sample target"], rule: Rule, entries: int
) -> tuple[solve.Solution, Float[Tensor, "source target"]]:
    limit = (x.T @ y / len(x)).abs().amax(0)
    level = rule.strength if isinstance(rule.strength, float) else default_strength(limit, entries, len(x))
    solution = solve.regress(x, y, strength=level, tol=rule.tol, form="residual")
    refit = _least_squares(x, y, solution.value)
    if rule.penalty == "adaptive":
        penalty = solve.L1(solve.adaptive_weights(refit))
        level = level if isinstance(rule.strength, float) else FIXED_WEIGHTED
        solution = solve.regress(x, y, strength=level, penalty=penalty, tol=rule.tol, form="residual")
        refit = _least_squares(x, y, solution.value)
    return solution, refit


def _least_squares(
    x: Float[Tensor, "sample source"], y: Float[Tensor, "sample target"], value: Float[Tensor, "source target"]
) -> Float[Tensor, "source target"]:
    fitted = torch.zeros_like(value)
    for j in range(value.shape[1]):
        rows = value[:, j].nonzero().flatten()
        if len(rows):
            fitted[rows, j] = torch.linalg.lstsq(x[:, rows], y[:, j : j + 1], driver="gelsd").solution[:, 0]
    return fitted


def _joined(solutions: Sequence[solve.Solution]) -> solve.Solution:
    """Solutions of blocks of targets side by side."""
    worst = next((one for one in solutions if not bool(one.converged.all())), solutions[-1])
    names = ("iterations", "strength", "strength_max")
    return solve.Solution(
        torch.cat([one.value for one in solutions], 1),
        torch.cat([one.gap for one in solutions]),
        torch.cat([one.converged for one in solutions]),
        worst.status,
        {name: torch.cat([torch.as_tensor(one.stats[name]) for one in solutions]) for name in names},
    )
