"""One pair's regression: sums over the chunks, a certified sparse solve, unshrunk weights.

    min_A  1/(2M) ||Y - [Z, E] A||^2 + sum_j lambda_j ||A_j||_1        every column in units of its standard deviation

Z: the parent's codes, E: the leading directions of what its SAE misses, Y: the child's codes or the target. The rule
behind strength "auto" is lambda_j = max(0.2 lambda_max,j, sqrt(2 log(p q) / M)): a fifth of the strongest pull, and
never below what the largest of p q correlations reaches by chance (where features fire together often enough for a
normal law: rare ones reach more). Penalties "read" and "adaptive" weigh an edge by what its pull says already, so that
a share of s in the strongest pull counts as s^2: there the fifth is squared, too. Weights are least squares on the
support so found; the certificate is that of the Lasso.
"""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.effects import with_effects
from tl_circuitlasso.features.fit import Entries, Regressed, Units, deviation, nonzeros, regressed, with_held_out
from tl_circuitlasso.features.kept import Kept
from tl_circuitlasso.features.read import Read, keeping_signs, read_lasso
from tl_circuitlasso.features.samples import FOLDS, PairData, to_torch
from tl_circuitlasso.features.shared import everyones, joined
from tl_circuitlasso.models.memory import free_bytes, in_words

FIXED = 0.2  # of lambda_max
FIXED_WEIGHTED = FIXED**2  # the same under penalties "read" and "adaptive"
DRAWS = 20
PATH = 60  # matrices of coefficients in memory while a strength is chosen: two paths of 20, and a stack of one
TILES = 1 << 28  # entries of the Gram that the solver may keep in another order beside it
BLOCK = 1 << 13  # targets solved at once
READ = 8  # matrices of coefficients beside them for penalty "read": what is read, in both units, weights and signs


@dataclass(frozen=True, eq=False)
class Rule:
    """How sparse: the user's strength, the penalty, and how many half-samples tell stability."""

    strength: str | float
    penalty: str = "l1"
    draws: int = 0
    tol: float = 1e-4
    seed: int = 0

    @property
    def folds(self) -> bool:
        """Whether sums must be kept in folds."""
        return self.draws > 0 or self.strength in ("cv", "stability")

    @property
    def chosen(self) -> str | None:
        """The solver's rule that chooses a strength along a path, if that's how it is chosen."""
        if self.strength == "ebic" and self.penalty == "adaptive":
            return "adaptive"
        return str(self.strength) if self.strength in ("ebic", "mcp", "cv") else None


def regress_pair(
    pair: PairData,
    rule: Rule,
    *,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    ranks: Ranks = ALONE,
    kept: Kept | None = None,
) -> Regressed:
    """The certified sparse regression of a child's features on its parent's, through the Gram of the parent's.

    `ranks` are processes with samples of their own: all get the regression over all samples. Blocks of children that
    are `kept` aren't solved again.

    Raises
    ------
    InputError: it wouldn't fit in memory: estimated first, and the message says what to reduce.
    """
    clock = time.perf_counter()
    _check_room(pair, rule, device, memory, ranks)
    sums = _sums(pair, rule, device)
    own = (torch.stack([part.target_sums, part.target_squares]) for part in sums)
    totals = ranks.sum(functools.reduce(torch.add, own))
    for number in range(len(sums)):
        sums[number] = solve.scatter_sums(sums[number], ranks)
    mine = ranks.dealt(len(pair.child_features))
    data, parts, units = _moments(sums, totals, mine)
    del sums
    counted = time.perf_counter()
    found = _in_blocks(pair, rule, data, parts, units, mine, kept)
    del data, parts
    found = everyones(found, mine, ranks)
    solved = time.perf_counter()
    found = with_effects(found, pair.effects, units, grow=rule.strength == "auto")
    seconds = {"statistics": counted - clock, "solve": solved - counted, "effects": time.perf_counter() - solved}
    return with_held_out(replace(found, seconds=seconds), pair, units, ranks)


def _moments(
    sums: Sequence[solve.PairSums], totals: Float[Tensor, "two target"], mine: Int[Tensor, " mine"]
) -> tuple[solve.Moments, list[solve.Moments], Units]:
    """What the solver sees of the targets in `mine`, whose `sums` these are, in standard units: over all samples, and
    in folds if there are. `totals` are sums and squares of every target."""
    whole = sums[0] if len(sums) == 1 else _added(sums)
    means, data = whole.means, whole.centred()
    mean, square = totals / whole.count
    spread = deviation((square - mean.square()).clamp(min=0))
    units = Units(*(part.cpu() for part in (deviation(data.gram.diagonal()), spread, means[0], mean)))
    own = units.of(mine)
    folds = [part.centred(means) for part in sums if part.count] if len(sums) > 1 else []
    return _in_units(data, own), [_in_units(part, own) for part in folds], units


