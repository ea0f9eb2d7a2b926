"""TransformerLens 4's attribution results and circuits: there and back, and its own engine as an oracle."""

import importlib
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given

from tests.formats.helpers import GRAPHS, feature_graph, nonzero, random_graph, small_graph
from tl_circuitlasso import baselines, evaluate, formats
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.formats.transformer_lens_ import MODULE


@dataclass(frozen=True)
class Node:
    kind: str
    position: int
    layer: int | None = None
    head: int | None = None


@dataclass
class AttributionResult:
    node_scores: dict[Any, float]
    edge_scores: dict[tuple[Any, Any], float] = field(default_factory=dict)


def scores(graph: Any) -> pd.DataFrame:
    """Every candidate's score, in the order of the names."""
    table = graph.edge_table()[["source", "target", "port", "score"]]
    return table.sort_values(["source", "target", "port"]).reset_index(drop=True)


@pytest.fixture
def _nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Node=Node, AttributionResult=AttributionResult)
    monkeypatch.setitem(sys.modules, MODULE, module)


@pytest.mark.usefixtures("_nodes")
@given(GRAPHS)
def test_scores_and_circuits_come_back(arguments) -> None:
    n_layers, n_heads, parallel, _, _, seed, threshold = arguments
    graph = random_graph(n_layers, n_heads, parallel, False, True, seed, threshold)
    again = formats.from_transformer_lens(formats.to_transformer_lens(graph, 3, result=True), parallel=parallel)
    pd.testing.assert_frame_equal(scores(again), scores(graph))
    assert bool(again.kept.all())
    circuit = formats.to_transformer_lens(graph, 2)
    assert len(circuit) == 2 * int(graph.kept.sum())
    assert all(writer.position == reader.position for writer, reader in circuit)
    if circuit:
        assert formats.from_transformer_lens(circuit, parallel=parallel).kept_edges() == graph.kept_edges()


@pytest.mark.usefixtures("_nodes")
def test_scores_are_summed_over_positions() -> None:
    ends = Node("embed", 0), Node("v_input", 0, 0, 1)
    later = Node("embed", 4), Node("v_input", 4, 0, 1)
    graph = formats.from_transformer_lens(
        [(*ends, 2.0), (*later, -0.5), (Node("attn_head_out", 1, 0, 1), Node("logits", 1, 0))]
    )
    assert nonzero(graph) == {("input", "a0.h1", "v"): (1.5, True), ("a0.h1", "logits", ""): (1.0, True)}
    totals = formats.to_transformer_lens(small_graph(), 2, result=True).node_scores
    assert totals[Node("embed", 0)] == pytest.approx((0.5 - 0.25 + 2.0) / 2)


@pytest.mark.usefixtures("_nodes")
def test_what_is_no_attribution_is_refused() -> None:
    with pytest.raises(FormatError, match="granularity='edge'"):
        formats.from_transformer_lens(AttributionResult({Node("embed", 0): 1.0}))
    with pytest.raises(FormatError, match="isn't a node that writes"):
        formats.from_transformer_lens([(Node("mlp_in", 0, 0), Node("logits", 0, 0))])
    with pytest.raises(FormatError, match="isn't a node that reads"):
        formats.from_transformer_lens([(Node("embed", 0), Node("embed", 0))])
    with pytest.raises(FormatError, match="finite"):
        formats.from_transformer_lens([(Node("embed", 0), Node("mlp_in", 0, 0), float("nan"))])
    with pytest.raises(FormatError, match="list of pairs"):
        formats.from_transformer_lens(3)
    with pytest.raises(InputError, match="`positions`"):
        formats.to_transformer_lens(small_graph(), 0)
    with pytest.raises(InputError, match="isn't a component"):
        formats.to_transformer_lens(feature_graph(), 2)


def test_without_transformer_lens_4_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(InputError, match="transformer-lens>=4"):
        formats.to_transformer_lens(small_graph(), 2)


def test_its_own_engine_agrees_with_ours() -> None:
    """TransformerLens 4's attribution at the corrupted prompt, and its faithfulness of one circuit, as third oracle."""
    theirs = pytest.importorskip(MODULE)
    architectures = importlib.import_module("tests.architectures")
    model = architectures.bridge("gpt2", dtype=torch.float32)
    clean, corrupted = (architectures.prompts(length=6, batch=1, seed=seed) for seed in (0, 9))

    def difference(logits: torch.Tensor, rows: Any = None) -> torch.Tensor:
        return (logits[:, -1, 3] - logits[:, -1, 4]).sum()

    try:
        config = theirs.EdgeAttributionConfig(granularity="edge")
    except NotImplementedError:
        pytest.skip("this TransformerLens has no attribution of edges yet: TransformerLens 4 has")
    result = theirs.attribution_patch(model, clean, corrupted, difference, config)
    ours = baselines.eap(model, corrupted, clean, difference)  # the derivative at the corrupted prompt: ends swapped
    read = formats.from_transformer_lens(result)
    negated = replace(ours, score=-ours.score)
    pd.testing.assert_frame_equal(scores(read), scores(negated), check_exact=False, rtol=1e-6, atol=3e-6)
    circuit = read.top_k(12, ports=True)
    judged = theirs.faithfulness(model, clean, corrupted, difference, formats.to_transformer_lens(circuit, 6))
    measured = evaluate.faithfulness(model, circuit, clean, corrupted, difference)
    assert judged.recovered == pytest.approx(measured.faithfulness, abs=2e-5)
