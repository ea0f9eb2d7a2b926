"""How the baselines behave in a user's hands: padding, strings, bad input, and a model left as it was."""

import typing
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import architectures
from tests.helpers import to_matrix
from tl_circuitlasso import baselines
from tl_circuitlasso.baselines import edges, gradient
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import adapt

METRIC_METHODS = (
    baselines.eap,
    baselines.eap_ig,
    baselines.clean_corrupted,
    baselines.eap_ig_activations,
    baselines.exact,
)


def last_difference(logits, rows):
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def pair(length=7, batch=3):
    return architectures.prompts(length=length, batch=batch), architectures.prompts(length=length, batch=batch, seed=9)


@pytest.mark.parametrize("method", METRIC_METHODS, ids=lambda method: method.__name__)
def test_left_padding_changes_nothing(method):
    model = architectures.hooked("llama", dtype=torch.float64)
    clean, corrupted = pair()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, :2] = False
    pads = torch.full((3, 2), 2)
    plain = method(model, clean, corrupted, last_difference, steps=2)
    longer = (torch.cat([pads, tokens], 1) for tokens in (clean, corrupted))
    padded = method(model, *longer, last_difference, steps=2, attention_mask=mask)
    assert torch.allclose(plain.score, padded.score, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [baselines.information_flow_routes, baselines.correlation])
