"""Class labels on a parent's features: sparse (multinomial) logistic regressions, and how strong they should be.

"auto" is `solve.CLASS_STRENGTH`, and never below what the largest correlation of a feature with a class reaches by
chance.
"cv" takes the strength on a path of `PATH` of the least cross-entropy in `CLASS_FOLDS` folds of prompts, "ebic" that of
the least 2 M H + k log M + 2 k log p (k coefficients of p, H the mean cross-entropy). `draws` half-samples tell each
coefficient's stability, and "stability" keeps those of at least `solve.STABLE`.
"""

import math
import time
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import Labels
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.few import standardised
from tl_circuitlasso.features.fit import Entries, Regressed, Units, held_out_deviance, nonzeros, regressed
from tl_circuitlasso.features.regression import DRAWS, Rule, default_strength
from tl_circuitlasso.features.samples import PairData, fold_of
from tl_circuitlasso.features.shared import first_of, gathered

PATH = tuple(10 ** (-k / 8) for k in range(17))  # from lambda_max to a hundredth of it
CLASS_FOLDS = 5


def classify_pair(
    pair: PairData, rule: Rule, target: Labels, *, memory: int | None = None, ranks: Ranks = ALONE
) -> Regressed:
    """Class labels on the parent's features by sparse (multinomial) logistic regression with a certificate.

    One column of coefficients for two classes (of class 1), one per class for more. In place of R^2 stands the share of
    the held-out cross-entropy of guessing that the features remove. Of several processes each gets the samples of all
    and solves the whole of it.

    Raises
    ------
    InputError: one class only among the samples, or more than fits in memory.
    """
    pair = gathered(pair, ranks)
    found = _classified(pair, rule, target, memory)
    return replace(found, **(first_of(found, ranks) or found).tensors())


def _classified(pair: PairData, rule: Rule, target: Labels, memory: int | None) -> Regressed:
    clock = time.perf_counter()
    x, y, units = standardised(pair, memory)
    labels = (y[:, 0] * units.target[0].nan_to_num(posinf=0.0) + units.target_mean[0]).round().long()
    if len(labels.unique()) < 2:
        raise InputError(f"`target`: all {len(labels)} samples have one class: labels need at least two classes")
    counted = time.perf_counter()
    classes = int(torch.as_tensor(target.y).max()) + 1
    outcome = torch.nn.functional.one_hot(labels, classes).double()
    level = _strength(x, outcome, pair, rule)
    solution, stability = _fit(x, outcome, level, rule.tol), None
    if rule.draws or rule.strength == "stability":
        stability = _stability(x, outcome, level, rule)
    if stability is not None and rule.strength == "stability":
        solution = solve.if_stable(solution, stability)
    solved = time.perf_counter()
    columns = solution.value.shape[1]
    ones = torch.ones(columns, dtype=torch.float64)
    units = Units(units.source, ones, units.source_mean, torch.zeros_like(ones))
    value = solution.value / units.source[:, None]
    overall = held_out_deviance(pair, value, units.source_mean, solution.stats["intercept"], labels)
    source, place = nonzeros(solution.value)
    entries = Entries(source, place, solution.value[source, place], solution.value[source, place])
    seconds = {"statistics": counted - clock, "solve": solved - counted, "held out": time.perf_counter() - solved}
    found = regressed(entries, units, solution, stability=stability, samples=len(x), seconds=seconds)
    return replace(found, r2=torch.full_like(found.r2, overall), overall=overall)


def _fit(
    x: Float[Tensor, "sample source"],
    outcome: Float[Tensor, "sample class"],
    level: float,
    tol: float,
    init: Float[Tensor, "source column"] | None = None,
) -> solve.Solution:
    """One column for two classes, of class 1; one for each class of more."""
    if outcome.shape[1] == 2:
        return solve.logistic_lasso(x, outcome[:, 1], strength=level, tol=tol, init=init)
    return solve.multinomial_lasso(x, outcome, strength=level, tol=tol, init=init)


def _strength(
    x: Float[Tensor, "sample source"], outcome: Float[Tensor, "sample class"], pair: PairData, rule: Rule
) -> float:
    if isinstance(rule.strength, float):
        return rule.strength
    if rule.strength == "cv":
        return PATH[int(_out_of_fold(x, outcome, pair, rule.tol).argmin())]
    if rule.strength == "ebic":
        return PATH[int(_ebic(x, outcome, rule.tol).argmin())]
    centred = outcome - outcome.mean(0)
    spread = centred.square().mean(0).max().sqrt()
    limit = (x.T @ centred / len(x) / spread).abs().max()
    return float(default_strength(limit[None], x.shape[1] * outcome.shape[1], len(x), solve.CLASS_STRENGTH))


def _out_of_fold(
    x: Float[Tensor, "sample source"], outcome: Float[Tensor, "sample class"], pair: PairData, tol: float
) -> Float[Tensor, " level"]:
    """The cross-entropy of samples under fits to the other folds, by strength; whole prompts go to one fold."""
    folds = fold_of(torch.cat([part.prompt for part in pair.parts(held=False)])) % CLASS_FOLDS
    lost = torch.zeros(len(PATH), dtype=torch.float64)
    for fold in folds.unique().tolist():
        inside, init = folds != fold, None
        if len(outcome[inside].argmax(1).unique()) < outcome.shape[1]:
            continue
        for number, level in enumerate(PATH):
            one = _fit(x[inside], outcome[inside], level, tol, init)
            init = one.value
            lost[number] += _cross_entropy(one, x[~inside], outcome[~inside]).sum()
    return lost


def _ebic(
    x: Float[Tensor, "sample source"], outcome: Float[Tensor, "sample class"], tol: float
) -> Float[Tensor, " level"]:
    found, init = [], None
    for level in PATH:
        one = _fit(x, outcome, level, tol, init)
        init, k = one.value, int((one.value != 0).sum())
        price = k * (math.log(len(x)) + 2 * math.log(max(init.numel(), 2)))
        found.append(2 * _cross_entropy(one, x, outcome).sum() + price)
    return torch.stack(found)


def _cross_entropy(
    one: solve.Solution, x: Float[Tensor, "sample source"], outcome: Float[Tensor, "sample class"]
) -> Float[Tensor, " sample"]:
    margins = x @ one.value + one.stats["intercept"]
    margins = margins if margins.shape[1] > 1 else torch.cat([torch.zeros_like(margins), margins], 1)
    return -(outcome * margins.log_softmax(1)).sum(1)


def _stability(
    x: Float[Tensor, "sample source"], outcome: Float[Tensor, "sample class"], level: float, rule: Rule
) -> Float[Tensor, "source column"]:
    """The share of half-samples with each coefficient."""
    random = torch.Generator().manual_seed(rule.seed)
    halves = [_half(len(x), random) for _ in range(rule.draws or DRAWS)]
    return torch.stack([(_fit(x[half], outcome[half], level, rule.tol).value != 0).double() for half in halves]).mean(0)


def _half(samples: int, random: torch.Generator) -> Int[Tensor, " half"]:
    return torch.randperm(samples, generator=random)[: max(samples // 2, 1)]
