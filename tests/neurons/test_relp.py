"""RelP and its relatives: conservation, and oracles that share no code with the sweep."""

from functools import partial

import pytest
import torch

from tests import architectures
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.neuron_scores import Batch, ByGradient, BySweep, Scoring, products, scores
from tl_circuitlasso.models.neuron_sweep import RELP, SECANT, Ends, Rules, sweep, unembedded, wanted
from tl_circuitlasso.models.rotary import position_ids


def last_logit(logits, rows):
    return logits[:, -1, 3].sum()


def last_difference(logits, rows):
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def goal(logits, batch):
    return last_difference(logits, batch.rows)


def bias_free(family, **changes):
    """A model without any bias: what relevance is conserved in."""
    model = architectures.hooked(family, dtype=torch.float64, **changes)
    for name, weight in model.named_parameters():
        if name.split(".")[-1].lstrip("_").startswith("b"):
            weight.data.zero_()
    return model


def embedding_relevance(model, tokens, rules):
    """sum over positions of (d logit / d embedding) . embedding, by our sweep."""
    adapter = adapt(model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    acts = adapter.run(tokens, mask, {"logits", "resid_pre.0", *wanted(adapter, rules)})
    at_logits = torch.zeros_like(acts["logits"])
    at_logits[:, -1, 3] = 1
    ends = Ends(adapter, acts, acts, mask, position_ids(mask))
    *_, first = sweep(ends, unembedded(adapter, acts["logits"], acts["logits"], at_logits), rules)
    return (first.front[:, 0] * acts["resid_pre.0"]).sum((1, 2)), acts["logits"][:, -1, 3]


def test_relevance_is_conserved_only_if_all_rules_hold():
    model, tokens = bias_free("llama"), architectures.prompts(length=6)
    found, logit = embedding_relevance(model, tokens, RELP)
    assert torch.allclose(found, logit, atol=1e-5)
    for rule in ("norm", "attention", "activation", "half"):
        broken, _ = embedding_relevance(model, tokens, Rules(**{**vars(RELP), rule: False}))
        assert (broken - logit).abs().max() > 1e-3, rule


def explicit_relp(model, tokens):
    """A Llama written out in torch with RelP's detach tricks, and autograd: activation x gradient of every neuron."""
    posts, x = [], model.embed(tokens)

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt().detach() * module.w

    for block in model.blocks:
        pattern = block.attn.hook_pattern.kept
        v = torch.einsum("bpd,hde->bphe", norm(x, block.ln1), block.attn.W_V) + block.attn.b_V
        z = torch.einsum("bhqk,bkhe->bqhe", pattern.detach(), v)
        x = x + torch.einsum("bqhe,hed->bqd", z, block.attn.W_O) + block.attn.b_O
        y = norm(x, block.ln2)
        pre, linear = y @ block.mlp.W_gate, y @ block.mlp.W_in
        product = pre * torch.sigmoid(pre).detach() * linear
        post = product / 2 + (product / 2).detach() + block.mlp.b_in
        posts.append(post)
        x = x + post @ block.mlp.W_out + block.mlp.b_out
    logits = norm(x, model.ln_final) @ model.unembed.W_U + model.unembed.b_U
    grads = torch.autograd.grad(last_difference(logits, None), posts)
    return logits, [post.detach() * grad for post, grad in zip(posts, grads)]


def test_relp_is_what_detach_tricks_and_autograd_give():
    model, tokens = architectures.hooked("llama", dtype=torch.float64), architectures.prompts(length=6)
    for block in model.blocks:
        point = block.attn.hook_pattern
        point.add_hook(lambda act, hook, point=point: setattr(point, "kept", act.detach()))
    expected_logits = model(tokens)
    logits, expected = explicit_relp(model, tokens)
    model.reset_hooks()
    assert torch.allclose(logits, expected_logits)
    graph = baselines.relp(model, tokens, None, last_difference, max_nodes=None)
    assert torch.allclose(graph.score, torch.cat([part.mean(0).sum(0) for part in expected]), atol=1e-12)
    assert graph.provenance["reference"] == "zero" and graph.index.names[0] == "m0#0"


def test_whole_products_are_the_gradient_where_norms_and_patterns_rest():
    """Between the two kinds of products lies a factor of two for a neuron read by one gated MLP alone."""
    model, tokens = architectures.hooked("llama", dtype=torch.float64), architectures.prompts(length=6)
    half, whole = (
        baselines.relp(model, tokens, None, last_difference, products=products, max_nodes=None)
        for products in ("half", "whole")
    )
    assert torch.allclose(half.score[40:], whole.score[40:])  # nothing gated is behind the last layer
    assert (half.score[:40] - whole.score[:40]).abs().max() > 1e-3


FAMILIES = ("gpt2", "pythia", "gptj", "gemma2", "qwen3", "olmo2", "mistral", "no_norm", "folded", "solu_ln", "alibi")


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_conserved_in_every_architecture(family):
    """Gated and plain MLPs, shared keys, parallel layers, norms behind attention and MLP, any way to tell positions."""
    changes = {"output_logits_soft_cap": -1.0} if family == "gemma2" else {}
    model, tokens = bias_free(family, **changes), architectures.prompts(length=5)
    found, logit = embedding_relevance(model, tokens, RELP)
    assert torch.allclose(found, logit, atol=1e-9)


def test_every_basis_has_its_nodes():
    model, tokens = architectures.hooked("llama"), architectures.prompts(length=5)
    for basis, width in {"neuron": 40, "mlp_out": 24, "head": 4, "residual": 24}.items():
        for reference in ("corrupted", "mean", "zero"):
            graph = baselines.relp(
                model, tokens, tokens.flip(0), last_difference, basis=basis, reference=reference, max_nodes=None
            )
            assert len(graph) == 2 * width and bool((graph.score != 0).any())


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia", "gptj", "no_norm", "folded", "solu", "bidirectional"])
def test_without_rules_and_in_one_run_the_sweep_is_the_gradient(family):
    model, tokens = architectures.hooked(family, dtype=torch.float64), architectures.prompts(length=6)
    adapter, mask = adapt(model), torch.ones_like(tokens, dtype=torch.bool)
    for basis in ("neuron", "mlp_out", "head", "residual"):
        swept, derived = (by(adapter, tokens, mask, basis, way) for way in (BySweep(SECANT, True), ByGradient()))
        for key in derived:
            assert torch.allclose(swept[key], derived[key], atol=1e-8, rtol=1e-6), (basis, key)


def by(adapter, tokens, mask, basis, way):
    batch = Batch(tokens, None, mask, torch.arange(len(tokens)))
    return scores(Scoring(adapter, goal, basis, "zero"), lambda: iter([batch]), len(tokens), way)


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia", "no_norm"])
def test_secants_between_two_runs_add_up_to_the_difference(family):
    model = architectures.hooked(family, dtype=torch.float64)
    clean, other = architectures.prompts(length=6), architectures.prompts(length=6, seed=5)
    adapter, mask = adapt(model), torch.ones_like(clean, dtype=torch.bool)
    batch = Batch(clean, other, mask, torch.arange(len(clean)))
    scoring = Scoring(adapter, goal, "residual", "corrupted")
    found = {
        key: product.sum()
        for _, key, product in products(scoring, lambda: iter([batch]), len(clean), BySweep(SECANT, False))
    }
    difference = last_difference(model(clean), None) - last_difference(model(other), None)
    assert torch.allclose(found["resid_pre.1"], difference, atol=1e-6)
    assert torch.allclose(found["resid_pre.0"], difference, atol=1e-6)


def test_integrated_gradients_average_over_the_inputs():
    model = architectures.hooked("llama", dtype=torch.float64)
    clean, other = architectures.prompts(length=6), architectures.prompts(length=6, seed=5)
    clean_embedding, other_embedding = model.embed(clean), model.embed(other)
    total = 0
    for k in range(3):
        posts, start = [], (other_embedding + k / 3 * (clean_embedding - other_embedding)).detach().requires_grad_()
        keep = partial(lambda posts, act, hook: posts.append(act), posts)
        hooks = [
            ("hook_embed", lambda act, hook, start=start: start),
            *((f"blocks.{i}.mlp.hook_post", keep) for i in (0, 1)),
        ]
        with model.hooks(fwd_hooks=hooks):
            grads = torch.autograd.grad(last_difference(model(clean), None), posts)
        total = total + torch.stack(grads) / 3
    posts = [
        torch.stack([model.run_with_cache(tokens)[1][f"blocks.{i}.mlp.hook_post"] for i in (0, 1)])
        for tokens in (clean, other)
    ]
    expected = ((posts[0] - posts[1]) * total).mean(1).sum(1).flatten()
    graph = baselines.integrated_gradients(model, clean, other, last_difference, steps=3, max_nodes=None)
    assert torch.allclose(graph.score, expected, atol=1e-12)


def test_pads_and_batches_change_nothing():
    model = architectures.hooked("llama", dtype=torch.float64)
    clean, other = architectures.prompts(length=6), architectures.prompts(length=6, seed=5)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, :2] = False
    longer = [torch.cat([torch.full((3, 2), 2), tokens], 1) for tokens in (clean, other)]
    for method in (baselines.relp, baselines.gradient_activation, baselines.integrated_gradients):
        for reference in ("corrupted", "mean", "zero"):
            plain = method(model, clean, other, last_difference, reference=reference)
            padded = method(model, *longer, last_difference, reference=reference, attention_mask=mask, batch_size=2)
            assert torch.allclose(plain.score, padded.score, rtol=1e-9, atol=1e-12), (method, reference)


