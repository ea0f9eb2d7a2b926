"""Losses of classification targets: logistic, multinomial, and the cross-entropy of weighted contributions.

Each is one coupled problem with its coefficients in a single column (a multinomial's (source, class) matrix is
flattened row by row), a fixed offset, and, if asked, an unpenalised intercept that is always at its optimum given the
coefficients. With P the observed probabilities and q the predicted ones the dual point is s (P - q) / M, 0 <= s <= 1:

    f + f* = mean_m [ logsumexp(z_m + o_m) - P_m (z_m + o_m) + sum_c x log x - s (q_m - P_m) o_m ]

with x = (1 - s) P_m + s q_m.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve.base import AbstractLoss
from tl_circuitlasso.solve.losses import largest_singular_sq

STRIP = 64  # columns of a Hessian that are computed together


class AbstractLikelihood(AbstractLoss):
    """A loss of one target that is smooth enough for Newton steps."""

    observed: Tensor
    intercept: bool
    known: tuple[Tensor, Tensor] | None

    @property
    def intercepted(self) -> bool:
        return self.intercept

    def margins(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "sample outcome"]:
        """The linear predictor without the offset."""
        return self.known[1] if self.known is not None and self.known[0] is value else self._margins(value)

    def objective(
        self, value: Float[Tensor, "source 1"], negative_gradient: Float[Tensor, "source 1"]
    ) -> Float[Tensor, " 1"]:
        del negative_gradient
        return self.at(self.margins(value))[None]

    def natural_scale(
        self, value: Float[Tensor, "source 1"], negative_gradient: Float[Tensor, "source 1"]
    ) -> Float[Tensor, " 1"]:
        del negative_gradient
        return value.new_ones(1)

    @abstractmethod
    def knowing(
        self, value: Float[Tensor, "source 1"], margins: Float[Tensor, "sample outcome"]
    ) -> "AbstractLikelihood":
        """The same loss, which need not compute the margins of this very `value`: a pass over the samples each time."""

    @abstractmethod
    def _margins(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "sample outcome"]: ...

    @abstractmethod
    def at(self, margins: Float[Tensor, "sample outcome"]) -> Float[Tensor, ""]:
        """f as a function of the predictor, for line searches."""

    @abstractmethod
    def hessian(
        self, margins: Float[Tensor, "sample outcome"], rows: Int[Tensor, " kept"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "kept kept"]:
        """The Hessian over the coefficients in `rows`, the intercept profiled out; products may be taken in `dtype`."""

    @abstractmethod
    def centre(self, margins: Float[Tensor, "sample outcome"]) -> "AbstractLikelihood":
        """The same loss with its intercept at the optimum for these margins."""


@dataclass(frozen=True, eq=False)
class Logistic(AbstractLikelihood):
    """f(a) = 1/M sum_m log(1 + exp(z_m)) - P_m z_m, z = b + X a; P_m in [0, 1]."""

    features: Float[Tensor, "sample source"]
    observed: Float[Tensor, "sample 1"]
    bias: Float[Tensor, "1 1"]
    intercept: bool = True
    known: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.features.shape[1]), 1

    def knowing(self, value: Float[Tensor, "source 1"], margins: Float[Tensor, "sample 1"]) -> "Logistic":
        return replace(self, known=(value, margins))

    def _margins(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "sample 1"]:
        return self.features @ value

    def at(self, margins: Float[Tensor, "sample 1"]) -> Float[Tensor, ""]:
        z = margins + self.bias
        return (torch.nn.functional.softplus(z) - self.observed * z).mean()

    def negative_gradient(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "source 1"]:
        return self.features.t() @ (self.observed - self._predict(value)) / len(self.observed)

    def fenchel(
        self, value: Float[Tensor, "source 1"], negative_gradient: Float[Tensor, "source 1"], scale: Float[Tensor, " 1"]
    ) -> Float[Tensor, " 1"]:
        del negative_gradient
        margins = self.margins(value)
        predicted = torch.sigmoid(margins + self.bias)
        mixed = (1 - scale) * self.observed + scale * predicted
        conjugate = torch.special.xlogy(mixed, mixed) + torch.special.xlogy(1 - mixed, 1 - mixed)
        shift = scale * (predicted - self.observed) * self.bias
        return self.at(margins)[None] + (conjugate - shift).mean(0)

    def curvature(self) -> float:
        return 0.25 * largest_singular_sq(self.features) / len(self.observed)

    def null_objective(self) -> Float[Tensor, " 1"]:
        nothing = torch.zeros_like(self.observed)
        return _above_entropy(self.centre(nothing).at(nothing), torch.cat([self.observed, 1 - self.observed], 1))

    def hessian(
        self, margins: Float[Tensor, "sample 1"], rows: Int[Tensor, " kept"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "kept kept"]:
        predicted = torch.sigmoid(margins + self.bias)
        weight = predicted * (1 - predicted)
        features = _columns(self.features, rows)
        if self.intercept:
            features = features - weight.T @ features / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        return _gram(features.mul_((weight / len(weight)).sqrt()).to(dtype))

    def centre(self, margins: Float[Tensor, "sample 1"]) -> "Logistic":
        if not self.intercept:
            return self
        bias = self.bias
        for _ in range(50):
            predicted = torch.sigmoid(margins + bias)
            slope = (predicted - self.observed).mean()
            if float(slope.abs()) < 1e-15:
                break
            curvature = (predicted * (1 - predicted)).mean()
            bias = bias - (slope / curvature.clamp(min=1e-12)).clamp(-2, 2)
        return replace(self, bias=bias)

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "Logistic":
        del targets
        return self if sources is None else replace(self, features=self.features.index_select(1, sources), known=None)

    def _predict(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "sample 1"]:
        return torch.sigmoid(self.margins(value) + self.bias)


@dataclass(frozen=True, eq=False)
class Softmax(AbstractLikelihood):
    """f(a) = 1/M sum_m KL(P_m || softmax(o_m + sum_u a_u X_mu)) for contributions X (sample, outcome, source).

    `features` given as a matrix (sample, input) instead mean the multinomial regression with one coefficient per
    (input, outcome), flattened input by input. `intercept` adds one free offset per outcome.
    """

    features: Tensor  # (sample, outcome, source), or (sample, input)
    observed: Float[Tensor, "sample outcome"]
    offset: Float[Tensor, "#sample outcome"]
    intercept: bool = False
    known: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        sources = int(self.features.shape[-1])
        return (sources if self._direct else sources * int(self.observed.shape[1])), 1

    @property
    def _direct(self) -> bool:
        return self.features.ndim == 3

    def knowing(self, value: Float[Tensor, "source 1"], margins: Float[Tensor, "sample outcome"]) -> "Softmax":
        return replace(self, known=(value, margins))

    def _margins(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "sample outcome"]:
        if self._direct:
            return self.features @ value[:, 0]
        return self.features @ value.view(-1, self.observed.shape[1])

    def at(self, margins: Float[Tensor, "sample outcome"]) -> Float[Tensor, ""]:
        logs = torch.log_softmax(margins + self.offset, dim=1)
        return (torch.special.xlogy(self.observed, self.observed) - self.observed * logs).sum(1).mean()

    def negative_gradient(self, value: Float[Tensor, "source 1"]) -> Float[Tensor, "source 1"]:
        rest = (self.observed - torch.softmax(self.margins(value) + self.offset, 1)) / len(self.observed)
        if self._direct:
            return self.features.reshape(-1, self.shape[0]).T @ rest.reshape(-1, 1)
        return (self.features.T @ rest).reshape(-1, 1)

    def fenchel(
        self, value: Float[Tensor, "source 1"], negative_gradient: Float[Tensor, "source 1"], scale: Float[Tensor, " 1"]
    ) -> Float[Tensor, " 1"]:
        del negative_gradient
        logits = self.margins(value) + self.offset
        predicted = torch.softmax(logits, 1)
        mixed = (1 - scale) * self.observed + scale * predicted
        primal = torch.logsumexp(logits, 1) - (self.observed * logits).sum(1)
        shift = (scale * (predicted - self.observed) * self.offset).sum(1)
        return (primal + torch.special.xlogy(mixed, mixed).sum(1) - shift).mean()[None]

    def curvature(self) -> float:
        flat = self.features.reshape(-1, self.features.shape[-1])
        return 0.5 * largest_singular_sq(flat) / len(self.observed)  # diag(q) - qq' <= 1/2

    def null_objective(self) -> Float[Tensor, " 1"]:
        nothing = torch.zeros_like(self.observed)
        return self.centre(nothing).at(nothing)[None]

    def hessian(
        self, margins: Float[Tensor, "sample outcome"], rows: Int[Tensor, " kept"], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "kept kept"]:
        predicted = torch.softmax(margins + self.offset, 1)
        if self._direct:
            kept = self.features.index_select(2, rows)
            mean = torch.einsum("mcu,mc->mu", kept, predicted)
            spread = (kept - mean[:, None]) * predicted.sqrt()[:, :, None]
            return _gram(spread.reshape(-1, len(rows)).to(dtype)) / len(predicted)
        return _multinomial_hessian(self.features, predicted, rows, self.intercept)

    def centre(self, margins: Float[Tensor, "sample outcome"]) -> "Softmax":
        if not self.intercept:
            return self
        offset = self.offset
        for _ in range(50):
            predicted = torch.softmax(margins + offset, 1)
            slope = (predicted - self.observed).mean(0)
            if float(slope.abs().max()) < 1e-15:
                break
            curvature = torch.diag(predicted.mean(0)) - predicted.T @ predicted / len(predicted)
            offset = offset - (torch.linalg.pinv(curvature, hermitian=True) @ slope).clamp(-2, 2)
        return replace(self, offset=offset)

    def restrict(
        self, sources: Int[Tensor, " kept_source"] | None, targets: Int[Tensor, " kept_target"] | None
    ) -> "Softmax":
        del targets
        if sources is None:
            return self
        if not self._direct:
            raise InputError("`RowSet` can't take the rows of a multinomial regression apart: use `Fista`")
        return replace(self, features=self.features.index_select(2, sources), known=None)


def _columns(matrix: Float[Tensor, "sample source"], some: Int[Tensor, " kept"]) -> Float[Tensor, "sample kept"]:
    """A copy of some columns, by numpy where it can: its rows stay whole, which takes a quarter of the time."""
    if matrix.device.type != "cpu":
        return matrix.index_select(1, some)
    return torch.from_numpy(matrix.numpy().take(some.numpy(), axis=1))


def _gram(matrix: Float[Tensor, "row kept"]) -> Float[Tensor, "kept kept"]:
    """X'X by strips on and right of the diagonal, the rest mirrored: little more than half the products; in double."""
    count = matrix.shape[1]
    total = matrix.new_empty(count, count)
    for left in range(0, count, STRIP):
        strip = slice(left, left + STRIP)
        torch.mm(matrix[:, strip].T, matrix[:, left:], out=total[strip, left:])
        total[left + STRIP :, strip] = total[strip, left + STRIP :].T
    return total.double()


