"""How strong a penalty? Information criteria, cross-validation and stability, all from Gram matrices alone.

| rule      | what it does                                                       | for                             |
|-----------|--------------------------------------------------------------------|---------------------------------|
| fixed     | 0.2 lambda_max                                                     | a first look                    |
| ebic      | extended BIC of least-squares refits along a path                  | edges, one path                 |
| adaptive  | ebic, then a second path weighted by the refit of the first        | edges, the default ("auto")     |
| mcp       | ebic over a path re-weighed by the minimax concave penalty         | edges, a little more of them    |
| cv        | least held-out error over folds                                    | prediction; never for edges     |
| stability | edges kept in most half-samples                                    | edges with a measure of doubt   |

Measured by benchmarks/strength.py: what each finds on planted problems, and in what time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractPenalty, Solution
from tl_circuitlasso.solve.certificate import per_problem
from tl_circuitlasso.solve.group_set import GroupSet
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.lasso import ONCE, TOLERANCE, Prepared, lasso, prepare, report
from tl_circuitlasso.solve.path import Moments, geometric_strengths, path, total
from tl_circuitlasso.solve.penalties import L1, adaptive_weights

WORKSPACE = 1 << 25  # entries of the small Grams refitted at once
FIXED = 0.2
CONCAVITY = 3.0  # gamma of the minimax concave penalty: coefficients beyond gamma * lambda aren't shrunk
REWEIGHTED = 2
TIE = 1e-10  # of the criterion, for each sample
RIDGE = 1e-10  # of the diagonal: sources that are copies of one another share a refit
SINGULAR = 1e-5  # relative: eigenvalues of a unit-diagonal Gram that rounding to single precision can turn negative


@dataclass(frozen=True, eq=False)
class Choice:
    """A chosen strength per target, the certified solution at it, and what the choice was made from.

    strength: fraction of lambda_max; refit: least squares on the chosen support; scores: (strength, target) criterion.
    """

    strength: Float[Tensor, " target"]
    solution: Solution
    refit: Float[Tensor, "source target"]
    scores: Float[Tensor, "strength target"]
    rule: str


def select(
    data: Moments,
    *,
    rule: str = "auto",
    strengths: Sequence[float] | None = None,
    penalty: AbstractPenalty | None = None,
    folds: Sequence[Moments] | None = None,
    **options: Any,
) -> Choice:
    """A strength for every target by `rule`: "auto", "fixed", "ebic", "adaptive", "mcp"; with `folds` "cv", "cv-1se".

    `options` go to `lasso`. InputError for an unknown rule, or for "cv" without folds.

    >>> gram, cross = torch.eye(2), torch.tensor([[0.9], [0.01]])
    >>> choice = select(Moments(gram, cross, torch.ones(1), 100.0), rule="ebic")
    >>> (choice.solution.value != 0).flatten().tolist()
    [True, False]
    """
    if rule == "auto":
        rule = "adaptive" if penalty is None or isinstance(penalty, L1) else "ebic"
    if rule == "fixed":
        return _fixed(data, penalty, options)
    if rule in ("ebic", "adaptive"):
        first = ebic(data, strengths=strengths, penalty=penalty, **options)
        return first if rule == "ebic" else _adaptive(data, first, strengths, penalty, options)
    if rule == "mcp":
        return _concave(data, strengths, penalty, options)
    if rule in ("cv", "cv-1se"):
        if not folds:
            raise InputError("`folds` are needed for cross-validation: pass the Moments of each fold")
        return cross_validate(folds, strengths=strengths, penalty=penalty, one_se=rule == "cv-1se", **options)
    raise InputError(f"`rule` must be 'auto', 'fixed', 'ebic', 'adaptive', 'mcp', 'cv' or 'cv-1se', got {rule!r}")


def ebic(
    data: Moments,
    *,
    strengths: Sequence[float] | None = None,
    penalty: AbstractPenalty | None = None,
    gamma: float = 0.5,
    **options: Any,
) -> Choice:
    """M log(rss_S / yy) + |S| log M + 2 gamma |S| log p, minimised along a path over supports S (Chen & Chen 2008).

    rss_S is that of the least-squares refit on S: the Lasso's own residual still carries its shrinkage, and would
    choose too small a strength. One path, one small factorisation per strength and target.

    >>> gram, cross = torch.eye(2), torch.tensor([[0.9], [0.01]])
    >>> choice = ebic(Moments(gram, cross, torch.ones(1), 100.0))
    >>> (choice.solution.value != 0).flatten().tolist()
    [True, False]
    """
    levels = _levels(strengths)
    solutions = _path(data, levels, penalty, options)
    scores = torch.stack([_joint(_criterion(data, solution.value, gamma), penalty) for solution in solutions])
    return _pick(data, levels, solutions, scores, _least(data, scores), "ebic")


def cross_validate(
    folds: Sequence[Moments],
    *,
    strengths: Sequence[float] | None = None,
    penalty: AbstractPenalty | None = None,
    one_se: bool = False,
    **options: Any,
) -> Choice:
    """Least held-out squared error, from the Grams of K folds: one pass over the data, K paths of solves.

    `one_se` takes the largest strength within one standard error of the best. For edges prefer "ebic" or "adaptive":
    the strength that predicts best keeps many false edges.

    >>> folds = [Moments(torch.eye(2), torch.tensor([[0.9], [0.01]]), torch.ones(1), 50.0) for _ in range(2)]
    >>> choice = cross_validate(folds)
    >>> bool(choice.solution.value[0, 0] > 0.5)
    True
    """
    if len(folds) < 2:
        raise InputError(f"`folds` must hold at least 2 parts, got {len(folds)}")
    if isinstance(penalty, Group) and not penalty.non_negative and folds[0].gram.device.type == "cpu":
        options.setdefault("solver", GroupSet())  # hundreds of solves, however small, pay for its compilation
    levels = _levels(strengths)
    whole, errors = total(folds), []
    for fold in folds:
        rest = whole - fold
        held_out = [_squared_error(fold, solution.value) for solution in _path(rest, levels, penalty, options)]
        errors.append(torch.stack([_joint(error, penalty) for error in held_out]))
    table = torch.stack(errors)  # fold strength target
    mean = table.mean(0)
    chosen = mean.argmin(0)
    if one_se:
        error = table.std(0) / len(folds) ** 0.5
        bar = (mean + error).gather(0, chosen[None])
        chosen = (mean <= bar).to(torch.uint8).argmax(0)  # strengths fall: the first is the largest
    return _pick(whole, levels, _path(whole, levels, penalty, options), mean, chosen, "cv-1se" if one_se else "cv")


def stability(
    parts: Sequence[Moments],
    *,
    strength: int | float | Float[Tensor, " target"] = FIXED,
    draws: int = 20,
    penalty: AbstractPenalty | None = None,
    seed: int = 0,
    **options: Any,
) -> Float[Tensor, "source target"]:
    """The share of `draws` half-samples whose solution has the edge, in [0, 1] (Meinshausen & Buehlmann 2010).

    `parts` are Moments of disjoint parts of the data (10 or more); each draw takes a random half of them, and the next
    draw the other half (complementary pairs, Shah & Samworth 2013). Above 0.8 is a usual bar.

    >>> parts = [Moments(torch.eye(2), torch.tensor([[0.9], [0.01]]), torch.ones(1), 10.0) for _ in range(10)]
    >>> stability(parts, strength=0.5, draws=4).flatten().tolist()
    [1.0, 0.0]
    """
    if len(parts) < 2 or draws < 1:
        raise InputError(
            f"`parts` needs at least 2 disjoint parts and `draws` at least 1, got {len(parts)} and {draws}"
        )
    generator, kept = torch.Generator().manual_seed(seed), torch.zeros_like(parts[0].cross, dtype=torch.float64)
    order: list[int] = []
    for draw in range(draws):
        if draw % 2 == 0:
            order = torch.randperm(len(parts), generator=generator).tolist()
        half = order[: len(parts) // 2] if draw % 2 == 0 else order[len(parts) // 2 :]
        data = total([parts[k] for k in half])
        found = lasso(
            data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=strength, penalty=penalty, **options
        )
        kept += found.value != 0
    return kept / draws


def refit_support(data: Moments, value: Float[Tensor, "source target"]) -> Float[Tensor, "source target"]:
    """Least squares on the support of each column, from the Gram, in batches of equally small problems.

    >>> data = Moments(torch.eye(2), torch.tensor([[0.75], [0.01]]), torch.ones(1), 100.0)
    >>> (refit_support(data, torch.tensor([[0.5], [0.0]])) > 0).flatten().tolist()
    [True, False]
    """
    support = value != 0
    size = support.sum(0)
    fitted = torch.zeros_like(data.cross, dtype=torch.float64)
    gram, cross = data.gram.double(), data.cross.double()
    order, start = size.argsort(), int((size == 0).sum())
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(size[order[stop]]) ** 2 <= WORKSPACE:
            stop += 1
        some = order[start:stop]
        fitted[:, some] = _refit_batch(gram, cross[:, some], support[:, some])
        start = stop
    return fitted


def _refit_batch(
    gram: Float[Tensor, "source source"], cross: Float[Tensor, "source some"], support: Tensor
) -> Float[Tensor, "source some"]:
    width = int(support.sum(0).max())
    at = support.to(torch.uint8).topk(width, dim=0).indices.T  # (some, width): the support first, then padding
    real = torch.arange(width, device=gram.device) < support.sum(0)[:, None]
    small = gram[at[:, :, None], at[:, None, :]] * (real[:, :, None] & real[:, None, :])
    size = torch.where(real, gram.diagonal()[at], 1.0).sqrt()
    small = small / size[:, :, None] / size[:, None, :]
    small.diagonal(dim1=1, dim2=2).copy_(1.0 + RIDGE * real.double())  # copies of one source share the fit
    right = (torch.where(real, cross.T.gather(1, at), 0) / size)[:, :, None]
    factor, failed = torch.linalg.cholesky_ex(small)
    fit = torch.cholesky_solve(right, factor)
    if bool((failed > 0).any()):  # indefinite by more than the ridge, as copies in single precision are
        hard = failed > 0
        fit[hard] = torch.linalg.pinv(small[hard], rtol=SINGULAR, hermitian=True) @ right[hard]
    fit = fit[:, :, 0] / size
    return torch.zeros_like(cross).T.contiguous().scatter_add_(1, at, torch.where(real, fit, 0)).T


@dataclass(frozen=True, eq=False)
class _Verb:
    """A problem that is prepared once, solved at a strength when called."""

    problem: Prepared
    options: dict[str, Any]

    @classmethod
    def of(cls, data: Moments, penalty: AbstractPenalty | None, options: dict[str, Any]) -> "_Verb":
        once = {name: value for name, value in options.items() if name in ONCE}
        each = {name: value for name, value in options.items() if name not in ONCE}
        return cls(prepare(data.gram, data.cross, target_sq_norm=data.target_sq_norm, penalty=penalty, **once), each)

    def __call__(self, **level: Any) -> Solution:
        each = {name: value for name, value in self.options.items() if name != "strict"}
        solution = self.problem.at(**level, **each)
        report(solution, self.options.get("tol", TOLERANCE), self.options.get("strict", False))
        return solution

    def weighed(self, penalty: L1) -> "_Verb":
        """The same under another elementwise penalty."""
        return replace(self, problem=self.problem.weighed(penalty))


def _path(
    data: Moments, levels: Sequence[float], penalty: AbstractPenalty | None, options: dict[str, Any]
) -> list[Solution]:
    """One solution per strength, each started from the one before it, of a problem that is prepared once."""
    return path(_Verb.of(data, penalty, options), levels)


def _criterion(data: Moments, value: Float[Tensor, "source target"], gamma: float) -> Float[Tensor, " target"]:
    size = (value != 0).sum(0)
    left = _squared_error(data, refit_support(data, value)) / data.target_sq_norm.clamp(min=1e-300)
    score = data.count * left.clamp(min=1e-12).log() + size * (log(data.count) + 2 * gamma * log(max(len(value), 2)))
    return torch.where(size >= data.count, torch.inf, score)  # as many coefficients as samples explain anything


def _levels(strengths: Sequence[float] | None, default: Sequence[float] | None = None) -> list[float]:
    """The strengths of a path.

    Raises
    ------
    InputError: none.
    """
    levels = list(default or geometric_strengths()) if strengths is None else list(strengths)
    if not levels:
        raise InputError("`strengths` is empty: give one or more fractions of lambda_max, or None for a path")
    return levels


def _joint(figures: Float[Tensor, " target"], penalty: AbstractPenalty | None) -> Float[Tensor, " target"]:
    """Targets that a penalty couples share one strength, chosen by their sum: columns of two solutions are none."""
    return figures if penalty is None else per_problem(figures, penalty.coupled())


def _least(data: Moments, scores: Float[Tensor, "strength target"]) -> Int[Tensor, " target"]:
    """The largest strength of those that score best: equal supports score alike but for rounding."""
    return (scores <= scores.amin(0) + TIE * data.count).to(torch.uint8).argmax(0)


def _squared_error(data: Moments, value: Float[Tensor, "source target"]) -> Float[Tensor, " target"]:
    value = value.to(data.gram.dtype)
    return (data.target_sq_norm - (value * (2 * data.cross - data.gram @ value)).sum(0)).clamp(min=0)


def _pick(
    data: Moments,
    levels: Sequence[float],
    solutions: Sequence[Solution],
    scores: Float[Tensor, "strength target"],
    chosen: Tensor,
    rule: str,
) -> Choice:
    """The chosen column of each target's path, certificates with it."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    value = torch.stack([solution.value for solution in solutions], 0)[chosen, :, columns].T
    gap = torch.stack([solution.gap for solution in solutions])[chosen, columns]
    converged = torch.stack([solution.converged for solution in solutions])[chosen, columns]
    level = torch.tensor(levels, dtype=torch.float64, device=scores.device)[chosen]
    last = solutions[-1]
    limit = last.stats["strength_max"]
    stats = {**last.stats, "strength": level * limit, "seconds": sum(s.stats["seconds"] for s in solutions)}
    worst = next((s.status for s in solutions if not bool(s.converged.all())), last.status)
    status = last.status if bool(converged.all()) and bool(last.converged.all()) else worst
    return Choice(level, Solution(value, gap, converged, status, stats), refit_support(data, value), scores, rule)


