"""What `run` returns, which weights are read, what is refused, and that the model is left as it was found."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import architectures
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import adapt, position_ids
from tl_circuitlasso.models import adapter as adapters

ALL_KINDS = ("resid_pre", "resid_post", "z", "q", "k", "v", "pattern", "mlp_pre", "mlp_linear", "mlp_post", "mlp_out")
SCALES = ("attn", "mlp", "attn_out", "mlp_out", "q", "k")


def _everything(model: Any) -> list[str]:
    shape = adapt(model).shape
    kinds = [kind for kind in ALL_KINDS if not (kind.startswith("mlp") and shape.attn_only)]
    kinds = [kind for kind in kinds if shape.gated or kind != "mlp_linear"]
    kinds += [f"scale.{name}" for name in SCALES]
    return ["logits", "scale.final", *(f"{kind}.{layer}" for kind in kinds for layer in range(shape.n_layers))]


def _models() -> list[Any]:
    hooked = [pytest.param("hooked", family, id=f"hooked-{family}") for family in ("gpt2", "llama", "gemma2", "pythia")]
    bridged = [
        pytest.param("bridge", family, id=f"bridge-{family}") for family in ("gpt2", "llama", "gemma2", "pythia")
    ]
    return hooked + bridged


def _make(kind: str, family: str) -> Any:
    return architectures.hooked(family) if kind == "hooked" else architectures.bridge(family)


# -- what is returned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "family"), _models())
def test_shapes_are_the_same_for_every_model(kind: str, family: str) -> None:
    model = _make(kind, family)
    adapter, shape = adapt(model), adapt(model).shape
    tokens, mask = architectures.padded()
    batch, pos = tokens.shape
    acts = adapter.run(tokens, mask, _everything(model))
    head, group, width = shape.n_heads, shape.n_kv_heads, shape.d_head
    assert acts["logits"].shape == (batch, pos, shape.d_vocab_out)
    for layer in range(shape.n_layers):
        assert acts[f"z.{layer}"].shape == acts[f"q.{layer}"].shape == (batch, pos, head, width)
        assert acts[f"k.{layer}"].shape == acts[f"v.{layer}"].shape == (batch, pos, group, width)
        assert acts[f"pattern.{layer}"].shape == (batch, head, pos, pos)
        assert acts[f"mlp_pre.{layer}"].shape == acts[f"mlp_post.{layer}"].shape == (batch, pos, shape.d_mlp)
        assert acts[f"mlp_out.{layer}"].shape == acts[f"resid_pre.{layer}"].shape == (batch, pos, shape.d_model)
        assert acts[f"scale.attn.{layer}"].shape == acts[f"scale.mlp_out.{layer}"].shape == (batch, pos, 1)
    assert all(act.dtype == torch.float32 for act in acts.values())


@pytest.mark.parametrize(("kind", "family"), _models())
def test_activations_are_those_of_the_model(kind: str, family: str) -> None:
    model, tokens = _make(kind, family), architectures.prompts()
    acts = adapt(model).run(tokens, None, ["logits", "z.1", "mlp_out.0", "pattern.1", "resid_post.1"])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(acts["logits"], logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(acts["z.1"], cache["blocks.1.attn.hook_z"])
    torch.testing.assert_close(acts["mlp_out.0"], cache["blocks.0.hook_mlp_out"])
    torch.testing.assert_close(acts["pattern.1"], cache["blocks.1.attn.hook_pattern"])
    torch.testing.assert_close(acts["resid_post.1"], cache["blocks.1.hook_resid_post"])


@pytest.mark.parametrize(("kind", "family"), _models())
def test_padding_on_either_side_changes_nothing_at_real_tokens(kind: str, family: str) -> None:
    model = _make(kind, family)
    adapter, keys = adapt(model), _everything(model)
    keys = [key for key in keys if not key.startswith("pattern")]
    tokens, mask = architectures.padded()
    padded = adapter.run(tokens, mask, keys)
    for row in range(len(tokens)):
        real = mask[row]
        alone = adapter.run(tokens[row, real][None], None, keys)
        for key in keys:
            torch.testing.assert_close(padded[key][row, real], alone[key][0], atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize(("kind", "family"), _models())
def test_returned_references_are_not_overwritten_by_the_rest_of_the_pass(kind: str, family: str) -> None:
    model, tokens = _make(kind, family), architectures.prompts()
    adapter = adapt(model)
    keys = [key for key in _everything(model) if not key.startswith("scale")]
    together = adapter.run(tokens, None, keys)
    for key in keys:
        torch.testing.assert_close(together[key], adapter.run(tokens, None, [key])[key], msg=key)


def test_raw_hook_names_are_keys() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts()
    acts = adapt(model).run(tokens, None, ["blocks.0.hook_resid_mid", "hook_embed"])
    _, cache = model.run_with_cache(tokens)
    for name, value in acts.items():
        torch.testing.assert_close(value, cache[name])


def test_later_layers_are_not_run() -> None:
    model, tokens = architectures.hooked("gpt2", n_layers=3), architectures.prompts()
    ran: list[int] = []
    for layer, block in enumerate(model.blocks):
        block.hook_resid_pre.add_hook(lambda activation, hook, layer=layer: ran.append(layer))
    adapter = adapt(model)
    adapter.run(tokens, None, ["z.1", "blocks.0.hook_mlp_out"])
    assert ran == [0, 1]
    adapter.run(tokens, None, ["resid_post.2"], stop_at_layer=3)
    assert ran == [0, 1, 0, 1, 2]
    with pytest.raises(ModelError, match="did not fire"):
        adapter.run(tokens, None, ["z.1"], stop_at_layer=1)


@given(seed=st.integers(0, 1000), pads=st.integers(0, 4))
def test_positions_count_real_tokens(seed: int, pads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = 1 + int(torch.randint(1, 6, (1,), generator=generator))
    mask = torch.cat([torch.zeros(1, pads), torch.ones(1, length)], dim=1).bool()
    assert position_ids(mask)[mask].tolist() == list(range(length))


# -- weights -------------------------------------------------------------------------------------------------------


def test_folded_weights_are_kept_and_shared_heads_repeated() -> None:
    adapter = adapt(architectures.hooked("llama"))
    reader = adapter.reader(0, "k")
    assert reader.weight.shape == (4, 24, 6)
    assert torch.equal(reader.weight[0], reader.weight[1])
    assert not torch.equal(reader.weight[1], reader.weight[2])
    assert adapter.reader(0, "k") is reader


def test_of_folded_weights_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is never held a second time: what was used longest ago goes, and is folded again."""
    model = architectures.hooked("llama")
    like = adapt(model).reader(0, "k")
    monkeypatch.setattr(adapters, "CACHE_BYTES", 2 * sum(part.nbytes for part in (like.weight, like.bias)))
    adapter = adapt(model)
    first, second = adapter.reader(0, "q"), adapter.reader(0, "k")
    third = adapter.reader(1, "q")
    assert adapter.reader(1, "q") is third and adapter.reader(0, "k") is second
    again = adapter.reader(0, "q")
    assert again is not first and torch.equal(again.weight, first.weight)
    assert adapter.reader(0, "k") is second and adapter.reader(1, "q") is not third


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_some_columns_of_the_unembedding_are_those_of_the_whole(family: str) -> None:
    adapter, tokens = adapt(architectures.hooked(family)), torch.tensor([3, 0, 3])
    for some, whole in zip(adapter.unembed(tokens), adapter.unembed()):
        torch.testing.assert_close(some, whole[..., tokens])