def _of(data: solve.Moments, mine: Int[Tensor, " mine"]) -> solve.Moments:
    """The moments of some targets."""
    if len(mine) == data.cross.shape[1]:
        return data
    square = data.target_sq_norm[mine.to(data.cross.device)]
    return solve.Moments(data.gram, _columns(data.cross, mine), square, data.count)


def _columns(matrix: Float[Tensor, "source target"], mine: Int[Tensor, " mine"]) -> Float[Tensor, "source mine"]:
    """Some columns; no copy where they are all."""
    return matrix if len(mine) == matrix.shape[1] else matrix[:, mine.to(matrix.device)]


def _in_blocks(
    pair: PairData,
    rule: Rule,
    data: solve.Moments,
    parts: Sequence[solve.Moments],
    units: Units,
    mine: Int[Tensor, " mine"],
    kept: Kept | None,
) -> Regressed:
    """The targets in `mine`, `BLOCK` at a time: coefficients, pulls, weights and effects are dense for a block only."""
    if len(mine) <= BLOCK:
        return _regressed(pair, rule, data, parts, units, mine)
    found = []
    for number, some in enumerate(torch.arange(len(mine)).split(BLOCK)):
        one = None if kept is None else kept.block(number, mine[some])
        if one is None:
            one = _regressed(pair, rule, _of(data, some), [_of(part, some) for part in parts], units, mine[some])
            if kept is not None:
                kept.keep_block(number, mine[some], one)
        found.append((one, {**one.tensors(), "mine": some}))
    return joined(found[0][0], [part for _, part in found])


def _regressed(
    pair: PairData,
    rule: Rule,
    data: solve.Moments,
    parts: Sequence[solve.Moments],
    units: Units,
    mine: Int[Tensor, " mine"],
) -> Regressed:
    """The targets in `mine`, each for itself."""
    own = units.of(mine)
    read = None if pair.effects is None else Read.of(pair.effects.dense(mine), own.source)
    solution, stability = _solve(data, parts, rule, read, pair.sources * len(pair.child_features))
    entries = _unshrunk(data, solution.value)
    entries = entries if read is None else keeping_signs(entries)
    return regressed(entries, own, solution, stability=stability, samples=int(data.count), seconds={})


def default_strength(
    limit: Float[Tensor, " target"], entries: int, samples: int | float, least: float = FIXED
) -> Float[Tensor, " target"]:
    """max(`least`, sqrt(2 log(p q) / M) / lambda_max) per target, at most 1; `limit` is lambda_max in standard units,
    p q the number of `entries`, sources times targets.

    >>> default_strength(torch.tensor([1.0, 0.01]), 1000, 10_000).tolist()
    [0.2..., 1.0]
    """
    noise = math.sqrt(2 * math.log(max(entries, 2)) / samples)
    return (noise / limit.clamp(min=1e-300)).clamp(min=least, max=1.0)


