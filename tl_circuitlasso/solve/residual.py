"""The verb over data, `regress`: through the Gram where it is small, else through residuals."""

import time
import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import Solution, Status
from tl_circuitlasso.solve.certificate import relative_gap
from tl_circuitlasso.solve.lasso import Strength, StrengthIs, absolute_strength, check_init, lasso, report
from tl_circuitlasso.solve.losses import QuadraticGram
from tl_circuitlasso.solve.penalties import L1, entries_like
from tl_circuitlasso.solve.problem import check_finite, check_finite_codes
from tl_circuitlasso.solve.sparse import csr_matrix, gram_of_codes

Design = Tensor | scipy.sparse.csr_matrix
ROUNDS = 100
INNER = 0.3  # share of the tolerance asked of the restricted problem


def regress(
    features: Tensor,
    targets: Float[Tensor, "sample target"],
    *,
    strength: Strength,
    penalty: L1 | None = None,
    tol: float = 1e-4,
    strength_is: StrengthIs = "relative",
    strict: bool = False,
    form: str | None = None,
    **options: Any,
) -> Solution:
    """min_A 1/(2M) ||Y - XA||^2 + lambda * penalty(A) on samples as they are (centre them first if that is meant).

    features: (sample, source), dense or sparse CSR; targets: (sample, target). With at most 2 M sources the Gram is
    formed once (`form="gram"`); else only the rows of it that a growing union of supports needs (`form="residual"`),
    with full gradients from residuals. `options` go to `lasso`.

    >>> regress(torch.eye(2), torch.tensor([[2.0], [0.1]]), strength=0.5).value.round(decimals=6).flatten().tolist()
    [1.0, 0.0]
    """
    samples, sources = features.shape
    if len(targets) != samples or not samples:
        raise InputError(
            f"`features` has {samples} samples and `targets` {len(targets)}; both need the same, at least 1"
        )
    features, targets = features.detach(), targets.detach()
    sparse = features.layout == torch.sparse_csr
    if sparse:
        check_finite_codes("features", features)
    else:
        check_finite("features", features)
    check_finite("targets", targets)
    y = targets.double()
    form = form or ("gram" if sources <= 2 * samples else "residual")
    if form == "residual":
        return _by_residuals(
            features, y, strength, L1() if penalty is None else penalty, tol, strength_is, strict, options
        )
    if form != "gram":
        raise InputError(f"`form` must be 'gram' or 'residual', got {form!r}")
    design = csr_matrix(features) if sparse else features.double()
    gram, cross = _gram(design) / samples, _pull(design, y)
    square = y.square().mean(0)
    return lasso(
        gram, cross, target_sq_norm=square, strength=strength, penalty=penalty, tol=tol, strength_is=strength_is,
        strict=strict, **options,
    )  # fmt: skip


