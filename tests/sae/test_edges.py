"""Measured effects of feature edges: against edits written out by hand, and against graphs whose answers are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tl_circuitlasso.baselines import feature_correlation, feature_gradient
from tl_circuitlasso.data.sites import parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate import edge_recall, edges
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex, component_index
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import Trying, contribution, record, trials
from tl_circuitlasso.models.tokens import Prompts

FIRST, LAST, MLP = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
FEATURES = 12


class Plain:
    """A random SAE with ReLU codes; `spread` normalises the input and scales the output back, as some SAEs do."""

    def __init__(self, width: int, seed: int, spread: bool = False) -> None:
        random = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(width, FEATURES, generator=random) / width**0.5
        self.W_dec = self.W_enc.T.contiguous()
        self.b_enc = 0.2 * torch.randn(FEATURES, generator=random)
        self.spread = spread

    def encode(self, x: Tensor) -> Tensor:
        if self.spread:
            self.kept = x.std(-1, keepdim=True)
            x = x / self.kept
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, codes: Tensor) -> Tensor:
        out = codes @ self.W_dec
        if self.spread:
            out = out * self.kept
            del self.kept
        return out


@pytest.fixture(scope="module")
def few() -> Any:
    return tcl.load_demo(prompts=12)


@pytest.fixture(scope="module")
def plain(few) -> dict[str, Plain]:
    return {hook: Plain(few.model.cfg.d_model, seed) for seed, hook in enumerate((FIRST, LAST))}


@pytest.fixture(scope="module")
def graph(few, plain) -> AttributionGraph:
    """All pairs of features, weighted by their own measured effect."""
    return _measured(few, plain)


def _measured(few: Any, plain: dict[str, Plain]) -> AttributionGraph:
    index = NodeIndex(tuple(Block(parse_site(hook), rank, tuple(range(FEATURES))) for rank, hook in enumerate(plain)))
    first, last = plain
    pairs = {(f"{first}#{i}", f"{last}#{j}"): 1.0 for i in range(FEATURES) for j in range(FEATURES)}
    whole = AttributionGraph.from_edges(index, pairs)
    size = len(pairs)
    table = edges(few.model, whole, plain, few.tokens, strongest=size, sample=1, prompts=12, progress=False).table
    some = table[(table["set"] == "strongest") & (table["effect"] != 0)]
    ends = zip(some["source"], some["target"], some["effect"])
    return AttributionGraph.from_edges(index, {(source, target): effect for source, target, effect in ends})


def by_hand(few: Any, hook: str, sae: Plain, target: Plain, feature: int, prompt: int, factor: float) -> Any:
    """Codes of the target at the positions where the feature fires, before and after the edit; the sum of its codes."""
    tokens = few.tokens[prompt : prompt + 1]
    _, cache = few.model.run_with_cache(tokens)
    x = cache[hook][0]
    codes = sae.encode(x)
    other = codes.clone()
    other[:, feature] *= 1 + factor
    delta = (other - codes) @ sae.W_dec
    delta[0] = 0  # BOS is no sample
    edit = (hook, lambda activation, hook: activation + delta)
    with few.model.hooks(fwd_hooks=[edit]):
        _, edited = few.model.run_with_cache(tokens)
    fires = (codes[:, feature] > 0) & (torch.arange(len(x)) > 0)
    before, after = (target.encode(c[LAST][0])[fires].sum(0) for c in (cache, edited))
    return before, after, codes[fires, feature].sum()


def run_trials(few: Any, ends: tuple[Encoder, Encoder], **options: Any) -> list[Any]:
    adapter = adapt(few.model)
    recording = record(adapter, Prompts(adapter, few.tokens), [ends[0].hook, ends[1].hook])
    return list(trials(recording, ends, torch.arange(FEATURES), how=Trying(12, 5, **options)))


@pytest.mark.parametrize("hook", [FIRST, MLP])
def test_trials_do_what_the_edit_by_hand_does(few, plain, hook: str) -> None:
    ends = (Encoder(plain[FIRST], hook, hook), Encoder(plain[LAST], LAST, LAST))
    with torch.no_grad():
        for batch in run_trials(few, ends, modes=("ablate", "amplify"))[::4]:
            for mode, factor in (("ablate", -1.0), ("amplify", 1.0)):
                some = batch[mode]
                feature, prompt = int(some.source[0]), int(some.prompt[0])
                before, after, mass = by_hand(few, hook, plain[FIRST], plain[LAST], feature, prompt, factor)
                torch.testing.assert_close(some.code[0].float(), factor * (after - before), atol=2e-5, rtol=1e-4)
                assert float(some.mass[0]) == pytest.approx(float(mass), rel=1e-5)


def test_the_gradient_is_the_limit_of_small_edits(few, plain) -> None:
    ends = (Encoder(plain[FIRST], FIRST, FIRST), Encoder(plain[LAST], LAST, LAST))
    some = run_trials(few, ends, modes=("gradient",))[0]["gradient"]
    feature, prompt = int(some.source[0]), int(some.prompt[0])
    with torch.no_grad():
        step = 1e-2
        up = by_hand(few, FIRST, plain[FIRST], plain[LAST], feature, prompt, step)
        down = by_hand(few, FIRST, plain[FIRST], plain[LAST], feature, prompt, -step)
    slope = (up[1] - down[1]) / (2 * step)
    torch.testing.assert_close(some.code[0].float(), slope, atol=5e-3, rtol=2e-2)


def test_reading_positions_add_up(few, plain) -> None:
    ends = (Encoder(plain[FIRST], FIRST, FIRST), Encoder(plain[LAST], LAST, LAST))
    sums = {}
    for read in ("firing", "elsewhere", "all"):
        sums[read] = torch.cat([batch["ablate"].code for batch in run_trials(few, ends, read=read)])
    torch.testing.assert_close(sums["firing"] + sums["elsewhere"], sums["all"], atol=1e-4, rtol=1e-4)
    assert sums["elsewhere"].abs().max() > 1e-3, "attention carries the edit to other positions"


def test_contribution_of_an_sae_that_normalises_its_input() -> None:
    sae, x = Plain(8, 3, spread=True), torch.randn(5, 8)
    feature = torch.tensor([0, 3, 3, 7, 1])
    codes = sae.encode(x)
    del sae.kept
    expected = codes[torch.arange(5), feature, None] * sae.W_dec[feature] * x.std(-1, keepdim=True)
    torch.testing.assert_close(contribution(Encoder(sae, FIRST, FIRST), x, feature), expected)  # type: ignore[arg-type]


def test_right_signs_wrong_signs_and_ranks(few, plain, graph) -> None:
    flipped = AttributionGraph.from_edges(
        graph.index,
        {(s, t): -w for s, t, w in graph.edge_table()[["source", "target", "weight"]].itertuples(index=False)},
    )
    options = {"strongest": 20, "sample": 30, "non_edges": 5, "prompts": 12, "progress": False}
    found = edges(few.model, {"right": graph, "wrong": flipped}, plain, few.tokens, **options)
    for which in ("strongest", "kept"):
        right, wrong = (found.summary.loc[name, which, "all"] for name in ("right", "wrong"))
        assert right.sign_agreement == 1 and wrong.sign_agreement == 0
        assert right.spearman == pytest.approx(1) and wrong.spearman == pytest.approx(1)
        assert right.precision == wrong.precision
    assert found.table["effect"].between(found.table["effect_low"], found.table["effect_high"]).all()
    assert set(zip(found.table["kind"], found.table["cosine"] > 0.7)) <= {("persistence", True), ("rest", False)}
    top = found.table[(found.table["set"] == "strongest") & (found.table["method"] == "right")]
    assert found.precision_at(10) == top.head(10)["real"].mean()


def test_an_edge_without_effect_is_not_real(few, plain) -> None:
    deaf = {FIRST: plain[FIRST], LAST: Plain(few.model.cfg.d_model, 1)}
    deaf[LAST].W_enc[:, 0] = 0.0  # reads nothing
    deaf[LAST].b_enc[0] = 1.0
    index = NodeIndex(tuple(Block(parse_site(hook), rank, tuple(range(FEATURES))) for rank, hook in enumerate(deaf)))
    graph = AttributionGraph.from_edges(index, {(f"{FIRST}#{i}", f"{LAST}#0"): 1.0 for i in range(FEATURES)})
    found = edges(few.model, graph, deaf, few.tokens, prompts=6, progress=False)
    assert found.summary.loc["CircuitLasso", "strongest", "all"].precision == 0
    tested = found.table[found.table["set"] == "strongest"]
    assert (tested["effect"] == 0).all()


def test_correlation_is_pearsons(few, plain, graph) -> None:
    found = feature_correlation(few.model, plain, few.tokens, graph)
    assert found.n_kept == graph.n_kept
    acts = adapt(few.model).run(few.tokens, None, list(plain))
    codes = [plain[hook].encode(acts[hook][:, 1:].flatten(0, 1)).numpy().astype(float) for hook in plain]
    row = found.edge_table().iloc[0]
    i, j = (int(row[end].rpartition("#")[2]) for end in ("source", "target"))
    slope, r = np.polyfit(codes[0][:, i], codes[1][:, j], 1)[0], np.corrcoef(codes[0][:, i], codes[1][:, j])[0, 1]
    assert (row["score"], row["weight"]) == pytest.approx((r, slope), rel=1e-4)


def test_gradient_attribution_agrees_with_its_trials(few, plain, graph) -> None:
    found = feature_gradient(few.model, plain, few.tokens, graph, prompts=12)
    ends = (Encoder(plain[FIRST], FIRST, FIRST), Encoder(plain[LAST], LAST, LAST))
    batches = [batch["gradient"] for batch in run_trials(few, ends, modes=("gradient",))]
    row = found.edge_table().iloc[0]
    i, j = (int(row[end].rpartition("#")[2]) for end in ("source", "target"))
    change = sum(float(some.code[some.source == i, j].sum()) for some in batches)
    mass = sum(float(some.mass[some.source == i].sum()) for some in batches)
    assert row["weight"] == pytest.approx(change / mass, rel=1e-4)
    assert found.n_kept == graph.n_kept


def test_on_trained_saes_most_edges_hold(stories, saes, story_graph, story_tokens) -> None:
    """The library's own edges, on text of the kind they were learned from."""
    found = edges(
        stories, story_graph, saes, story_tokens[:64], strongest=30, sample=30, non_edges=60, prompts=6,
        progress=False,
    )  # fmt: skip
    top = found.summary.loc["CircuitLasso", "strongest", "all"]
    assert top.sign_agreement >= 0.95 and top.precision >= 0.8
    assert found.summary.loc["CircuitLasso", "kept", "all"].sign_agreement >= 0.75
    assert found.summary.loc["non-edges", "non-edges", "all"].precision <= 0.1
    assert found.table["effect_pre"].notna().all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"strongest": 0}, "`strongest`"),
        ({"prompts": 0}, "`prompts`"),
        (
            {"graphs": AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), {("input", "m0"): 1.0})},
            "keeps no edge",
        ),
    ],
)
def test_bad_input(few, plain, graph, change: dict, word: str) -> None:
    arguments = {"graphs": graph, "model": few.model, "basis": plain, "tokens": few.tokens, "progress": False}
    with pytest.raises(InputError, match=word):
        edges(**(arguments | change))


