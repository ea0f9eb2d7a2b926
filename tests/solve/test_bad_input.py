"""Wrong input raises at once, names the argument and says what to do."""

import inspect

import pytest
import torch

from tests.solve.problems import planted
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.solve import (
    L1,
    ElasticNet,
    Group,
    cross_entropy_garrote,
    lasso,
    logistic_lasso,
    regress,
)


def changed(**entries: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**planted().matrices, **entries}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["gram", "cross"])
def test_nan_and_inf_name_matrix_and_row(name: str, bad: float) -> None:
    matrices = planted().matrices
    matrices[name][7, 2] = bad
    names = [f"a0.h{i}" for i in range(30)]
    with pytest.raises(InputError, match=rf"`{name}` holds .* at row 7 \(a0.h7\), column 2"):
        lasso(**matrices, strength=0.1, names=names)


def test_asymmetric_gram() -> None:
    gram = planted().gram
    gram[3, 5] += 0.1
    with pytest.raises(InputError, match=r"`gram` isn't symmetric: entries \(3, 5\)"):
        lasso(**changed(gram=gram), strength=0.1)


def test_indefinite_gram_small_and_large() -> None:
    gram = planted().gram - 0.5 * torch.eye(30, dtype=torch.float64)
    with pytest.raises(InputError, match="positive semidefinite"):
        lasso(**changed(gram=gram), strength=0.1)
    gram = planted().gram
    gram[0, 1] = gram[1, 0] = 5.0
    with pytest.raises(InputError, match="exceeds the product of its standard deviations"):
        lasso(**changed(gram=gram), strength=0.1)


def test_indefinite_gram_too_large_to_factorise_is_found_by_its_failure(monkeypatch) -> None:
    monkeypatch.setattr("tl_circuitlasso.solve.problem.CHOLESKY_UP_TO", 0)
    gram = torch.full((3, 3), -0.9, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(InputError, match="negative variance"):
        lasso(gram, torch.ones(3, 1), target_sq_norm=torch.ones(1), strength=0.1)


def test_moments_that_do_not_belong_together() -> None:
    with pytest.raises(InputError, match="`cross` exceeds what `gram` and `target_sq_norm` allow"):
        lasso(**changed(cross=planted().cross * 100), strength=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": -0.1}, "`strength` must be >= 0"),
        ({"strength": float("nan")}, "`strength` must be >= 0"),
        ({"strength": torch.ones(5)}, "`strength` must be a number or one per target"),
        ({"tol": 0.0}, "`tol` must be > 0"),
        ({"solver": "magic"}, "`solver` must be"),
        ({"strength_is": "wrong"}, "`strength_is` must be"),
        ({"gram": torch.ones(30, 29)}, "`gram` must be square"),
        ({"cross": torch.ones(29, 6)}, "`cross` must be"),
        ({"target_sq_norm": torch.ones(5)}, "`target_sq_norm` must be"),
        ({"target_sq_norm": -torch.ones(6)}, "`target_sq_norm` must be >= 0"),
        ({"init": torch.ones(3, 3)}, "`init` must be"),
        ({"init": torch.full((30, 6), torch.nan)}, "`init` holds NaN"),
        ({"penalty": L1(torch.zeros(30))}, "`weights` must be > 0"),
        ({"penalty": L1(torch.full((30, 6), torch.nan))}, "`weights` must be > 0"),
        ({"penalty": L1(torch.ones(7))}, "`weights` must be a number"),
        ({"penalty": L1(upper=1.0)}, "non_negative=True"),
        ({"penalty": Group(torch.zeros(3, dtype=torch.long), torch.zeros(6, dtype=torch.long))}, "`row_groups`"),
        (
            {"penalty": Group(torch.zeros(30, dtype=torch.long), torch.zeros(6, dtype=torch.long), torch.zeros(1, 1))},
            "`weights` must be > 0",
        ),
    ],
)
def test_arguments(change: dict, message: str) -> None:
    arguments = {"strength": 0.1, **planted().matrices, **change}
    gram, cross = arguments.pop("gram"), arguments.pop("cross")
    if gram.shape[0] != gram.shape[1] or cross.shape[0] != gram.shape[0] or len(arguments["target_sq_norm"]) != 6:
        lasso_unchecked = inspect.unwrap(lasso)  # the shape checker of the test run would answer first
        with pytest.raises(InputError, match=message):
            lasso_unchecked(gram, cross, **arguments)
        return
    if "init" in change and change["init"].shape != cross.shape:
        with pytest.raises(InputError, match=message):
            inspect.unwrap(lasso)(gram, cross, **arguments)
        return
    with pytest.raises(InputError, match=message):
        lasso(gram, cross, **arguments)


def test_other_verbs() -> None:
    with pytest.raises(InputError, match="`l1_ratio`"):
        ElasticNet(0.0)
    with pytest.raises(InputError, match="at least 1"):
        regress(torch.ones(0, 3), torch.ones(0, 1), strength=0.1)
    with pytest.raises(InputError, match="probabilities"):
        logistic_lasso(torch.ones(3, 1), torch.tensor([0, 1, 2]), strength=0.1)
    with pytest.raises(InputError, match="sum to 1"):
        cross_entropy_garrote(torch.ones(2, 2, 1), torch.ones(2, 2), strength=0.1)
    with pytest.raises(InputError, match="`contributions` holds nan"):
        cross_entropy_garrote(torch.full((2, 2, 1), torch.nan), torch.full((2, 2), 0.5), strength=0.1)
