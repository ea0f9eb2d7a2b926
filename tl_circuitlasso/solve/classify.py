"""The verbs for classification targets: sparse logistic and multinomial regression, and the cross-entropy garrote."""

import time
from dataclasses import replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractSolver, Solution, Status
from tl_circuitlasso.solve.lasso import StrengthIs, absolute_strength, report
from tl_circuitlasso.solve.likelihoods import AbstractLikelihood, Logistic, Softmax
from tl_circuitlasso.solve.newton import ProxNewton
from tl_circuitlasso.solve.penalties import L1
from tl_circuitlasso.solve.problem import check_finite


def logistic_lasso(
    features: Float[Tensor, "sample source"],
    labels: Shaped[Tensor, " sample"],
    *,
    strength: int | float,
    penalty: L1 | None = None,
    intercept: bool = True,
    tol: float = 1e-4,
    strength_is: StrengthIs = "relative",
    init: Float[Tensor, "source 1"] | None = None,
    solver: AbstractSolver | None = None,
    strict: bool = False,
) -> Solution:
    """min_a 1/M sum_m log(1 + exp(z_m)) - y_m z_m + lambda * penalty(a), z = b + X a, the intercept b unpenalised.

    `labels` are 0/1 or probabilities. The value is (source, 1); the intercept is in `stats["intercept"]`.

    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> bool(logistic_lasso(x, torch.tensor([0, 0, 1, 1]), strength=0.5).value[0, 0] > 0)
    True
    """
    target = _probabilities(labels[:, None], len(features))
    bias = torch.zeros(1, 1, dtype=torch.float64, device=features.device)
    loss = Logistic(_design(features), target, bias, intercept)
    solution, fitted = _solve(loss, penalty, strength, tol, strength_is, init, solver, strict)
    assert isinstance(fitted, Logistic)
    return replace(solution, stats={**solution.stats, "intercept": fitted.bias[0]})


def multinomial_lasso(
    features: Float[Tensor, "sample source"],
    labels: Shaped[Tensor, "sample *outcome"],
    *,
    strength: int | float,
    penalty: L1 | None = None,
    intercept: bool = True,
    tol: float = 1e-4,
    strength_is: StrengthIs = "relative",
    init: Float[Tensor, "source outcome"] | None = None,
    solver: AbstractSolver | None = None,
    strict: bool = False,
) -> Solution:
    """min_A 1/M sum_m KL(P_m || softmax(b + X_m A)) + lambda * penalty(A): one column of coefficients per outcome.

    `labels` are class numbers (sample,) or probabilities (sample, outcome), for example a model's own prediction. The
    problem is one, so `gap` and `converged` repeat its figure for every outcome; intercepts are in `stats`.

    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> found = multinomial_lasso(x, torch.tensor([0, 0, 1, 1]), strength=0.5)
    >>> bool(found.value[0, 1] > found.value[0, 0])
    True
    """
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(_classes(labels))
    target = _probabilities(labels, len(features))
    outcomes = target.shape[1]
    offset = torch.zeros(1, outcomes, dtype=torch.float64, device=features.device)
    loss = Softmax(_design(features), target, offset, intercept)
    flat = None if penalty is None else _flattened(penalty, features.shape[1], outcomes)
    start = None if init is None else init.reshape(-1, 1)
    solution, fitted = _solve(loss, flat, strength, tol, strength_is, start, solver, strict)
    assert isinstance(fitted, Softmax)
    return replace(
        solution,
        value=solution.value.view(-1, outcomes),
        gap=solution.gap.expand(outcomes),
        converged=solution.converged.expand(outcomes),
        stats={**solution.stats, "intercept": fitted.offset[0]},
    )


