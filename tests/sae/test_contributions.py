"""One prompt through a graph: A_ij z_i where the source is active, and the active part of the graph."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso.apps import contributions, influence
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.formats import to_circuit_tracer
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.sae import error_block, error_name
from tl_circuitlasso.models.tokens import Prompts

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def graph_of(edges: dict) -> AttributionGraph:
    blocks = [Block(parse_site(hook), rank, tuple(range(48))) for rank, hook in enumerate((FIRST, LAST))]
    return AttributionGraph.from_edges(NodeIndex((*blocks, Block(Site("target"), 2))), edges)


@pytest.fixture(scope="module")
def some_saes(demo_saes) -> dict[str, Any]:
    return {hook: demo_saes[hook] for hook in (FIRST, LAST)}


@pytest.fixture(scope="module")
def codes(demo, some_saes) -> dict[str, torch.Tensor]:
    acts = adapt(demo.model).run(demo.tokens[:1], None, [FIRST, LAST])
    return {hook: sae.encode(acts[hook][0]) for hook, sae in some_saes.items()}


def active(codes: dict[str, torch.Tensor], hook: str, wanted: bool = True) -> int:
    """A feature that fires on the prompt, or one that doesn't."""
    return int(((codes[hook] > 0).any(0) == wanted).nonzero()[0])


def together(codes: dict[str, torch.Tensor]) -> tuple[int, int]:
    """A feature of either hook that fire at one position."""
    both = (codes[FIRST][1:].T > 0).double() @ (codes[LAST][1:] > 0).double()
    source, target = both.nonzero()[0].tolist()
    return source, target


def at_words(found: Any) -> Any:
    """What edges bring, by position."""
    return found.table[found.table["source"].str.contains("#")].sort_values("position")


def test_contributions_are_weight_times_code(demo, some_saes, codes) -> None:
    source, target = together(codes)
    graph = graph_of({(f"{FIRST}#{source}", f"{LAST}#{target}"): -2.0, (f"{LAST}#{target}", "target"): 0.5})
    found = contributions(demo.model, graph, some_saes, demo.tokens[0])
    z, y = codes[FIRST][:, source].double(), codes[LAST][:, target].double()
    edges = found.table[found.table["source"].str.contains("#")]
    rows = edges[edges["target"] != "target"].sort_values("position")
    where = [p for p in range(len(z)) if z[p] > 0 and y[p] > 0]
    assert rows["position"].tolist() == where
    assert rows["contribution"].tolist() == pytest.approx((-2 * z[where]).tolist(), rel=1e-5)
    assert rows["source_code"].tolist() == pytest.approx(z[where].tolist(), rel=1e-5)
    assert rows["target_code"].tolist() == pytest.approx(y[where].tolist(), rel=1e-5)
    last = edges[edges["target"] == "target"]
    assert last["target_code"].isna().all() and last["contribution"].sum() == pytest.approx(0.5 * float(y.sum()))
    assert found.at(where[0])["position"].eq(where[0]).all()
    assert found.table["contribution"].abs().is_monotonic_decreasing


def test_the_graph_of_a_prompt_is_its_active_part(demo, some_saes, codes) -> None:
    on, off, target = active(codes, FIRST), active(codes, FIRST, False), active(codes, LAST)
    both = (codes[FIRST][:, on] > 0) & (codes[LAST][:, target] > 0)
    graph = graph_of({(f"{FIRST}#{on}", f"{LAST}#{target}"): 1.0, (f"{FIRST}#{off}", f"{LAST}#{target}"): 1.0})
    found = contributions(demo.model, graph, some_saes, demo.tokens[0]).graph
    expected = float(codes[FIRST][:, on][both].sum())
    assert found.score.tolist() == pytest.approx([expected, 0.0], rel=1e-5)
    assert found.kept.tolist() == [expected != 0, False]
    assert found.weight.tolist() == [1.0, 1.0]


def test_edges_through_attention_mix_positions(demo, some_saes, codes) -> None:
    source, target = active(codes, FIRST), active(codes, LAST)
    graph = graph_of({(f"{FIRST}#{source}", f"{LAST}#{target}", "v"): 1.0})
    found = at_words(contributions(demo.model, graph, some_saes, demo.tokens[0]))
    pattern = adapt(demo.model).run(demo.tokens[:1], None, ["pattern.1"])["pattern.1"][0].double().mean(0)
    (batch,) = Prompts(adapt(demo.model), demo.tokens[:1])
    mixed = (pattern @ (codes[FIRST][:, source].double() * batch.words[0]))[batch.keep[0]]
    mixed = mixed[codes[LAST][batch.keep[0], target] > 0]
    assert found["contribution"].tolist() == pytest.approx(mixed[mixed != 0].tolist(), rel=1e-4)
    learned = replace(graph, extras={"regression": torch.tensor([-3.0], dtype=torch.float64)})  # per unit of the mean
    again = at_words(contributions(demo.model, learned, some_saes, demo.tokens[0]))
    assert again["contribution"].tolist() == pytest.approx((-3 * found["contribution"]).tolist())
    assert again["source_code"].tolist() == pytest.approx(found["source_code"].tolist())