def test_a_reference_is_taken_off():
    model, clean = architectures.hooked("gpt2", dtype=torch.float64), architectures.prompts(length=6)
    same = baselines.relp(model, clean, clean, last_difference)
    assert float(same.score.abs().max()) == 0.0
    one = baselines.relp(model, clean[:1], None, last_difference, reference="mean")
    assert float(one.score.abs().max()) < 1e-12


def test_scores_come_apart_by_position_whatever_the_padding():
    model, clean = architectures.hooked("llama"), architectures.prompts(length=6)
    pads = torch.full((len(clean), 2), 2)
    longer, mask = torch.cat([pads, clean], 1), torch.cat([pads == 0, clean >= 0], 1)
    for score in (baselines.relp, baselines.gradient_activation, baselines.integrated_gradients):
        for basis in ("neuron", "head"):
            graph = score(model, clean, None, last_difference, basis=basis, by_position=True, max_nodes=5)
            parts = [graph.node_info[graph.index.names[node]]["by_position"] for node in graph.source.tolist()]
            sums = torch.tensor([sum(own.values()) for own in parts], dtype=torch.float64)
            assert torch.allclose(sums, graph.score, rtol=1e-6) and max(map(len, parts)) > 1
            if score is not baselines.integrated_gradients:  # its line starts at embeddings of pads, too
                options = {"basis": basis, "by_position": True, "max_nodes": 5, "attention_mask": mask}
                padded = score(model, longer, None, last_difference, **options)
                again = padded.node_info[graph.index.names[0]]["by_position"]
                assert again == pytest.approx(parts[0], rel=1e-3, abs=1e-6)
    with pytest.raises(InputError, match="by_position"):
        baselines.relp(model, clean, None, last_difference, basis="component", by_position=True)


