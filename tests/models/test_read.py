"""The design `read`: fair pairs, sums that add up however they were collected, and graphs whose truth is planted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import architectures
from tl_circuitlasso.data import schema
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import read
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.bases import Component
from tl_circuitlasso.models.collect import Plan, collect
from tl_circuitlasso.models.pairing import make_pairs
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.tokens import Prompts

# ---- sums -----------------------------------------------------------------------------------------------------------


def collected(model: Any, tokens: Any, **options: Any) -> Statistics:
    adapter = adapt(model)
    given_mask = options.pop("attention_mask", None)
    prompts = Prompts(
        adapter,
        tokens,
        attention_mask=given_mask,
        batch_size=options.pop("batch_size", 8),
        positions=options.pop("positions", "all"),
    )
    design = ReadDesign(Component(), rows=options.pop("rows", read.ROWS))
    plan = Plan(design, options.pop("target", None), last=options.pop("last", False), **options)
    return collect(adapter, prompts, plan, progress=False).statistics


def assert_same_sums(one: Statistics, other: Statistics, tolerance: float = 1e-9) -> None:
    assert one.sums.keys() == other.sums.keys()
    for key, value in one.sums.items():
        torch.testing.assert_close(value, other.sums[key], rtol=tolerance, atol=tolerance * 1e-3, msg=key)


@pytest.mark.parametrize("family", ["gpt2", "bidirectional"])
def test_the_size_of_parts_does_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = architectures.hooked(family, dtype=torch.float64), architectures.prompts(batch=16)
    whole = collected(model, tokens)
    monkeypatch.setattr(read, "ON_CPU", 1)
    assert_same_sums(whole, collected(model, tokens))


def test_the_columns_of_a_head_are_q_then_k_then_v() -> None:
    model = architectures.hooked("no_norm")
    model.blocks[1].attn.W_V.data.zero_()  # the last heads move nothing
    model.blocks[1].attn.b_V.data.zero_()
    model.blocks[0].attn.W_Q.data.zero_()  # the first heads' patterns ignore what the residual stream says
    model.blocks[0].attn.b_Q.data.zero_()
    statistics = collected(model, architectures.prompts(batch=16))
    sizes = [heads * sources * len(schema.ports(key)) for key, heads, sources in read.children(adapt(model))]
    parts = dict(zip(("a0", "m0", "a1", "m1", "target"), statistics.rows["contributions"].square().sum(0).split(sizes)))
    first, last = parts["a0"].view(4, 3), parts["a1"].view(4, 3 * 6)
    assert not bool(first[:, 1].any()) and bool((first[:, 2] > 0).all())  # without queries no key matters
    assert not bool(statistics.sums["cost/a0/k"].any()) and bool(statistics.sums["cost/a0/v"].sum(0).all())
    assert not bool(last.any())  # without values it doesn't matter either where a head looks


def test_rows_are_in_nats_to_second_order() -> None:
    """Between prompts that hardly differ, the squares of a row's entries are what the edges cost, each alone."""
    model = architectures.hooked("no_norm", dtype=torch.float64)
    weight = model.embed.W_E
    weight.data.copy_(weight.data[3:4] + 1e-3 * (weight.data - weight.data[3:4]))
    statistics = collected(model, architectures.prompts(batch=16))
    target = statistics.rows["contributions"][:, -11:].double().square().sum(0)
    torch.testing.assert_close(target, statistics.sums["cost/target/"].sum(0)[0], rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
def test_the_side_of_the_padding_does_not_matter(left: bool) -> None:
    """Prompts of several lengths; position by position the same words face each other."""
    model = architectures.hooked("llama", dtype=torch.float64)
    lengths = [4, 6, 5, 4, 9, 7, 9, 6]
    rows = [architectures.prompts(length=length, batch=1, seed=n)[0] for n, length in enumerate(lengths)]
    tokens, mask = torch.full((8, 9), 2), torch.zeros(8, 9, dtype=torch.bool)
    plain, plain_mask = tokens.clone(), mask.clone()
    for number, row in enumerate(rows):
        where = slice(9 - len(row), 9) if left else slice(1, 1 + len(row)) if len(row) < 9 else slice(0, 9)
        tokens[number, where], mask[number, where] = row, True
        plain[number, : len(row)], plain_mask[number, : len(row)] = row, True
    for positions in ("last", -2):
        one = collected(model, tokens, attention_mask=mask, positions=positions)
        other = collected(model, plain, attention_mask=plain_mask, positions=positions)
        assert_same_sums(one, other, 1e-6)


def test_what_is_kept_does_not_grow_with_the_number_of_prompts() -> None:
    model = architectures.hooked("gpt2")
    few, many = (collected(model, architectures.prompts(batch=size), rows=100) for size in (8, 64))
    sizes = [{key: value.numel() for key, value in one.sums.items()} for one in (few, many)]
    assert sizes[0] == sizes[1] and not few.moments
    assert [min(len(one.rows["contributions"]), 100) for one in (few, many)] == [100, 100]
    assert len(many.rows["contributions"]) == 100
    assert float(few.sums["count"].sum()) == 8 and float(many.sums["count"].sum()) == 64


def test_two_workers_statistics_add_up_to_the_whole() -> None:
    model, tokens = architectures.hooked("gpt2", dtype=torch.float64), architectures.prompts(batch=16)
    first, second = collected(model, tokens[:8]), collected(model, tokens[8:])
    both = first + second
    assert both.done == 2 and float(both.sums["count"].sum()) == 16
    for key in both.sums:
        torch.testing.assert_close(both.sums[key], first.sums[key] + second.sums[key])


def test_a_file_holds_all_that_learning_needs(tmp_path: Path) -> None:
    statistics = collected(architectures.hooked("gpt2"), architectures.prompts(batch=16))
    statistics.save(tmp_path / "s.safetensors")
    one, other = learn(statistics), learn(Statistics.load(tmp_path / "s.safetensors"))
    assert one.edge_table().equals(other.edge_table())


# ---- known truths ---------------------------------------------------------------------------------------------------


def planted(path: list[str]) -> Any:
    """A model without norms in which only the components on `path` write anything."""
    model = architectures.hooked("no_norm", seed=3)
    for layer, block in enumerate(model.blocks):
        for head in range(model.cfg.n_heads):
            if f"a{layer}.h{head}" not in path:
                block.attn.W_O.data[head] = 0
        block.attn.b_O.data.zero_()
        if f"m{layer}" not in path:
            block.mlp.W_out.data.zero_()
    return model


def cut(model: Any, *edges: tuple[str, str]) -> None:
    """Give the residual stream one third for each writer, and let readers ignore thirds: no such edge any more."""
    thirds = {"input": slice(0, 8), "a0.h1": slice(8, 16), "m1": slice(16, 24)}
    for source, target in edges:
        where = thirds[source]
        if target == "logits":
            model.unembed.W_U.data[where] = 0
        elif target == "m1":
            model.blocks[1].mlp.W_in.data[where] = 0


@pytest.mark.parametrize("strength", ["auto", 0.0, 0.02])
def test_a_planted_chain_is_found_exactly(strength: Any) -> None:
    model = planted(["a0.h1", "m1"])
    thirds = torch.eye(24).split(8)
    model.embed.W_E.data @= thirds[0].T @ thirds[0]
    model.pos_embed.W_pos.data @= thirds[0].T @ thirds[0]
    model.blocks[0].attn.W_O.data[1] @= thirds[1].T @ thirds[1]
    model.blocks[1].mlp.W_out.data @= thirds[2].T @ thirds[2]
    model.blocks[1].mlp.b_out.data.zero_()
    cut(model, ("input", "logits"), ("a0.h1", "logits"), ("input", "m1"))
    statistics = collected(model, architectures.prompts(batch=64), batch_size=32)
    graph = learn(statistics, strength=strength)
    assert graph.kept_edges() == {("input", "a0.h1"), ("a0.h1", "m1"), ("m1", "logits")}
    assert bool(graph.certificate.converged.all())
    table = graph.edge_table()
    kept = table[table.kept & (table.port == "")]
    assert kept.weight.min() > 0.9 and (kept.score > 0).all()  # each is all that its child gets
    others = table[~table.kept & (table.source + table.target != "inputa0.h1")]
    assert others.score.abs().max() < 1e-2 * table.score.max()  # rounding


def test_parents_and_children_that_cancel_get_signs() -> None:
    """m1 takes back half of some dimensions that the input writes: the edge from m1 works against the rest."""
    model = planted(["m1"])
    model.blocks[1].mlp.act_fn = lambda x: x
    model.blocks[1].mlp.W_in.data = torch.eye(24, 40)
    model.blocks[1].mlp.W_out.data = -0.5 * torch.eye(40, 24)
    model.blocks[1].mlp.W_out.data[8:] = 0
    graph = learn(collected(model, architectures.prompts(batch=32)))
    matrix, place = graph.adjacency(), graph.index.position
    assert graph.kept_edges() == {("input", "logits"), ("input", "m1"), ("m1", "logits")}
    assert float(matrix[place("input"), place("logits")]) > 0 > float(matrix[place("m1"), place("logits")])


def test_moving_all_logits_alike_is_no_edge() -> None:
    """A component that shifts every logit by the same amount moves no prediction."""
    model = planted(["a0.h1", "m1"])
    model.unembed.W_U.data[16:] = 0.7  # the last third reaches all logits alike
    last = torch.eye(24)[:, 16:] @ torch.eye(24)[16:]
    model.blocks[1].mlp.W_out.data @= last
    few = architectures.hooked("no_norm", d_vocab_out=9)
    model.unembed.W_U.data = torch.cat([few.unembed.W_U.data[:16], torch.full((8, 9), 0.7)]).contiguous()
    model.unembed.b_U.data = few.unembed.b_U.data
    model.cfg.d_vocab_out = 9
    statistics = collected(model, architectures.prompts(batch=32))
    cost = statistics.sums["cost/target/"][:, 0].sum(0)
    assert float(cost[-1]) < 1e-6 * float(cost.max())


def test_a_logit_difference_is_read_in_its_own_units() -> None:
    model = planted([])
    tokens = architectures.prompts(batch=16)
    correct, incorrect = [3 + n for n in range(16)], [20] * 16
    statistics = collected(
        model, tokens, target=LogitDiff(correct, incorrect), last=True, positions="last", batch_size=16
    )
    with torch.no_grad():
        logits = model(tokens)[:, -1]
    pairs = make_pairs(
        torch.ones(16, 9, dtype=torch.bool),
        torch.arange(9).eq(8).expand(16, 9),
        torch.Generator().manual_seed(0),
    )
    rows, ids = torch.arange(16), (torch.tensor(correct), torch.tensor(incorrect))
    own = logits[rows, ids[0]] - logits[rows, ids[1]]
    other = logits[pairs.partner, ids[0]] - logits[pairs.partner, ids[1]]
    expected = (other - own).abs().double().sum()
    torch.testing.assert_close(statistics.sums["cost/target/"][:, 0, 0].sum(), expected, rtol=1e-4, atol=1e-4)


def test_one_prompt_a_batch_makes_no_pairs() -> None:
    statistics = collected(architectures.hooked("gpt2"), architectures.prompts(batch=4), batch_size=1)
    with pytest.raises(InputError, match="`tokens`"):
        learn(statistics)