def test_text_on_which_nothing_fires(few, plain, graph) -> None:
    silent = {FIRST: Plain(few.model.cfg.d_model, 0), LAST: plain[LAST]}
    silent[FIRST].b_enc -= 1e3
    with pytest.raises(InputError, match="fires"):
        edges(few.model, graph, silent, few.tokens, progress=False)
    with pytest.raises(InputError, match="`like`"):
        feature_correlation(few.model, {MLP: plain[FIRST]}, few.tokens, graph)


def test_edges_through_attention_and_pooled_edges_are_read_where_they_act(few, plain, graph) -> None:
    ends = (Encoder(plain[FIRST], FIRST, FIRST), Encoder(plain[LAST], LAST, LAST))
    pair = next(iter(graph.kept_edges()))
    i, j = (int(node.rpartition("#")[2]) for node in pair)
    through = AttributionGraph.from_edges(graph.index, {(*pair, "v"): 1.0})
    plainly = AttributionGraph.from_edges(graph.index, {pair: 1.0})
    cases = (("elsewhere", through, "same"), ("all", plainly, "pooled"), ("firing", plainly, "same"))
    for read, tested, mixing in cases:
        basis = tcl.SAEFeatures(plain, mixing=mixing)
        found = edges(few.model, tested, basis, few.tokens, prompts=12, progress=False).table.iloc[0]
        some = [batch["ablate"] for batch in run_trials(few, ends, read=read)]
        change = sum(float(one.code[one.source == i, j].sum()) for one in some)
        mass = sum(float(one.mass[one.source == i].sum()) for one in some)
        assert found["effect"] == pytest.approx(change / mass, rel=1e-4, abs=1e-7)