@pytest.mark.parametrize("family", ["gpt2", "llama", "solu", "solu_ln"])
def test_the_derivative_of_the_activation_is_right(family: str) -> None:
    mlp = adapt(architectures.hooked(family)).mlp(0)
    generator = torch.Generator().manual_seed(0)
    pre, tangent = torch.randn(2, 3, 40, generator=generator)
    step = 1e-3
    slope = (mlp.act(pre + step * tangent) - mlp.act(pre - step * tangent)) / (2 * step)
    torch.testing.assert_close(mlp.act_jvp(pre, tangent), slope, atol=1e-3, rtol=1e-2)
    if mlp.elementwise:
        torch.testing.assert_close(mlp.act_grad(pre) * tangent, slope, atol=1e-3, rtol=1e-2)
    else:
        with pytest.raises(ModelError, match="act_jvp"):
            mlp.act_grad(pre)


def test_gated_bias_is_added_behind_the_product() -> None:
    adapter = adapt(architectures.hooked("llama"))
    assert adapter.mlp(0).b_post is not None
    assert bool((adapter.mlp(0).b_in == 0).all())


@pytest.mark.parametrize(("kind", "family"), _models())
def test_shape_is_read_right(kind: str, family: str) -> None:
    shape = adapt(_make(kind, family)).shape
    assert (shape.n_layers, shape.n_heads, shape.d_model, shape.d_mlp) == (2, 4, 24, 40)
    assert shape.n_kv_heads == (2 if family in ("llama", "gemma2") else 4)
    assert shape.gated == (family in ("llama", "gemma2"))
    assert shape.parallel == (family == "pythia")
    assert shape.causal and not shape.attn_only and not shape.moe


