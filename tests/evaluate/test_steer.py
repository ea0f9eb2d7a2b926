"""Steering: nodes of a circuit turned up, down and off, against the same written out by hand."""

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import pair
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.norms import scale_of
from tl_circuitlasso.models.patching import mlp_norm, record_all, unembed


@pytest.mark.parametrize(("make", "family"), [(architectures.hooked, "llama"), (architectures.bridge, "gpt2")])
def test_steering_is_scaling_what_nodes_write(make, family):
    model = make(family)
    clean, _, _ = pair()
    graph = baselines.random_edges(model).prune()
    metric = tcl.evaluate.next_token(clean)
    found = tcl.evaluate.steer(model, graph, ["a1.h2", "m1"], 3, clean, metric, other=clean)
    adapter = adapt(model)
    plain = record_all(adapter, clean)
    head = plain.written.heads[1][:, :, 2] @ adapter.writer(1)[0][2]
    norm = mlp_norm(adapter, 1)
    behind = plain.streams.attn[1] + plain.written.heads[1].flatten(2) @ adapter.writer(1)[0].flatten(0, 1)
    behind = behind + adapter.writer(1)[1] + 2 * head
    mlp, read = adapter.mlp(1), behind / scale_of(behind, norm)
    if mlp.w_gate is None:
        post = mlp.act(read @ mlp.w_in + mlp.b_in)
    else:
        post = mlp.act(read @ mlp.w_gate + mlp.b_gate) * (read @ mlp.w_in + mlp.b_in)
    post = post if mlp.b_post is None else post + mlp.b_post
    logits = unembed(adapter, behind + 3 * (post @ mlp.w_out + mlp.b_out))
    expected = metric.each(logits, torch.arange(2)).mean()
    assert found.after == pytest.approx(float(expected), abs=1e-4)
    assert found.low <= found.change <= found.high
    assert found.loss_before == pytest.approx(-found.before) and found.loss_after == pytest.approx(-found.after)
    assert tcl.evaluate.steer(model, graph, ["m1"], 1, clean, metric).change == pytest.approx(0, abs=1e-6)


def test_turning_the_circuit_off_ends_the_behaviour_and_leaves_hooks_gone():
    demo = tcl.load_demo(prompts=32)
    graph = AttributionGraph.from_edges(component_index(n_layers=3, n_heads=4), dict.fromkeys(demo.true_edges, 1.0))
    metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    off = tcl.evaluate.steer(demo.model, graph, None, 0, demo.tokens, metric)
    assert set(off.nodes) == {name for name in demo.true_nodes if name not in ("input", "logits")}
    assert off.after < 0.3 * off.before and off.high < 0 and off.loss_before is None
    assert not any(point.fwd_hooks for point in demo.model.hook_dict.values())


@pytest.mark.parametrize(
    ("nodes", "scale", "message"),
    [
        (["input"], 2, "isn't a head or MLP"),
        (["a9.h9"], 2, "isn't a head or MLP"),
        ("m0", 2, "put it in a list"),
        ([], 2, "`nodes` is empty"),
        (["m0"], float("nan"), "`scale` is nan"),
    ],
)
def test_bad_steering_is_refused(nodes, scale, message):
    model = architectures.hooked("gpt2")
    clean, _, _ = pair()
    with pytest.raises(InputError, match=message):
        tcl.evaluate.steer(model, baselines.random_edges(model), nodes, scale, clean, tcl.evaluate.next_token(clean))
