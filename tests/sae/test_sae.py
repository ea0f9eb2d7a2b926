"""SAEs at their place in a model: every architecture's codes, what they leave behind, loading, and metadata."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae.training import PlainSAE, plain_sae
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import Prompts, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hook_order import attention_between, computing_order
from tl_circuitlasso.models.sae import load_sae
from tl_circuitlasso.models.sae_checks import SAEMismatch, check_labels
from tl_circuitlasso.testing import check_basis

HOOK = "blocks.1.hook_resid_post"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "matching_pursuit", "transcoder", "skip_transcoder")


def _lens_sae(kind: str, d_in: int = 16, features: int = 40, **more: Any) -> Any:
    """An untrained SAELens SAE of a kind, its weights random."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    saes = pytest.importorskip("sae_lens.registry")
    cls, config = saes.get_sae_class(kind)
    special = {"topk": {"k": 4}, "transcoder": {"d_out": d_in, "apply_b_dec_to_input": False}}
    special["skip_transcoder"] = special["transcoder"]
    made = config(d_in=d_in, d_sae=features, **special.get(kind, {}), **more)
    made.metadata = sae_lens.saes.sae.SAEMetadata(hook_name=HOOK)
    sae = cls(made)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return sae


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_codes_and_error_of_every_architecture(kind: str) -> None:
    sae, x = _lens_sae(kind), torch.randn(50, 16)
    encoder = Encoder(sae, HOOK, HOOK)
    codes, error = encoder.encode_with_error(x, x)
    with torch.no_grad():
        torch.testing.assert_close(codes, sae.encode(x))
        expected = sae(x) if kind == "skip_transcoder" else sae.decode(sae.encode(x))
    torch.testing.assert_close(error, x - expected)
    assert encoder.features == 40 and encoder.width == 16 and codes.dtype == torch.float32


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_normalised_sae_decodes_with_the_scale_of_its_own_input(norm: str) -> None:
    sae = _lens_sae("standard", normalize_activations=norm)
    encoder = Encoder(sae, HOOK, HOOK)
    x, other = torch.randn(30, 16), 20 * torch.randn(30, 16) + 5
    alone = encoder.encode_with_error(x, x)[1]
    encoder.encode(other)
    torch.testing.assert_close(encoder.encode_with_error(x, x)[1], alone)
    with torch.no_grad():
        torch.testing.assert_close(x - sae.decode(sae.encode(x)), alone)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in ARCHITECTURES if "transcoder" not in kind),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
        ("standard", {"dtype": "bfloat16"}),
    ],
)
def test_every_architecture_passes_the_checks_of_a_basis(kind: str, more: dict[str, Any]) -> None:
    model = architectures.hooked("gpt2")
    assert len(check_basis(_lens_sae(kind, d_in=model.cfg.d_model, **more), model)) == 8