def test_only_the_largest_nodes_are_kept_in_the_graph():
    model, clean = architectures.hooked("gpt2"), architectures.prompts(length=6)
    whole = baselines.relp(model, clean, None, last_difference, max_nodes=None)
    graph = baselines.relp(model, clean, None, last_difference, max_nodes=7)
    assert len(graph) == 7 and graph.provenance["nodes_scored"] == 80
    assert torch.allclose(graph.score.abs().sort().values, whole.score.abs().sort().values[-7:])


def test_bad_input_is_named():
    model, clean = architectures.hooked("gpt2"), architectures.prompts(length=6)
    bad = (
        ({"basis": "neurons"}, "basis"),
        ({"reference": "median"}, "reference"),
        ({"reference": "corrupted"}, "corrupted"),
        ({"attention": "melted"}, "attention"),
        ({"products": "double"}, "products"),
        ({"max_nodes": 0}, "max_nodes"),
    )
    for options, name in bad:
        with pytest.raises(InputError, match=name):
            baselines.relp(model, clean, None, last_difference, **options)
    with pytest.raises(InputError, match="steps"):
        baselines.integrated_gradients(model, clean, None, last_difference, steps=0)
    with pytest.raises(InputError, match="metric"):
        baselines.relp(model, clean, None, lambda logits, rows: logits)
    with pytest.raises(ModelError, match="no MLPs"):
        baselines.relp(architectures.hooked("attn_only"), clean, None, last_difference)
    with pytest.raises(ModelError, match="experts"):
        baselines.relp(architectures.hooked("moe"), clean, None, last_difference)
