"""Bad input raises an error that names the argument and says what to do; nothing crashes and nothing is NaN."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError, ModelError
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.tokens import Prompts

TOKENS = architectures.prompts(batch=8)


@pytest.fixture(scope="module")
def model() -> Any:
    return architectures.small()


def found(model: Any, tokens: Any = TOKENS, **options: Any) -> tcl.AttributionGraph:
    return tcl.circuit_lasso(model, tokens, progress=False, **{"refined": False, **options})


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        torch.zeros(0, 5, dtype=torch.long),
        torch.zeros(3, 0, dtype=torch.long),
        iter([]),
        ["", "w3"],
        "w3 w4",
        TOKENS.float(),
        TOKENS + 100,
        TOKENS - 50,
        TOKENS[0],
        TOKENS.bool(),
        torch.full((2, 99), 3),
        [1, 2, 3],
        [TOKENS, "w3"],
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_tokens(model: Any, tokens: Any) -> None:
    with pytest.raises(InputError, match="`tokens`"):
        found(model, tokens)


@pytest.mark.parametrize("tokens", [7, None])
def test_tokens_that_are_nothing_of_the_kind(model: Any, tokens: Any) -> None:
    with pytest.raises(InputError, match="`tokens`"):
        Prompts(adapt(model), tokens)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(8, 4), torch.ones(9), torch.zeros(8, 9), torch.full((8, 9), 2), torch.ones(8, 9).tril(-3)],
    ids=["width", "axes", "all masked", "twos", "one prompt masked"],
)
def test_attention_mask(model: Any, mask: torch.Tensor) -> None:
    with pytest.raises(InputError, match="`attention_mask`"):
        found(model, attention_mask=mask)


@pytest.mark.parametrize("design", ["read", "activation", "routed"])
def test_one_sample(model: Any, design: str) -> None:
    with pytest.raises(InputError, match="`tokens`"):
        found(model, TOKENS[:1], positions="last", design=design)


@pytest.mark.parametrize(
    "positions",
    ["first", 99, -99, slice(50, 60), torch.zeros(9, dtype=torch.bool), torch.ones(4, dtype=torch.bool), torch.ones(9)],
    ids=str,
)
def test_positions(model: Any, positions: Any) -> None:
    with pytest.raises(InputError, match="`positions`"):
        found(model, positions=positions)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), "strong", True, -1])
def test_strength(model: Any, strength: Any) -> None:
    with pytest.raises(InputError, match="`strength`"):
        found(model, strength=strength)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("basis", "features"),
        ("basis", "a0.h0"),
        ("design", "write"),
        ("design", ""),
        ("batch_size", 0),
        ("batch_size", -3),
        ("device", "abacus"),
        ("device", "cuda:99"),
    ],
)
def test_unknown_values_are_named(model: Any, option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{option}`"):
        found(model, **{option: value})


def test_unknown_hooks_are_named_with_near_matches(model: Any) -> None:
    with pytest.raises(InputError, match=r"`blocks\.0\.hook_resid_prae`.*hook_resid_pre"):
        adapt(model).run(TOKENS, None, ["blocks.0.hook_resid_prae"])


@pytest.mark.parametrize("design", ["read", "activation"])
@pytest.mark.parametrize("size", [7, 9])
def test_target_of_the_wrong_length(model: Any, design: str, size: int) -> None:
    for target in (tcl.LogitDiff([3] * size, [4] * size), tcl.Labels(torch.arange(size) % 2), tcl.Values([0.5] * size)):
        with pytest.raises(InputError, match="`target`"):
            found(model, target=target, design=design)


@pytest.mark.parametrize("design", ["read", "activation"])
def test_target_that_names_no_token(model: Any, design: str) -> None:
    with pytest.raises(InputError, match="`target` names token 99"):
        found(model, target=tcl.LogitDiff([99] * 8, [3] * 8), design=design)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = architectures.small()
    list(model.parameters())[3].data.view(-1)[-1] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        found(model)


def test_activations_that_overflow() -> None:
    model = architectures.hooked("no_norm")
    model.blocks[0].mlp.W_out.data *= 1e30
    model.blocks[1].mlp.W_in.data *= 1e30
    with pytest.raises(ModelError):
        found(model)


@pytest.mark.parametrize("design", ["read", "activation"])
def test_numbers_that_half_precision_cannot_hold_are_named_by_layer(design: str) -> None:
    model = architectures.hooked("no_norm", n_layers=3).to(torch.float16)
    model.blocks[1].mlp.W_out.data.fill_(6e4)
    with pytest.raises(ModelError, match=r"at mlp_out\.1 are NaN or infinite.*torch\.float16.*bfloat16 or float32"):
        found(model, design=design)


def test_a_model_without_values() -> None:
    model = architectures.small()
    torch.nn.Module.to(model, "meta")
    with pytest.raises(ModelError, match="meta"):
        found(model)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2), "gpt2"], ids=str)
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(ModelError, match="`model`"):
        found(thing)


# ---- data without information ---------------------------------------------------------------------------------------


def silent() -> Any:
    """Components that write nothing but constants."""
    model = architectures.hooked("no_norm")
    for name, weight in model.named_parameters():
        if "embed" in name and "un" not in name:
            weight.data.fill_(0.3)
    return model


@pytest.mark.parametrize(
    ("design", "basis"),
    [("read", "component"), ("activation", "component"), ("routed", "component"), ("activation", "neuron"),
     ("activation", "residual")],
)  # fmt: skip
@pytest.mark.parametrize("strength", ["auto", 0.0, 0.5])
def test_constant_activations(design: str, basis: str, strength: Any) -> None:
    """An empty graph or an error of this library; never a crash, never a NaN."""
    try:
        graph = found(silent(), design=design, basis=basis, strength=strength)
    except CircuitLassoError as error:
        assert "`" in str(error)
        return
    assert graph.n_kept == 0 and bool(graph.score.isfinite().all())


@pytest.mark.parametrize("design", ["read", "activation", "routed"])
def test_equal_prompts(design: str) -> None:
    """The same prompt over and over, read at its end: nothing varies, so nothing can be explained."""
    try:
        graph = found(architectures.hooked("gpt2"), TOKENS[:1].expand(8, -1), positions="last", design=design)
    except CircuitLassoError as error:
        assert "`" in str(error)
        return
    assert graph.n_kept == 0 and bool(graph.score.isfinite().all())


def test_constant_values_as_a_target(model: Any) -> None:
    for design in ("read", "activation"):
        try:
            graph = found(model, target=tcl.Values([2.0] * 8), design=design, strength=0.2)
        except CircuitLassoError as error:
            assert "`" in str(error)
        else:
            assert graph.n_kept == 0


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graph.json", "graph.safetensors", ""])
def test_a_folder_that_cannot_be_written(model: Any, name: str, tmp_path: Path) -> None:
    graph = found(model)
    blocked = tmp_path / "a file"
    blocked.write_text("not a folder")
    with pytest.raises(InputError, match="`path`"):
        graph.save(blocked / "below" / name)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="`path`"):
            graph.save(tmp_path / "locked" / name)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"kind": "recipe"}', b"\x80\x04\x95pickle", bytes(range(64))], ids=range(6)
)
def test_a_foreign_or_broken_graph_file(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"graph{suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="graph"):
        tcl.AttributionGraph.load(path)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_graph_file(model: Any, suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"graph{suffix}"
    found(model).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FormatError, match="graph"):
        tcl.AttributionGraph.load(path)


def test_a_missing_graph_file(tmp_path: Path) -> None:
    for name in ("none.json", "none.safetensors", "none"):
        with pytest.raises(FormatError, match="none"):
            tcl.AttributionGraph.load(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(range(64))], ids=range(3))
def test_a_broken_checkpoint(model: Any, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="half"):
        found(model, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written(model: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("not a folder")
    with pytest.raises(InputError, match=r"`path`|`checkpoint`"):
        found(model, checkpoint=blocked / "c.safetensors")
