"""Exact patching of single neurons: as slow hooks give it, whatever the model, padding and batch size."""

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt

METRIC = tcl.evaluate.logit_diff([3] * 5, [4] * 5)
NEURONS = ["m0#3", "m0#17", "m1#0", "m1#39"]


def pair(length=6):
    return (architectures.prompts(length=length, batch=5, seed=seed) for seed in (0, 3))


def by_hooks(model, clean, corrupted):
    """The fall of the mean metric, one neuron and one hook at a time."""
    rows, adapter = torch.arange(len(clean)), adapt(model)
    whole = METRIC.each(model(clean), rows).mean()
    fallen = []
    for name in NEURONS:
        layer, neuron = map(int, name[1:].split("#"))
        other = adapter.run(corrupted, None, [f"mlp_post.{layer}"])[f"mlp_post.{layer}"]

        def swap(post, hook, neuron=neuron, other=other):
            changed = post.reshape(other.shape).clone()
            changed[..., neuron] = other[..., neuron].to(post)
            return changed.view_as(post)

        with model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", swap)]):
            fallen.append(float((whole - METRIC.each(model(clean), rows).mean()).detach()))
    return torch.tensor(fallen)


def exact(model, clean, corrupted, **options):
    graph = tcl.baselines.exact_neurons(model, clean, corrupted, METRIC, **{"neurons": NEURONS, **options})
    assert [graph.index.names[i] for i in graph.source.tolist()] == NEURONS
    return graph.score.float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "pythia", "gemma2", "bridge gpt2", "bridge llama"])
def test_it_is_what_one_hook_at_a_time_gives(family):
    make = architectures.bridge if family.startswith("bridge") else architectures.hooked
    model, (clean, corrupted) = make(family.split()[-1]), pair()
    forwards = [block.__dict__.get("forward") for block in model.blocks]
    expected = by_hooks(model, clean, corrupted)
    assert float(expected.abs().max()) > 1e-3
    for size in (5, 96, 8):
        assert torch.allclose(exact(model, clean, corrupted, batch_size=size), expected, atol=2e-5)
    assert [block.__dict__.get("forward") for block in model.blocks] == forwards


def test_small_steps_give_the_derivative_and_large_ones_do_not():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    local = tcl.baselines.gradient_activation(model, clean, corrupted, METRIC, max_nodes=None)
    scores = dict(zip((local.index.names[i] for i in local.source.tolist()), local.score.float().tolist()))
    expected = torch.tensor([scores[name] for name in NEURONS])
    small, whole = (float((exact(model, clean, corrupted, step=step) - expected).abs().max()) for step in (0.1, 1.0))
    assert small < 0.2 * whole and small < 2e-4 < whole


def test_pads_change_nothing():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    pads = torch.full((5, 2), 2)
    longer = [torch.cat([pads, tokens], 1) for tokens in (clean, corrupted)]
    mask = torch.cat([pads == 0, clean >= 0], 1)
    plain, padded = exact(model, clean, corrupted), exact(model, *longer, attention_mask=mask)
    assert torch.allclose(plain, padded, atol=1e-5)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    before, unembed, calls = model(clean), type(model.unembed).forward, []

    def failing(module, residual):
        calls.append("forward" in model.blocks[0].__dict__)
        if calls[-1]:
            raise RuntimeError("stop")
        return unembed(module, residual)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="stop"):
        patched.setattr(type(model.unembed), "forward", failing)
        exact(model, clean, corrupted, neurons=["m1#3"])
    assert calls == [False, True]  # the plain run, then one where the first block isn't run
    assert torch.equal(model(clean), before) and not any("forward" in block.__dict__ for block in model.blocks)


def test_bad_input_is_named():
    model, (clean, corrupted) = architectures.hooked("llama"), pair()
    for neurons in ([], "m0#3", ["m0#40"], ["m2#0"], ["a0.h1"]):
        with pytest.raises(InputError, match="neurons"):
            exact(model, clean, corrupted, neurons=neurons)
    for step in (0, -0.5, 1.5, True):
        with pytest.raises(InputError, match="step"):
            exact(model, clean, corrupted, step=step)
    with pytest.raises(InputError, match="corrupted"):
        exact(model, clean, None)
    with pytest.raises(ModelError, match="no MLPs"):
        exact(architectures.hooked("attn_only"), clean, corrupted)
    with pytest.raises(ModelError, match="experts"):
        exact(architectures.hooked("moe"), clean, corrupted)
