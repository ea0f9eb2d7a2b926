"""The smallest circuit that keeps a behaviour: what comes back was measured, and nothing smaller that was is enough."""

import importlib

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.smallest import CLOSE


@pytest.fixture(scope="module")
def ranked() -> tuple[tcl.Experiment, tcl.AttributionGraph]:
    model = architectures.small()
    tokens = [torch.randint(31, (12, 7), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    target = tcl.LogitDiff([3] * 12, [4] * 12)
    experiment = tcl.Experiment(model, *tokens, target, progress=False)
    return experiment, tcl.baselines.eap_ig(experiment)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_it_is_the_smallest_that_was_measured_to_do(
    ranked: tuple[tcl.Experiment, tcl.AttributionGraph], share: float
) -> None:
    experiment, graph = ranked
    found = evaluate.smallest(experiment, graph, share=share)
    measured = dict(found.provenance["smallest"]["measured"])
    again = evaluate.faithfulness(experiment, found)
    assert again.faithfulness == pytest.approx(measured[found.n_kept], abs=1e-5) and again.faithfulness >= share
    assert all(kept >= share for size, kept in measured.items() if size >= found.n_kept)
    below = max(size for size in measured if size < found.n_kept)
    assert measured[below] < share and found.n_kept <= max(below + 1, CLOSE * below)
    assert found.kept_edges() == graph.top_k(found.n_kept, how="greedy").kept_edges()
    assert len(measured) <= 16


def test_a_small_circuit_that_does_well_by_luck_is_not_taken_for_enough() -> None:
    """Where a smaller circuit does better than a larger one, it's from the larger one on that it holds."""
    bracket = importlib.import_module("tl_circuitlasso.evaluate.smallest")._bracket
    assert bracket({1: 0.2, 4: 0.95, 20: 0.5, 90: 0.91, 400: 1.0}, 0.9) == (20, 90)
    assert bracket({1: 0.95, 4: 0.99}, 0.9) == (0, 1)
    assert bracket({1: 0.2, 4: 0.3}, 0.9) == (4, 0)


def test_a_size_that_no_whole_path_has_does_not_keep_the_search_going(
    ranked: tuple[tcl.Experiment, tcl.AttributionGraph],
) -> None:
    """Of one edge alone there's no path, so the circuit of size 1 is empty: it's measured once."""
    experiment, graph = ranked
    few = tcl.AttributionGraph.from_edges(graph.index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0})
    kept = evaluate.faithfulness(experiment, few).faithfulness
    found = evaluate.smallest(experiment, few, share=kept / 2)
    assert found.n_kept == 2 and [size for size, _ in found.provenance["smallest"]["measured"]] == [0, 2]


def test_one_call_finds_it() -> None:
    demo = tcl.load_demo(prompts=16)
    options = {"target": demo.target, "corrupted": demo.corrupted, "positions": "last", "progress": False}
    graph = tcl.circuit_lasso(demo.model, demo.tokens, method="lasso+confirm", size="auto", **options)
    report = graph.provenance["smallest"]
    assert dict(report["measured"])[graph.n_kept] >= 0.9 and graph.n_kept <= 10
    assert graph.provenance["forward_passes"] > report["forward_passes"] and "confirm" not in graph.provenance
    plain = tcl.circuit_lasso(demo.model, demo.tokens, **options)
    torch.testing.assert_close(plain.score, graph.score)


def test_what_no_circuit_keeps_is_refused(ranked: tuple[tcl.Experiment, tcl.AttributionGraph]) -> None:
    experiment, graph = ranked
    few = tcl.AttributionGraph.from_edges(graph.index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0})
    with pytest.raises(InputError, match=r"`graph` keeps .* less than `share`"):
        evaluate.smallest(experiment, few, share=1.0)
    for share in (0, 1.5, True):
        with pytest.raises(InputError, match="`share` is"):
            evaluate.smallest(experiment, graph, share=share)