def _fixed(data: Moments, penalty: AbstractPenalty | None, options: dict[str, Any]) -> Choice:
    solution = lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=FIXED, penalty=penalty, **options
    )
    scores = torch.zeros(1, len(data.target_sq_norm), dtype=torch.float64, device=data.gram.device)
    level = torch.full_like(scores[0], FIXED)
    return Choice(level, solution, refit_support(data, solution.value), scores, "fixed")


def _concave(
    data: Moments, strengths: Sequence[float] | None, penalty: AbstractPenalty | None, options: dict[str, Any]
) -> Choice:
    """The minimax concave penalty (Zhang 2010) by weighted Lassos (Zou & Li 2008), its strength by `ebic`'s criterion.

    w_ij = max(1 - G_ii |a_ij| / (gamma lambda_j), 0) from the round before: the penalty in standard units. Each round
    is convex and its certificate is the one reported; it says nothing about the concave problem's other optima.
    """
    if penalty is not None and not isinstance(penalty, L1):
        raise InputError("`rule='mcp'` weighs entries and needs an elementwise penalty: use 'ebic' for groups")
    base, spread = L1() if penalty is None else penalty, data.gram.diagonal().double()[:, None]
    spread = spread.clamp(min=0).sqrt() if options.get("standardise") else spread
    verb = _Verb.of(data, base, options)
    levels, solutions = _levels(strengths), []
    for fit in path(verb, levels):
        limit, level = fit.stats["strength_max"], fit.stats["strength"]
        weight = base.weight(fit.value)
        for _ in range(REWEIGHTED):
            flatter = (1 - spread * fit.value.abs() / (CONCAVITY * level * weight).clamp(min=1e-300)).clamp(min=1e-3)
            shape = replace(base, weights=weight * flatter)
            fit = verb.weighed(shape)(strength=level, strength_is="absolute", init=fit.value)
        solutions.append(replace(fit, stats={**fit.stats, "strength_max": limit}))
    scores = torch.stack([_criterion(data, solution.value, 0.5) for solution in solutions])
    return _pick(data, levels, solutions, scores, _least(data, scores), "mcp")


def _adaptive(
    data: Moments,
    first: Choice,
    strengths: Sequence[float] | None,
    penalty: AbstractPenalty | None,
    options: dict[str, Any],
) -> Choice:
    """A second path whose weights come from the refit of the first, in standard units."""
    if penalty is not None and not isinstance(penalty, L1):
        raise InputError("`rule='adaptive'` weighs entries and needs an elementwise penalty: use 'ebic' for groups")
    base = L1() if penalty is None else penalty
    spread = data.gram.diagonal().double().clamp(min=0).sqrt()[:, None]
    pilot = first.solution.value if bool((first.refit == 0).all()) else first.refit
    weights = adaptive_weights(pilot * spread) * base.weight(data.cross.double())
    levels = _levels(strengths, geometric_strengths(20, 0.005))
    second = ebic(data, strengths=levels, penalty=replace(base, weights=weights), **options)
    return replace(second, rule="adaptive")
