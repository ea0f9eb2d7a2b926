"""Small models built by hand, each with one thing that straight lines can miss; exact patching says what is true."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.test_learning import CHAIN, read_statistics
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.discover.drawing import draw_by_output
from tl_circuitlasso.discover.garrote import aligned, children
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.outcome import direction_of_others
from tl_circuitlasso.models.tokens import Prompts

BOS = 2


def blank(**config: Any) -> Any:
    """A model that does nothing yet: every weight is 0."""
    transformer_lens = pytest.importorskip("transformer_lens")
    if not hasattr(transformer_lens, "HookedTransformer"):
        pytest.skip("this TransformerLens has no HookedTransformer")
    sizes = {"n_layers": 1, "n_heads": 1, "d_model": 4, "d_head": 4, "d_mlp": 2, "d_vocab": 3, "n_ctx": 4}
    rest = {"act_fn": "relu", "normalization_type": None, "seed": 0}
    model = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**{**sizes, **rest, **config}))
    for weight in model.parameters():
        weight.data.zero_()
    return model.eval()


def exact(model: Any, tokens: Tensor, metric: Callable[[Tensor, Tensor], Tensor], shifts: tuple[int, ...]) -> Any:
    """Each edge's cost when it alone comes from another prompt, by name and port."""
    graphs = [tcl.baselines.exact(model, tokens, tokens.roll(shift, 0), metric, batch_size=256) for shift in shifts]
    rows = [{(r.source, r.target, r.port): r.score for r in graph.edge_table().itertuples()} for graph in graphs]
    return {edge: sum(row[edge] for row in rows) / len(rows) for edge in rows[0]}