def needed_bytes(
    sources: int, targets: int, folds: int = 1, *, along_path: bool = False, reads: bool = False, processes: int = 1
) -> int:
    """An estimate of what one pair's sums and solve take at their peak, in bytes; a path keeps every solution on it.

    Penalty "read" has its `reads` and the weights made of them. Each of several `processes` adds up all sums of its own
    samples, keeps the sources' and those of its share of the targets, and solves these, `BLOCK` at once.

    >>> needed_bytes(4096, 4096) < 3e9, needed_bytes(32768, 32768, reads=True) < 139 * 2**30
    (True, True)
    """
    share = sources * -(-targets // processes)
    added = folds * (sources * sources + sources * targets) + (2 * share if processes > 1 else 0)  # as it is scattered
    kept = (sources * sources + share) * (2 if folds == 1 else 2 * folds + 2)  # sums and moments, of folds and of all
    solved = min(share, sources * BLOCK)
    tiles = min(sources * sources, TILES)
    working = sources * sources + tiles + 6 * solved  # scaled or single copies; coefficients, pulls and weights
    working += (PATH * solved if along_path else 0) + (READ * solved if reads else 0)
    return 8 * max(added, kept + working)


def _sums(pair: PairData, rule: Rule, device: torch.device | str) -> list[solve.PairSums]:
    """One sum, or one for each fold."""
    count = FOLDS if rule.folds else 1
    sums = [solve.PairSums.empty(pair.sources, len(pair.child_features), device=device) for _ in range(count)]
    for part in pair.parts(held=False):
        for number in range(count):
            some = part if count == 1 else part.fold(number)
            if len(some.prompt):
                sums[number] = sums[number].add(to_torch(some.codes), to_torch(some.child), some.extra)
    return sums


def _added(sums: Sequence[solve.PairSums]) -> solve.PairSums:
    whole = sums[0]
    for part in sums[1:]:
        whole = whole + part
    return whole


def _in_units(moments: solve.Moments, units: Units) -> solve.Moments:
    """In standard deviations; the matrices are changed in place, and what is 1 up to rounding is made exactly 1."""
    source, target = units.source.to(moments.gram), units.target.to(moments.gram)
    gram = moments.gram.div_(source[:, None]).div_(source)
    cross = moments.cross.div_(source[:, None]).div_(target)
    square = moments.target_sq_norm / target.square()
    gram.diagonal().copy_(_exact(gram.diagonal()))
    return solve.Moments(gram, cross, _exact(square), moments.count)


def _exact(ones: Float[Tensor, " column"]) -> Float[Tensor, " column"]:
    return torch.where((ones - 1).abs() < 1e-9, 1.0, ones)


def _solve(
    data: solve.Moments,
    parts: Sequence[solve.Moments],
    rule: Rule,
    read: Read | None,
    entries: int,
) -> tuple[solve.Solution, Float[Tensor, "source target"] | None]:
    """The Lasso at the rule's strength, and the share of half-samples with each coefficient where it is asked for.

    `entries` are the coefficients that the whole regression could have.
    """
    level = rule.strength
    if not isinstance(level, float):
        least = FIXED if read is None else FIXED_WEIGHTED
        level = default_strength(data.cross.abs().amax(0), entries, data.count, least)
    solution = penalty = None
    if rule.chosen is not None:
        penalty = None if read is None else solve.L1(read.weights.to(data.gram))
        options: dict[str, Any] = {"parts": parts, "penalty": penalty, "tol": rule.tol, "check": False}
        solution = solve.at_strength(data, rule.chosen, **options).solution
        level = torch.as_tensor(solution.stats["strength"] / solution.stats["strength_max"]).nan_to_num(1.0)
    elif rule.penalty == "adaptive":
        pilot = _unshrunk(data, _lasso(data, level, rule.tol).value)
        weights = torch.zeros_like(data.cross)
        weights[pilot.source, pilot.target] = pilot.refit.to(weights)
        penalty = solve.L1(solve.adaptive_weights(weights))
        level = level if isinstance(rule.strength, float) else FIXED_WEIGHTED
    if read is not None:
        solution, penalty = read_lasso(data, read, strength=level, tol=rule.tol)
    solution = _lasso(data, level, rule.tol, penalty) if solution is None else solution
    if not rule.draws and rule.strength != "stability":
        return solution, None
    stability = solve.stability(
        parts, strength=level, draws=rule.draws or DRAWS, penalty=penalty, tol=rule.tol, seed=rule.seed, check=False
    )
    if rule.strength == "stability":
        solution = solve.if_stable(solution, stability)
    return solution, stability


def _lasso(data: solve.Moments, level: float | Tensor, tol: float, penalty: solve.L1 | None = None) -> solve.Solution:
    return solve.lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=level, penalty=penalty, tol=tol, check=False
    )


def _unshrunk(data: solve.Moments, value: Float[Tensor, "source target"]) -> Entries:
    """Least squares on each target's support; where that is all but singular, the Lasso's own values."""
    source, target = nonzeros(value)
    lasso, refit = value[source, target], solve.refit_entries(data, source, target)
    return Entries(source.cpu(), target.cpu(), lasso.cpu(), sound(refit, lasso, target).cpu())


def sound(
    refit: Float[Tensor, " edge"], lasso: Float[Tensor, " edge"], target: Int[Tensor, " edge"]
) -> Float[Tensor, " edge"]:
    """Refitted coefficients, but the Lasso's for targets whose refit blows up."""
    targets = int(target.max()) + 1 if len(target) else 0
    largest = torch.zeros(targets, dtype=refit.dtype, device=refit.device)
    largest = largest.scatter_reduce(0, target, refit.abs().nan_to_num(torch.inf), "amax")
    return torch.where(largest[target] <= solve.COLLINEAR, refit, lasso)


def _check_room(pair: PairData, rule: Rule, device: torch.device | str, memory: int | None, ranks: Ranks) -> None:
    """Compare what the sums and the solve need with what there is, before anything is allocated."""
    p, q, folds = pair.sources, len(pair.child_features), FOLDS if rule.folds else 1
    along = rule.chosen is not None
    need = needed_bytes(p, q, folds, along_path=along, reads=pair.effects is not None, processes=ranks.size)
    room = memory if memory is not None else _free(device, ranks)
    if room is None or need <= room:
        return
    most = int(
        math.sqrt(room / needed_bytes(1000, 1000, folds, along_path=along)) * 1000 / max(p / len(pair.features), 1)
    )
    ways = [f"`max_features` of about {most}", "a higher `min_count`"]
    ways += ["no `draws` and strength 'auto'" if rule.folds or along else "a larger device"]
    ways += ["mixing 'mean'"] if len(pair.columns) > 2 else []
    there = f"{in_words(room)} are free on {torch.device(device)}"
    raise InputError(
        f"{pair.parent} -> {pair.child or 'the target'}: {p} columns on {q} targets need about {in_words(need)}, "
        f"{there if memory is None else f'`memory` allows {in_words(room)}'}: use {', or '.join(ways)}"
    )


def _free(device: torch.device | str, ranks: Ranks) -> int | None:
    """What is free to this process: those on one machine share its memory, not its cards."""
    free = free_bytes(device)
    return free if free is None or torch.device(device).type != "cpu" else free // ranks.beside