def test_soft_caps_and_attention_scale() -> None:
    gemma = adapt(architectures.hooked("gemma2"))
    assert (gemma.attn_soft_cap, gemma.logit_soft_cap) == (2.0, 3.0)
    plain = adapt(architectures.hooked("inverse_scale"))
    assert (plain.attn_soft_cap, plain.logit_soft_cap) == (None, None)
    assert plain.attn_scale(1) == pytest.approx(2 * 6**0.5)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_unknown_keys_name_near_matches() -> None:
    adapter, tokens = adapt(architectures.hooked("gpt2")), architectures.prompts()
    with pytest.raises(InputError, match=r"hook_resid_prex.*near matches: blocks.0.hook_resid_pre"):
        adapter.run(tokens, None, ["blocks.0.hook_resid_prex"])
    with pytest.raises(InputError, match="names no layer of this model; layers run from 0 to 1"):
        adapter.run(tokens, None, ["z.2"])
    with pytest.raises(InputError, match="not gated"):
        adapter.run(tokens, None, ["mlp_linear.0"])
    with pytest.raises(InputError, match="collection of keys"):
        adapter.run(tokens, None, "z.0")
    with pytest.raises(InputError, match="neither an activation"):
        adapter.run(tokens, None, ["blocks.0.attn"])


def test_switched_off_hooks_are_an_error_not_silence() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    with pytest.raises(ModelError, match=r"`blocks.0.attn.hook_result`.*did not fire"):
        adapter.run(architectures.prompts(), None, ["blocks.0.attn.hook_result"])


def test_attention_only_models_have_no_mlps() -> None:
    adapter = adapt(architectures.hooked("attn_only"))
    with pytest.raises(InputError, match="no MLPs"):
        adapter.run(architectures.prompts(), None, ["mlp_out.0"])
    with pytest.raises(ModelError, match="no MLPs"):
        adapter.mlp(0)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_neurons_of_mixtures_of_experts_are_refused(kind: str) -> None:
    adapter = adapt(architectures.hooked("moe") if kind == "hooked" else architectures.bridge("mixtral"))
    with pytest.raises(ModelError, match="mixtures of experts"):
        adapter.run(architectures.prompts(), None, ["mlp_post.0"])
    with pytest.raises(ModelError, match="mixture of experts"):
        adapter.mlp(0)


def test_padding_under_bidirectional_attention_is_refused() -> None:
    tokens, mask = architectures.padded()
    with pytest.raises(InputError, match="bidirectional"):
        adapt(architectures.hooked("bidirectional")).run(tokens, mask, ["z.0"])


def test_a_mask_of_another_shape_is_refused() -> None:
    tokens, mask = architectures.padded()
    with pytest.raises(InputError, match=r"`attention_mask` has shape \(3, 8\), tokens have \(3, 9\)"):
        adapt(architectures.hooked("gpt2")).run(tokens, mask[:, 1:], ["z.0"])


def test_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(ModelError, match="must be a HookedTransformer or a TransformerBridge"):
        adapt(nn.Linear(2, 2))