def test_recall_and_signs_tell_inhibition_apart(few, plain, graph) -> None:
    """A graph with all measured effects finds them; one that says "+" of everything has none of the negative ones."""
    always = AttributionGraph.from_edges(
        graph.index,
        {
            (graph.index.names[s], graph.index.names[t]): abs(float(w))
            for s, t, w in zip(graph.source.tolist(), graph.target.tolist(), graph.weight.tolist())
        },
    )
    spreads = {name: {"std": 1.0} for name in graph.index.names}
    graphs = {"true": replace(graph, node_info=spreads), "always +": replace(always, node_info=spreads)}
    found = edges(
        few.model, graphs, plain, few.tokens, strongest=5, prompts=12, recall_sources=FEATURES, progress=False
    )
    assert found.recall.loc[("true", "-", 0.05), "effects"] > 0 and found.recall.loc[("true", "+", 0.05), "effects"] > 0
    assert (found.recall.loc["true", "recall"].dropna() == 1).all()
    assert (found.recall.loc[("always +", "-"), "recall"].dropna() == 0).all()
    assert (found.recall.loc[("always +", "-"), "kept"].dropna() == 1).all()
    assert found.signs.loc[("true", "-"), "sign_agreement"] == found.signs.loc[("true", "+"), "sign_agreement"] == 1
    assert found.signs.loc[("always +", "-"), "sign_agreement"] == 0


