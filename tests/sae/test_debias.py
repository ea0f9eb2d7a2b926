"""A concept that goes with the class where the probe is trained, and can be told by its features."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae import training
from tl_circuitlasso.apps.debias import Pooled, debias_pooled, pool, train_probe
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.encoder import Encoder

HOOK, FEATURES, WIDTH = "blocks.0.hook_resid_post", 40, 24


def planted(texts: int = 480, seed: int = 0) -> tuple[Pooled, torch.Tensor, torch.Tensor]:
    """Two features of the class, three louder ones of the concept, and others that tell nothing."""
    random = torch.Generator().manual_seed(seed)
    classes, concept = (torch.arange(texts) // size % 2 for size in (1, 2))
    codes = torch.rand(texts, FEATURES, generator=random).double()
    codes[:, :2] += 0.8 * classes[:, None]
    codes[:, 2:5] += 1.6 * concept[:, None]
    written = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=random), dim=1).double()
    x = codes @ written + 0.3 * torch.randn(texts, WIDTH, generator=random).double()
    return Pooled(HOOK, x, codes, written), classes, concept


def test_zeroing_the_concepts_features_saves_the_worst_group() -> None:
    pooled, classes, concept = planted()
    found = debias_pooled(pooled, classes, concept, splits=3, strength=0.15)
    worst = found.summary["worst"]
    assert worst["original"] < 0.4 and worst["oracle"] > 0.65
    assert found.summary.loc["circuit", "recovered"] > 0.8 > found.summary.loc["random", "recovered"]
    assert worst["circuit"] > worst["dimensions"] and found.summary.loc["circuit", "concept"] < 0.65
    assert all({f"{HOOK}#{i}" for i in (2, 3, 4)} <= set(some) for some in found.features)
    assert set(found.scr.index) == {"circuit", "gradient", "probe", "random"} and found.scr.columns[-1] == 20
    assert bool(found.scr.notna().all(axis=None))


def test_probes_are_logistic_regressions() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    pooled, classes, _ = planted(200)
    probe = train_probe(pooled.x, classes)
    ready = ((pooled.x - probe.mean) / probe.spread).numpy()
    other = linear_model.LogisticRegression(C=1 / (0.01 * 200), tol=1e-8, max_iter=1000).fit(ready, classes.numpy())
    torch.testing.assert_close(probe.weight, torch.from_numpy(other.coef_[0]), rtol=1e-2, atol=1e-3)


def test_pooled_ablation_is_ablation_at_every_token() -> None:
    model = architectures.hooked("llama")
    adapter = adapt(model)
    tokens = torch.randint(0, 31, (5, 9), generator=torch.Generator().manual_seed(3))
    x = adapter.run(tokens, None, [HOOK])[HOOK]
    encoder = Encoder(training.plain_sae(x.flatten(0, 1), 12, share=0.3), HOOK, HOOK)
    pooled = pool(adapter, encoder, tokens, batch_size=2)
    gone = torch.tensor([1, 4])
    codes = encoder.encode(x.flatten(0, 1)).view(5, 9, -1)
    expected = (x - codes[..., gone] @ encoder.decoder[gone]).double().mean(1)
    torch.testing.assert_close(pooled.without(gone), expected, rtol=1e-5, atol=1e-6)


class Squared(training.PlainSAE):
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return super().decode(codes**2)


def test_what_cannot_be_debiased_is_refused() -> None:
    pooled, _, concept = planted(40)
    for bad, message in (([2] * 40, "`classes` must be 0 or 1"), ([0] * 40, "has 0 texts")):
        with pytest.raises(InputError, match=message):
            debias_pooled(pooled, bad, concept)
    model: Any = architectures.hooked("llama")
    sae = training.plain_sae(torch.randn(50, model.cfg.d_model), 5, share=0.5)
    with pytest.raises(InputError, match="isn't linear"):
        tcl.apps.debias(model, {HOOK: Squared(sae.W_enc, sae.W_dec, sae.bias)}, torch.zeros(4, 5).long(), [0], [0])
    with pytest.raises(InputError, match="`saes` has 2 SAEs"):
        tcl.apps.debias(model, dict.fromkeys((HOOK, "blocks.1.hook_resid_post"), sae), ["a"], [0], [0])