def test_an_sae_is_left_as_it_was() -> None:
    sae = _lens_sae("standard", normalize_activations="layer_norm")
    before = dict(vars(sae))
    Encoder(sae, HOOK, HOOK).encode(torch.randn(5, 16))
    assert vars(sae).keys() == before.keys()
    assert all(vars(sae)[name] is value for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codes_are_float32_whatever_the_sae_is_made_of(dtype: torch.dtype) -> None:
    x = torch.randn(20, 16)
    plain = plain_sae(x, 30)
    cast = PlainSAE(plain.W_enc.to(dtype), plain.W_dec.to(dtype), plain.bias.to(dtype))
    codes, error = Encoder(cast, HOOK, HOOK).encode_with_error(x, x)
    assert codes.dtype == error.dtype == torch.float32
    torch.testing.assert_close(codes, Encoder(plain, HOOK, HOOK).encode(x), atol=0.1, rtol=0.1)


def test_heads_are_laid_side_by_side(demo: Any) -> None:
    hook = "blocks.1.attn.hook_z"
    z = adapt(demo.model).run(demo.tokens[:4], torch.ones(4, demo.tokens.shape[1], dtype=torch.bool), [hook])[hook]
    flat = z.flatten(2).flatten(0, 1)
    sae = plain_sae(flat, 24)
    torch.testing.assert_close(Encoder(sae, hook, hook).encode(z.flatten(0, 1)), sae.encode(flat))
    lens = _lens_sae("standard", d_in=flat.shape[1], reshape_activations="none")
    torch.testing.assert_close(Encoder(lens, hook, hook).encode(z.flatten(0, 1)), lens.encode(flat).detach())


def test_an_hook_z_sae_that_reshapes_itself(demo: Any) -> None:
    hook = "blocks.1.attn.hook_z"
    z = adapt(demo.model).run(demo.tokens[:4], torch.ones(4, demo.tokens.shape[1], dtype=torch.bool), [hook])[hook]
    flat = z.flatten(2).flatten(0, 1)
    sae = _lens_sae("standard", d_in=flat.shape[1])
    expected = sae.encode(flat).detach()
    sae.cfg.metadata.hook_name = hook
    sae.turn_on_forward_pass_hook_z_reshaping()
    encoder = Encoder(sae, hook, hook)
    torch.testing.assert_close(encoder.encode(z.flatten(0, 1)), expected)
    assert encoder.encode_with_error(z.flatten(0, 1), z.flatten(0, 1))[1].shape == flat.shape


def test_what_lacks_encode_decode_or_a_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="without encode, decode, W_dec"):
        Encoder(object(), HOOK, HOOK)
    with pytest.raises(InputError, match="W_dec"):
        Encoder(PlainSAE(torch.eye(3), torch.ones(3), torch.zeros(3)), HOOK, HOOK)


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (lambda x: x[:, :5], None),  # fewer codes than W_dec has rows
        (lambda x: x.sum(1), None),
        (lambda x: x.tolist(), None),
        (None, lambda codes: codes[:, :3]),
    ],
)
def test_codes_and_reconstructions_of_another_shape_are_refused(encode: Any, decode: Any) -> None:
    """W_dec is the identity, so codes and activations have one width."""

    def same(x: Tensor) -> Tensor:
        return x

    odd = SimpleNamespace(encode=encode or same, decode=decode or same, W_dec=torch.eye(16))
    with pytest.raises(InputError, match=r"`saes`: (en|de)code of the SAE at blocks\.1\.hook_resid_post gives"):
        Encoder(odd, HOOK, HOOK).reconstruct(torch.rand(20, 16))


def test_negative_codes_are_refused_by_name() -> None:
    signed = SimpleNamespace(encode=lambda x: x, decode=lambda codes: codes, W_dec=torch.eye(16))
    with pytest.raises(InputError, match="negative codes, as AbsTopK does"):
        Encoder(signed, HOOK, HOOK).encode(torch.randn(20, 16))


@pytest.mark.parametrize("name", ["blocks.7.hook_resid_post#1", f"{HOOK}#16", f"{HOOK}#x", "16"])
def test_labels_of_features_that_cannot_be_are_refused(name: str) -> None:
    sae = SimpleNamespace(encode=torch.relu, decode=lambda codes: codes, W_dec=torch.eye(16))
    encoders = {HOOK: Encoder(sae, HOOK, HOOK)}
    check_labels(encoders, {f"{HOOK}#15": "cats", "3": "dogs"})
    with pytest.raises(InputError, match="`labels` names"):
        check_labels(encoders, {name: "birds"})


def test_nan_codes_are_refused_by_name() -> None:
    x = torch.randn(20, 16)
    sae = plain_sae(x, 30)
    sae.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"codes of the SAE at blocks\.1\.hook_resid_post are NaN"):
        Encoder(sae, HOOK, HOOK).encode(x)


def test_an_sae_of_another_width_is_refused_with_both_widths() -> None:
    with pytest.raises(InputError, match="another model or hook"):
        Encoder(plain_sae(torch.randn(20, 16), 30), HOOK, HOOK).encode(torch.randn(5, 12))


def test_loading_from_a_folder(sae_folders: dict[str, str], saes: dict[str, Any]) -> None:
    hook, folder = next(iter(sae_folders.items()))
    x = torch.randn(10, 64)
    for source in (folder, Path(folder)):
        torch.testing.assert_close(load_sae(source).encode(x), saes[hook].encode(x))
    assert load_sae(saes[hook]) is saes[hook]


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    with pytest.raises(InputError, match="neither a folder with an SAE nor a release"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="no-such-release"):
        load_sae("no-such-release/layer_0")
    with pytest.raises(InputError, match="no-such-release"):
        load_sae(("no-such-release", "layer_0"))


