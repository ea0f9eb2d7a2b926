"""One prompt from tokens to logits: every kind of edge against runs with hooks of TransformerLens's own."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso.apps import contributions, influence, prompt_graph
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.formats import from_circuit_tracer, to_circuit_tracer
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.tokens import Prompts

FIRST, LAST = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def some_saes(demo_saes) -> dict[str, Any]:
    return {hook: demo_saes[hook] for hook in (FIRST, LAST)}


@pytest.fixture(scope="module")
def codes(demo, some_saes) -> dict[str, torch.Tensor]:
    acts = adapt(demo.model).run(demo.tokens[:1], None, [FIRST, LAST])
    return {hook: sae.encode(acts[hook][0]) for hook, sae in some_saes.items()}


@pytest.fixture(scope="module")
def learned(codes) -> AttributionGraph:
    """Every firing feature feeds every other, some through attention, too."""
    fires = {hook: (z[1:] > 0).any(0).nonzero().flatten().tolist()[:6] for hook, z in codes.items()}
    blocks = [Block(parse_site(hook), rank, tuple(range(48))) for rank, hook in enumerate((FIRST, LAST))]
    edges: dict = {(f"{FIRST}#{i}", f"{LAST}#{j}"): 0.1 * (i - j + 0.5) for i in fires[FIRST] for j in fires[LAST]}
    edges |= {(f"{FIRST}#{i}", f"{LAST}#{fires[LAST][0]}", "v"): 0.3 for i in fires[FIRST][:3]}
    edges |= {(f"{LAST}#{j}", "target"): 1.0 for j in fires[LAST]}
    return AttributionGraph.from_edges(NodeIndex((*blocks, Block(Site("target"), 2))), edges)


@pytest.fixture(scope="module")
def view(demo, some_saes, learned) -> AttributionGraph:
    return prompt_graph(demo.model, learned, some_saes, demo.tokens[0], logits=3)


def scores(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    names = graph.index.names
    ends = zip(graph.source.tolist(), graph.target.tolist())
    return {(names[s], names[t]): score for (s, t), score in zip(ends, graph.score.tolist())}


def test_edges_between_features_add_up_to_their_contributions(demo, some_saes, learned, view) -> None:
    rows = contributions(demo.model, learned, some_saes, demo.tokens[0]).table
    rows = rows[rows.target.str.startswith(LAST) & ~rows.source.str.endswith(".bias")]
    expected = rows.groupby(["target", "position"])["contribution"].sum()
    found: dict[tuple[str, int], float] = {}
    for (source, target), value in scores(view).items():
        if source.startswith("blocks.0") and target.startswith(LAST):
            hook, _, place = target.rpartition("#")[0].rpartition(".pos")
            key = f"{hook}#{target.rpartition('#')[2]}", int(place)
            found[key] = found.get(key, 0.0) + value
    assert found == pytest.approx(expected.to_dict(), rel=1e-4, abs=1e-6)
    through = rows[rows.port == "v"]
    assert len(through)
    target, position = through.iloc[0]["target"], through.iloc[0]["position"]
    places = {
        int(source.partition(".pos")[2].partition("#")[0])
        for source, end in scores(view)
        if end == f"{LAST}.pos{position}#{target.rpartition('#')[2]}" and "#" in source
    }
    assert len(places) > 1 and max(places) <= position  # what attention brings comes from where it was


def test_a_token_brings_what_a_code_loses_without_it(demo, some_saes, codes, view) -> None:
    ends, value = next((e, v) for e, v in scores(view).items() if e[0].startswith("hook_embed.pos2#") and abs(v) > 1e-3)
    assert ends[0] == f"hook_embed.pos2#{int(demo.tokens[0, 2])}"
    site, _, number = ends[1].rpartition("#")
    place = int(site.rpartition(".pos")[2])

    def instead(embedded: torch.Tensor, hook: Any) -> torch.Tensor:
        embedded = embedded.clone()
        embedded[0, 2] = embedded[0].mean(0)
        return embedded

    held: list[torch.Tensor] = []
    hooks = [("hook_embed", instead), (FIRST, lambda x, hook: held.append(x[0].detach()))]
    demo.model.run_with_hooks(demo.tokens[:1], fwd_hooks=hooks)
    left = some_saes[FIRST].encode(held[0])[place, int(number)]
    assert value == pytest.approx(float(codes[FIRST][place, int(number)] - left), rel=1e-4)


@pytest.mark.parametrize("kind", ["feature", "error"])
def test_a_logit_loses_what_is_taken_out(kind: str, demo, some_saes, codes, view) -> None:
    wanted = f"{LAST}.pos" if kind == "feature" else f"{LAST}.hook_sae_error.pos"
    source, logit = max((e for e in scores(view) if e[0].startswith(wanted)), key=lambda e: abs(scores(view)[e]))
    place = int(source.partition(".pos")[2].partition("#")[0])
    sae = some_saes[LAST]

    def without(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x, z = x.clone(), codes[LAST][place]
        number = int(source.rpartition("#")[2]) if kind == "feature" else 0
        x[0, place] -= z[number] * sae.W_dec[number] if kind == "feature" else x[0, place] - sae.decode(z[None])[0]
        return x

    plain, less = demo.model(demo.tokens[:1]), demo.model.run_with_hooks(demo.tokens[:1], fwd_hooks=[(LAST, without)])
    lost = (plain - less)[0, -1].detach()
    token = int(logit.rpartition("#")[2])
    assert scores(view)[source, logit] == pytest.approx(float(lost[token] - lost.mean()), rel=1e-3, abs=1e-5)


def test_logits_are_the_likeliest_and_weigh_by_probability(demo, view) -> None:
    chance = demo.model(demo.tokens[:1])[0, -1].detach().double().softmax(0)
    shown = [name for name in view.index.names if name.startswith("hook_unembed.")]
    best = chance.topk(len(shown)).indices.tolist()
    assert {int(name.rpartition("#")[2]) for name in shown} == set(best) and 1 <= len(shown) <= 3
    weight = torch.zeros(len(view.index), dtype=torch.float64)
    for name in shown:
        weight[view.index.position(name)] = chance[int(name.rpartition("#")[2])]
    weight /= weight.sum()
    matrix = torch.zeros(len(weight), len(weight), dtype=torch.float64)  # circuit-tracer's algebra, row = target
    matrix.index_put_((view.target, view.source), view.score.abs().double(), accumulate=True)
    matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-10)
    total, step = torch.zeros_like(weight), weight @ matrix
    while bool(step.any()):
        total, step = total + step, step @ matrix
    found = influence(view)
    torch.testing.assert_close(found.node, total, rtol=1e-6, atol=1e-9)
    missed = torch.tensor(["error" in name or "unexplained" in name for name in view.index.names])
    tokens = torch.tensor([name.startswith("hook_embed") for name in view.index.names])
    assert float(total[missed].sum()) > 0 and float(total[tokens].sum()) > 0
    roots = (matrix.sum(1) == 0) & (total > 0)
    expected = total[roots & ~missed].sum() / total[roots].sum()
    assert found.replacement == pytest.approx(float(expected)) and 0 < found.completeness < 1


def test_circuit_tracers_page_has_the_tokens_as_columns(demo, view) -> None:
    small = influence(view).pruned(nodes=0.8, edges=0.98)
    assert 0 < small.n_kept < view.n_kept
    page = to_circuit_tracer(small, prompt="some")
    assert page["metadata"]["prompt_tokens"] == [str(t) for t in view.provenance["prompt_tokens"]]
    assert len(page["links"]) == small.n_kept
    kinds = {node["tl_name"]: node for node in page["nodes"]}
    for name, node in kinds.items():
        assert node["ctx_idx"] == int(name.partition(".pos")[2].partition("#")[0])
    logits = [node for name, node in kinds.items() if name.startswith("hook_unembed")]
    assert logits and all(
        node["is_target_logit"] and f"(p={node['token_prob']:.3f})" in node["clerp"] for node in logits
    )
    assert sum(node["token_prob"] for node in logits) <= 1 + 1e-6
    assert all(node["layer"] == "E" for name, node in kinds.items() if name.startswith("hook_embed"))
    assert from_circuit_tracer(page).kept_edges() == small.kept_edges()


def test_hooks_of_one_layer_have_rows_of_their_own() -> None:
    sites = ["blocks.1.hook_attn_out.pos2", "blocks.1.hook_mlp_out.pos2"]
    index = NodeIndex(
        (*(Block(parse_site(s), r, (4,)) for r, s in enumerate(sites)), Block(parse_site("hook_unembed.pos2"), 2, (9,)))
    )
    graph = AttributionGraph.from_edges(index, {(f"{s}#4", "hook_unembed.pos2#9"): 1.0 for s in sites})
    page = to_circuit_tracer(graph)
    assert len({node["node_id"] for node in page["nodes"]}) == 3 and len(page["links"]) == 2


def test_what_cannot_be_drawn_is_named(demo, some_saes, learned) -> None:
    with pytest.raises(InputError, match="`logits` is 0"):
        prompt_graph(demo.model, learned, some_saes, demo.tokens[0], logits=0)
    with pytest.raises(InputError, match="one prompt"):
        tcl.apps.prompt_graph(demo.model, learned, some_saes, demo.tokens[:2])


def test_a_learned_graph_of_a_real_model(stories, saes, story_graph) -> None:
    """Tokens are whole, and a transcript of the parts: every kept edge runs forwards."""
    found = prompt_graph(stories, story_graph, tcl.SAEFeatures(saes), "Once upon a time there was", logits=2)
    (batch,) = Prompts(adapt(stories), ["Once upon a time there was"])
    assert len(found.provenance["prompt_tokens"]) == batch.tokens.shape[1]
    assert 0 < influence(found).replacement < 1
    assert any("label" in found.node_info[name] for name in found.index.names if name.startswith("hook_embed"))
