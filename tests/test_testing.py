"""The conformance checks: what is good passes, and each check fails when the thing it looks at is broken."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines, formats
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.sae_checks import check_shapes
from tl_circuitlasso.testing import CheckFailure, check_basis, check_format, check_method, check_model

HOOK = "blocks.1.hook_resid_post"


class PlainSAE:
    """ReLU codes; W_enc as (feature, width), as circuit-tracer's transcoders have it, and no cfg."""

    def __init__(self, width: int, features: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(features, width, generator=generator)
        self.W_dec = torch.randn(features, width, generator=generator)
        self.b_dec = torch.randn(width, generator=generator)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_enc.T).relu()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes @ self.W_dec + self.b_dec


@pytest.fixture(scope="module")
def model() -> Any:
    return architectures.hooked("gpt2")


def plain_sae(model: Any) -> PlainSAE:
    return PlainSAE(model.cfg.d_model, 40)


@pytest.mark.parametrize("family", ["llama", "pythia"])
def test_models_that_are_supported_pass(family: str) -> None:
    assert len(check_model(architectures.hooked(family))) == 6


def test_a_model_with_noise_or_a_hook_that_edits_fails(model: Any) -> None:
    noisy = architectures.hooked("gpt2")
    noisy.blocks[0].attn.hook_z.add_perma_hook(lambda act, hook: act + torch.randn_like(act))
    with pytest.raises(CheckFailure, match="two runs agree"):
        check_model(noisy)
    with pytest.raises(CheckFailure, match="is supported"):
        check_model(torch.nn.Linear(2, 2))
    one = torch.zeros(1, 8, dtype=torch.long)
    for tokens in (one, one.repeat(3, 1)):  # patched with themselves, every check of cut edges would pass
        with pytest.raises(tcl.InputError, match="two or more different prompts"):
            check_model(model, tokens)


def test_heads_that_change_places_fail() -> None:
    swapped = architectures.hooked("gpt2")
    swapped.blocks[1].attn.hook_v.add_perma_hook(lambda act, hook: act.flip(2))
    with pytest.raises(CheckFailure, match="closure check of `v` failed in layer 1"):
        check_model(swapped)


def test_any_object_with_encode_decode_and_w_dec_is_a_basis(model: Any) -> None:
    assert len(check_basis(plain_sae(model), model, HOOK)) == 8
    acts = {HOOK: torch.zeros(1, 1, model.cfg.d_model)}
    check_shapes({HOOK: Encoder(plain_sae(model), HOOK, HOOK)}, acts)  # a transposed W_enc says no other width
    with pytest.raises(tcl.InputError, match="another model or hook"):
        check_shapes({HOOK: Encoder(PlainSAE(model.cfg.d_model + 1, 40), HOOK, HOOK)}, acts)