class HookedEncoder(nn.Module):
    """Stands for TransformerLens' class of this name."""


def test_encoders_are_refused() -> None:
    with pytest.raises(ModelError, match="encoders and encoder-decoders are not supported"):
        adapt(HookedEncoder())


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("T5", "T5Config", {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 31}),
        (
            "BertForMaskedLM",
            "BertConfig",
            {
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 40,
                "vocab_size": 31,
            },
        ),
        ("Mamba", "MambaConfig", {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 31, "state_size": 4}),
        (
            "DeepseekV2",
            "DeepseekV2Config",
            {
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 40,
                "vocab_size": 31,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 6,
                "v_head_dim": 6,
                "first_k_dense_replace": 2,
            },
        ),
    ],
)
def test_other_kinds_of_models_are_refused(family: str, config: str, settings: dict[str, Any]) -> None:
    model = architectures.other_bridge(config, settings)
    with pytest.raises(ModelError, match=r"not supported|only decoders|only text decoders"):
        adapt(model)


def test_weights_must_have_finite_values() -> None:
    model = architectures.hooked("gpt2")
    model.blocks[1].mlp.W_in.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite values in `blocks.1.mlp.W_in`"):
        adapt(model)
    model.blocks[1].mlp.W_in.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        adapt(model)


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ModelError, match="meta device"):
        adapt(architectures.hooked("gpt2").to("meta"))


def test_weights_that_wait_elsewhere_until_their_layer_runs_are_refused() -> None:
    model = architectures.hooked("gpt2")
    torch.nn.Module.to(model.blocks[1], "meta")  # what accelerate leaves of a layer that it has put aside
    model.hf_device_map = {"blocks.0": "cpu", "blocks.1": "disk"}
    with pytest.raises(ModelError, match=r"`blocks\.1\..*load it without `device_map`"):
        adapt(model)


# -- the model is left as it was found --------------------------------------------------------------------------------


def _state(model: Any) -> dict[str, Any]:
    """Everything `run` could leave behind."""
    modules = dict(model.named_modules())
    inner = model.__dict__.get("original_model")
    if inner is not None:
        modules |= {f"inner.{name}": module for name, module in inner.named_modules()}
    return {
        "training": {name: module.training for name, module in modules.items()},
        "torch hooks": {name: list(module._forward_hooks) for name, module in modules.items()},
        "lens hooks": {name: list(getattr(module, "fwd_hooks", [])) for name, module in modules.items()},
        "cfg": copy.deepcopy(vars(model.cfg)),
        "weights": {
            name: (weight.dtype, weight.device, weight.sum().item()) for name, weight in model.named_parameters()
        },
        "grad": torch.is_grad_enabled(),
    }


def _assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in before:
        assert after[name] == before[name], name


@pytest.mark.parametrize(("kind", "family"), _models())
def test_run_leaves_no_trace(kind: str, family: str) -> None:
    model, tokens = _make(kind, family), architectures.prompts()
    adapter = adapt(model)
    adapter.run(tokens, None, ["logits"])  # a bridge wires hooks of its own in its first forward pass
    calls: list[int] = []
    model.blocks[0].attn.hook_z.add_hook(lambda activation, hook: calls.append(1), is_permanent=True)
    model.train()
    model.blocks[0].ln1.eval()
    before = _state(model)
    adapter.run(tokens, None, _everything(model))
    _assert_unchanged(before, _state(model))
    assert calls == [1]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("kind", "family"), _models())
def test_interruptions_leave_no_trace(kind: str, family: str, interruption: type[BaseException]) -> None:
    model, tokens = _make(kind, family), architectures.prompts()
    adapter = adapt(model)
    adapter.run(tokens, None, ["logits"])

    def interrupt(activation: torch.Tensor, hook: Any) -> None:
        raise interruption

    model.blocks[1].hook_mlp_out.add_hook(interrupt)
    model.train()
    before = _state(model)
    with pytest.raises(interruption):
        adapter.run(tokens, None, _everything(model))
    _assert_unchanged(before, _state(model))