def _multinomial_hessian(
    features: Float[Tensor, "sample input"],
    predicted: Float[Tensor, "sample outcome"],
    rows: Int[Tensor, " kept"],
    intercept: bool,
) -> Float[Tensor, "kept kept"]:
    """sum_m x_i x_j (q_c [c = d] - q_c q_d) / M over flattened (input, outcome) pairs."""
    outcomes = predicted.shape[1]
    inputs, which = rows // outcomes, rows % outcomes
    kept = features.index_select(1, inputs)
    lit = kept * predicted[:, which]
    total = torch.where(which[:, None] == which, kept.T @ lit, 0) - lit.T @ lit
    if intercept:  # Schur complement of the free offsets
        mixed = torch.where(which[:, None] == torch.arange(outcomes, device=rows.device), lit.sum(0)[:, None], 0)
        mixed = mixed - lit.T @ predicted
        free = torch.diag(predicted.sum(0)) - predicted.T @ predicted
        total = total - mixed @ torch.linalg.pinv(free, hermitian=True) @ mixed.T
    return total / len(predicted)


def _above_entropy(cross_entropy: Float[Tensor, ""], observed: Float[Tensor, "sample outcome"]) -> Float[Tensor, " 1"]:
    """The part of a cross-entropy that a model can explain: a prediction copied exactly would have none left."""
    return (cross_entropy + torch.special.xlogy(observed, observed).sum(1).mean())[None]