def _by_residuals(
    features: Tensor,
    targets: Float[Tensor, "sample target"],
    strength: Strength,
    penalty: L1,
    tol: float,
    strength_is: StrengthIs,
    strict: bool,
    options: dict[str, Any],
) -> Solution:
    """Working sets shared by all targets: solve on their small Gram, look at all sources, add the violators."""
    clock = time.perf_counter()
    sources, count = features.shape[1], targets.shape[1]
    if not isinstance(penalty, L1):
        raise InputError("`form='residual'` takes elementwise penalties; group penalties need the Gram (form='gram')")
    if options.get("standardise") or options.get("checkpoint") is not None:
        raise InputError("`standardise` and `checkpoint` need the whole Gram: pass form='gram' beside them")
    options = {name: entry for name, entry in options.items() if name != "check"}
    init = options.pop("init", None)
    penalty.check(sources, count)
    penalty = penalty.to(torch.float64, targets.device)
    design = csr_matrix(features) if features.layout == torch.sparse_csr else features.double()
    square, cross = targets.square().mean(0), _pull(design, targets)
    pull, nothing = cross, cross.new_empty(0, 0)
    limit = penalty.strength_max(pull)
    absolute = absolute_strength(strength, limit, torch.ones_like(limit), strength_is)
    value, iterations = torch.zeros_like(pull), torch.zeros(count, dtype=torch.long)
    gap, union, rounds = torch.full_like(limit, torch.inf), torch.zeros(sources, dtype=torch.bool), 0
    if init is not None:
        value = penalty.prox(check_init(init, cross).to(value), 0.0, absolute)
        union, pull = (value != 0).any(1), _pull(design, targets - _predict(design, value))
    for step in range(ROUNDS + 1):
        # given its gradient, the Gram form of the loss needs no Gram
        loss = QuadraticGram(nothing, cross, square)
        gap = relative_gap(loss, penalty, value, absolute, pull)
        if bool((gap <= tol).all()) or step == ROUNDS:
            break
        rounds += 1
        rows, union = _grow(penalty, pull, absolute, union, gap > tol)
        part = _columns(design, rows)
        small = {"penalty": penalty.restrict(rows, None), "tol": INNER * tol, "init": value[rows], **options}
        answer = _restricted(part, targets, target_sq_norm=square, strength=absolute, **small)
        value = torch.zeros_like(value).index_copy_(0, rows, answer.value)
        iterations += answer.stats["iterations"]
        pull = _pull(design, targets - _predict(part, answer.value))
    converged = gap <= tol
    status = Status.SOLVED if bool(converged.all()) else Status.MAX_ITERATIONS
    if bool((~converged & (absolute == 0)).any()):
        status = Status.UNCERTIFIED
    stats = {
        "strength": absolute,
        "strength_max": limit,
        "iterations": iterations,
        "rounds": rounds,
        "working_set": int(union.sum()),
        "solver": "residual",
        "seconds": time.perf_counter() - clock,
    }
    solution = Solution(value, gap, converged, status, stats)
    report(solution, tol, strict)
    return solution


def _restricted(part: Design, targets: Float[Tensor, "sample target"], **options: Any) -> Solution:
    """The Lasso on some sources; what this small problem misses is reported in the end, of the whole one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gram = _gram(part) / len(targets)
        return lasso(gram, _pull(part, targets), strength_is="absolute", check=False, **options)


def _grow(
    penalty: L1,
    pull: Float[Tensor, "source target"],
    strength: Float[Tensor, " target"],
    union: Tensor,
    unfinished: Tensor,
) -> tuple[Tensor, Tensor]:
    """The union and the sources that violate some unfinished target most; it at most doubles, from 64."""
    weight = penalty.weight(pull)
    over = ((pull if penalty.non_negative else pull.abs()) / weight - strength) / strength.clamp(min=1e-300)
    if penalty.upper is not None:
        over = torch.where(entries_like(penalty.upper, over) > 0, over, -torch.inf)
    worst = torch.where(union, -torch.inf, over[:, unfinished].amax(1))
    room = min(max(64, int(union.sum())), int((worst > 0).sum()))
    union = union.index_fill(0, worst.topk(room).indices, True)
    return union.nonzero()[:, 0], union


def _gram(design: Design) -> Float[Tensor, "source source"]:
    """X'X."""
    return design.T @ design if isinstance(design, Tensor) else gram_of_codes(design)


def _pull(design: Design, residual: Float[Tensor, "sample target"]) -> Float[Tensor, "source target"]:
    """X'R/M."""
    if isinstance(design, Tensor):
        return design.T @ residual / len(residual)
    return torch.from_numpy(np.ascontiguousarray(design.T @ residual.numpy())) / len(residual)


def _predict(design: Design, value: Float[Tensor, "source target"]) -> Float[Tensor, "sample target"]:
    return design @ value if isinstance(design, Tensor) else torch.from_numpy(design @ value.numpy())


def _columns(design: Design, rows: Tensor) -> Design:
    if isinstance(design, Tensor):
        return design[:, rows]
    part = design[:, rows.numpy()].tocsr()
    part.sort_indices()
    return part
