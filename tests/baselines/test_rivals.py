"""ACDC, EAP-GP and bootstrapped EAP-IG against slow or hand-made versions of themselves, and one call for all."""

import inspect
import sys

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.baselines import gradient
from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.patch import run_circuits


def last_difference(logits, rows):
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def pair(batch=3, length=6):
    return (architectures.prompts(length=length, batch=batch, seed=seed) for seed in (0, 9))


def searched_slowly(model, clean, corrupted, threshold):
    """The search as its package has it: one try, one run; returns what is left, effects of single edges, and tries."""
    adapter = adapt(model)
    layout, cut = EdgeLayout(adapter.shape), from_run(adapter, corrupted, None)
    mask, kept = layout.mask(), layout.mask()
    nodes, (n_layers, n_heads) = layout.targets()[0], (adapter.shape.n_layers, adapter.shape.n_heads)

    def value(matrix):
        logits = run_circuits(adapter, clean, None, as_circuits(matrix[None], layout), cut)[0]
        return float(last_difference(logits, None)) / len(clean)

    def sources(column):
        rank = layout.index.ranks.tolist()
        return sorted(mask[:, column].nonzero().flatten().tolist(), key=lambda s: (-rank[s], s))

    order = [(column, [source]) for column in [layout.n_readers - 1] for source in sources(column)]
    for layer in range(n_layers - 1, -1, -1):
        first = layer * (3 * n_heads + 1)
        mlp, ports = first + 3 * n_heads, range(first + 3 * n_heads - 1, first - 1, -1)
        order += [(mlp, [source]) for source in sources(mlp)]
        order += [(column, sources(column)) for column in ports]
        order += [(column, [source]) for column in ports for source in sources(column)]
    before, effects, tries = value(kept), {}, 0
    for column, some in order:
        without = kept.clone()
        without[some, column] = False
        read = nodes[column] == layout.n_sources or bool(kept[nodes[column]].any())
        if read and bool(kept[some, column].any()):
            after, tries = value(without), tries + 1
            if len(some) == 1:
                effects[some[0], column] = before - after
            if before - after >= threshold:
                continue
            before = after
        kept = without
    return kept, effects, tries


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_acdc_makes_the_decisions_of_the_slow_search(family):
    model = architectures.hooked(family, dtype=torch.float64)
    clean, corrupted = pair()
    found = baselines.acdc(model, clean, corrupted, last_difference, threshold=0.02, batch_size=2)
    kept, effects, tries = searched_slowly(model, clean, corrupted, 0.02)
    layout = EdgeLayout(adapt(model).shape)
    source, column = layout.mask().nonzero(as_tuple=True)
    expected = found.keep(kept[source, column])
    assert 0 < int(expected.kept.sum()) < len(found)
    assert torch.equal(found.kept, expected.prune().kept)
    cells = zip(source.tolist(), column.tolist())
    weights = torch.tensor([effects.get(cell, 0.0) for cell in cells], dtype=torch.float64)
    torch.testing.assert_close(found.weight, weights, rtol=1e-9, atol=1e-12)
    assert found.provenance["tested"] == tries > len(effects) > 0
    assert found.provenance["forward_passes"] >= 2 + tries  # the model, the corrupted run, and every try


def test_acdc_counts_what_it_tries_in_vain(monkeypatch):
    """Trying ahead changes nothing but the number of runs; one at a time there are none in vain."""
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    ahead = baselines.acdc(model, clean, corrupted, last_difference, threshold=0.02)
    monkeypatch.setattr(sys.modules["tl_circuitlasso.baselines.acdc"], "AHEAD", 1)
    single = baselines.acdc(model, clean, corrupted, last_difference, threshold=0.02)
    assert torch.equal(ahead.kept, single.kept)
    assert single.provenance["forward_passes"] == pytest.approx(2 + single.provenance["tested"])
    assert ahead.provenance["forward_passes"] > single.provenance["forward_passes"]


def test_acdc_finds_a_known_circuit_by_divergence():
    demo = tcl.load_demo(prompts=12)
    found = baselines.acdc(demo.model, demo.tokens, demo.corrupted)
    truth = set(demo.true_edges)
    assert len(found.kept_edges() & truth) >= 0.8 * len(truth)
    judged = tcl.evaluate.structure(found, truth, found.candidate_edges())
    assert judged.shd < len(truth)
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    assert tcl.evaluate.faithfulness(demo.model, found, demo.tokens, demo.corrupted, metric).faithfulness > 0.8