def test_a_learned_graph_takes_text_and_its_parts_add_up(stories, saes, story_graph) -> None:
    found = contributions(stories, story_graph, tcl.SAEFeatures(saes), "Once upon a time, there was a dog.")
    assert "".join(found.tokens).endswith("dog.")
    assert len(found.table) and 0 < found.graph.n_kept <= story_graph.n_kept
    edges = found.table[found.table["source"].str.contains("#")]
    assert set(edges["source"]) | set(edges["target"]) <= set(story_graph.index.names)
    parts = found.balance()
    total = parts[["edges", "error", "bias", "unexplained"]].sum(axis=1)
    assert (total - parts["code"]).abs().max() < 1e-5 * parts["code"].max()
    assert (parts["code"] > 0).all() and parts["edges"].sum() > 0


def test_error_and_bias_are_what_runs_without_them_say(demo, some_saes, codes) -> None:
    """Independent of the runs inside: the model's own hooks, with the SAE's reconstruction and its bias put in."""
    source, target = together(codes)
    graph = graph_of({(f"{FIRST}#{source}", f"{LAST}#{target}"): 0.5})
    parts = contributions(demo.model, graph, some_saes, demo.tokens[0]).balance().set_index("position")
    (batch,) = Prompts(adapt(demo.model), demo.tokens[:1])
    fitted = some_saes[FIRST].decode(codes[FIRST])

    def code(new: torch.Tensor) -> torch.Tensor:
        heard = {}
        put = lambda x, hook: torch.where(batch.keep[..., None], new, x)  # noqa: E731
        keep = lambda x, hook: heard.update(x=x)  # noqa: E731
        demo.model.run_with_hooks(demo.tokens[:1], fwd_hooks=[(FIRST, put), (LAST, keep)])
        return some_saes[LAST].encode(heard["x"][0])[:, target]

    where = parts.index.tolist()
    less, bias = code(fitted[None])[where], code(0 * fitted[None])[where]
    assert where and parts["code"].tolist() == pytest.approx(codes[LAST][where, target].tolist(), rel=1e-4)
    assert parts["error"].tolist() == pytest.approx((codes[LAST][where, target] - less).tolist(), rel=1e-3, abs=1e-4)
    assert parts["bias"].tolist() == pytest.approx(bias.tolist(), rel=1e-3, abs=1e-4)


def test_what_an_error_brings_is_an_edge_where_there_is_a_node_for_it(demo, some_saes, codes) -> None:
    source, target = together(codes)
    plain = graph_of({(f"{FIRST}#{source}", f"{LAST}#{target}"): 0.5, (f"{LAST}#{target}", "target"): 1.0})
    blocks = plain.index.blocks
    index = NodeIndex((blocks[0], error_block(FIRST, 0), *blocks[1:]))
    edges = {(f"{FIRST}#{source}", f"{LAST}#{target}"): 0.5, (f"{LAST}#{target}", "target"): 1.0}
    found = contributions(demo.model, AttributionGraph.from_edges(index, edges), some_saes, demo.tokens[0])
    brought = found.graph.pair_scores()[(error_name(FIRST), f"{LAST}#{target}")]
    assert abs(brought) == pytest.approx(abs(found.balance()["error"].sum()))
    told = influence(found.graph)
    without = influence(contributions(demo.model, plain, some_saes, demo.tokens[0]).graph)
    assert 0 < told.replacement < 1 == without.replacement
    page = to_circuit_tracer(told.pruned(nodes=1.0, edges=1.0), prompt="one prompt")
    assert len(page["links"]) == 3 and len(page["nodes"]) == 4


def test_bad_input(demo, some_saes, codes) -> None:
    graph = graph_of({(f"{FIRST}#0", f"{LAST}#0"): 1.0})
    with pytest.raises(InputError, match="one prompt"):
        contributions(demo.model, graph, some_saes, demo.tokens[:2])
    with pytest.raises(InputError, match="`basis`"):
        contributions(demo.model, graph, {LAST: some_saes[LAST]}, demo.tokens[0])
    with pytest.raises(InputError, match="`position`"):
        contributions(demo.model, graph, some_saes, demo.tokens[0]).at(99)
