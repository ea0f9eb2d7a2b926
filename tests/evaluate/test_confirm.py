"""Confirming kept edges one by one: the effects of exact patching, budgets, and what is dropped."""

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import pair
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


def test_effects_of_kept_edges_are_those_of_exact_patching():
    model = architectures.hooked("llama")
    clean, corrupted, _ = pair()
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    exact = baselines.exact(model, clean, corrupted, metric, batch_size=64)
    some = exact.top_k(12, ports=True)
    found = tcl.evaluate.confirm(model, some, clean, corrupted, metric, tolerance=0)
    tested = found.extras["measured"].bool()
    assert bool(tested.any()) and not bool((tested & ~some.kept).any())
    assert (found.extras["effect"] - exact.score)[tested].abs().max() < 1e-4 * exact.score.abs().max()
    assert not bool(found.extras["effect"][~tested].any())
    low, effect, high = (found.extras[name][tested] for name in ("effect_low", "effect", "effect_high"))
    assert bool((low <= effect).all()) and bool((effect <= high).all())
    report = found.provenance["confirm"]
    assert report["tested"] == int(tested.sum()) and report["forward_passes"] <= 2 + report["tested"]
    assert report["forward_passes_all_edges"] - report["forward_passes"] == len(exact) - report["tested"]


def test_false_edges_are_dropped_and_true_ones_stay():
    demo = tcl.load_demo(prompts=48)
    truth = {*demo.true_edges}
    false = {("m1", "logits"), ("input", "m1"), ("a0.h0", "a2.h2"), ("a2.h2", "logits"), ("input", "a0.h0")}
    graph = AttributionGraph.from_edges(component_index(n_layers=3, n_heads=4), dict.fromkeys(truth | false, 1.0))
    clean = demo.model(demo.tokens)[:, -1].detach()
    metric = tcl.evaluate.kl(clean)
    found = tcl.evaluate.confirm(demo.model, graph, demo.tokens, demo.corrupted, metric)
    assert found.kept_edges() == truth
    assert found.provenance["confirm"]["refuted"] == len(false)
    assert found.candidate_edges() == graph.candidate_edges() and torch.equal(found.score, graph.score)


def test_a_budget_goes_to_the_weakest_edges_and_the_others_stay():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    graph = baselines.random_edges(model).top_k(20, ports=True)
    every = tcl.evaluate.confirm(model, graph, clean, corrupted, metric)
    some = tcl.evaluate.confirm(model, graph, clean, corrupted, metric, budget=7)
    tested, kept = some.extras["measured"].bool(), graph.kept
    assert int(tested.sum()) == 7 and float(graph.score[tested].max()) < float(graph.score[kept & ~tested].min())
    assert torch.equal(some.kept[tested], every.kept[tested]) and bool(some.kept[kept & ~tested].all())
    torch.testing.assert_close(some.extras["effect"][tested], every.extras["effect"][tested])
    report = some.provenance["confirm"]
    assert (report["tested"], report["untested"]) == (7, every.provenance["confirm"]["tested"] - 7)
    assert report["forward_passes"] < every.provenance["confirm"]["forward_passes"]
    assert (
        tcl.evaluate.confirm(model, graph, clean, corrupted, metric, budget=999).provenance["confirm"]["untested"] == 0
    )
    with pytest.raises(InputError, match="`budget` is 0"):
        tcl.evaluate.confirm(model, graph, clean, corrupted, metric, budget=0)


def test_the_confirmed_graph_can_be_saved(tmp_path):
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    found = tcl.evaluate.confirm(
        model, baselines.random_edges(model).top_k(30), clean, corrupted, tcl.evaluate.logit_diff([3, 4], [5, 6])
    )
    for name in ("graph.json", "graph.safetensors"):
        found.save(tmp_path / name)
        again = AttributionGraph.load(tmp_path / name)
        assert torch.equal(again.extras["effect"], found.extras["effect"])
        assert again.provenance["confirm"] == found.provenance["confirm"]


def test_nothing_to_confirm_is_said():
    model = architectures.hooked("gpt2")
    clean, corrupted, _ = pair()
    graph = baselines.random_edges(model)
    metric = tcl.evaluate.logit_diff([3, 4], [5, 6])
    with pytest.raises(InputError, match="keeps no edge on a path"):
        tcl.evaluate.confirm(model, graph.keep(~graph.kept), clean, corrupted, metric)
    with pytest.raises(InputError, match="no scale"):  # such as the divergence of a single output
        tcl.evaluate.confirm(model, graph, clean, corrupted, lambda logits, rows: 0 * logits.sum())
    with pytest.raises(InputError, match="`tolerance` is -1"):
        tcl.evaluate.confirm(model, graph, clean, corrupted, metric, tolerance=-1)