def divergence(model: Any, tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        before = model(tokens)[:, -1].log_softmax(-1)

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        return (before[rows].exp() * (logits[:, -1].log_softmax(-1) - before[rows])).sum()

    return metric


def step(mlp: Any, source: int, target: int, threshold: float, steepness: float = 20.0) -> None:
    """An MLP that writes 1 into one dimension where another exceeds a threshold, 0 elsewhere."""
    mlp.W_in.data[source] = steepness
    mlp.b_in.data[:] = torch.tensor([0.5, -0.5]) - steepness * threshold
    mlp.W_out.data[:, target] = torch.tensor([1.0, -1.0])


def test_thresholds_off_the_middle_in_series() -> None:
    """From 0 to 1 the first steps at .3, the second at .7: half the way crosses one of them, from either side."""
    model = blank(n_layers=2)
    model.embed.W_E.data[1, 0] = 1.0
    step(model.blocks[0].mlp, 0, 1, 0.3)
    step(model.blocks[1].mlp, 1, 2, 0.7)
    model.unembed.W_U.data[2, 1] = 6.0
    model.unembed.b_U.data[:] = torch.tensor([3.0, 0.0, -9.0])
    tokens = torch.tensor([[BOS, row % 2] for row in range(32)])
    graph = tcl.circuit_lasso(model, tokens, positions="last", progress=False)
    assert graph.kept_edges() == {("input", "m0"), ("m0", "m1"), ("m1", "logits")}
    truth = exact(model, tokens, divergence(model, tokens), (1, 2, 3))
    for edge, score in graph.pair_scores().items():
        if edge in graph.kept_edges():
            assert score == pytest.approx(truth[(*edge, "")], rel=0.5)


@pytest.mark.parametrize("gap", [30.0, 100.0])
def test_sharp_attention_that_only_queries_decide(gap: float) -> None:
    """The last token points at one of two places; what stands there is copied. Scores lie `gap` apart."""
    model = blank(d_model=6, d_head=6, d_vocab=5, n_ctx=4, attn_only=True)
    attn = model.blocks[0].attn
    model.embed.W_E.data[0, 0], model.embed.W_E.data[1, 0] = 1.0, -1.0  # content
    model.embed.W_E.data[2, 1], model.embed.W_E.data[3, 1] = 1.0, -1.0  # pointers
    model.pos_embed.W_pos.data[1, 2], model.pos_embed.W_pos.data[2, 2] = 1.0, -1.0  # places
    attn.W_Q.data[0, 1, 0], attn.W_K.data[0, 2, 0] = gap / 2 * 6**0.5, 1.0
    attn.b_Q.data[0, 1], attn.W_K.data[0, 2, 1] = 0.0, 0.0
    attn.W_V.data[0, 0, 0], attn.W_O.data[0, 0, 3] = 1.0, 1.0
    model.pos_embed.W_pos.data[0, 4] = model.pos_embed.W_pos.data[3, 4] = 1.0
    attn.W_K.data[0, 4, 2], attn.b_Q.data[0, 2] = -1.0, 10 * gap  # neither BOS nor itself
    model.unembed.W_U.data[3, 0], model.unembed.W_U.data[3, 1] = 3.0, -3.0
    model.unembed.b_U.data[2:] = -20.0
    places = torch.tensor([[0, 1], [1, 0]]).repeat(16, 1)
    pointers = 2 + torch.arange(32) // 2 % 2
    tokens = torch.cat([torch.full((32, 1), 4), places, pointers[:, None]], dim=1)
    graph = tcl.circuit_lasso(model, tokens, positions="last", progress=False)
    table = {(r.source, r.target, r.port): r for r in graph.edge_table().itertuples()}
    truth = exact(model, tokens, divergence(model, tokens), (1, 2, 3))
    assert truth["input", "a0.h0", "q"] > 1.0
    assert table["input", "a0.h0", "q"].kept and table["input", "a0.h0", "v"].kept
    assert table["input", "a0.h0", "q"].score > 0.3 * truth["input", "a0.h0", "q"]


def test_an_effect_through_the_final_norm_alone() -> None:
    """An MLP writes where no logit looks; it only makes the norm divide by more."""
    model = blank(normalization_type="RMS", d_vocab=5, n_ctx=3)
    model.ln_final.w.data[:] = 1.0
    model.blocks[0].ln1.w.data[:] = model.blocks[0].ln2.w.data[:] = 1.0
    model.embed.W_E.data[0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    model.embed.W_E.data[1] = torch.tensor([1.0, 0.0, -1.0, 0.0])
    model.embed.W_E.data[3:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    model.blocks[0].mlp.W_in.data[2, 0] = 1.0
    model.blocks[0].mlp.W_out.data[0, 3] = 6.0
    model.unembed.W_U.data[0, 0], model.unembed.W_U.data[0, 1] = 4.0, -4.0
    tokens = torch.tensor([[4, row % 2] for row in range(32)])
    target = tcl.LogitDiff([0] * 32, [1] * 32)
    graph = tcl.circuit_lasso(model, tokens, target=target, positions="last", progress=False)
    with torch.no_grad():
        before = model(tokens)[:, -1, :2] @ torch.tensor([1.0, -1.0])

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        return -(logits[:, -1, :2] @ torch.tensor([1.0, -1.0]) - before[rows]).abs().sum()

    truth = exact(model, tokens, metric, (1, 2, 3))
    assert truth["m0", "logits", ""] > 0.5
    assert ("m0", "logits") in graph.kept_edges()
    assert graph.pair_scores()["m0", "logits"] == pytest.approx(truth["m0", "logits", ""], rel=0.5)


def test_early_estimates_that_run_away_do_not_raise_the_bar() -> None:
    statistics = read_statistics()
    for key in ("cost/a0/", "cost/a0/v"):
        statistics.sums[key] *= 1000
    assert learn(statistics).kept_edges() == CHAIN


def test_a_direction_of_all_other_tokens_sees_what_two_tokens_miss() -> None:
    """In the mean, half its squared change is the divergence of all but the contrast of the two."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    stream, move = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    logits, changed = stream @ weight, (stream + 0.01 * move) @ weight
    tokens = torch.tensor([[3, 7]]).expand(6000, -1)
    rows = logits.expand(6000, -1)
    direction = direction_of_others(weight, rows, rows.softmax(-1), tokens, None, generator)[:, 0]
    before, after = logits.log_softmax(-1), changed.log_softmax(-1)
    whole = (before.exp() * (before - after)).sum()
    two, two_after = before[[3, 7]].log_softmax(-1), after[[3, 7]].log_softmax(-1)
    within = before[[3, 7]].exp().sum() * (two.exp() * (two - two_after)).sum()
    found = (direction @ (0.01 * move)).square().mean() / 2
    assert float(found) == pytest.approx(float(whole - within), rel=0.1)


@pytest.mark.parametrize("target", ["own", "difference"])
def test_kept_scores_are_what_patching_finds(target: str) -> None:
    """Within a factor of two, and in proportion, for nats and for logits."""
    demo = tcl.load_demo(prompts=32)
    with torch.no_grad():
        last = demo.model(demo.tokens)[:, -1]
    rows = torch.arange(32)
    before = last[rows, demo.correct] - last[rows, demo.incorrect]

    def change(logits: Tensor, some: Tensor) -> Tensor:
        here = torch.arange(len(some))
        after = logits[here, -1, demo.correct[some]] - logits[here, -1, demo.incorrect[some]]
        return -(after - before[some]).abs().sum()

    asked = demo.target if target == "difference" else None
    graph = tcl.circuit_lasso(demo.model, demo.tokens, target=asked, positions="last", progress=False)
    assert graph.kept_edges() == demo.true_edges
    metric = change if target == "difference" else divergence(demo.model, demo.tokens)
    by_port = exact(demo.model, demo.tokens, metric, (1, 5, 11))
    kept = sorted(graph.kept_edges())
    truth = [max(value for key, value in by_port.items() if key[:2] == edge) for edge in kept]
    scores = [graph.pair_scores()[edge] for edge in kept]
    assert all(0.5 < score / value < 2 for score, value in zip(scores, truth))
    if target == "own":  # the differences all cost the same, within a fifth
        assert pearsonr(scores, truth).statistic > 0.9


def test_rare_behaviour_is_drawn() -> None:
    """One prompt in a hundred says something else: all of those are looked at, each weighing one."""
    model = blank(d_vocab=4, n_ctx=3)
    model.embed.W_E.data[0, 0], model.embed.W_E.data[1, 1] = 5.0, 5.0
    model.unembed.W_U.data[0, 0], model.unembed.W_U.data[1, 1] = 1.0, 1.0
    rare = torch.zeros(500, dtype=torch.bool)
    rare[::100] = True
    tokens = torch.stack([torch.full((500,), 3), rare.long()], dim=1)
    adapter = adapt(model)
    drawn = draw_by_output(adapter, Prompts(adapter, tokens), None, 64, 0, progress=False)
    assert len(drawn.rows) == 64 and int(rare[drawn.rows].sum()) == 5 and drawn.strata == 2
    assert float(drawn.weight.mean()) == pytest.approx(1.0)
    assert float(drawn.weight[rare[drawn.rows]].sum() / drawn.weight.sum()) == pytest.approx(0.01)
    graph = tcl.circuit_lasso(model, tokens, positions="last", max_prompts=64, progress=False)
    assert graph.kept_edges() == {("input", "logits")} and graph.provenance["drawn"]["prompts"] == 64


@pytest.mark.parametrize("strength", ["auto", 0.05])
def test_what_leaves_all_probabilities_alone_changes_nothing(strength: Any) -> None:
    """The same direction added to every column of the unembedding."""
    plain, moved = (architectures.hooked("no_norm", dtype=torch.float64) for _ in range(2))
    shift = torch.randn(plain.cfg.d_model, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved.unembed.W_U.data += 3 * shift
    tokens = architectures.prompts(batch=16)
    one, other = (tcl.circuit_lasso(model, tokens, strength=strength, progress=False) for model in (plain, moved))
    assert one.kept_edges() == other.kept_edges()
    torch.testing.assert_close(one.score, other.score, rtol=1e-5, atol=1e-8 * float(one.score.abs().max()))


def test_an_empty_circuit_is_told() -> None:
    """A model whose prediction doesn't depend on its prompt."""
    model = blank()
    tokens = torch.tensor([[BOS, row % 2] for row in range(8)])
    with pytest.warns(UserWarning, match="the circuit is empty"):
        graph = tcl.circuit_lasso(model, tokens, progress=False)
    assert not graph.kept.any() and graph.provenance["warnings"]


def test_contrast_pairs_give_signed_effects_that_add_up() -> None:
    """Into the logits they sum to the drop of the logit difference; what both prompts share has no effect."""
    demo = tcl.load_demo(prompts=32)
    graph = tcl.circuit_lasso(
        demo.model, demo.tokens, corrupted=demo.corrupted, target=demo.target, positions="last", progress=False,
        refined=False,
    )  # fmt: skip
    assert graph.kept_edges() == demo.true_edges
    rows = torch.arange(32)
    with torch.no_grad():
        clean, other = (demo.model(tokens)[:, -1] for tokens in (demo.tokens, demo.corrupted))
    drop = sum(s * (x[rows, demo.correct] - x[rows, demo.incorrect]).mean() for s, x in ((1, clean), (-1, other)))
    table, effect, size = graph.edge_table(), graph.extras["mean_effect"], graph.extras["mean_abs"]
    assert table[table.target == "logits"].mean_effect.sum() == pytest.approx(float(drop), rel=1e-3)
    assert (size + 1e-9 >= graph.score.abs()).all() and (graph.score.abs() + 1e-9 >= effect.abs()).all()
    torch.testing.assert_close(graph.score, effect.sign() * (effect.abs() * size).sqrt())
    assert graph.provenance["partners"] == "corrupted" and graph.provenance["prompt_pairs"] == 32


def test_the_regression_decides_where_costly_edges_carry_too_little(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tl_circuitlasso.discover import growing, learning_read

    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, other = architectures.prompts(batch=16), architectures.prompts(batch=16, seed=5)
    target = tcl.LogitDiff([1] * 16, [2] * 16)
    options = {"corrupted": other, "target": target, "positions": "last", "progress": False, "refined": False}
    monkeypatch.setattr(growing, "ENOUGH", 1.0)
    assert tcl.circuit_lasso(model, clean, **options).provenance["chosen_by"] == "regression"
    monkeypatch.setattr(learning_read, "MANY_PAIRS", 0)  # for itself, not for what the costly edges carry
    monkeypatch.setattr(growing, "ENOUGH", 0.0)
    decided = tcl.circuit_lasso(model, clean, checkpoint=tmp_path / "statistics", **options)
    assert decided.provenance["chosen_by"] == "regression"
    weight = decided.weight
    assert float(weight.max()) <= 1 and float(weight.min()) >= 0  # no parent stands for others
    count = len({(int(s), int(t)) for s, t in zip(decided.source[weight > 0], decided.target[weight > 0])})
    found = children(Statistics.load(tmp_path / "statistics"), decided.index)
    # the regression says how many; how much they do, and how far they do it for their child, says which
    value = decided.extras["mean_abs"] * (0.4 + 0.6 * aligned(found))
    grown = dataclasses.replace(decided, score=value).top_k(count, how="greedy")
    assert decided.kept_edges() == grown.kept_edges() and decided.n_kept >= count > 0
    stability = decided.extras["stability"]
    least = value[decided.kept].min()
    assert bool((stability[decided.kept & (value >= 3 * least)] == 1).all()) and float(stability[value == 0].sum()) == 0
    assert bool((stability[~decided.kept & (value >= least)] == 0).all())  # large, but it leads nowhere
    sizes = (decided.extras["mean_effect"].abs() * decided.extras["mean_abs"]).sqrt()
    # what is left out keeps a tenth, so that any number of the highest scores holds the chosen ones first
    worth = torch.where(decided.kept, 0.4 + 0.6 * aligned(found), learning_read.COUNTERPARTS.left_out)
    least = learning_read.COUNTERPARTS.left_out
    torch.testing.assert_close(decided.score.abs(), sizes * (least + (1 - least) * weight) * worth)
    monkeypatch.setattr(learning_read, "MANY_PAIRS", 1000)
    assert tcl.circuit_lasso(model, clean, **options).provenance["chosen_by"] == "cost"


def test_a_circuit_grows_until_it_is_expected_to_carry_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it's expected to carry is the least above what is asked for, and more edges carry more."""
    from tl_circuitlasso.discover import growing, learning_read

    model = architectures.hooked("gpt2", dtype=torch.float64)
    clean, other = architectures.prompts(batch=16), architectures.prompts(batch=16, seed=5)
    target = tcl.LogitDiff([1] * 16, [2] * 16)
    options = {"corrupted": other, "target": target, "positions": "last", "progress": False, "refined": False}
    monkeypatch.setattr(learning_read, "MANY_PAIRS", 0)
    monkeypatch.setattr(learning_read, "COUNTERPARTS", dataclasses.replace(learning_read.COUNTERPARTS, least=1.0))
    sizes, shares = [], []
    for enough in (0.3, 0.6, 0.9):
        monkeypatch.setattr(growing, "ENOUGH", enough)
        graph = tcl.circuit_lasso(model, clean, **options)
        sizes.append(len(graph.kept_edges()))
        shares.append(graph.provenance["expected_share"])
        assert enough <= shares[-1]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and shares[0] < 0.9


def test_forward_equivalents_count_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tcl.load_demo(prompts=16)
    for _ in range(2):  # the first call of a process has more to do
        graph = tcl.circuit_lasso(demo.model, demo.tokens, positions="last", progress=False)
    assert graph.provenance["forward_equivalents"] > 1

    def timing(*_: Any) -> None:  # what is run to say ahead how long it takes
        end = time.process_time() + 1.0
        while time.process_time() < end:
            pass

    monkeypatch.setattr("tl_circuitlasso.discover.run.tell_ahead", timing)
    timed = tcl.circuit_lasso(demo.model, demo.tokens, positions="last", progress=False)
    assert timed.provenance["forward_equivalents"] > graph.provenance["forward_equivalents"] + 5
