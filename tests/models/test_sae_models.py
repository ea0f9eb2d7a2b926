"""Models that carry SAEs are read like any other, with SAEs attached or not."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import adapt, closure_check

sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")

HOOKS = ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre")


def _hooked() -> Any:
    plain = architectures.hooked("gpt2")
    model = sae_lens.HookedSAETransformer(plain.cfg)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def _bridged() -> Any:
    if not hasattr(sae_lens, "SAETransformerBridge"):
        pytest.skip("this sae_lens has no SAETransformerBridge")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = architectures.bridge("gpt2")
    with torch.no_grad():
        bridge = SAETransformerBridge.boot_transformers(
            "local", hf_model=architectures.hugging_face("gpt2"), tokenizer=model.tokenizer, device="cpu"
        )
    return bridge.eval()


def _sae(hook: str) -> Any:
    cfg = sae_lens.StandardSAEConfig(d_in=24, d_sae=48, dtype="float32", device="cpu", apply_b_dec_to_input=False)
    cfg.metadata.hook_name = hook
    sae = sae_lens.StandardSAE(cfg)
    generator = torch.Generator().manual_seed(2)
    for weight in sae.parameters():
        weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return sae


@pytest.mark.parametrize("make", [_hooked, _bridged])
def test_models_with_sae_support_close(make: Any) -> None:
    tokens, mask = architectures.padded()
    assert closure_check(adapt(make()), tokens, mask) < 5e-6


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [_hooked, _bridged])
def test_with_an_attached_sae_its_output_is_what_flows_on(make: Any, hook: str) -> None:
    model, tokens = make(), architectures.prompts()
    model.add_sae(_sae(hook), use_error_term=False)
    adapter = adapt(model)
    acts = adapter.run(tokens, None, ["resid_pre.1", "mlp_out.0", hook, "z.1"])
    key = {"blocks.0.hook_mlp_out": "mlp_out.0", "blocks.1.hook_resid_pre": "resid_pre.1"}[hook]
    torch.testing.assert_close(acts[hook], acts[key])
    _, cache = model.run_with_cache(tokens)
    (recons,) = [value for name, value in cache.items() if name.endswith("hook_sae_output")]
    torch.testing.assert_close(acts[key], recons)
    torch.testing.assert_close(acts["z.1"], _z(cache))


def _z(cache: Any) -> torch.Tensor:
    return cache["blocks.1.attn.hook_z"] if "blocks.1.attn.hook_z" in cache else cache["blocks.1.attn.o.hook_in"]


@pytest.mark.parametrize("make", [_hooked, _bridged])
def test_attached_saes_stay_attached_and_untouched(make: Any) -> None:
    model, tokens = make(), architectures.prompts()
    model.add_sae(_sae(HOOKS[0]), use_error_term=True)
    attached = set(model.acts_to_saes)
    acts = adapt(model).run(tokens, None, ["logits", "mlp_out.0"])
    assert set(model.acts_to_saes) == attached
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), acts["logits"])


@pytest.mark.parametrize("basis", ["component", "features"])
@pytest.mark.parametrize("make", [_hooked, _bridged])
def test_an_sae_that_alters_the_model_is_named(make: Any, basis: str) -> None:
    """Also where the closure check can't see it: behind the hook of an MLP's output all is linear as before."""
    model, tokens = make(), architectures.prompts(batch=4)
    what = {"basis": tcl.SAEFeatures({HOOKS[1]: _sae(HOOKS[1])}) if basis == "features" else "component"}
    options = what if basis == "features" else {**what, "design": "activation"}
    model.add_sae(_sae(HOOKS[0]), use_error_term=False)
    with pytest.raises(
        ModelError,
        match=r"an SAE without its error term is attached.*blocks.0.(mlp.hook_out|hook_mlp_out)`.*reset_saes",
    ):
        tcl.circuit_lasso(model, tokens, progress=False, **options)


@pytest.mark.parametrize("make", [_hooked, _bridged])
def test_an_sae_with_its_error_term_changes_no_graph(make: Any) -> None:
    model, tokens = make(), architectures.prompts(batch=4)
    plain = tcl.circuit_lasso(model, tokens, design="activation", progress=False)
    model.add_sae(_sae(HOOKS[0]), use_error_term=True)
    found = tcl.circuit_lasso(model, tokens, design="activation", progress=False)
    torch.testing.assert_close(found.score, plain.score)
