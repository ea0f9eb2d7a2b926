"""What MLPs make of a feature on average, against derivatives taken token by token; and what edges then do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae import training
from tl_circuitlasso.features.effects import LEAST, changes, is_clear
from tl_circuitlasso.features.fit import PER_TARGET, Regressed
from tl_circuitlasso.features.samples import Column, Gate, PairData, Part
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.codes import sparse_codes
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_reads import Reads, mlps_between, reads_of
from tl_circuitlasso.models.feature_setup import READS
from tl_circuitlasso.models.feature_store import CodeStore
from tl_circuitlasso.models.tokens import Prompts

FEATURES = 7
MID, POST = "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"
PRE = "blocks.1.hook_resid_pre"
TOKENS = torch.randint(0, 31, (6, 9), generator=torch.Generator().manual_seed(3))


def encoders(adapter: Adapter, *hooks: str) -> dict[str, Encoder]:
    found = {}
    for number, hook in enumerate(hooks):
        x = adapter.run(TOKENS, None, [hook])[hook].flatten(0, 1)
        found[hook] = Encoder(training.plain_sae(x, FEATURES, share=0.3, seed=number), hook, hook)
    return found


def summed(adapter: Adapter, ends: dict[str, Encoder], *, parts: int = 1) -> Reads:
    """The reads between two hooks over all tokens, taken in by parts."""
    batch = next(iter(Prompts(adapter, TOKENS)))
    first, last = ends
    reads = reads_of(adapter, ends, [(first, last)], batch, None)
    for tokens in TOKENS.chunk(parts):
        acts = adapter.run(tokens, None, {first, *reads.wanted()})
        rows = tuple(torch.ones_like(tokens).nonzero().T)
        dense = ends[first].encode(acts[first][rows])
        reads.add(first, dense, sparse_codes(dense), acts, rows)
    return reads


def mean_response(model: Any, x: Tensor, codes: Tensor, directions: Tensor) -> Tensor:
    """d_i + sum_m z_mi (J_m d_i) / sum_m z_mi by forward derivatives of layer 1's norm and MLP."""
    block = model.blocks[1]

    def mlp(stream: Tensor) -> Tensor:
        return block.mlp(block.ln2(stream[None]))[0]

    rows = []
    for code, direction in zip(codes.T, directions):
        change = torch.func.jvp(mlp, (x,), (code[:, None] * direction,))[1].sum(0)
        rows.append(direction + change / code.sum())
    return torch.stack(rows).detach()


@pytest.mark.parametrize(
    ("kind", "family"),
    [("hooked", name) for name in ("gpt2", "llama", "folded", "no_norm", "pythia")]
    + [("bridge", name) for name in ("gpt2", "llama")],
)
def test_responses_are_mean_derivatives(kind: str, family: str) -> None:
    model = architectures.hooked(family) if kind == "hooked" else architectures.bridge(family)
    adapter = adapt(model)
    start = PRE if adapter.shape.parallel else MID
    start = start if kind == "hooked" or adapter.shape.parallel else "blocks.1.hook_attn_out"
    x = adapter.run(TOKENS, None, [PRE if adapter.shape.parallel else "resid_post.1", "mlp_out.1"])
    stream = x[PRE] if adapter.shape.parallel else x["resid_post.1"] - x["mlp_out.1"]
    ends = encoders(adapter, start, POST)
    reads = summed(adapter, ends)
    assert list(reads.sums) == [(start, 1)]
    codes = ends[start].encode(adapter.run(TOKENS, None, [start])[start].flatten(0, 1))
    assert bool((codes.sum(0) > 0).all())
    expected = mean_response(model, stream.flatten(0, 1), codes, ends[start].decoder)
    found = reads.responses(start, POST, torch.arange(FEATURES))
    assert float((expected - ends[start].decoder).norm()) > 0.05 * float(expected.norm())  # there is something to tell
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        reads.responses(start, POST, torch.tensor([4, 2])), expected[[4, 2]], rtol=1e-4, atol=1e-5
    )


def test_parts_and_densities_give_the_same_sums() -> None:
    adapter = adapt(architectures.hooked("llama"))
    ends = encoders(adapter, MID, POST)
    whole, parted = summed(adapter, ends), summed(adapter, ends, parts=3)
    dense = summed(adapter, ends, parts=2)
    for key, total in whole.sums.items():
        for name, values in total.tensors().items():
            torch.testing.assert_close(values, parted.sums[key].tensors()[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, dense.sums[key].tensors()[name], rtol=1e-4, atol=1e-5)


def test_a_feature_that_never_fired_is_read_like_all_samples() -> None:
    adapter = adapt(architectures.hooked("no_norm"))
    ends = encoders(adapter, MID, POST)
    reads = summed(adapter, ends)
    total = reads.sums[MID, 1]
    total.mass[0] = 0.0
    torch.testing.assert_close(total.mean("slopes", torch.tensor([0]))[0], total.mean_slopes / total.count)
    assert bool(reads.responses(MID, POST, torch.tensor([0])).isfinite().all())


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", [1]),
        ("blocks.0.hook_resid_post", "blocks.3.hook_resid_mid", [1, 2]),
        ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre", [0]),
        ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", []),
        ("blocks.0.hook_attn_out", "blocks.0.hook_resid_post", [0]),
        ("hook_embed", "blocks.0.hook_resid_post", [0]),
        ("blocks.0.attn.hook_z", "blocks.1.hook_resid_post", []),
        ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", []),
    ],
)
def test_which_mlps_stand_between(written: str, read: str, expected: list[int]) -> None:
    assert list(mlps_between(adapt(architectures.hooked("llama")), written, read)) == expected