def test_hooks_are_ordered_as_the_model_computes_them(demo: Any) -> None:
    adapter = adapt(demo.model)
    batch = next(iter(Prompts(adapter, demo.tokens[:2])))
    hooks = ["blocks.2.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_q", "blocks.0.attn.hook_k",
             "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"]  # fmt: skip
    order = computing_order(adapter, batch, hooks)
    assert sorted(order, key=lambda hook: order[hook])[0] == "blocks.0.hook_resid_pre"
    assert order["blocks.0.attn.hook_q"] == order["blocks.0.attn.hook_k"]
    assert order["blocks.0.hook_resid_mid"] < order["blocks.0.hook_mlp_out"] < order["blocks.2.hook_resid_post"]
    with pytest.raises(InputError, match="hook_resid_posst"):
        computing_order(adapter, batch, ["blocks.0.hook_resid_posst"])


@pytest.mark.parametrize(
    ("source", "target", "layers"),
    [
        ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", [0]),
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", [1]),
        ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", []),
        ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", [0]),
        ("blocks.1.hook_mlp_out", "target", [2]),
    ],
)
def test_which_attention_stands_between(source: str, target: str, layers: list[int]) -> None:
    assert list(attention_between(source, target, 3)) == layers


@pytest.fixture
def complaints(stories: Any, story_tokens: Tensor, saes: dict[str, Any]) -> Any:
    """Run on a changed SAE and give the warnings."""

    def run(tokens: Tensor = story_tokens[:8], hook: str | None = None, **metadata: Any) -> list[str]:
        own, sae = next(iter(saes.items()))
        kept = {name: sae.cfg.metadata[name] for name in metadata}
        sae.cfg.metadata.__dict__.update(metadata)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                basis = tcl.SAEFeatures({hook or own: sae}, min_count=2, held_out=0.0)
                tcl.circuit_lasso(stories, tokens, basis=basis, progress=False)
        finally:
            sae.cfg.metadata.__dict__.update(kept)
        return [str(one.message) for one in caught if issubclass(one.category, SAEMismatch)]

    return run


def test_metadata_that_fits_is_not_complained_of(complaints: Any) -> None:
    assert complaints() == []
    assert complaints(hook="blocks.2.hook_resid_pre") == []  # the same stream


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_name": "gpt2-small"}, "trained on gpt2-small"),
        ({"hook_name": "blocks.4.hook_resid_post"}, "trained at blocks.4.hook_resid_post"),
        ({"prepend_bos": False}, "without BOS"),
        ({"context_size": 32}, "32 positions"),
    ],
)
def test_metadata_that_does_not_fit_is_warned_of(complaints: Any, changed: dict[str, Any], said: str) -> None:
    (complaint,) = complaints(**changed)
    assert said in complaint


def test_a_model_without_a_name_is_not_complained_of(stories: Any, complaints: Any) -> None:
    stories.cfg.model_name = "custom"  # what TransformerLens calls models that it hasn't loaded itself
    try:
        assert complaints() == []
    finally:
        stories.cfg.model_name = "stories260K"


def test_prompts_without_bos_are_warned_of(complaints: Any, story_tokens: Tensor) -> None:
    assert any("begin with BOS" in text for text in complaints(story_tokens[:8, 1:]))


def test_a_centred_model_is_warned_of(stories: Any, complaints: Any) -> None:
    weights = [block.attn.W_O for block in stories.blocks]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight -= weight.mean(-1, keepdim=True)
        assert any("uncentred" in text for text in complaints())
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept):
                weight.copy_(old)


def test_saes_that_know_their_hook_need_no_name() -> None:
    sae = _lens_sae("standard")
    assert all(list(tcl.SAEFeatures(given).saes.items()) == [(HOOK, sae)] for given in ([sae], sae))
    with pytest.raises(InputError, match="SAEs alone must say their hook"):
        tcl.SAEFeatures([object()])
