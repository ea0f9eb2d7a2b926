"""One pair's regression: sums over the chunks, a certified sparse solve, unshrunk weights.

    min_A  1/(2M) ||Y - [Z, E] A||^2 + sum_j lambda_j ||A_j||_1        every column in units of its standard deviation

Z: the parent's codes, E: the leading directions of what its SAE misses, Y: the child's codes or the target. The rule
behind strength "auto" is lambda_j = max(0.2 lambda_max,j, sqrt(2 log(p q) / M)): a fifth of the strongest pull, and
never below what the largest of p q correlations reaches by chance (where features fire together often enough for a
normal law: rare ones reach more). Weights are least squares on the support so found;
the certificate is that of the Lasso.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.fit import Entries, Regressed, Units, deviation, held_out_r2, nonzeros, regressed
from tl_circuitlasso.features.read import in_standard_units, keeping_signs, read_lasso
from tl_circuitlasso.features.samples import FOLDS, PairData, to_torch
from tl_circuitlasso.models.memory import free_bytes, in_words

FIXED = 0.2  # of lambda_max
STABLE = 0.8  # share of half-samples that must have an edge at strength "stability"
DRAWS = 20
PATH = 60  # matrices of coefficients in memory while a strength is chosen: two paths of 20, and a stack of one
COLLINEAR = 10.0  # standardised least-squares weights beyond this come from parents that are all but copies


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
        return str(self.strength) if self.strength in ("ebic", "cv") else None


def regress_pair(
    pair: PairData, rule: Rule, *, device: torch.device | str = "cpu", memory: int | None = None
) -> Regressed:
    """The certified sparse regression of a child's features on its parent's, through the Gram of the parent's.

    Raises
    ------
    InputError: it wouldn't fit in memory: estimated first, and the message says what to reduce.
    """
    clock = time.perf_counter()
    _check_room(pair, rule, device, memory)
    sums = _sums(pair, rule, device)
    whole = sums[0] if len(sums) == 1 else _added(sums)
    means, samples = whole.means, whole.count
    data = whole.centred()
    units = Units(
        deviation(data.gram.diagonal()).cpu(), deviation(data.target_sq_norm).cpu(), *(mean.cpu() for mean in means)
    )
    data = _in_units(data, units)
    parts = [_in_units(part.centred(means), units) for part in sums if part.count] if rule.folds else []
    del sums, whole
    counted = time.perf_counter()
    reads = None if pair.reads is None else in_standard_units(pair.reads, units.source, units.target)
    solution, stability = _solve(data, parts, rule, reads)
    entries = _unshrunk(data, solution.value)
    entries = entries if reads is None else keeping_signs(entries)
    solved = time.perf_counter()
    held_out = held_out_r2(pair, entries.matrix(units), units)
    seconds = {"statistics": counted - clock, "solve": solved - counted, "held out": time.perf_counter() - solved}
    return regressed(entries, units, solution, held_out, stability=stability, samples=int(samples), seconds=seconds)


def default_strength(limit: Float[Tensor, " target"], entries: int, samples: int | float) -> Float[Tensor, " target"]:
    """max(0.2, sqrt(2 log(p q) / M) / lambda_max) per target, at most 1; `limit` is lambda_max in standard units, p q
    the number of `entries`, sources times targets.

    >>> default_strength(torch.tensor([1.0, 0.01]), 1000, 10_000).tolist()
    [0.2..., 1.0]
    """
    noise = math.sqrt(2 * math.log(max(entries, 2)) / samples)
    return (noise / limit.clamp(min=1e-300)).clamp(min=FIXED, max=1.0)


def needed_bytes(sources: int, targets: int, folds: int = 1, *, along_path: bool = False) -> int:
    """An estimate of what one pair's sums and solve take at their peak, in bytes; a path keeps every solution on it.

    >>> needed_bytes(4096, 4096) < 2e9
    True
    """
    matrices = sources * sources + sources * targets
    kept = matrices * (2 if folds == 1 else 2 * folds + 2)  # sums and moments, of every fold and of all
    working = sources * sources + 6 * sources * targets  # scaled or single copies; coefficients, pulls and weights
    return 8 * (kept + working + (PATH * sources * targets if along_path else 0))


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
    reads: Float[Tensor, "source target"] | None,
) -> tuple[solve.Solution, Float[Tensor, "source target"] | None]:
    """The Lasso at the rule's strength, and the share of half-samples with each coefficient where it is asked for."""
    level = rule.strength if isinstance(rule.strength, float) else _default(data)
    solution = penalty = None
    if rule.chosen is not None:
        solution = solve.select(data, rule=rule.chosen, folds=parts or None, tol=rule.tol, check=False).solution
        level = torch.as_tensor(solution.stats["strength"] / solution.stats["strength_max"]).nan_to_num(1.0)
    elif rule.penalty == "adaptive":
        pilot = _unshrunk(data, _lasso(data, level, rule.tol).value)
        weights = torch.zeros_like(data.cross)
        weights[pilot.source, pilot.target] = pilot.refit.to(weights)
        penalty = solve.L1(solve.adaptive_weights(weights))
        # a weight of 1 / |pilot| squares the ratio of an edge to the child's strongest, so the rule's share is squared
        level = level if isinstance(rule.strength, float) else FIXED**2
    if reads is not None:
        solution, penalty = read_lasso(data, reads, strength=level, tol=rule.tol)
    solution = _lasso(data, level, rule.tol, penalty) if solution is None else solution
    if not rule.draws and rule.strength != "stability":
        return solution, None
    stability = solve.stability(
        parts, strength=level, draws=rule.draws or DRAWS, penalty=penalty, tol=rule.tol, seed=rule.seed, check=False
    )
    if rule.strength == "stability":
        solution = solve.Solution(
            solution.value * (stability >= STABLE), solution.gap, solution.converged, solution.status, solution.stats
        )
    return solution, stability


def _default(data: solve.Moments) -> Float[Tensor, " target"]:
    return default_strength(data.cross.abs().amax(0), data.cross.numel(), data.count)


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
    return torch.where(largest[target] <= COLLINEAR, refit, lasso)


def _check_room(pair: PairData, rule: Rule, device: torch.device | str, memory: int | None) -> None:
    """Compare what the sums and the solve need with what there is, before anything is allocated."""
    p, q, folds = pair.sources, len(pair.child_features), FOLDS if rule.folds else 1
    along = rule.chosen is not None
    need = needed_bytes(p, q, folds, along_path=along)
    room = memory if memory is not None else free_bytes(device)
    if room is None or need <= room:
        return
    most = int(
        math.sqrt(room / needed_bytes(1000, 1000, folds, along_path=along)) * 1000 / max(p / len(pair.features), 1)
    )
    ways = [f"`max_features` of about {most}", "a higher `min_count`"]
    ways += ["no `draws` and strength 'auto'" if rule.folds or along else "a larger device"]
    ways += ["mixing 'mean'"] if len(pair.columns) > 2 else []
    raise InputError(
        f"{pair.parent} -> {pair.child or 'the target'}: {p} columns on {q} targets need about {in_words(need)}, "
        f"{in_words(room)} are free on {torch.device(device)}: use {', or '.join(ways)}"
    )