def test_parallel_layers_read_what_is_in_front_of_them() -> None:
    adapter = adapt(architectures.hooked("pythia"))
    assert list(mlps_between(adapter, "blocks.0.hook_attn_out", "blocks.1.hook_resid_post")) == [1]
    assert list(mlps_between(adapter, "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")) == [0, 1]


@pytest.mark.parametrize("family", ["solu", "moe", "attn_only"])
def test_mlps_that_cannot_be_read_are_left_out(family: str) -> None:
    adapter = adapt(architectures.hooked(family))
    ends = encoders(adapter, "blocks.0.hook_resid_pre", POST)
    reads = reads_of(adapter, ends, [tuple(ends)], next(iter(Prompts(adapter, TOKENS))), None)  # type: ignore[list-item]
    assert not reads.sums and not reads.wants_more and not reads.wanted()
    direct = reads.responses("blocks.0.hook_resid_pre", POST, torch.arange(FEATURES))
    torch.testing.assert_close(direct, ends["blocks.0.hook_resid_pre"].decoder)


def test_sums_without_room_are_left_out() -> None:
    adapter = adapt(architectures.hooked("llama"))
    ends, batch = encoders(adapter, MID, POST), next(iter(Prompts(adapter, TOKENS)))
    need = 4 * FEATURES * (2 * adapter.shape.d_mlp + adapter.shape.d_model)
    assert reads_of(adapter, ends, [(MID, POST)], batch, need).sums
    assert not reads_of(adapter, ends, [(MID, POST)], batch, need - 1).sums


def test_sums_come_back_from_a_file(tmp_path: Path) -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    ends = encoders(adapter, MID, POST)
    reads = summed(adapter, ends)
    reads.samples = 54
    reads.save(tmp_path / "reads", {"model": "one"})
    again = Reads(adapter, ends, reads.layers)
    again.load(tmp_path / "reads", {"model": "another"})
    assert again.wants_more and not again.samples
    again.load(tmp_path / "reads", {"model": "one"})
    assert not again.wants_more and again.samples == 54
    every = torch.arange(FEATURES)
    assert torch.equal(again.responses(MID, POST, every), reads.responses(MID, POST, every))


def test_a_resumed_run_reads_the_same(demo, tmp_path: Path) -> None:
    """With the sums' file, without it, and with the codes alone."""
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    acts = adapt(demo.model).run(demo.tokens, None, hooks)
    saes = {hook: training.plain_sae(acts[hook][:, 1:].flatten(0, 1), 24, seed=3) for hook in hooks}

    def learn() -> tcl.AttributionGraph:
        basis = tcl.SAEFeatures(saes, pairs=[hooks])
        return tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, checkpoint=tmp_path / "run", progress=False)

    first = learn()
    assert (tmp_path / "run" / READS).exists()
    for lost in (["pair-0000.safetensors"], ["pair-0000.safetensors", READS]):
        for name in lost:
            (tmp_path / "run" / name).unlink()
        again = learn()
        assert again.kept_edges() == first.kept_edges()
        torch.testing.assert_close(again.weight, first.weight, rtol=1e-5, atol=1e-7)


def pair(codes: Tensor, child: Tensor) -> PairData:
    part = Part(
        scipy.sparse.csr_matrix(codes.numpy()),
        torch.zeros(len(codes), 0),
        scipy.sparse.csr_matrix(child.numpy()),
        torch.arange(len(codes)),
    )
    columns, store = (Column("a", ""),), CodeStore(None, 1 << 20, {})
    sizes = [torch.arange(x.shape[1]) for x in (codes, child)]
    return PairData(store, "a", "b", columns, *sizes, 0, False, 0.0, given=(part, part))


