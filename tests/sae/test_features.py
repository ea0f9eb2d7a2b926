"""Circuits among SAE features: what a graph holds, position handling, targets, strengths, and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests.sae.training import PlainSAE, plain_sae
from tl_circuitlasso.demo import Demo
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.features.samples import is_held
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Prompts, adapt

FIRST, SECOND, THIRD = (f"blocks.{layer}.hook_resid_post" for layer in range(3))
CALL = ("target", "strength", "positions", "attention_mask", "checkpoint", "seed", "batch_size", "design", "method")


def circuit(demo: Demo, saes: Any, *, tokens: Any = None, **options: Any) -> AttributionGraph:
    call = {name: options.pop(name) for name in CALL if name in options}
    basis = tcl.SAEFeatures(saes, **options)
    return tcl.circuit_lasso(demo.model, demo.tokens if tokens is None else tokens, basis=basis, progress=False, **call)


@pytest.fixture(scope="module")
def graph(demo: Demo, demo_saes: dict[str, PlainSAE]) -> AttributionGraph:
    return circuit(demo, demo_saes, held_out=0.0, error=False, penalty="l1")


@pytest.fixture(scope="module")
def codes(demo: Demo, demo_saes: dict[str, PlainSAE]) -> dict[str, Tensor]:
    """Dense codes of every sample by hook, and under "prompt" whose they are."""
    adapter = adapt(demo.model)
    found: dict[str, list[Tensor]] = {name: [] for name in (*demo_saes, "prompt")}
    for batch in Prompts(adapter, demo.tokens):
        numbers = batch.start + torch.arange(len(batch.tokens))
        found["prompt"].append(numbers[:, None].expand_as(batch.keep)[batch.keep])
        acts = adapter.run(batch.tokens, batch.mask, list(demo_saes))
        for hook, sae in demo_saes.items():
            found[hook].append(sae.encode(acts[hook][batch.keep]).double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def rows_into(graph: AttributionGraph, child: str) -> Any:
    table = graph.edge_table()
    return table[table.target == child]


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    x = x - x.mean(0)
    return torch.linalg.lstsq(x, (y - y.mean())[:, None]).solution[:, 0]


# ---- the graph ------------------------------------------------------------------------------------------------------


def test_nodes_are_features_and_error_terms_in_the_order_of_computation(demo: Demo, demo_saes: Any) -> None:
    with_errors = circuit(demo, demo_saes)
    assert [str(block.site) for block in with_errors.index.blocks] == [
        FIRST, f"{FIRST}.hook_sae_error", SECOND, f"{SECOND}.hook_sae_error", THIRD, f"{THIRD}.hook_sae_error",
        "logits",
    ]  # fmt: skip
    assert f"{FIRST}#7" in with_errors.index
    fed = {(with_errors.index.site(s).hook.split(".hook_sae")[0], t) for s, t in with_errors.kept_edges()}
    assert {parent for parent, child in fed if child == "logits"} == {THIRD}
    assert any(source.endswith("hook_sae_error") for source, _ in with_errors.kept_edges())


def test_weights_are_least_squares_on_the_support(graph: AttributionGraph, codes: dict[str, Tensor]) -> None:
    for child in (f"{SECOND}#3", f"{THIRD}#20"):
        rows = rows_into(graph, child)
        parents = [name.split("#") for name in rows.source]
        x = torch.stack([codes[hook][:, int(feature)] for hook, feature in parents], 1)
        hook, feature = child.split("#")
        y = codes[hook][:, int(feature)]
        expected = least_squares(x, y)
        torch.testing.assert_close(torch.tensor(rows.weight.to_numpy()), expected, rtol=1e-6, atol=1e-9)
        scores = expected * x.std(0) / y.std()
        torch.testing.assert_close(torch.tensor(rows.score.to_numpy()), scores, rtol=1e-6, atol=1e-9)


def test_the_lasso_itself_is_optimal(graph: AttributionGraph, codes: dict[str, Tensor]) -> None:
    """KKT of the shrunken coefficients, from dense standardised codes and the strength that the certificate states."""
    x, child = codes[FIRST], f"{SECOND}#5"
    x = (x - x.mean(0)) / x.std(0, correction=0)
    y = codes[SECOND][:, 5]
    spread = y.std(correction=0)
    y = (y - y.mean()) / spread
    rows, certificate = rows_into(graph, child), graph.certificate.loc[child]
    value = torch.zeros(x.shape[1], dtype=torch.float64)
    at = [int(name.split("#")[1]) for name in rows.source]
    value[at] = torch.tensor(rows.lasso.to_numpy()) * codes[FIRST].std(0, correction=0)[at] / spread
    pull = x.T @ (y - x @ value) / len(y)
    limit = float((x.T @ y / len(y)).abs().max())
    assert certificate.converged and certificate.gap <= 1e-4 and certificate.strength >= 0.2 - 1e-12
    assert float(pull.abs().max()) <= certificate.strength * limit * 1.02
    on = value != 0
    torch.testing.assert_close(pull[on], value[on].sign() * certificate.strength * limit, rtol=0.05, atol=0.01 * limit)


def test_held_out_r2_is_that_of_prompts_that_were_not_used(demo: Demo, demo_saes: Any, codes: Any) -> None:
    held = circuit(demo, demo_saes, error=False, held_out=0.25)
    out = is_held(codes["prompt"], 0.25)
    assert 0.15 < float(out.double().mean()) < 0.35
    child = f"{SECOND}#3"
    rows = rows_into(held, child)
    at = [int(name.split("#")[1]) for name in rows.source]
    x, y = codes[FIRST][:, at], codes[SECOND][:, 3]
    weight = torch.tensor(rows.regression.to_numpy())
    fitted = (x - x[~out].mean(0)) @ weight + y[~out].mean()
    wrong, total = (y - fitted)[out].square().sum(), (y[out] - y[~out].mean()).square().sum()
    assert held.certificate.loc[child].held_out_r2 == pytest.approx(float(1 - wrong / total), abs=1e-6)
    pair = held.provenance["pairs"][0]
    assert pair["source"] == FIRST and 0 < pair["held_out_r2"] < 1 and pair["samples"] == int((~out).sum())


def test_the_record_counts_the_edges_of_the_graph(demo: Demo, demo_saes: Any) -> None:
    """Error directions and columns of the target are one node each."""
    made = circuit(demo, demo_saes)
    table = made.edge_table()
    kept = table[table.kept]
    for pair in made.provenance["pairs"]:
        ends = kept.source.str.startswith(pair["source"]), kept.target.str.startswith(pair["target"])
        into = kept.target == "logits" if pair["target"] == "target" else ends[1]
        assert pair["edges"] == int((ends[0] & into).sum()) > 0
        children = 1 if pair["target"] == "target" else made.provenance["alive"][pair["target"]]
        assert pair["edges_per_target"] == pair["edges"] / children


def test_what_stands_for_several_directions_has_no_sign(demo: Demo, demo_saes: Any) -> None:
    """Principal directions of errors and logits point either way."""
    made = circuit(demo, demo_saes, strength=0.05)
    table = made.edge_table()
    of_errors, into_logits = table.source.str.endswith("hook_sae_error"), table.target == "logits"
    assert of_errors.any() and into_logits.any()
    for name in ("weight", "score", "lasso"):
        assert bool((table.loc[of_errors | into_logits, name] >= 0).all())
    assert bool((table.loc[~of_errors & ~into_logits, "weight"] < 0).any())


def test_what_is_said_of_a_feature_is_what_the_data_say(
    demo: Demo, demo_saes: Any, codes: dict[str, Tensor], graph: AttributionGraph
) -> None:
    values = codes[SECOND][:, 11]
    info = graph.node_info[f"{SECOND}#11"]
    assert info["frequency"] == pytest.approx(float((values > 0).double().mean()))
    assert info["mean"] == pytest.approx(float(values[values > 0].mean()), rel=1e-5)
    assert info["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert info["max"] == pytest.approx(float(values.max()), rel=1e-5)
    best = info["contexts"][0]
    assert best["value"] == pytest.approx(float(values.max()), rel=1e-5)
    assert best["prompt"] == int(codes["prompt"][values.argmax()])
    token = int(demo.tokens[best["prompt"], best["position"]])
    assert best["tokens"][best["at"]] == str(token) and str(token) in info["top_tokens"]
    assert len({context["prompt"] for context in info["contexts"]}) == len(info["contexts"]) <= 5
    weight, _ = adapt(demo.model).unembed()
    expected = (demo_saes[SECOND].W_dec[11] @ weight).topk(5).indices.tolist()
    assert info["top_logits"] == [str(token) for token in expected]


def test_labels_from_a_dict_or_a_file(demo: Demo, demo_saes: Any, tmp_path: Path) -> None:
    labels = {f"{FIRST}#3": "a name", f"{SECOND}#4": "again"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    for given in (labels, tmp_path / "labels.json"):
        found = circuit(demo, demo_saes, tokens=demo.tokens[:60], labels=given).node_info
        assert found[f"{FIRST}#3"]["label"] == "a name" and "label" not in found[f"{FIRST}#4"]


def test_a_graph_survives_its_files(graph: AttributionGraph, tmp_path: Path) -> None:
    for name in ("graph.safetensors", "graph.json"):
        graph.save(tmp_path / name)
        again = AttributionGraph.load(tmp_path / name)
        assert again.index == graph.index and again.provenance["pairs"] == graph.provenance["pairs"]
        torch.testing.assert_close(again.weight, graph.weight)


def test_the_same_call_gives_the_same_graph(demo: Demo, demo_saes: Any, graph: AttributionGraph) -> None:
    again = circuit(demo, demo_saes, held_out=0.0, error=False, penalty="l1")
    assert again.kept_edges() == graph.kept_edges()
    torch.testing.assert_close(again.weight, graph.weight)
    batched = circuit(demo, demo_saes, held_out=0.0, error=False, penalty="l1", batch_size=100, pairs=[(FIRST, SECOND)])
    among = {edge for edge in graph.kept_edges() if edge[1].startswith(SECOND)}
    assert {edge for edge in batched.kept_edges() if edge[1].startswith(SECOND)} == among


def test_persistence_is_the_cosine_of_decoder_directions(graph: AttributionGraph, demo_saes: Any) -> None:
    row = rows_into(graph, f"{SECOND}#3").iloc[0]
    one = demo_saes[FIRST].W_dec[int(row.source.split("#")[1])]
    cosine = torch.nn.functional.cosine_similarity(one, demo_saes[SECOND].W_dec[3], dim=0)
    assert row.persistence == pytest.approx(float(cosine), abs=1e-6)


# ---- which features, which pairs ------------------------------------------------------------------------------------


def test_features_that_never_always_or_rarely_fire_are_left_out(demo: Demo, demo_saes: Any, codes: Any) -> None:
    saes = {hook: PlainSAE(sae.W_enc, sae.W_dec, sae.bias.clone()) for hook, sae in demo_saes.items()}
    saes[FIRST].bias[0], saes[FIRST].bias[1] = -1e6, 1e6
    levels, counts = codes[FIRST][:, 2].unique(return_counts=True)
    saes[FIRST].bias[2] -= levels[-2:].mean().float()  # only the strongest still fire
    some = circuit(demo, saes, min_count=int(counts[-1]) + 1)
    assert some.provenance["left_out"][FIRST] == {"never": 1, "always": 1, "rare": 1, "dropped_by_max_features": 0}
    assert not {f"{FIRST}#{feature}" for feature in range(3)} & set(some.index.names)


def test_max_features_keeps_those_of_most_variance(demo: Demo, demo_saes: Any, codes: dict[str, Tensor]) -> None:
    few = circuit(demo, demo_saes, max_features=10)
    weight = codes[SECOND].var(0) * demo_saes[SECOND].W_dec.double().square().sum(1)
    block = next(block for block in few.index.blocks if str(block.site) == SECOND)
    assert set(block.features or ()) == set(weight.topk(10).indices.tolist())
    assert few.provenance["left_out"][SECOND]["dropped_by_max_features"] == 38


def test_pairs(demo: Demo, demo_saes: Any) -> None:
    def between(**options: Any) -> set[tuple[str, str]]:
        made = circuit(demo, demo_saes, tokens=demo.tokens[:100], **options)
        return {(pair["source"], pair["target"]) for pair in made.provenance["pairs"]}

    adjacent = {(FIRST, SECOND), (SECOND, THIRD), (THIRD, "target")}
    assert between() == adjacent
    assert between(pairs="all") == adjacent | {(FIRST, THIRD)}
    assert between(pairs=[(FIRST, THIRD)]) == {(FIRST, THIRD), (THIRD, "target")} - {(THIRD, "target")} | {
        (SECOND, "target"), (THIRD, "target")
    }  # fmt: skip
    assert between(pairs=[(FIRST, SECOND), (FIRST, "target")]) == {(FIRST, SECOND), (FIRST, "target")}


def test_saes_may_come_in_any_order(demo: Demo, demo_saes: Any, graph: AttributionGraph) -> None:
    turned = circuit(demo, dict(reversed(demo_saes.items())), held_out=0.0, error=False, penalty="l1")
    assert turned.index == graph.index and turned.kept_edges() == graph.kept_edges()


def test_a_transcoder_feeds_what_comes_after_its_output(demo: Demo, demo_saes: Any) -> None:
    adapter = adapt(demo.model)
    hook, out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    acts = adapter.run(demo.tokens, None, [hook])
    plain = plain_sae(acts[hook][:, 1:].flatten(0, 1), 32, seed=7)

    class Transcoder(PlainSAE):
        hook_out = out

    saes = {hook: Transcoder(plain.W_enc, plain.W_dec, plain.bias), SECOND: demo_saes[SECOND], FIRST: demo_saes[FIRST]}
    made = circuit(demo, saes)
    assert {(pair["source"], pair["target"]) for pair in made.provenance["pairs"]} == {
        (FIRST, hook), (hook, SECOND), (SECOND, "target")
    }  # fmt: skip
    with pytest.raises(InputError, match="one activation twice"):
        circuit(demo, {FIRST: demo_saes[FIRST], "blocks.1.hook_resid_pre": demo_saes[FIRST]})
    with pytest.raises(InputError, match="against the order of computation"):
        circuit(demo, {hook: saes[hook], out: plain_sae(acts[hook][:, 1:].flatten(0, 1), 8)}, pairs=[(out, hook)])


# ---- positions ------------------------------------------------------------------------------------------------------


def test_mean_mixing_shows_parents_through_attention(demo: Demo, demo_saes: Any, codes: dict[str, Tensor]) -> None:
    """With codes mixed by hand, every weight of a child is least squares on both kinds of columns."""
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    mixed = circuit(
        demo, pair, mixing="mean", error=False, held_out=0.0, pairs=[(FIRST, SECOND)], positions=slice(1, None)
    )
    assert {"", "v"} == set(mixed.edge_table().port)
    acts = adapt(demo.model).run(demo.tokens, None, [FIRST, "pattern.1"])
    pattern = acts["pattern.1"].mean(1)
    seen = torch.where(pattern < 0.01, 0, pattern) @ demo_saes[FIRST].encode(acts[FIRST])
    through = seen[:, 1:].flatten(0, 1).double()
    child = f"{SECOND}#9"
    rows = rows_into(mixed, child)
    rows = rows[rows.regression != 0]  # others are there for their effect alone
    x = torch.stack(
        [
            (codes[FIRST] if port == "" else through)[:, int(name.split("#")[1])]
            for name, port in zip(rows.source, rows.port)
        ],
        1,
    )
    expected = least_squares(x, codes[SECOND][:, 9])
    torch.testing.assert_close(torch.tensor(rows.regression.to_numpy()), expected, rtol=1e-4, atol=1e-6)


def test_head_mixing_names_the_head(demo: Demo, demo_saes: Any) -> None:
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    heads = circuit(demo, pair, mixing="heads", pairs=[(FIRST, SECOND)], strength=0.05)
    table = heads.edge_table()
    assert set(table[table.port == "v"]["head"]) <= {0.0, 1.0, 2.0, 3.0} and set(table[table.port == ""]["head"]) == {
        -1
    }
    assert len(set(table[table.port == "v"]["head"])) > 1
    assert not table.duplicated(["source", "target", "port"]).any()


def test_parts_of_heads_add_up_to_the_edge(demo: Demo, demo_saes: Any) -> None:
    """And the edge is the one that is seen through all heads together."""
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    options = {"pairs": [(FIRST, SECOND)], "tokens": demo.tokens[:64]}
    table, mean = (circuit(demo, pair, mixing=mixing, **options).edge_table() for mixing in ("heads", "mean"))
    ends = ["source", "target", "port"]
    mean = mean[mean.kept & (mean.port == "v") & (mean.target != "logits")]  # of logits the size alone is told
    whole = mean.set_index(ends)
    assert (whole["q"] <= 0.05).all()
    parts = table[table.port == "v"].set_index(ends)
    names = [f"head.{number}" for number in range(4)]
    assert (parts[names].sum(axis=1) - parts["weight"]).abs().max() <= 1e-5 * parts["weight"].abs().max()
    assert set(parts[parts.kept].index) >= set(whole.index) and len(whole) > 3
    both = whole.join(parts.add_suffix("_heads"))
    assert both["weight_heads"].tolist() == pytest.approx(both["weight"].tolist(), rel=1e-5)
    assert (parts[names].abs().to_numpy().argmax(axis=1) == parts["head"]).all()
    assert (parts[names].abs().max(axis=1) < parts["weight"].abs() * 0.95).any()  # more than one head carries some


def test_pooling_makes_a_sample_of_each_prompt(demo: Demo, demo_saes: Any, codes: dict[str, Tensor]) -> None:
    pooled = circuit(demo, demo_saes, mixing="pooled", error=False, held_out=0.0, penalty="l1")
    assert pooled.provenance["pairs"][0]["samples"] == len(demo.tokens)
    means = {hook: codes[hook].view(len(demo.tokens), -1, codes[hook].shape[1]).mean(1) for hook in (FIRST, SECOND)}
    child = next(name for name in pooled.edge_table().target if name.startswith(SECOND))
    rows = rows_into(pooled, child)
    x = means[FIRST][:, [int(name.split("#")[1]) for name in rows.source]]
    expected = least_squares(x, means[SECOND][:, int(child.split("#")[1])])
    torch.testing.assert_close(torch.tensor(rows.weight.to_numpy()), expected, rtol=1e-4, atol=1e-6)


def test_positions_choose_the_samples(demo: Demo, demo_saes: Any) -> None:
    last = circuit(demo, demo_saes, positions="last", min_count=5, held_out=0.0)
    assert last.provenance["samples"] == len(demo.tokens)


# ---- targets --------------------------------------------------------------------------------------------------------


def last_codes(demo: Demo, codes: dict[str, Tensor], hook: str) -> Tensor:
    return codes[hook].view(len(demo.tokens), -1, codes[hook].shape[1])[:, -1]


def test_a_number_is_explained_by_the_features_that_make_it(demo: Demo, demo_saes: Any, codes: Any) -> None:
    found = last_codes(demo, codes, THIRD)
    varied = found.std(0).topk(2).indices.tolist()
    y = 2.0 * found[:, varied[0]] - 3.0 * found[:, varied[1]]
    made = circuit(demo, demo_saes, target=tcl.Values(y), error=False, held_out=0.0)
    rows = rows_into(made, "target")
    weights = dict(zip(rows.source, rows.weight))
    assert weights[f"{THIRD}#{varied[0]}"] == pytest.approx(2.0, abs=1e-3)
    assert weights[f"{THIRD}#{varied[1]}"] == pytest.approx(-3.0, abs=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_are_explained_by_the_features_that_tell_them(
    demo: Demo, demo_saes: Any, codes: Any, classes: int
) -> None:
    found = last_codes(demo, codes, THIRD)
    teller = int(found.std(0).argmax())
    bars = found[:, teller].quantile(torch.tensor([0.5] if classes == 2 else [0.33, 0.67]).double())
    y = (found[:, teller, None] > bars).sum(1)
    made = circuit(demo, demo_saes, target=tcl.Labels(y), held_out=0.2)
    rows = rows_into(made, "target")
    assert rows.source.iloc[0] == f"{THIRD}#{teller}"
    assert not rows.duplicated("source").any()
    assert made.provenance["pairs"][-1]["held_out_r2"] > 0.3
    assert made.certificate.loc["target"].converged if classes == 2 else True
    if classes == 2:
        assert rows.weight.iloc[0] > 0


def test_labels_by_chance_are_explained_by_nothing(demo: Demo, demo_saes: Any) -> None:
    y = torch.randint(2, (len(demo.tokens),), generator=torch.Generator().manual_seed(1))
    made = circuit(demo, demo_saes, target=tcl.Labels(y), held_out=0.2)
    assert len(rows_into(made, "target")) <= 2
    assert made.provenance["pairs"][-1]["held_out_r2"] > -0.05


def test_a_logit_difference_is_read_at_the_last_position(demo: Demo, demo_saes: Any, codes: Any) -> None:
    made = circuit(demo, demo_saes, target=demo.target, held_out=0.0, error=False, strength=0.02)
    rows = rows_into(made, "logits")
    assert len(rows) and made.provenance["pairs"][-1]["samples"] == len(demo.tokens)
    x = last_codes(demo, codes, THIRD)[:, [int(name.split("#")[1]) for name in rows.source]]
    logits = demo.model(demo.tokens)[:, -1].detach().double()
    prompt = torch.arange(len(logits))
    y = logits[prompt, demo.correct] - logits[prompt, demo.incorrect]
    torch.testing.assert_close(torch.tensor(rows.weight.to_numpy()), least_squares(x, y), rtol=1e-3, atol=1e-4)


# ---- strengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", ["ebic", "mcp", "cv", "stability"])
def test_named_strengths(demo: Demo, demo_saes: Any, strength: str) -> None:
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    penalty = "l1" if strength == "mcp" else "read"
    made = circuit(demo, pair, pairs=[(FIRST, SECOND)], strength=strength, penalty=penalty)
    assert made.n_kept and bool(made.certificate.converged.all())
    if strength == "stability":
        assert float(made.extras["stability"][made.port == 0].min()) >= 0.8


def test_stability_comes_beside_any_strength(demo: Demo, demo_saes: Any) -> None:
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    plain, told = (circuit(demo, pair, pairs=[(FIRST, SECOND)], strength=0.1, draws=draws) for draws in (0, 10))
    assert told.kept_edges() == plain.kept_edges() and "stability" not in plain.extras
    share = told.extras["stability"]
    assert float(share.min()) >= 0 and float(share.max()) == 1.0
    strong = told.score.abs() > told.score.abs().median()
    assert float(share[strong].mean()) > float(share[~strong].mean())


def test_adaptive_weights_keep_fewer_edges(demo: Demo, demo_saes: Any) -> None:
    pair = {FIRST: demo_saes[FIRST], SECOND: demo_saes[SECOND]}
    plain, adaptive = (
        circuit(demo, pair, pairs=[(FIRST, SECOND)], strength=0.05, penalty=penalty) for penalty in ("l1", "adaptive")
    )
    assert 0 < adaptive.n_kept < plain.n_kept


def test_a_larger_strength_keeps_fewer_edges(demo: Demo, demo_saes: Any) -> None:
    counts = [circuit(demo, demo_saes, strength=strength).n_kept for strength in (0.1, 0.4, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 0


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixing": "max"}, "`mixing` is 'max'"),
        ({"penalty": "l0"}, "`penalty` is 'l0'"),
        ({"min_count": 0}, "`min_count` is 0"),
        ({"max_features": 2.5}, "`max_features` is 2.5"),
        ({"held_out": 1.0}, "`held_out` is 1.0"),
        ({"pairs": "some"}, "`pairs` is 'some'"),
        ({"pairs": []}, "`pairs` is empty"),
        ({"pairs": [("blocks.9.hook_resid_post", SECOND)]}, "has no SAE here"),
        ({"pairs": [(FIRST, SECOND), (FIRST, SECOND)]}, "a pair twice"),
        ({"pairs": [(FIRST,)]}, "give \\(source hook, target hook\\)"),
        ({"pairs": [FIRST]}, f"`pairs` holds '{FIRST}'"),
        ({"pairs": None}, "`pairs` is None"),
        ({"labels": 3}, "`labels` is a int"),
        ({"labels": {FIRST: {"3": "text"}}}, f"`labels` has a dict for '{FIRST}'"),
        ({"labels": "/nowhere.json"}, "isn't a readable JSON file"),
    ],
)
def test_bad_options(demo_saes: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tcl.SAEFeatures(demo_saes, **options)


def test_bad_saes(demo_saes: Any) -> None:
    sae = demo_saes[FIRST]
    with pytest.raises(InputError, match="`saes` is empty"):
        tcl.SAEFeatures({})
    for wrong in (None, sae, [sae], [(3, sae)], 7):
        with pytest.raises(InputError, match="give \\{hook name: SAE\\}") as caught:
            tcl.SAEFeatures(wrong)
        assert len(str(caught.value)) < 150  # no tensors
    with pytest.raises(InputError, match="more than once"):
        tcl.SAEFeatures([(FIRST, sae), (FIRST, sae)])
    with pytest.raises(InputError, match="isn't a hook name"):
        tcl.SAEFeatures({"layer 3": sae})
    with pytest.raises(InputError, match="give a hook name"):
        tcl.SAEFeatures({"a0.h1": sae})


def test_bad_hooks_pairs_and_shapes(demo: Demo, demo_saes: Any) -> None:
    with pytest.raises(InputError, match="hook_resid_pots"):
        circuit(demo, {"blocks.0.hook_resid_pots": demo_saes[FIRST]})
    with pytest.raises(InputError, match="one activation twice"):
        circuit(demo, {FIRST: demo_saes[FIRST], "blocks.1.hook_resid_pre": demo_saes[FIRST]})
    with pytest.raises(InputError, match="against the order of computation"):
        circuit(demo, demo_saes, pairs=[(SECOND, FIRST)])
    with pytest.raises(InputError, match="another model or hook"):
        circuit(demo, {FIRST: plain_sae(torch.randn(50, 20), 30)})
    with pytest.raises(InputError, match="without encode"):
        circuit(demo, {FIRST: object()})


def test_bad_numbers(demo: Demo, demo_saes: Any) -> None:
    broken = replace(demo_saes[FIRST], bias=torch.full_like(demo_saes[FIRST].bias, torch.nan))
    with pytest.raises(ModelError, match=f"codes of the SAE at {FIRST}"):
        circuit(demo, {FIRST: broken})
    dead = replace(demo_saes[FIRST], bias=torch.full_like(demo_saes[FIRST].bias, -1e6))
    with pytest.raises(InputError, match="48 never fire"):
        circuit(demo, {FIRST: dead, SECOND: demo_saes[SECOND]})
    with pytest.raises(InputError, match="lower `min_count`"):
        circuit(demo, demo_saes, min_count=10**9)


def test_bad_targets(demo: Demo, demo_saes: Any) -> None:
    count = len(demo.tokens)
    with pytest.raises(InputError, match="one class only"):
        circuit(demo, demo_saes, target=tcl.Labels([1] * count))
    with pytest.raises(InputError, match="one per prompt"):
        circuit(demo, demo_saes, target=tcl.Values([1.0] * (count - 1)))
    with pytest.raises(InputError, match="1 sample"):
        circuit(demo, demo_saes, tokens=demo.tokens[:1], target=tcl.Values([1.0]), min_count=1, held_out=0.0)


def test_bad_calls(demo: Demo, demo_saes: Any) -> None:
    with pytest.raises(InputError, match="is for components: SAEFeatures"):
        circuit(demo, demo_saes, design="routed")
    with pytest.raises(InputError, match="`method`"):
        circuit(demo, demo_saes, method="lasso+confirm")
    with pytest.raises(InputError, match="`strength`"):
        circuit(demo, demo_saes, strength=2.0)


def test_too_little_memory_is_said_before_anything_is_allocated(demo: Demo, demo_saes: Any) -> None:
    with pytest.raises(InputError, match=r"need about .*, `memory` allows 0\.0 MB: use `max_features` of about \d+"):
        circuit(demo, demo_saes, memory=10_000)
