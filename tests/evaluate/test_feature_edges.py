"""Circuits of edges between features: at both ends, against circuits of nodes, and against runs made by hand."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import pair
from tests.evaluate.test_features import METRIC, SAES, Sae, cached, hook_site
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.features import node_scores
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex

HOOKS = tuple(SAES)
ERRORS = tuple(f"{hook}.hook_sae_error" for hook in HOOKS)
FEATURES = tuple(range(40))
EVERY = [[f"{hook}#{feature}" for feature in FEATURES] for hook in HOOKS]


def wired(edges: Any, *, errors: bool = False, features: tuple[int, ...] = FEATURES) -> Any:
    blocks = [Block(hook_site(hook), rank, features) for rank, hook in enumerate(HOOKS)]
    blocks += [Block(Site("hook", 0, hook=name), rank) for rank, name in enumerate(ERRORS) if errors]
    blocks.sort(key=lambda block: block.rank)
    index = NodeIndex((*blocks, Block(Site("target"), len(HOOKS))))
    return AttributionGraph.from_edges(index, edges if isinstance(edges, dict) else dict.fromkeys(edges, 1.0))


def joined(first: list[str], second: list[str], *between: str) -> list[tuple[str, str]]:
    """Every edge between these features of the two hooks, the errors `between`, and the target."""
    groups = [first, second, ["target"]]
    inner = [(u, v) for one, other in combinations(groups, 2) for u in one for v in other]
    outer = [(u, v) for u in between for v in [*(second if u == ERRORS[0] else []), "target"]]
    return [*inner, *outer]


def measured(graph: AttributionGraph, level: str, ablation: str = "patch", verb: Any = None, **options: Any) -> Any:
    clean, corrupted, _ = pair()
    verb = verb or tcl.evaluate.faithfulness
    model = options.pop("model", None) or architectures.hooked("gpt2")
    options = {"saes": SAES, "progress": False, **options}
    return verb(model, graph, clean, corrupted, METRIC, ablation, level=level, **options)


@pytest.mark.parametrize(("ablation", "error"), [("patch", "keep"), ("mean", "graph"), ("zero", "remove")])
def test_where_all_features_are_joined_edges_tell_what_nodes_tell(ablation: str, error: str) -> None:
    some, others = EVERY[0][::3], EVERY[1][::2]
    graph = wired(joined(some, others, ERRORS[0]), errors=True)
    edges, nodes = (measured(graph, level, ablation, error=error) for level in ("edge", "node"))
    torch.testing.assert_close(edges.per_prompt, nodes.per_prompt, atol=1e-5, rtol=1e-5)
    assert edges.nodes == len(some) + len(others) and edges.edges == graph.n_kept


def test_all_edges_are_the_model_and_none_is_the_ablated_model() -> None:
    whole = wired(joined(*EVERY, *ERRORS), errors=True)
    assert measured(whole, "edge").circuit == pytest.approx(measured(whole, "edge").model, abs=1e-5)
    nothing = whole.keep(torch.zeros_like(whole.kept))
    found = measured(nothing, "edge")
    assert found.circuit == pytest.approx(found.ablated, abs=1e-6) and (found.edges, found.nodes) == (0, 0)
    assert found.ablated == pytest.approx(measured(nothing, "node").ablated, abs=1e-6)
    rest = [measured(graph, "edge", verb=tcl.evaluate.completeness) for graph in (nothing, whole)]
    assert rest[0].circuit == pytest.approx(rest[0].model, abs=1e-5)
    assert rest[1].circuit == pytest.approx(rest[1].ablated, abs=1e-5)


class Chain:
    """Two edges into one feature of the second hook and one into another, run by hand; errors kept."""

    edges = (
        (EVERY[0][0], EVERY[1][1]), (EVERY[0][3], EVERY[1][1]), (EVERY[0][5], EVERY[1][2]),
        (EVERY[1][1], "target"), (EVERY[1][2], "target"), (EVERY[0][7], "target"),
    )  # fmt: skip

    def __init__(self, model: Any) -> None:
        self.model = model
        self.clean, corrupted, _ = pair()
        self.own, self.other = (
            {h: SAES[h].encode(cached(model, t, h)) for h in HOOKS} for t in (self.clean, corrupted)
        )

    def first(self, *heard: int) -> Any:
        """The first hook with the clean values of some features."""
        return self.edited(HOOKS[0], self.own[HOOKS[0]], heard)

    def edited(self, hook: str, values: Tensor, heard: tuple[int, ...]) -> Any:
        codes = self.other[hook].clone()
        codes[..., list(heard)] = values[..., list(heard)]
        return lambda x, hook: x + SAES[hook.name].decode(codes) - self.plain(x, hook.name)

    @staticmethod
    def plain(x: Tensor, hook: str) -> Tensor:
        return SAES[hook].decode(SAES[hook].encode(x))

    def run(self, **hooks: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.model.reset_hooks()
            for hook, edit in hooks.items():
                self.model.add_hook(HOOKS[int(hook[-1])], edit)
            logits, cache = self.model.run_with_cache(self.clean)
            self.model.reset_hooks()
        return logits, cache[HOOKS[1]]

    def logits(self) -> Tensor:
        codes = self.own[HOOKS[1]].clone()
        codes[..., 1] = SAES[HOOKS[1]].encode(self.run(hook0=self.first(0, 3))[1])[..., 1]
        codes[..., 2] = SAES[HOOKS[1]].encode(self.run(hook0=self.first(5))[1])[..., 2]
        whole = self.run(hook0=self.first(0, 3, 5, 7))[1]  # what the second SAE misses there
        missed = whole - self.plain(whole, HOOKS[1])
        mixed = self.other[HOOKS[1]].clone()
        mixed[..., [1, 2]] = codes[..., [1, 2]]
        return self.run(hook1=lambda x, hook: SAES[HOOKS[1]].decode(mixed) + missed)[0]


@pytest.mark.parametrize("at_once", [1, 1 << 25])
def test_each_feature_hears_only_its_parents(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("tl_circuitlasso.models.feature_wires.AT_ONCE", at_once)
    model = architectures.hooked("gpt2")
    graph = wired(list(Chain.edges))
    found = measured(graph, "edge", error="keep", model=model)
    expected = METRIC.each(Chain(model).logits(), torch.arange(2)).double()
    torch.testing.assert_close(found.per_prompt["circuit"], expected, atol=1e-5, rtol=1e-5)
    assert found.edges == 6 and found.nodes == 6
    assert found.circuit != pytest.approx(measured(graph, "node", error="keep", model=model).circuit, abs=1e-5)
    # the model, partners, the ablated model; one run for each of two errors, the logits, the first hook's features and
    # two sets of parents
    assert found.forward_passes == 3 + 6


def test_edges_that_lead_nowhere_change_nothing() -> None:
    more = [*Chain.edges, (EVERY[0][9], EVERY[1][9])]
    some, all_of_them = (measured(wired(list(edges)), "edge", error="keep") for edges in (Chain.edges, more))
    torch.testing.assert_close(some.per_prompt["circuit"], all_of_them.per_prompt["circuit"])
    assert all_of_them.edges == 6


def test_features_without_a_node_stay_where_they_are_told_to() -> None:
    named = wired([(EVERY[0][0], EVERY[1][0]), (EVERY[1][0], "target"), (EVERY[0][0], "target")], features=(0,))
    for rest in ("keep", "ablate"):
        edges, nodes = (measured(named, level, error="keep", rest=rest) for level in ("edge", "node"))
        torch.testing.assert_close(edges.per_prompt, nodes.per_prompt, atol=1e-5, rtol=1e-5)


def test_an_sae_that_the_graph_does_not_know_is_refused() -> None:
    more = {**SAES, "blocks.0.hook_attn_out": Sae(seed=9)}
    with pytest.raises(InputError, match="leave it out at level='edge'"):
        measured(wired(list(Chain.edges)), "edge", saes=more)


def test_a_curve_by_edges_takes_the_edges_that_matter_most() -> None:
    """Strong edges into a feature that hardly matters come after weak ones into one that does."""
    (a, b, c), (x, y) = EVERY[0][:3], EVERY[1][:2]
    scores = {(x, "target"): 2.0, (y, "target"): 0.1, (a, x): 0.5, (b, y): 3.0, (c, x): -1.5}
    graph = wired(scores)
    found = measured(graph, "edge", verb=tcl.evaluate.curve, sizes=[1, 3, 5], error="keep")
    three = wired({ends: scores[ends] for ends in ((x, "target"), (c, x), (a, x))})
    for size, circuit in zip((1, 2), (three, graph)):
        expected = measured(circuit, "edge", error="keep").faithfulness
        assert found.faithfulness[size] == pytest.approx(expected, abs=1e-6)
    assert found.requested == (1, 3, 5) and found.sizes == (0, 3, 5)  # the strongest leads to nothing yet
    grown = measured(graph, "edge", verb=tcl.evaluate.curve, sizes=[1, 3], error="keep", rule="greedy")
    assert grown.sizes == (1, 3)


def test_a_feature_that_feeds_nothing_matters_to_nothing_where_there_is_a_target() -> None:
    (a, b), (x, y) = EVERY[0][:2], EVERY[1][:2]
    scores = node_scores(wired({(a, x): 5.0, (b, y): 0.5, (y, "target"): 2.0}))
    assert {name: scores[name] for name in (a, b, x, y)} == {a: 0.0, b: 1.0, x: 0.0, y: 2.0}
    without = node_scores(wired({(a, x): 5.0, (b, y): 0.5}))
    assert {name: without[name] for name in (a, b)} == {a: 5.0, b: 0.5}
