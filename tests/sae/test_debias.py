"""A concept that goes with the class where the probe is trained, and can be told by its features."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae import training
from tl_circuitlasso.apps.debias import debias_pooled
from tl_circuitlasso.apps.pooling import Pooled, Tokens, pool, pooled_tokens
from tl_circuitlasso.apps.probes import train_probe
from tl_circuitlasso.apps.removal import circuit_order, expected_accuracy
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
    found = debias_pooled(pooled, classes, concept, splits=2, strength=0.15)
    worst = found.summary["worst"]
    assert worst["original"] < 0.4 and worst["oracle"] > 0.65
    assert found.summary.loc["circuit", "recovered"] > 0.8 > found.summary.loc["random", "recovered"]
    assert worst["circuit"] > worst["dimensions"] and found.summary.loc["circuit", "concept"] < 0.65
    assert all({f"{HOOK}#{i}" for i in (2, 3, 4)} <= set(some) for some in found.features)
    assert set(found.table.loc[found.table["method"] == "circuit", "features"]) <= {5, 10}


def test_standard_figures_are_high_for_the_right_features() -> None:
    plain, classes, concept = planted()
    centred = plain.codes - plain.codes.mean(0)  # so that zeroing features doesn't move every text's answer alike
    pooled = Pooled(HOOK, plain.x, centred, plain.written)
    found = debias_pooled(pooled, classes, concept, splits=2, strength=0.15, sizes=(5, 20, 99))
    for figures in (found.scr, found.tpp):
        assert set(figures.index) == {"circuit", "gradient", "probe", "random"} and list(figures.columns) == [5, 20]
        assert figures.loc["circuit", 5] > figures.loc["random", 5] + 0.1
    assert found.scr.loc["circuit", 5] > 0.6 and found.tpp.loc["circuit", 5] > 0.15


def test_what_a_lasso_leaves_out_comes_in_the_next_round() -> None:
    """Two features tell one thing: the weaker of them stands behind the first round and before what tells nothing."""
    pooled, _, concept = planted(200)
    codes = pooled.codes.clone()
    codes[:, 30] = codes[:, 2] + 0.05 * codes[:, 30]
    first = circuit_order(codes, concept, 0.5, rounds=1).tolist()
    order = circuit_order(codes, concept, 0.5).tolist()
    assert sorted(order) == list(range(FEATURES)) and set(order[:4]) == {2, 3, 4, 30}
    assert first[:2] == order[:2] and circuit_order(codes[:, :1] * 0, concept, 0.5).tolist() == [0]


def test_accuracy_is_told_without_classes_where_class_and_concept_are_independent() -> None:
    """On exact shares the estimate is the accuracy itself, whatever the answers are."""
    random = torch.Generator().manual_seed(0)
    classes, concept = (torch.arange(400) // size % 2 for size in (1, 2))
    says = (torch.rand(400, generator=random) < 0.1 + 0.5 * classes + 0.3 * concept).long()
    agree = classes == concept
    found = expected_accuracy((says[agree], says), classes[agree], concept)
    assert found == pytest.approx(float((says == classes).double().mean()), abs=1e-12)


def test_a_text_without_tokens_keeps_its_place() -> None:
    model = architectures.hooked("llama")
    encoder = Encoder(training.plain_sae(torch.randn(50, model.cfg.d_model), 5, share=0.5), HOOK, HOOK)
    x = torch.randn(3, model.cfg.d_model)
    pooled = pooled_tokens(encoder, [Tokens(x, torch.tensor([0, 2, 2]), 3)])
    torch.testing.assert_close(pooled.x, torch.stack([x[0], 0 * x[0], x[1:].mean(0)]).double())


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
    with pytest.raises(InputError, match="`sizes` has no number"):
        debias_pooled(pooled, [0] * 40, concept, sizes=(0, 500))
    model: Any = architectures.hooked("llama")
    sae = training.plain_sae(torch.randn(50, model.cfg.d_model), 5, share=0.5)
    with pytest.raises(InputError, match="isn't linear"):
        tcl.apps.debias(model, {HOOK: Squared(sae.W_enc, sae.W_dec, sae.bias)}, torch.zeros(4, 5).long(), [0], [0])
    with pytest.raises(InputError, match="`saes` has 2 SAEs"):
        tcl.apps.debias(model, dict.fromkeys((HOOK, "blocks.1.hook_resid_post"), sae), ["a"], [0], [0])