def test_watching_methods_leave_pads_out(method):
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, _ = pair()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, -2:] = False
    padded = method(model, torch.cat([clean, torch.full((3, 2), 2)], 1), attention_mask=mask)
    assert torch.allclose(method(model, clean).score, padded.score, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = architectures.hooked("llama")
    model.train()
    model.blocks[0].attn.hook_q.add_perma_hook(lambda act, hook: None)
    before = dict(vars(model.cfg))
    for method in METRIC_METHODS:
        method(model, *pair(batch=1), last_difference, steps=1)
    baselines.node_scores(model, *pair(), last_difference)
    assert vars(model.cfg) == before and model.training and model.blocks[1].training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    points = {name for name, point in model.hook_dict.items() if point.fwd_hooks or point._forward_hooks}
    assert points == {"blocks.0.attn.hook_q"}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_when_the_metric_fails():
    model = architectures.hooked("llama")

    def fails(logits, rows):
        raise KeyboardInterrupt

    for method in METRIC_METHODS:
        with pytest.raises(KeyboardInterrupt):
            method(model, *pair(), fails)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.cfg.ungroup_grouped_query_attention
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


def test_no_tensor_holds_all_nodes_of_a_batch(monkeypatch):
    model = architectures.hooked("gpt2", n_layers=6)
    clean, corrupted = pair(length=16, batch=24)
    monkeypatch.setattr(edges, "WORKSPACE", 1 << 18)
    with Largest() as largest:
        baselines.eap(model, clean, corrupted, last_difference)
    layout = edges.EdgeLayout(adapt(model).shape)
    assert largest.numel < clean.numel() * layout.n_sources * model.cfg.d_model / 4


def test_rows_tell_the_metric_which_prompts_it_sees():
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, corrupted = pair(batch=5)
    wanted = torch.tensor([3, 4, 5, 6, 7])

    def metric(logits, rows):
        return logits[:, -1].gather(1, wanted[rows][:, None]).sum()

    graphs = [baselines.eap(model, clean, corrupted, metric, batch_size=size) for size in (2, 5)]
    assert torch.allclose(graphs[0].score, graphs[1].score, rtol=1e-9, atol=1e-12)


def test_strings_are_tokenised():
    model = architectures.hooked("gpt2", tokenizer=architectures.tokenizer())
    clean, corrupted = ["w3 w4 w5", "w6 w7 w8"], ["w9 w4 w5", "w6 w10 w8"]
    tokens = [torch.cat([model.to_tokens(prompt) for prompt in prompts]) for prompts in (clean, corrupted)]
    strings = baselines.eap(model, clean, corrupted, last_difference)
    assert torch.equal(strings.score, baselines.eap(model, *tokens, last_difference).score)


def test_input_node_matters_only_when_nothing_is_put_in_its_place():
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, corrupted = pair()
    shape = adapt(model).shape

    def scores(**options):
        return to_matrix(baselines.eap_ig(model, clean, corrupted, last_difference, **options), shape)

    assert torch.allclose(scores(input_node="resid"), scores(input_node="embed"), rtol=1e-12)
    resid, embed = (scores(ablation="zero", input_node=node) for node in ("resid", "embed"))
    assert (resid[0] - embed[0]).abs().max() > 1e-3


def test_correlation_is_the_rv_coefficient():
    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, _ = pair(batch=12)
    graph = baselines.correlation(model, clean, batch_size=5)
    _, cache = model.run_with_cache(clean)
    first = (cache["blocks.0.attn.hook_z"][:, :, 1] @ model.blocks[0].attn.W_O[1]).flatten(0, 1).detach()
    second = cache["blocks.1.hook_mlp_out"].flatten(0, 1).detach()
    u, v = (part - part.mean(0) for part in (first, second))
    expected = (u.T @ v).square().sum() / ((u.T @ u).norm() * (v.T @ v).norm())
    assert graph.pair_scores()["a0.h1", "m1"] == pytest.approx(float(expected), rel=1e-9)
    assert float(graph.score.min()) >= 0 and float(graph.score.max()) <= 1 + 1e-12


def test_random_edges_repeat_by_seed():
    model = architectures.hooked("gpt2")
    first, again, other = (baselines.random_edges(model, seed=seed).score for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.3 < np.mean(first.numpy()) < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.zeros(2, 5)}, "`clean` are torch.float32"),
        ({"clean": torch.zeros(0, 5, dtype=torch.long)}, "`clean` has shape"),
        ({"clean": torch.full((3, 7), 99)}, "`clean` run from 99 to 99"),
        ({"clean": []}, "`clean` is empty"),
        (
            {"corrupted": architectures.prompts(length=8)},
            "`corrupted`: prompt 0 has 8 tokens, its partner in `clean` 7",
        ),
        ({"corrupted": None}, "`corrupted` is missing"),
        ({"attention_mask": torch.ones(3, 6)}, "`attention_mask` has shape"),
        ({"attention_mask": torch.zeros(3, 7)}, "`attention_mask`: all positions of prompt 0 are masked"),
        ({"ablation": "noise"}, "`ablation`"),
        ({"input_node": "tokens"}, "`input_node`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"metric": lambda logits, rows: logits[:, -1, 0]}, "`metric` returned"),
        ({"metric": lambda logits, rows: 1.0}, "`metric` doesn't depend"),
        ({"metric": lambda logits, rows: "1"}, "`metric` returned a str"),
        ({"metric": lambda logits, rows: logits.detach().sum()}, "`metric` doesn't depend"),
        ({"metric": lambda logits, rows: (logits * torch.nan).sum()}, "`metric` returned NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(changes, message):
    clean, corrupted = pair()
    arguments = {"clean": clean, "corrupted": corrupted, "metric": last_difference} | changes
    with pytest.raises(InputError) as caught:
        baselines.eap(architectures.hooked("gpt2"), **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, True])
def test_bad_steps_are_named(steps):
    with pytest.raises(InputError, match="`steps`"):
        baselines.eap_ig(architectures.hooked("gpt2"), *pair(), last_difference, steps=steps)


def test_attached_saes_are_warned_of():
    """Their error terms carry no derivative: scores through them aren't the model's."""

    class WithSAEs(torch.nn.Module):
        acts_to_saes: typing.ClassVar = {"blocks.0.hook_resid_post": object()}

    with pytest.warns(UserWarning, match=r"blocks\.0\.hook_resid_post.*reset_saes"):
        gradient.warn_of_attached_saes(WithSAEs())
    model = architectures.hooked("gpt2")
    clean, corrupted = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        baselines.eap(model, clean, corrupted, last_difference)
    model.acts_to_saes = WithSAEs.acts_to_saes
    with pytest.warns(UserWarning, match="aren't the model's"):
        baselines.eap(model, clean, corrupted, last_difference)
