"""Features edited while the model runs: against hooks by hand, and with patterns held as they were."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import architectures
from tests.sae import training
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Edit, adapt, edit

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TOKENS = torch.randint(0, 31, (5, 9), generator=torch.Generator().manual_seed(3))


def saes_of(model: Any) -> dict[str, training.PlainSAE]:
    acts = adapt(model).run(TOKENS, None, [FIRST, LAST])
    return {hook: training.plain_sae(x.flatten(0, 1), 12, share=0.3) for hook, x in acts.items()}


def by_hand(model: Any, sae: Any, feature: int, new: Any, extra: list[Any] | None = None) -> Any:
    """Logits and the stream behind layer 1 with one code changed by `new`."""

    def change(x: Tensor, hook: Any) -> Tensor:
        codes = sae.encode(x)
        edited = codes.clone()
        edited[..., feature] = new(codes[..., feature])
        return x + sae.decode(edited) - sae.decode(codes)

    with torch.no_grad(), model.hooks(fwd_hooks=[(FIRST, change), *(extra or [])]):
        logits, cache = model.run_with_cache(TOKENS)
    return logits, cache[LAST]


@pytest.mark.parametrize(
    ("how", "value", "new"),
    [
        ("set", 1.5, lambda z: torch.full_like(z, 1.5)),
        ("scale", 3.0, lambda z: 3 * z),
        ("add", 0.5, lambda z: z + 0.5),
        ("add", -100.0, torch.zeros_like),
    ],
)
def test_other_features_activations_and_logits_are_read(how: Any, value: float, new: Any) -> None:
    model = architectures.hooked("llama")
    saes = saes_of(model)
    read = [f"{LAST}#4", LAST, "logits", f"{FIRST}#2"]
    found = edit(model, saes, TOKENS, [Edit(f"{FIRST}#2", value, how)], read, batch_size=2)
    logits, stream = by_hand(model, saes[FIRST], 2, new)
    torch.testing.assert_close(found.after["logits"], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.after[LAST], stream, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.after[f"{LAST}#4"], saes[LAST].encode(stream)[..., 4], rtol=1e-4, atol=1e-5)
    assert float(found.change("logits").abs().max()) > 1e-4
    torch.testing.assert_close(found.before["logits"], model(TOKENS).detach(), rtol=1e-4, atol=1e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_positions_and_values_of_their_own() -> None:
    model = architectures.hooked("gpt2")
    saes = saes_of(model)
    where = torch.zeros(5, 9, dtype=torch.bool)
    where[2, 3] = True
    values = torch.arange(45.0).view(5, 9) / 10
    found = edit(
        model, saes, TOKENS, [Edit(f"{FIRST}#1", values, positions=where)], [f"{FIRST}#1", FIRST], batch_size=2
    )
    changed = found.change(FIRST).abs().amax(-1) > 0
    assert torch.equal(changed, where)
    back = edit(model, saes, TOKENS, [Edit(f"{FIRST}#1", 1.0, "scale")], ["logits"])
    assert float(back.change("logits").abs().max()) < 1e-5


def test_frozen_attention_keeps_its_patterns() -> None:
    model = architectures.hooked("llama")
    saes = saes_of(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    frozen = [(name, lambda x, hook: cache[hook.name]) for name in cache if name.endswith("hook_pattern")]
    edits, read = [Edit(f"{FIRST}#2", 5.0)], ["logits", "blocks.1.attn.hook_pattern"]
    expected, _ = by_hand(model, saes[FIRST], 2, lambda z: torch.full_like(z, 5.0), frozen)
    held = edit(model, saes, TOKENS, edits, read, freeze_attention=True)
    free = edit(model, saes, TOKENS, edits, read)
    torch.testing.assert_close(held.after["logits"], expected, rtol=1e-4, atol=1e-5)
    assert float((held.after["logits"] - free.after["logits"]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("edits", "read", "message"),
    [
        ([], ["logits"], "`edits` is empty"),
        ([("x#1",)], ["logits"], "no SAE for x#1"),
        ([(f"{FIRST}#12",)], ["logits"], "has 12 features"),
        ([(f"{FIRST}#1",)], "logits", "put it in a list"),
        ([(f"{FIRST}#1",)], ["blocks.7.hook_resid_post"], "doesn't have the hook"),
        ([("blocks.0",)], ["logits"], "write '<hook>#<number>'"),
        ([(f"{FIRST}#1", float("nan"))], ["logits"], "NaN or infinite"),
        ([(f"{FIRST}#1", torch.zeros(4, 4))], ["logits"], "give \\(batch, pos\\)"),
    ],
)
def test_bad_edits_are_refused(edits: Any, read: Any, message: str) -> None:
    model = architectures.hooked("llama")
    with pytest.raises(InputError, match=message):
        edit(model, saes_of(model), TOKENS, [Edit(*one) for one in edits], read)