def test_acdc_refuses_a_negative_threshold():
    model = architectures.hooked("gpt2")
    clean, corrupted = pair()
    with pytest.raises(InputError, match="`threshold`"):
        baselines.acdc(model, clean, corrupted, last_difference, threshold=-1)
    with pytest.raises(InputError, match="must return one number"):
        baselines.acdc(model, clean, corrupted, lambda logits, rows: logits)


def test_eap_gp_with_one_step_is_eap():
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    one = baselines.eap_gp(model, clean, corrupted, last_difference, steps=1)
    torch.testing.assert_close(one.score, baselines.eap(model, clean, corrupted, last_difference).score)
    four = baselines.eap_gp(model, clean, corrupted, last_difference, steps=4, batch_size=2)
    assert four.provenance["forward_passes"] == 2 * 4 and four.provenance["backward_passes"] == 2 * 4 - 1
    assert not torch.allclose(one.score, four.score, rtol=1e-2)


def test_eap_gp_walks_down_the_distance_to_the_corrupted_output():
    """The path by hand, by TransformerLens and autograd, and the score of input -> logits along it."""
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, corrupted = pair(batch=1)
    steps, name = 3, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    start, end = (model.run_with_cache(tokens)[1]["blocks.0.hook_resid_pre"].detach() for tokens in (clean, corrupted))
    goal, at, gradients = model(corrupted).detach(), start, []
    for _ in range(steps):
        seen = []
        with model.hooks([(name, lambda act, hook, seen=seen: seen.append(act))]):
            logits = model(at.requires_grad_(), start_at_layer=0)
        gradients.append(torch.autograd.grad(last_difference(logits, None), seen[0], retain_graph=True)[0])
        distance = (logits - goal).square().sum() / 2
        away = torch.autograd.grad(distance, at)[0]
        at = (at - (start - end).norm() / steps * away / away.norm()).detach()
    expected = ((start - end) * torch.stack(gradients).mean(0)).sum()
    found = baselines.eap_gp(model, clean, corrupted, last_difference, steps=steps)
    assert found.pair_scores()["input", "logits"] == pytest.approx(abs(float(expected.detach())), rel=1e-6)


def test_resamples_of_eap_ig_are_eap_ig_of_the_resampled_prompts():
    model = architectures.hooked("llama", dtype=torch.float64)
    clean, corrupted = pair(batch=5)
    found = baselines.bootstrap_eap_ig(
        model, clean, corrupted, last_difference, steps=2, resamples=2, level=0.9, seed=3, batch_size=2
    )
    plain = baselines.eap_ig(model, clean, corrupted, last_difference, steps=2)
    torch.testing.assert_close(found.score, plain.score)
    assert found.provenance["forward_passes"] == plain.provenance["forward_passes"]
    rows = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(3))
    drawn = [baselines.eap_ig(model, clean[r], corrupted[r], last_difference, steps=2).score for r in rows]
    least, most = torch.stack(drawn).amin(0), torch.stack(drawn).amax(0)
    torch.testing.assert_close(found.extras["low"], least + 0.05 * (most - least))
    torch.testing.assert_close(found.extras["high"], most - 0.05 * (most - least))
    assert torch.equal(found.kept, (found.extras["low"] > 0) | (found.extras["high"] < 0))
    assert bool(found.kept.any()) and not bool(found.kept.all())
    agree = torch.stack([(part.sign() == plain.score.sign()).double() for part in drawn]).mean(0)
    assert torch.equal(found.extras["stability"], agree)


def test_bad_resamples_are_refused():
    model = architectures.hooked("gpt2")
    clean, corrupted = pair()
    for wrong in ({"resamples": 1}, {"level": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            baselines.bootstrap_eap_ig(model, clean, corrupted, last_difference, **wrong)


def test_every_method_is_called_alike():
    model = architectures.hooked("gpt2")
    clean, corrupted = pair(batch=2, length=5)
    for name in baselines.METHODS:
        graph = baselines.method(name)(model, clean, corrupted, last_difference, steps=2)
        made = graph.provenance
        assert len(graph) and made["method"] and bool(graph.score.isfinite().all()), name
        assert made["forward_passes"] >= 0 and made["backward_passes"] >= 0 and made["seconds"]["total"] >= 0, name
    with pytest.raises(InputError, match="acdc, bootstrap-eap-ig"):
        baselines.method("nothing")
    assert inspect.unwrap(gradient.eap) is inspect.unwrap(baselines.METHODS["eap"])
