"""Edges read again: exactly what patching them does, as far as that runs through kept edges."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits
from tl_circuitlasso.models.ablation import from_values
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.patching import Written, record
from tl_circuitlasso.models.reread import Costs, Edge, Reading, reread
from tl_circuitlasso.models.tokens import Batch

# Norms of queries, keys and outputs keep their scale in a second look; these families have none.
FAMILIES = ["gpt2", "no_norm", "llama", "gptj", "attn_only"]
RIGHT, WRONG = 3, 4
CIRCUIT = [
    ("input", "a0.h1"), ("input", "m0"), ("a0.h1", "m0"), ("a0.h1", "a1.h2"), ("m0", "a1.h2"), ("m0", "logits"),
    ("a1.h2", "m1"), ("a1.h2", "logits"), ("m1", "logits"),
]  # fmt: skip
CLEAN, CORRUPTED = architectures.prompts(batch=6), architectures.prompts(batch=6, seed=1)


def circuit_of(adapter: Adapter) -> list[Edge]:
    """Those edges of CIRCUIT that the model has."""
    index = EdgeLayout(adapter.shape).index
    return [edge for edge in CIRCUIT if all(name in index for name in edge) and index.may_feed(*edge)]


def looked_at(adapter: Adapter, edges: Collection[Edge], **changes: Any) -> Costs:
    real = torch.ones_like(CLEAN, dtype=torch.bool)
    batch = replace(Batch(CLEAN, real, real, 0, partners=CORRUPTED), **changes)
    return reread(
        adapter, batch, Reading.all(edges), tcl.LogitDiff(RIGHT, WRONG), last=True, probe=None, draws=2, seed=0
    )


def instead(clean: Written, other: Written, name: str) -> Written:
    """What everything writes on the clean prompts, one component on the others."""
    if name == "input":
        return replace(clean, input=other.input)
    layer = int(name[1:].split(".")[0])
    if name.startswith("m"):
        return replace(clean, mlps=tuple((other if i == layer else clean).mlps[i] for i in range(len(clean.mlps))))
    heads, head = [part.clone() for part in clean.heads], int(name.split("h")[1])
    heads[layer][:, :, head] = other.heads[layer][:, :, head]
    return replace(clean, heads=tuple(heads))


def patched(adapter: Adapter, edges: Collection[Edge], cut: Collection[Edge]) -> Tensor:
    """How each prompt's logit difference changes when the edges of `cut`, which leave one component, carry what that
    does on the counterpart, and nothing but `edges` hands the change on: runs of the model with cut edges."""
    layout = EdgeLayout(adapter.shape)
    (source,) = {edge[0] for edge in cut}
    names, (columns, _) = layout.index.names, layout.targets()
    pairs = [[(name, names[column]) for column in columns] for name in names[: layout.n_sources]]
    live = [[pair not in cut and (pair in edges or pair[0] == source) for pair in row] for row in pairs]
    kept = torch.tensor(live) & layout.mask()
    clean, other = record(adapter, CLEAN), record(adapter, CORRUPTED)
    carried = from_values(adapter, instead(clean, other, source))
    logits = run_circuits(adapter, CLEAN, None, as_circuits(kept[None], layout), carried)[0, :, -1]
    plain = adapter.run(CLEAN, None, ["logits"])["logits"][:, -1]
    return (logits[:, RIGHT] - logits[:, WRONG]) - (plain[:, RIGHT] - plain[:, WRONG])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edge_costs_what_patching_it_costs(family: str) -> None:
    adapter = adapt(architectures.hooked(family, dtype=torch.float64))
    edges = circuit_of(adapter)
    found = looked_at(adapter, edges)
    assert found.pairs == len(CLEAN) and found.passes == 1 and set(found.edges) == set(edges)
    for edge in edges:
        change = patched(adapter, edges, [edge])
        assert found.effects[edge] == pytest.approx(float(change.mean()), rel=1e-6, abs=1e-9)
        assert found.edges[edge] == pytest.approx(float(change.abs().mean()), rel=1e-6, abs=1e-9)
        assert found.judged[edge] == pytest.approx(float(change.square().mean()), rel=1e-6, abs=1e-9)
    assert max(found.edges.values()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_is_judged_by_all_that_it_hands_on(family: str) -> None:
    adapter = adapt(architectures.hooked(family, dtype=torch.float64))
    edges = circuit_of(adapter)
    found = looked_at(adapter, edges)
    assert set(found.nodes) == {source for source, _ in edges} - {"input"}
    for name, judged in found.nodes.items():
        change = patched(adapter, edges, [edge for edge in edges if edge[0] == name])
        assert judged == pytest.approx(float(change.square().mean()), rel=1e-6, abs=1e-9)


def test_an_edge_that_leads_nowhere_costs_nothing() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    found = looked_at(adapter, [("input", "a0.h1"), ("m0", "logits")])
    assert found.edges["input", "a0.h1"] == 0 and found.edges["m0", "logits"] > 0


def test_random_partners_are_other_prompts_of_the_batch() -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    found = looked_at(adapter, circuit_of(adapter), partners=None)
    assert found.pairs == 2 * len(CLEAN) and found.edges != looked_at(adapter, circuit_of(adapter)).edges
    alike = looked_at(adapter, circuit_of(adapter), tokens=CLEAN[:1].expand(6, -1), partners=None)
    assert max(alike.edges.values()) == pytest.approx(0, abs=1e-6)