CODES = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
CHILD = torch.tensor([[0.0, 1.0], [4.0, 0.0], [7.0, 0.5]])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("gate", "reads", "expected"),
    [
        # 0 -> 0 meets once (3, 4), 0 -> 1 once (1, 1), 1 -> 0 twice (2, 4) and (5, 7), 1 -> 1 once (5, .5)
        (Gate(torch.zeros(2)), [[0.5, 0.5], [0.5, 0.5]], [3 * 0.5, 1 * 0.5, (2 + 5) * 0.5, 0.5]),
        (None, [[-0.5, -0.5], [-0.5, -0.5]], [-1.5, -0.5, -3.5, -2.5]),  # nothing holds back codes that rise
        (Gate(torch.tensor([3.0, 0.6])), [[0.5, 0.5], [0.5, 0.5]], [4.0, 1.0, 2 * 0.5 + 5 * 0.5, 0.5]),
        # 7 falls to .75, or to .25, where .5 has its place, unless that falls too
        (Gate(torch.zeros(2), top=True), [[0.5, 0.5], [1.25, 0.0]], [1.5, 0.5, 2 * 1.25 + 5 * 1.25, 0.0]),
        (Gate(torch.zeros(2), top=True), [[0.5, 0.5], [1.35, 0.0]], [1.5, 0.5, 2 * 1.35 + 7, 0.0]),
        (Gate(torch.zeros(2), top=True), [[0.5, 0.5], [1.35, 0.1]], [1.5, 0.5, 2 * 1.35 + 5 * 1.35, 0.5]),
    ],
)
def test_codes_follow_what_is_taken_out_or_go_altogether(
    gate: Gate | None,
    reads: list[list[float]],
    expected: list[float],
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tl_circuitlasso.features.effects.numba_available", lambda: compiled)
    data = replace(pair(CODES, CHILD), gate=gate, reads=torch.tensor(reads, dtype=torch.float64))
    found, mass = changes(data, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert (found / 2).tolist() == pytest.approx(expected)  # of two equal parts
    assert (mass / 2).tolist() == [4.0, 7.0]


@pytest.mark.parametrize("top", [True, False])
def test_compiled_or_not_effects_are_the_same(top: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges in any order, and codes with copies behind the parent's features."""
    random = torch.Generator().manual_seed(2)
    codes, child = (torch.relu(torch.randn(200, size, generator=random) - 0.5) for size in (12, 9))
    whole = pair(codes, child)
    gate = Gate(torch.rand(9, generator=random), top)
    data = replace(whole, features=torch.arange(8), gate=gate, reads=torch.randn(8, 9, generator=random).double())
    source, target = (torch.randint(size, (30,), generator=random) for size in (8, 9))
    fast, mass = changes(data, source, target)
    monkeypatch.setattr("tl_circuitlasso.features.effects.numba_available", lambda: False)
    slow, again = changes(data, source, target)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(mass, again)
    torch.testing.assert_close(mass, 2 * codes[:, :8].double().sum(0), rtol=1e-6, atol=1e-6)
    assert bool((fast != 0).any())


def test_small_effects_are_not_clear() -> None:
    named = {
        "source": torch.tensor([0, 0, 1, 2]),
        "target": torch.tensor([0, 1, 0, 0]),
        "effect": torch.tensor([2 * LEAST, 2 * LEAST, 2 * LEAST, torch.nan]),
        "score": torch.tensor([2 * LEAST, LEAST / 2, 2 * LEAST, 0.001]),
        **{name: torch.zeros(4) for name in ("weight", "lasso", "stability")},
        **{name: torch.zeros(2) for name in PER_TARGET},
        "iterations": torch.zeros(2, dtype=torch.int64),
        "converged": torch.ones(2, dtype=torch.bool),
    }
    found = Regressed.of(named, {"overall": None, "samples": 3, "seconds": {}})
    # clear; too small in standard deviations; too small in lengths; not known
    assert is_clear(found, torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0])).tolist() == [True, False, False, True]


@pytest.mark.parametrize("strength", ["ebic", "cv"])
def test_rules_for_strengths_know_the_reads(strength: str, demo, demo_saes) -> None:
    """Without W_enc nothing would be read: these have one."""
    graph = tcl.circuit_lasso(
        demo.model, demo.tokens, basis=tcl.SAEFeatures(demo_saes), strength=strength, progress=False
    )
    table = graph.edge_table()
    inner = table[table["source"].str.contains("#") & table["target"].str.contains("#")]
    assert len(inner) and bool((inner["lasso"] * inner["weight"] >= 0).all())


def test_effects_are_those_of_interventions(stories, saes, story_tokens, story_graph) -> None:
    """Weights of kept edges beside what taking the source out does to the target, on the same texts."""
    found = tcl.evaluate.edges(story_graph, stories, saes, story_tokens, strongest=40, sample=80, non_edges=40,
                               prompts=24, progress=False)  # fmt: skip
    some = found.table[found.table["set"] == "kept"]
    assert float((some["weight"] * some["effect"] > 0).mean()) >= 0.95
    assert some[["weight", "effect"]].abs().corr("spearman").iloc[0, 1] > 0.75
    assert (some["weight"] / some["effect"]).median() == pytest.approx(1.0, abs=0.2)
