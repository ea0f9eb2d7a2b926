"""Every wrong value of the table is answered by an error that names the argument."""

import numpy as np
import pytest

import tl_circuitlasso as tcl
from tests import wrong_values
from tests.apart import apart
from tl_circuitlasso._checks import shortened, whole_number
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import component_index


def test_wrong_values_are_named() -> None:
    """In a process of its own: here, the checks of annotations would answer first."""
    answers = apart(wrong_values.answers)
    assert len(answers) > 150
    wrong = [
        answer for answer in answers if answer[2] not in ("InputError", "ModelError") or answer[1] not in answer[3]
    ]
    assert not wrong, "\n".join(": ".join(answer) for answer in wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    graph = tcl.AttributionGraph.from_edges(
        component_index(n_layers=2, n_heads=4), {("input", "m0"): 1.0, ("m0", "logits"): 0.5}
    )
    assert graph.top_k(np.int64(2)).kept_edges() == {("input", "m0"), ("m0", "logits")}
    assert graph.threshold(np.float32(0.6)).kept_edges() == {("input", "m0")}
    assert graph.keep([True, False]).kept_edges() == graph.keep(np.array([True, False])).kept_edges()
    assert tcl.evaluate.structure(graph, [("input", "m0")]).shd == 1


@pytest.mark.parametrize("given", [True, 1.0, "1", None, 0, 11, [3]])
def test_whole_numbers(given: object) -> None:
    assert whole_number("n", np.int16(10), most=10) == 10
    with pytest.raises(InputError, match=r"`n` is .*: give a whole number of things, 1 to 10"):
        whole_number("n", given, most=10, what="of things")


def test_long_values_are_shortened() -> None:
    assert len(shortened(list(range(10_000)))) <= 62
