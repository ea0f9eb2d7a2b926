"""Layers run on from edited activations, against the whole model run on from them; and effects, against ablations."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae import training
from tl_circuitlasso import progress
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import adapt, feature_replay
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import CodePlan, encode_batch
from tl_circuitlasso.models.feature_effects import Segment, Trying, record, trials
from tl_circuitlasso.models.feature_layers import Layers, Rows
from tl_circuitlasso.models.feature_path import Path, known_paths
from tl_circuitlasso.models.feature_places import Step, place_of, steps_between
from tl_circuitlasso.models.feature_replay import _distinct, replay
from tl_circuitlasso.models.feature_sums import Effects
from tl_circuitlasso.models.hooks import resting
from tl_circuitlasso.models.tokens import Prompts

FEATURES = 7
TOKENS = torch.randint(0, 31, (6, 9), generator=torch.Generator().manual_seed(3))
EVERYWHERE = (
    "hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_post",
    "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
HOOKS = tuple(f"blocks.{layer}.{place}" for layer in (0, 1) for place in EVERYWHERE)
FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def encoder(adapter: Adapter, hook: str, *, share: float = 0.3) -> Encoder:
    x = adapter.run(TOKENS, None, [hook])[hook].flatten(0, 1).flatten(1)
    return Encoder(training.plain_sae(x, FEATURES, share=share, seed=len(hook)), hook, hook)


def every_row() -> Rows:
    prompts, positions = TOKENS.shape
    where = torch.arange(positions).expand(prompts, positions).clone()
    return Rows(torch.arange(prompts), where, torch.ones(prompts, positions, dtype=torch.bool))


def model_of(kind: str, family: str) -> Any:
    return architectures.hooked(family) if kind == "hooked" else architectures.bridge(family)


@pytest.mark.parametrize(
    ("kind", "family"),
    [("hooked", name) for name in ("gpt2", "llama", "no_norm", "pythia", "solu")]
    + [("bridge", name) for name in ("gpt2", "llama")],
)
def test_layers_run_on_as_the_model_does(kind: str, family: str) -> None:
    """Between all hooks that a layer lies between: with every position edited nothing is left out."""
    model = model_of(kind, family)
    adapter = adapt(model)
    silent = ("hook_resid_mid",) if adapter.shape.parallel or kind == "bridge" else ()
    hooks = [hook for hook in HOOKS if adapter.point(hook) is not None and not hook.endswith(silent or ("?",))]
    encoders = {hook: encoder(adapter, hook) for hook in hooks}
    every = [(hooks[a], hooks[b]) for a in range(len(hooks)) for b in range(a + 1, len(hooks))]
    pairs = [pair for pair in every if pair[0].startswith("blocks.0")][:: 1 if family in ("gpt2", "llama") else 3]
    paths, reasons = known_paths(adapter, encoders, pairs, next(iter(Prompts(adapter, TOKENS))))
    assert len(paths) > len(pairs) / 2 and all(
        "normalized" in a or "nothing leads" in reasons[a, b] for a, b in reasons
    )
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    for (first, last), path in paths.items():
        acts = adapter.run(TOKENS, None, path.wanted())
        x = acts[first]
        taken = 0.3 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        less = path.change(Layers(adapter, acts, mask), every_row(), taken.flatten(2), None)
        with resting(model):
            after = Segment(adapter, first, last).run(TOKENS, mask, x - taken)
        expected = acts[last] - after
        assert float(expected.norm()) > 0.01 * float(acts[last].norm())
        torch.testing.assert_close(less.reshape(expected.shape), expected, rtol=1e-3, atol=2e-4 * float(expected.std()))


def test_heads_bring_together_what_attention_does() -> None:
    adapter = adapt(architectures.hooked("llama"))
    layers = Layers(adapter, adapter.run(TOKENS, None, {"resid_pre.1", "pattern.1"}), torch.ones_like(TOKENS).bool())
    change = torch.randn(*TOKENS.shape, adapter.shape.d_model, generator=torch.Generator().manual_seed(0))
    whole = layers.heads_change(1, every_row(), change)
    parts = [layers.heads_change(1, every_row(), change, only=head) for head in range(adapter.shape.n_heads)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "a1 m1"),
        ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre", "m0"),
        ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", ""),
        ("blocks.0.hook_attn_out", "blocks.0.hook_resid_post", "m0"),
        ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "m0 a1"),
        ("blocks.0.attn.hook_z", "blocks.0.hook_attn_out", ""),
        ("blocks.0.hook_mlp_out", "blocks.1.ln2.hook_normalized", "a1"),
        ("hook_embed", "blocks.0.hook_mlp_out", "a0 m0"),
        ("blocks.0.mlp.hook_post", "blocks.1.hook_attn_out", "a1"),
    ],
)
def test_which_layers_stand_between(written: str, read: str, expected: str) -> None:
    steps = steps_between(adapt(architectures.hooked("llama")), written, read)
    assert " ".join(f"{step.kind[0]}{step.layer}" for step in steps) == expected


def test_in_parallel_layers_mlps_do_not_read_attention() -> None:
    adapter = adapt(architectures.hooked("pythia"))
    assert steps_between(adapter, "blocks.0.hook_attn_out", LAST) == (Step(1, "attn"), Step(1, "mlp"))
    assert steps_between(adapter, "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out") == (Step(1, "mlp"),)
    with pytest.raises(ModelError, match="nothing leads"):
        steps_between(adapter, "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out")


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_q", "ln_final.hook_scale", "blocks.0.attn.hook_pattern"])
def test_hooks_of_which_nothing_is_known_are_refused(hook: str) -> None:
    with pytest.raises(ModelError, match="isn't known"):
        place_of(hook)


def test_what_cannot_be_run_on_has_a_reason() -> None:
    adapter = adapt(architectures.hooked("moe"))
    encoders = {hook: encoder(adapter, hook) for hook in (FIRST, "blocks.1.hook_attn_out", LAST)}
    pairs = [(FIRST, LAST), (FIRST, "blocks.1.hook_attn_out")]
    _, reasons = known_paths(adapter, encoders, pairs, next(iter(Prompts(adapter, TOKENS))))
    assert "mixture of experts" in reasons[FIRST, LAST]


# ---- effects --------------------------------------------------------------------------------------------------------


def effects_of(adapter: Adapter, ends: dict[str, Encoder], copies: int = 1) -> Effects:
    first, last = ends
    prompts = Prompts(adapter, TOKENS)
    plan = CodePlan(ends, {}, False, {}, None, False, None, False)
    chunks = [encode_batch(adapter, plan, batch, number) for number, batch in enumerate(prompts)]
    kept = {hook: torch.arange(FEATURES) for hook in ends}
    path = Path.of(adapter, ends[first], ends[last])
    return replay(adapter, chunks, {(first, last): path}, kept, {(first, last): copies})[first, last]


def ablated(adapter: Adapter, ends: dict[str, Encoder], read: Any) -> Tensor:
    first, last = ends.values()
    recording = record(adapter, Prompts(adapter, TOKENS), [first.hook, last.hook])
    total, mass = torch.zeros(FEATURES, FEATURES).double(), torch.zeros(FEATURES).double()
    for batch in trials(recording, (first, last), torch.arange(FEATURES), how=Trying(read=read)):
        some = batch["ablate"]
        total.index_add_(0, some.source, some.code)
        mass.index_add_(0, some.source, some.mass)
    return total / mass[:, None]


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (FIRST, LAST),
        ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z"),
        ("blocks.0.hook_mlp_out", "blocks.1.ln2.hook_normalized"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_effects_are_those_of_ablation(family: str, first: str, last: str) -> None:
    """Behind one attention nothing is left out, so they are equal; children that are turned on are in both."""
    adapter = adapt(architectures.hooked(family))
    ends = {hook: encoder(adapter, hook) for hook in (first, last)}
    found, expected = effects_of(adapter, ends).dense(torch.arange(FEATURES)), ablated(adapter, ends, "firing")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.min()) < -0.01 and float(expected.max()) > 0.01


def test_effects_elsewhere_are_those_of_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_replay, "ELSEWHERE", TOKENS.shape[1])
    adapter = adapt(architectures.hooked("llama"))
    ends = {hook: encoder(adapter, hook) for hook in (FIRST, LAST)}
    own, brought = effects_of(adapter, ends, copies=2).dense(torch.arange(FEATURES)).split(FEATURES)
    torch.testing.assert_close(own, ablated(adapter, ends, "firing"), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(brought, ablated(adapter, ends, "elsewhere"), rtol=1e-3, atol=1e-5)
    assert float(brought.abs().max()) > 1e-3


def test_some_positions_stand_for_all_others() -> None:
    able = torch.ones(1, 40, dtype=torch.bool)
    taken, weight = feature_replay._elsewhere(torch.zeros_like(able), able)
    assert int(taken.sum()) == feature_replay.ELSEWHERE and float(weight) * int(taken.sum()) == 40


def test_few_prompts_tell_of_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_replay, "GROUPS", 2)
    adapter = adapt(architectures.hooked("llama"))
    found = effects_of(adapter, {hook: encoder(adapter, hook) for hook in (FIRST, LAST)})
    assert found.groups.tolist() == [2] * FEATURES and bool(found.error.isfinite().all())
    monkeypatch.setattr(feature_replay, "GROUPS", 1)
    alone = effects_of(adapter, {hook: encoder(adapter, hook) for hook in (FIRST, LAST)})
    assert bool(alone.error.isinf().all())  # one prompt alone can't tell how sure it is


def test_an_sae_that_scales_back_is_taken_out_as_it_decodes() -> None:
    """What a feature writes isn't its decoder row there."""

    class Normed(training.PlainSAE):
        def encode(self, x: Tensor) -> Tensor:
            object.__setattr__(self, "size", x.norm(dim=-1, keepdim=True))
            return super().encode(x / self.size * 8)

        def decode(self, codes: Tensor) -> Tensor:
            return super().decode(codes) * self.size / 8

    adapter = adapt(architectures.hooked("llama"))
    plain = {hook: encoder(adapter, hook) for hook in (FIRST, LAST)}
    sae = plain[FIRST].sae
    ends = {FIRST: Encoder(Normed(sae.W_enc, sae.W_dec, sae.bias), FIRST, FIRST), LAST: plain[LAST]}
    found, expected = effects_of(adapter, ends).dense(torch.arange(FEATURES)), ablated(adapter, ends, "firing")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_prompts_that_are_chosen_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    demo = tcl.load_demo(prompts=48)
    saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    capsys.readouterr()
    tcl.circuit_lasso(demo.model, demo.tokens, basis=tcl.SAEFeatures(saes))
    assert "choose prompts: 1 chunk" in capsys.readouterr().err


def test_pairs_are_each_told_once() -> None:
    feature, prompt = torch.tensor([3, 0, 3, 3, 0]), torch.tensor([7, 1, 7, 2, 0])
    assert _distinct(feature, prompt).tolist() == [[0, 0, 3, 3], [0, 1, 2, 7]]
    assert _distinct(feature[:0], prompt[:0]).shape == (2, 0)
