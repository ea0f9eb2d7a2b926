"""RelP of edges: against detach tricks in TransformerLens and autograd, and conservation of relevance."""

import pytest
import torch

from tests import architectures
from tests.helpers import to_matrix
from tests.neurons.test_relp import bias_free, last_difference, last_logit
from tl_circuitlasso import baselines
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt


def pair(batch=3, length=6):
    return (architectures.prompts(length=length, batch=batch, seed=seed) for seed in (0, 9))


class Held:
    """RelP as hooks of TransformerLens; keeps what every reader reads, each head for itself, and every output."""

    def __init__(self, model, frozen):
        self.model, self.frozen, self.seen = model, frozen, {}

    def keep(self, act, hook):
        self.seen[hook.name] = act

    def alone(self, act, hook):
        self.seen[hook.name] = act.clone()
        return self.seen[hook.name]

    def post(self, act, hook):
        layer = int(hook.name.split(".")[1])
        mlp, pre = self.model.blocks[layer].mlp, self.seen[f"blocks.{layer}.mlp.hook_pre"]
        active = pre * (mlp.act_fn(pre) / pre).detach()
        if not self.model.cfg.gated_mlp:
            return active
        product = active * self.seen[f"blocks.{layer}.mlp.hook_pre_linear"]
        return product / 2 + (product / 2).detach() + mlp.b_in

    def hooks(self):
        for name in self.model.hook_dict:
            kind = name.split(".")[-1]
            if kind == "hook_scale" or (kind == "hook_pattern" and self.frozen):
                yield name, lambda act, hook: act.detach()
            elif kind in ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"):
                yield name, self.alone
            elif kind == "hook_post":
                yield name, self.post
            elif kind in ("hook_pre", "hook_pre_linear", "hook_result", "hook_mlp_out", "hook_resid_post") or (
                name == "blocks.0.hook_resid_pre"
            ):
                yield name, self.keep

    def run(self, tokens):
        with self.model.hooks(list(self.hooks())):
            return self.model(tokens)

    def sources(self):
        parts = [self.seen["blocks.0.hook_resid_pre"][:, :, None]]
        for layer in range(self.model.cfg.n_layers):
            parts += [
                self.seen[f"blocks.{layer}.attn.hook_result"],
                self.seen[f"blocks.{layer}.hook_mlp_out"][:, :, None],
            ]
        return torch.cat(parts, dim=2).detach()


def split(model, on):
    for flag in ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "ungroup_grouped_query_attention"):
        getattr(model, f"set_{flag}")(on)


def by_hooks(model, clean, corrupted, frozen):
    """The matrix of scores: <clean - corrupted source, modified gradient at the reader>, summed, over prompts' mean."""
    split(model, True)
    other = Held(model, frozen)
    other.run(corrupted)
    own = Held(model, frozen)
    value = last_difference(own.run(clean), None)
    last = model.cfg.n_layers - 1
    readers = []
    for layer in range(model.cfg.n_layers):
        readers += [f"blocks.{layer}.hook_{port}_input" for port in "qkv"] + [f"blocks.{layer}.hook_mlp_in"]
    readers.append(f"blocks.{last}.hook_resid_post")
    found = torch.autograd.grad(value, [own.seen[name] for name in readers], allow_unused=True)
    grads = [torch.zeros_like(own.seen[name]) if part is None else part for name, part in zip(readers, found)]
    wide = torch.cat([part if part.ndim == 4 else part[:, :, None] for part in grads], dim=2)
    split(model, False)
    return torch.einsum("bpsd,bprd->sr", own.sources() - other.sources(), wide) / len(clean)


@pytest.mark.parametrize("attention", ["frozen", "moving"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia"])
def test_edges_are_what_detach_tricks_and_autograd_give(family, attention):
    model = architectures.hooked(family, dtype=torch.float64)
    clean, corrupted = pair()
    expected = by_hooks(model, clean, corrupted, attention == "frozen")
    graph = baselines.relp(model, clean, corrupted, last_difference, basis="component", attention=attention)
    found = to_matrix(graph, adapt(model).shape)
    expected = torch.where(baselines.edges.EdgeLayout(adapt(model).shape).mask(), expected, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    into_q = found[:, : model.cfg.n_heads]
    assert bool(into_q.any()) == (attention == "moving")
    assert graph.provenance["forward_passes"] == 2 and graph.provenance["backward_passes"] == 1
    split = baselines.METHODS["relp"](model, clean, corrupted, last_difference, attention=attention, batch_size=2)
    torch.testing.assert_close(split.score, graph.score)
    assert not torch.allclose(graph.score, baselines.eap(model, clean, corrupted, last_difference).score, rtol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gptj", "solu_ln"])
def test_relevance_of_edges_is_conserved(family):
    """Against zero and without biases, as much flows out of the input, into and out of each node, as the logit has."""
    changes = {"output_logits_soft_cap": -1.0} if family == "gemma2" else {}
    model, (tokens, _) = bias_free(family, **changes), pair()
    graph = baselines.METHODS["relp"](model, tokens, None, last_logit, ablation="zero", input_node="resid")
    logit = float(last_logit(model(tokens), None).detach()) / len(tokens)
    into, out = ({name: sum(signed(graph, end, name)) for name in graph.index.names} for end in ("target", "source"))
    assert into["logits"] == pytest.approx(logit, rel=1e-6) and out["input"] == pytest.approx(logit, rel=1e-6)
    for name in graph.index.names:
        if name not in ("input", "logits"):
            assert into[name] == pytest.approx(out[name], rel=1e-6, abs=1e-9), name


def signed(graph, end, name):
    place = graph.index.position(name)
    return graph.score[getattr(graph, end) == place].tolist()


def test_references_are_the_ablations():
    model = architectures.hooked("llama")
    clean, corrupted = pair()
    for reference, ablation in (("corrupted", "patch"), ("mean", "mean"), ("zero", "zero")):
        found = baselines.relp(model, clean, corrupted, last_difference, basis="component", reference=reference)
        assert found.provenance["ablation"] == ablation and found.provenance["mean_over"] == "corrupted"
    assert baselines.relp(model, clean, None, last_difference, basis="component").provenance["ablation"] == "zero"


def test_what_it_cannot_do_is_refused():
    clean, corrupted = pair()
    with pytest.raises(InputError, match="`attention`"):
        baselines.METHODS["relp"](architectures.hooked("llama"), clean, corrupted, last_difference, attention="none")
    with pytest.raises(ModelError, match="experts"):
        baselines.METHODS["relp"](architectures.hooked("moe"), clean, corrupted, last_difference)