class SingleLayerTranscoder(PlainSAE):
    """As circuit-tracer's with a skip connection: it decodes only where it's shown what it has read, and has no cfg."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)
        self.W_skip = torch.randn(width, width, generator=torch.Generator().manual_seed(1))

    def decode(self, acts: torch.Tensor, input_acts: torch.Tensor | None = None) -> torch.Tensor:
        assert input_acts is not None
        return super().decode(acts) + input_acts @ self.W_skip.T


def packages_own(width: int, features: int) -> Any:
    package = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    made = package.SingleLayerTranscoder(
        width, features, torch.nn.functional.relu, 0, skip_connection=True, dtype=torch.float32
    )
    plain = SingleLayerTranscoder(width, features)
    for name in ("W_enc", "W_dec", "b_dec", "W_skip"):
        getattr(made, name).data.copy_(getattr(plain, name))
    return made.requires_grad_(False)


@pytest.mark.parametrize("make", [SingleLayerTranscoder, packages_own])
def test_a_transcoder_of_circuit_tracer_is_a_basis_once_it_says_where_it_writes(make: Any, model: Any) -> None:
    width, hook, out = model.cfg.d_model, "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    transcoder = make(width, 40)
    with pytest.raises(CheckFailure, match=r"set its attribute hook_out, such as sae\.hook_out ="):
        check_basis(transcoder, model, hook)
    transcoder.hook_out = out
    assert len(check_basis(transcoder, model, hook)) == 8
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    found = Encoder(transcoder, hook, out).reconstruct(x)
    torch.testing.assert_close(found, transcoder.decode(transcoder.encode(x), x))
    basis = tcl.SAEFeatures({hook: transcoder, HOOK: plain_sae(model)}, min_count=2)
    graph = tcl.circuit_lasso(model, architectures.prompts(length=8, batch=16), basis=basis, progress=False)
    assert {(pair["source"], pair["target"]) for pair in graph.provenance["pairs"]} >= {(hook, HOOK)}
    assert any(source.startswith(hook) and target.startswith(HOOK) for source, target in graph.kept_edges())


def negative(sae: PlainSAE) -> None:
    sae.encode = lambda x: x @ sae.W_enc.T


def mixing(sae: PlainSAE) -> None:
    sae.encode = lambda x: (x - x.mean(0)).relu() @ sae.W_enc.T.relu()


def elsewhere(sae: PlainSAE) -> None:
    sae.decode = lambda codes: codes @ sae.W_dec.flip(0)


def one_elsewhere(sae: PlainSAE) -> None:
    other = torch.cat([sae.W_dec[:-1], -sae.W_dec[-1:]])
    sae.decode = lambda codes: codes @ other


def squaring(sae: PlainSAE) -> None:
    sae.decode = lambda codes: codes.square() @ sae.W_dec


def doubling(sae: PlainSAE) -> None:
    sae.decode = lambda codes: 2 * codes @ sae.W_dec


def counting(sae: PlainSAE) -> None:
    plain, sae.seen = sae.encode, torch.zeros(40)

    def encode(x: torch.Tensor) -> torch.Tensor:
        sae.seen += plain(x).sum(0)
        return plain(x)

    sae.encode = encode


def restless(sae: PlainSAE) -> None:
    sae.encode = lambda x: (x @ sae.W_enc.T + torch.randn(40)).relu()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (negative, "codes aren't negative"),
        (mixing, "codes stand by themselves"),
        (elsewhere, "features write W_dec: .* against codes @ W_dec"),
        (one_elsewhere, "features write W_dec: .* against codes @ W_dec"),
        (squaring, "features write W_dec: .* against codes @ W_dec"),
        (doubling, "features write 2 times their rows of W_dec"),
        (restless, "two calls agree"),
        (counting, "is left as it was: .* seen"),
    ],
)
def test_a_basis_with_a_fault_fails_by_name(spoil: Any, message: str, model: Any) -> None:
    sae = plain_sae(model)
    spoil(sae)
    with pytest.raises(CheckFailure, match=message):
        check_basis(sae, model, HOOK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_basis_of_another_dtype_passes(dtype: torch.dtype, model: Any) -> None:
    sae = plain_sae(model)
    for name in ("W_enc", "W_dec", "b_dec"):
        setattr(sae, name, getattr(sae, name).to(dtype))
    assert len(check_basis(sae, model, HOOK)) == 8


def test_a_basis_that_normalises_its_input_passes(model: Any) -> None:
    """Its features write W_dec times each token's own spread, which the decoder remembers, as SAELens' do."""
    sae = plain_sae(model)
    encode, decode = sae.encode, sae.decode

    def normalised(x: torch.Tensor) -> torch.Tensor:
        sae.spread = x.std(1, keepdim=True)
        return encode(x / sae.spread)

    sae.encode, sae.decode = normalised, lambda codes: decode(codes) * sae.spread
    assert len(check_basis(sae, model, HOOK)) == 8


def test_a_basis_of_another_model_fails(model: Any) -> None:
    with pytest.raises(CheckFailure, match="reads this model's activations"):
        check_basis(PlainSAE(model.cfg.d_model + 1, 5), model, HOOK)
    with pytest.raises(CheckFailure, match="has encode"):
        check_basis(SimpleNamespace(), model, HOOK)
    with pytest.raises(tcl.InputError, match="`hook`"):
        check_basis(plain_sae(model), model)


@pytest.mark.parametrize(
    ("reader", "writer", "suffix"),
    [
        (formats.from_eap, formats.to_eap, ".json"),
        (formats.from_eap, formats.to_eap, ".pt"),
        (formats.from_graphml, formats.to_graphml, ".graphml"),
        (formats.from_neuronpedia, formats.to_neuronpedia, ".json"),
        (AttributionGraph.load, lambda graph, path: graph.save(path), ".safetensors"),
    ],
)
def test_formats_pass(reader: Any, writer: Any, suffix: str) -> None:
    assert len(check_format(reader, writer, suffix)) == 9


@pytest.mark.parametrize(
    ("reader", "writer", "suffix"),
    [
        (formats.from_acdc, formats.to_acdc, ".pth"),
        (formats.from_auto_circuit, partial(formats.to_auto_circuit, membership=True), ".pt"),
        (formats.from_circuits_benchmark, formats.to_circuits_benchmark, ".json"),
    ],
)
def test_formats_of_membership_pass_without_scores(reader: Any, writer: Any, suffix: str) -> None:
    assert len(check_format(reader, writer, suffix, scores=False)) == 9
    with pytest.raises(CheckFailure, match="has another score"):
        check_format(reader, writer, suffix)


def test_a_format_that_loses_or_raises_fails() -> None:
    def loses(path: Path) -> AttributionGraph:
        return AttributionGraph.load(path).top_k(2)

    def save(graph: AttributionGraph, path: Path) -> None:
        graph.save(path)

    with pytest.raises(CheckFailure, match="other edges are kept"):
        check_format(loses, save)

    def unsigned(path: Path) -> AttributionGraph:
        graph = AttributionGraph.load(path)
        return replace(graph, score=graph.score.abs())

    with pytest.raises(CheckFailure, match="has another score"):
        check_format(unsigned, save)
    with pytest.raises(CheckFailure, match="writing has changed the graph"):
        check_format(AttributionGraph.load, lambda graph, path: (save(graph, path), graph.weight.zero_()))
    with pytest.raises(CheckFailure, match="refuses half a file: JSONDecodeError"):
        check_format(lambda path: __import__("json").loads(path.read_text()), save)


def test_methods_pass_and_faults_are_named() -> None:
    assert len(check_method(baselines.eap)) == 6

    def untidy(model: Any, clean: Any, corrupted: Any, metric: Any) -> AttributionGraph:
        model.blocks[0].hook_resid_pre.register_forward_hook(lambda *_: None)
        graph = baselines.random_edges(model, seed=int(torch.randint(1 << 30, (1,))))
        return AttributionGraph(**{name: value for name, value in vars(graph).items() if name in COLUMNS})

    with pytest.raises(CheckFailure) as caught:
        check_method(untidy)
    for name in ("same again", "leaves the model as it was", "counts its passes"):
        assert name in str(caught.value)
    with pytest.raises(CheckFailure, match="gives a graph"):
        check_method(lambda *arguments: 3)


def spoils_prompts(model: Any, clean: torch.Tensor, graph: AttributionGraph) -> None:
    clean.zero_()


def swaps_weights(model: Any, clean: torch.Tensor, graph: AttributionGraph) -> None:
    weights = model.blocks[0].attn.W_O.data
    weights.copy_(weights.flip(0))


def leaves_gradients(model: Any, clean: torch.Tensor, graph: AttributionGraph) -> None:
    model.W_E.grad = torch.zeros_like(model.W_E)


def sets_a_switch(model: Any, clean: torch.Tensor, graph: AttributionGraph) -> None:
    model.cfg.use_attn_result = True


def counts_in_words(model: Any, clean: torch.Tensor, graph: AttributionGraph) -> None:
    graph.provenance["forward_passes"] = "many"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (spoils_prompts, "leaves the prompts as they were"),
        (swaps_weights, "leaves the model as it was"),
        (leaves_gradients, "leaves the model as it was"),
        (sets_a_switch, "leaves the model as it was"),
        (counts_in_words, "counts its passes: .*'many'"),
    ],
)
def test_a_method_with_a_fault_fails_by_name(fault: Any, message: str) -> None:
    def method(model: Any, clean: Any, corrupted: Any, metric: Any) -> AttributionGraph:
        graph = baselines.random_edges(model)
        graph = replace(graph, provenance=dict(graph.provenance))
        fault(model, clean, graph)
        return graph

    with pytest.raises(CheckFailure, match=message):
        check_method(method)


COLUMNS = ("index", "source", "target", "port", "score", "weight", "kept")
