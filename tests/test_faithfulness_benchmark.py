"""The benchmark of faithfulness: its re-enactment of the package computes the same logits; its verdicts are right."""

import torch

from benchmarks.cost import Problem
from benchmarks.faithfulness import demo_case, judged, package_way
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.evaluate.circuits import as_circuits, prune
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.patch import run_circuits


def test_the_re_enactment_computes_the_same_logits() -> None:
    problem = Problem(layers=2, heads=2, d_model=16, vocab=23, prompts=3, length=6, batch_size=3)
    model, (clean, corrupted) = problem.model(), problem.pairs()
    adapter = adapt(model)
    layout = EdgeLayout(adapter.shape)
    kept = prune((torch.rand(3, layout.n_sources, layout.n_readers) < 0.5) & layout.mask(), layout)
    ours = run_circuits(adapter, clean, None, as_circuits(kept, layout), from_run(adapter, corrupted, None))
    for mine, circuit in zip(ours, kept):
        theirs = package_way(model, clean, corrupted, circuit, layout)
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_default_circuit_of_the_demo_is_small_and_faithful() -> None:
    found = judged(demo_case(128), 128)
    assert found["reached"] and found["faithfulness"] >= 0.95 and found["edges"] <= 1.2 * found["truth"]
    assert found["truth's"] > 0.95 and found["low"] <= found["faithfulness"] <= found["high"]