def test_each_pair_of_hooks_has_its_own_bar(few, plain) -> None:
    """A parent that writes a hundredth does a hundredth: its true edges are real beside another's, though one bar of
    both would lie above them."""
    weak = Plain(few.model.cfg.d_model, 0)
    weak.W_dec = weak.W_dec / 100
    third = "blocks.1.hook_resid_mid"
    saes = {FIRST: weak, third: Plain(few.model.cfg.d_model, 2), LAST: plain[LAST]}
    index = NodeIndex(tuple(Block(parse_site(hook), rank, tuple(range(FEATURES))) for rank, hook in enumerate(saes)))
    pairs = [(FIRST, LAST), (third, LAST)]
    every = {(f"{s}#{i}", f"{t}#{j}"): 1.0 for s, t in pairs for i in range(FEATURES) for j in range(FEATURES)}
    options = {"strongest": len(every), "sample": 1, "prompts": 12, "recall_sources": FEATURES, "progress": False}
    table = edges(few.model, AttributionGraph.from_edges(index, every), saes, few.tokens, **options).table
    hook = table["source"].str.rpartition("#")[0]
    largest = (
        table[table["set"] == "strongest"]
        .groupby(hook, group_keys=False)
        .apply(lambda some: some[some["effect"].abs() >= some["effect"].abs().quantile(0.9)])
    )
    kept = {(s, t): e for s, t, e in largest[["source", "target", "effect"]].itertuples(index=False)}
    found = edges(few.model, AttributionGraph.from_edges(index, kept), saes, few.tokens, **options)
    assert 0 < found.nulls[FIRST, LAST] < found.nulls[third, LAST] / 10
    some = found.table[found.table["set"] == "strongest"]
    mine = some[some["source"].str.startswith(FIRST)]
    assert (mine["effect"].abs() < found.nulls[third, LAST]).all() and mine["real"].mean() > 0.9


def test_effects_that_chance_makes_are_not_asked_for() -> None:
    """Of 4,000 pairs, half of one source with an effect: those, and hardly any of the dozens beyond three errors."""
    random = torch.Generator().manual_seed(0)
    change = torch.randn(32, 40, 100, generator=random).double()
    change[:, 0, :50] += 2.0
    sums = torch.stack([change.sum(0), change.square().sum(0), change.sum(0)])
    mass = torch.full((3, 40), 32.0).double()
    numbers, ones = [torch.arange(40), torch.arange(100)], [torch.ones(40).double(), torch.ones(100).double()]
    found = edge_recall._truth(*numbers, sums, mass, *ones)
    assert bool(found.sure[0, :50].all()) and int(found.sure.sum()) <= 55
    error = change.std(0) / 32**0.5
    assert int((change.mean(0)[1:].abs() > 3 * error[1:]).sum()) > 10
