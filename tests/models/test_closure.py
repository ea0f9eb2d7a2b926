"""The frozen-linear view reproduces every supported family, and a wrong view is caught."""

from dataclasses import replace

import pytest
import torch

from tests import architectures
from tests.helpers import CASES
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models import adapt, closure_check, closure_report, rotary

EXACT = 5e-6  # float32 rounding over two layers


def _worst(model: object) -> tuple[str, float]:
    adapter = adapt(model)
    tokens, mask = architectures.padded()
    if not adapter.shape.causal:  # HookedTransformer can't mask pads there
        tokens, mask = architectures.prompts(), None
    return closure_report(adapter, tokens, mask).worst


@pytest.mark.parametrize("family", architectures.HOOKED)
def test_hooked_transformers_close(family: str) -> None:
    relation, error = _worst(architectures.hooked(family))
    assert error < EXACT, relation


@pytest.mark.parametrize("compatible", [False, True], ids=["raw", "compatible"])
@pytest.mark.parametrize("family", [*architectures.BRIDGES, *architectures.NATIVE])
def test_bridges_close(family: str, compatible: bool) -> None:
    relation, error = _worst(architectures.bridge(family, compatible=compatible))
    assert error < EXACT, relation


def test_relations_cover_every_port_of_every_layer() -> None:
    adapter = adapt(architectures.hooked("llama"))
    relations = set(closure_report(adapter, architectures.prompts()).errors)
    kinds = ("residual", "q", "k", "v", "z", "pattern", "mlp_pre", "mlp_linear", "mlp_post", "mlp_out")
    assert relations == {f"{kind}.{layer}" for kind in kinds for layer in (0, 1)} | {"logits"}


@pytest.mark.parametrize(("dtype", "at_most"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_other_dtypes_close(family: str, dtype: torch.dtype, at_most: float) -> None:
    adapter = adapt(architectures.hooked(family).to(dtype))
    adapter.model.cfg.dtype = dtype
    assert closure_check(adapter, architectures.prompts()) < at_most


def test_half_precision_bridge_closes() -> None:
    adapter = adapt(architectures.bridge("llama", dtype=torch.bfloat16))
    assert adapter.compute_dtype == torch.float32
    assert closure_check(adapter, architectures.prompts()) < 5e-2


@pytest.mark.parametrize("case", ["case_3", "case_13", "case_12"])
def test_trained_models_close(case: str) -> None:
    model = architectures.interpbench(CASES / case)
    assert closure_check(adapt(model), architectures.prompts(model.cfg.d_vocab, length=model.cfg.n_ctx)) < EXACT


def _break_writer(model: object) -> None:
    block = model.blocks[1]
    block.hook_attn_out.add_hook(lambda activation, hook: 0.9 * activation)


def _break_reader(model: object) -> None:
    model.blocks[1].attn.hook_q.add_hook(lambda activation, hook: activation + 0.1)


def _break_pattern(model: object) -> None:
    model.blocks[0].attn.hook_attn_scores.add_hook(lambda activation, hook: 1.1 * activation)


def _break_mlp(model: object) -> None:
    model.blocks[1].mlp.hook_post.add_hook(lambda activation, hook: activation.abs())


def _break_logits(model: object) -> None:
    model.ln_final.hook_normalized.add_hook(lambda activation, hook: activation + 0.1)


@pytest.mark.parametrize(
    ("damage", "relation", "layer"),
    [
        (_break_writer, "residual", "layer 1 "),
        (_break_reader, "q", "layer 1 "),
        (_break_pattern, "pattern", "layer 0 "),
        (_break_mlp, "mlp_post", "layer 1 "),
        (_break_logits, "logits", ""),
    ],
)
def test_a_model_that_does_something_else_is_caught(damage: object, relation: str, layer: str) -> None:
    model = architectures.hooked("gpt2")
    damage(model)
    with pytest.raises(ModelError, match=rf"closure check of `{relation}` failed (in {layer})?of HookedTransformer"):
        closure_check(adapt(model), architectures.prompts())


def test_a_wrong_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.hooked("llama")
    right = rotary.rotate
    monkeypatch.setattr(
        rotary, "rotate", lambda model, layer, x, positions, back: right(model, layer, x, positions + 1)
    )
    errors = closure_report(adapt(model), architectures.prompts()).errors
    assert errors["q.0"] > 0.01
    assert errors["v.0"] < EXACT


def test_writers_alone_are_checked_without_ports() -> None:
    model = architectures.hooked("gpt2")
    _break_reader(model)
    adapter = adapt(model)
    assert closure_check(adapter, architectures.prompts(), ports=False) < EXACT
    assert set(closure_report(adapter, architectures.prompts(), ports=False).errors) == {"residual.0", "residual.1"}


def test_nan_counts_as_the_largest_error() -> None:
    report = closure_report(adapt(architectures.hooked("gpt2")), architectures.prompts())
    broken = replace(report, errors={**report.errors, "q.1": float("nan")})
    assert broken.worst[0] == "q.1"