def test_dropout_is_off_while_running() -> None:
    model, tokens = architectures.bridge("gpt2"), architectures.prompts()
    quiet = adapt(model).run(tokens, None, ["logits"])["logits"]
    model.train()
    torch.testing.assert_close(adapt(model).run(tokens, None, ["logits"])["logits"], quiet)


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_costly_flags_are_off_while_nobody_listens(family: str) -> None:
    model, tokens = architectures.hooked(family), architectures.prompts()
    plain = adapt(model).run(tokens, None, _everything(model))
    for flag in FLAGS:
        setattr(model.cfg, flag, True)
    seen: list[bool] = []
    model.hook_embed.add_hook(lambda activation, hook: seen.append(any(getattr(model.cfg, flag) for flag in FLAGS)))
    acts = adapt(model).run(tokens, None, _everything(model))
    assert seen == [False]
    assert all(getattr(model.cfg, flag) for flag in FLAGS)
    for key, value in plain.items():
        torch.testing.assert_close(acts[key], value, msg=key)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_costly_flags_stay_on_for_those_who_listen(family: str) -> None:
    model, tokens = architectures.hooked(family), architectures.prompts()
    plain = adapt(model).run(tokens, None, _everything(model))
    for flag in FLAGS:
        setattr(model.cfg, flag, True)
    heard: list[tuple[int, ...]] = []
    model.blocks[0].hook_q_input.add_hook(lambda activation, hook: heard.append(tuple(activation.shape)))
    acts = adapt(model).run(tokens, None, [*_everything(model), "blocks.1.attn.hook_result"])
    assert heard == [(3, 9, 4, 24)]
    assert acts["blocks.1.attn.hook_result"].shape == (3, 9, 4, 24)
    for key, value in plain.items():
        torch.testing.assert_close(acts[key], value, msg=key)


def test_ungrouped_heads_are_grouped_again() -> None:
    model, tokens = architectures.hooked("llama"), architectures.prompts()
    grouped = adapt(model).run(tokens, None, ["k.0", "v.1"])
    model.set_ungroup_grouped_query_attention(True)
    ungrouped = adapt(model).run(tokens, None, ["k.0", "v.1"])
    for key, value in grouped.items():
        torch.testing.assert_close(ungrouped[key], value)


# -- text and identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_strings_are_padded_on_the_right_whatever_the_pad_token(kind: str) -> None:
    tokenizer = architectures.tokenizer()
    model = architectures.hooked("gpt2", tokenizer=tokenizer) if kind == "hooked" else architectures.bridge("gpt2")
    adapter = adapt(model)
    tokens, mask = adapter.to_tokens(["w3 w4 </s>", "w5"])
    assert adapter.special_ids() == (1, 2)
    assert tokens.tolist() == [[1, 3, 4, 2], [1, 5, 2, 2]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_strings_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        adapt(architectures.hooked("gpt2")).to_tokens(["w3"])


def test_hashes_tell_models_apart() -> None:
    one, same = adapt(architectures.hooked("gpt2")), adapt(architectures.hooked("gpt2", seed=5))
    other = adapt(architectures.hooked("gpt2", n_ctx=16))
    assert one.config_hash() == same.config_hash() != other.config_hash()
    assert one.weights_hash() == same.weights_hash()
    same.model.blocks[0].mlp.W_in.data += 1.0
    assert one.weights_hash() != adapt(same.model).weights_hash()


def test_repr_says_what_the_model_is() -> None:
    adapter = adapt(architectures.small())
    assert repr(adapter).startswith(f"Adapter({adapter.kind}, {adapter.architecture}, 2 layers x 4 heads, d_model 24")


def test_an_encoder_decoder_config_is_refused() -> None:
    model = architectures.hooked("gpt2")
    model.__dict__["original_model"] = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(ModelError, match="encoder-decoder"):
        adapt(model)


def test_the_config_hash_of_a_bridge_is_the_same_in_every_process() -> None:
    one, same = adapt(architectures.bridge("gpt2")), adapt(architectures.bridge("gpt2"))
    assert one.config_hash() == same.config_hash() != adapt(architectures.bridge("pythia")).config_hash()