def cross_entropy_garrote(
    contributions: Float[Tensor, "sample outcome source"],
    prediction: Float[Tensor, "sample outcome"],
    *,
    strength: int | float,
    offset: Float[Tensor, "#sample outcome"] | None = None,
    upper: int | float | Tensor | None = None,
    weights: int | float | Tensor | None = None,
    tol: float = 1e-4,
    strength_is: StrengthIs = "relative",
    init: Float[Tensor, "source 1"] | None = None,
    solver: AbstractSolver | None = None,
    strict: bool = False,
) -> Solution:
    """Which sources make the prediction? A non-negative garrote in probability space:

        min_{a >= 0}  1/M sum_m KL(P_m || softmax(o_m + sum_u a_u G_mu)) + lambda sum_u w_u a_u

    contributions: G, what each source adds to every outcome's logit; prediction: P, the probabilities to explain;
    offset: o, fixed logits; `upper` bounds a (1 keeps the garrote from amplifying). A source that moves all logits of a
    sample together moves no probability and gets 0. Pass the previous `value` as `init` along a path of strengths.

    Raises InputError for NaN, probabilities that don't sum to 1, or shapes that don't fit. After Breiman 1995.

    >>> logits = torch.tensor([[[2.0, 5.0], [0.0, 5.0]]])  # the second source moves both outcomes alike
    >>> explained = cross_entropy_garrote(logits, torch.softmax(logits.sum(2), 1), strength=0.1).value[:, 0]
    >>> bool(explained[0] > 0.5), float(explained[1])
    (True, 0.0)
    """
    target = _probabilities(prediction, len(contributions))
    if contributions.shape[1] != target.shape[1]:
        raise InputError(
            f"`contributions` (sample, outcome, source) has {contributions.shape[1]} outcomes,"
            f" `prediction` {target.shape[1]}"
        )
    check_finite("contributions", contributions.reshape(-1, contributions.shape[2]))
    fixed = torch.zeros_like(target[:1]) if offset is None else offset.detach().double()
    check_finite("offset", fixed)
    loss = Softmax(contributions.detach().double(), target, fixed)
    penalty = L1(weights, non_negative=True, upper=upper)
    solution, _ = _solve(loss, penalty, strength, tol, strength_is, init, solver, strict)
    return solution


def _solve(
    loss: AbstractLikelihood,
    penalty: L1 | None,
    strength: int | float,
    tol: float,
    strength_is: StrengthIs,
    init: Tensor | None,
    solver: AbstractSolver | None,
    strict: bool,
) -> tuple[Solution, AbstractLikelihood]:
    """Solve one likelihood; also hands back the loss with its intercept at the optimum."""
    clock = time.perf_counter()
    penalty = L1() if penalty is None else penalty
    penalty.check(*loss.shape)
    nothing = torch.zeros(loss.shape, dtype=torch.float64, device=loss.observed.device)
    penalty = penalty.to(nothing.dtype, nothing.device)
    loss = loss.centre(loss.margins(nothing))
    limit = penalty.strength_max(loss.negative_gradient(nothing))
    absolute = absolute_strength(strength, limit, torch.ones_like(limit), strength_is)
    chosen = ProxNewton() if solver is None else solver
    answer = chosen.solve(loss, penalty, absolute, tol=tol, init=None if init is None else init.detach().to(nothing))
    fitted = loss.centre(loss.margins(answer.value))
    converged = answer.gap <= tol
    failed = Status.STALLED if answer.stalled else Status.MAX_ITERATIONS
    if not bool(absolute > 0):
        failed = Status.UNCERTIFIED
    solution = Solution(
        answer.value,
        answer.gap,
        converged,
        Status.SOLVED if bool(converged.all()) else failed,
        {
            "strength": absolute,
            "strength_max": limit,
            "iterations": answer.iterations,
            "objective": fitted.at(fitted.margins(answer.value)),
            "solver": type(chosen).__name__,
            "seconds": time.perf_counter() - clock,
        },
    )
    report(solution, tol, strict)
    return solution, fitted


def _design(features: Float[Tensor, "sample source"]) -> Float[Tensor, "sample source"]:
    if not len(features):
        raise InputError("`features` has no samples")
    check_finite("features", features)
    return features.detach().double()


def _probabilities(target: Shaped[Tensor, "sample outcome"], samples: int) -> Float[Tensor, "sample outcome"]:
    target = target.detach().double()
    if len(target) != samples or not samples:
        raise InputError(f"the target must have one row per sample ({samples}, at least 1), got {len(target)}")
    check_finite("target", target)
    off = float((target.sum(1) - 1).abs().max()) if target.shape[1] > 1 else 0.0
    if float(target.min()) < 0 or float(target.max()) > 1 + 1e-6 or off > 1e-3:
        raise InputError("the target must hold probabilities: labels 0/1, or rows in [0, 1] that sum to 1")
    return target / target.sum(1, keepdim=True) if target.shape[1] > 1 else target.clamp(max=1)


def _classes(labels: Shaped[Tensor, " sample"]) -> Shaped[Tensor, " sample"]:
    if labels.is_floating_point() or labels.numel() == 0 or int(labels.min()) < 0:
        raise InputError("`labels` must be class numbers 0, 1, 2, ... or rows of probabilities")
    return labels.long()


def _flattened(penalty: L1, sources: int, outcomes: int) -> L1:
    """Entries of shape (source,) or (source, outcome) for the flattened coefficients."""

    def flat(entry: float | Tensor | None) -> float | Tensor | None:
        if not isinstance(entry, Tensor) or entry.ndim == 0:
            return entry
        return (entry[:, None] if entry.ndim == 1 else entry).expand(sources, outcomes).reshape(-1)

    return L1(flat(penalty.weights), penalty.non_negative, flat(penalty.upper), flat(penalty.squared))
