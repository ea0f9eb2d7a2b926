"""What attention makes of a feature elsewhere, against derivatives with frozen patterns; and what such edges do."""

from dataclasses import replace
from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae.test_feature_reads import CHILD, CODES, FEATURES, MID, POST, TOKENS, encoders, pair
from tl_circuitlasso.features import effects
from tl_circuitlasso.features.effects import changes
from tl_circuitlasso.features.samples import Column, Gate, Part
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import CodePlan, encode_batch, route_key
from tl_circuitlasso.models.feature_reads import Reads, heads_between, reads_of
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.sites import PORTS

BEFORE = "blocks.0.hook_resid_post"
EVERY = torch.arange(FEATURES)


def collected(adapter: Adapter, ends: dict[str, Encoder], *, by_head: bool) -> tuple[Reads, dict[str, Tensor]]:
    """The reads between two hooks over all tokens, and the sum over samples of what is seen of each feature."""
    batch = next(iter(Prompts(adapter, TOKENS)))
    reads = reads_of(adapter, ends, [tuple(ends)], batch, None, mixed=True)  # type: ignore[list-item]
    plan = CodePlan(ends, {BEFORE: {"1-2": range(1, 2)}}, by_head, {}, None, False, None, False)
    chunk = encode_batch(adapter, plan, batch, 0, reads)
    return reads, {key: torch.from_numpy(codes.matrix().sum(0)).flatten() for key, codes in chunk.codes.items()}


def brought(model: Any, x: Tensor, codes: Tensor, directions: Tensor, heads: list[int]) -> Tensor:
    """sum over positions of what layer 1's heads make of z_i d_i, patterns and norms as they are: by derivatives."""
    block, kept = model.blocks[1], {}

    def freeze(name: str, value: Tensor) -> Tensor:
        return kept.setdefault(name, value.detach())

    def only(pattern: Tensor) -> Tensor:
        some = torch.zeros_like(pattern)
        some[:, heads] = freeze("pattern", pattern)[:, heads]
        return some

    def attention(stream: Tensor) -> Tensor:
        normed = block.ln1(stream)
        return block.attn(query_input=normed, key_input=normed, value_input=normed)

    points = [(block.attn.hook_pattern, only)]
    if hasattr(block.ln1, "hook_scale"):
        points.append((block.ln1.hook_scale, lambda scale: freeze("scale", scale)))
    for point, function in points:
        point.add_hook(lambda value, hook, function=function: function(value))
    try:
        attention(x)
        rows = [
            torch.func.jvp(attention, (x,), (code[..., None] * direction,))[1].sum((0, 1))
            for code, direction in zip(codes.movedim(-1, 0), directions)
        ]
    finally:
        model.reset_hooks()
    return torch.stack(rows).detach()


@pytest.mark.parametrize("family", ["gpt2", "llama", "no_norm", "pythia"])
@pytest.mark.parametrize("by_head", [False, True])
def test_responses_are_derivatives_with_frozen_patterns(family: str, by_head: bool, monkeypatch) -> None:
    monkeypatch.setattr("tl_circuitlasso.models.feature_codes.LEAST_ATTENTION", 0.0)
    model = architectures.hooked(family)
    adapter = adapt(model)
    last = POST if adapter.shape.parallel else MID  # where MLPs stand beside the heads they don't read what those write
    ends = encoders(adapter, BEFORE, last)
    reads, seen = collected(adapter, ends, by_head=by_head)
    x = adapter.run(TOKENS, None, [BEFORE])[BEFORE]
    words = next(iter(Prompts(adapter, TOKENS))).words
    codes = torch.where(words[..., None], ends[BEFORE].encode(x.flatten(0, 1)).view(*x.shape[:2], -1), 0)
    heads = range(adapter.shape.n_heads)
    found = reads.mixed(BEFORE, last, EVERY, by_head=by_head)
    assert len(found) == (len(heads) if by_head else 1)
    for number, response in enumerate(found):
        some = [number] if by_head else list(heads)
        mass = seen[route_key(BEFORE, "1-2", number if by_head else None)]
        expected = brought(model, x, codes, ends[BEFORE].decoder, some)
        torch.testing.assert_close(response * mass[:, None], expected, rtol=1e-3, atol=1e-4)
        assert float(expected.norm()) > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mlps_behind_the_heads_answer_as_they_do_on_average(family: str) -> None:
    adapter = adapt(architectures.hooked(family))
    ends = encoders(adapter, BEFORE, POST)
    reads, _ = collected(adapter, ends, by_head=False)
    (whole,), (heads,) = (reads.mixed(BEFORE, hook, EVERY, by_head=False) for hook in (POST, MID))
    assert list(reads.sums) == [(BEFORE, 1)] and list(reads.attended) == [(BEFORE, 1)]
    answer = reads.sums[BEFORE, 1].answer_anywhere(adapter, 1, heads)
    torch.testing.assert_close(whole, heads + answer)
    assert float(answer.norm()) > 0.01 * float(heads.norm())


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        (BEFORE, POST, [1]),
        ("hook_embed", POST, [0, 1]),
        (MID, POST, []),
        ("blocks.0.attn.hook_z", POST, []),
        (BEFORE, "blocks.1.hook_mlp_out", []),
    ],
)
def test_which_heads_stand_between(written: str, read: str, expected: list[int]) -> None:
    assert list(heads_between(adapt(architectures.hooked("llama")), written, read)) == expected


def test_without_a_look_through_attention_nothing_of_it_is_known() -> None:
    adapter = adapt(architectures.hooked("llama"))
    ends, batch = encoders(adapter, BEFORE, POST), next(iter(Prompts(adapter, TOKENS)))
    reads = reads_of(adapter, ends, [(BEFORE, POST)], batch, None)
    assert not reads.attended and reads.mixed(BEFORE, POST, EVERY, by_head=False) == []


def test_attention_is_told_where_mlps_cannot_be() -> None:
    adapter = adapt(architectures.hooked("solu"))
    ends = encoders(adapter, BEFORE, POST)
    reads, _ = collected(adapter, ends, by_head=False)
    assert not reads.sums and list(reads.attended) == [(BEFORE, 1)]
    (response,) = reads.mixed(BEFORE, POST, EVERY, by_head=False)
    assert bool(response.isfinite().all()) and float(response.norm()) > 0


@pytest.mark.parametrize("compiled", [True, False])
def test_a_feature_that_fires_itself_is_not_counted_again(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(effects, "numba_available", lambda: False)
    seen = torch.tensor([[0.5, 2.0], [1.0, 0.0], [4.0, 1.0]])
    both = scipy.sparse.csr_matrix(torch.cat([CODES, seen], 1).numpy())
    child = scipy.sparse.csr_matrix(CHILD.numpy())
    part = Part(both, torch.zeros(3, 0), child, torch.arange(3))
    data = replace(
        pair(CODES, CHILD),
        columns=(Column("a", ""), Column("a>1-2", "v")),
        reads=torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.25, 0.1], [0.3, 0.25]], dtype=torch.float64),
        gate=Gate(torch.zeros(2)),
        given=(part,),
    )
    found, mass = changes(data, torch.tensor([0, 2, 2, 3]), torch.tensor([0, 0, 1, 1]))
    # 0 fires in the first two samples, 1 in the last two: (4, 7) and (4, .5) in the last; (2, 1) in the first
    assert found.tolist() == pytest.approx([3 * 0.5, 4 * 0.25, 4 * 0.1, 2 * 0.25])
    assert mass.tolist() == [4.0, 7.0]


@pytest.mark.parametrize("mixing", ["mean", "heads"])
def test_edges_through_attention_do_what_is_said(mixing: str, stories, saes, story_tokens) -> None:
    basis = tcl.SAEFeatures(saes, mixing=mixing)
    graph = tcl.circuit_lasso(stories, story_tokens[:256], basis=basis, progress=False)
    seen = graph.port == PORTS.index("v")
    assert bool((graph.kept & seen).any()) and bool((graph.kept & ~seen).any())
    some = replace(graph, kept=seen & (graph.score.abs() > 0.01))  # small ones, too
    found = tcl.evaluate.edges(some, stories, basis, story_tokens, strongest=20,
                               sample=40, non_edges=20, prompts=8, progress=False)  # fmt: skip
    kept = found.table[found.table["set"] == "kept"]
    right = kept["weight"] * kept["effect"] > 0
    assert float(right[kept["real"]].mean()) >= 0.9 and float(right.mean()) >= 0.7
