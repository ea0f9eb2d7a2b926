"""Circuits of trained SAEs' features, put to the test on the model that they were found in."""

from typing import Any

import torch
from torch import Tensor

import tl_circuitlasso as tcl


def test_the_features_of_a_circuit_do_more_than_others_of_the_same_number(
    stories: Any, story_tokens: Tensor, saes: dict[str, Any], story_graph: tcl.AttributionGraph
) -> None:
    tokens = story_tokens[:24]
    data: Any = (tokens, None, tcl.evaluate.next_token(tokens), "mean")
    sites = [block for block in story_graph.index.blocks if block.features is not None]
    found = tcl.evaluate.faithfulness(stories, story_graph, *data, saes=saes, error="keep")
    assert found.nodes == len({name for block in sites for name in block.names} & story_graph.kept_nodes())
    assert found.ablated < found.circuit and found.low <= found.faithfulness <= found.high
    report = tcl.evaluate.report(stories, {"features": story_graph}, *data, saes=saes, error="keep")
    assert report.table.loc["features", "cpr"] > report.table.loc["random", "cpr"]
    gone = tcl.evaluate.faithfulness(stories, story_graph, *data, saes=saes, error="remove")
    assert gone.circuit < found.circuit  # SAEs miss something that the model needs
    best = tcl.evaluate.curve(stories, story_graph, *data, saes=saes, error="keep", sizes=(0.01, 0.02))
    node = max(torch.arange(len(story_graph)).tolist(), key=lambda row: float(story_graph.score[row].abs()))
    name = story_graph.index.names[int(story_graph.source[node])]
    off = tcl.evaluate.steer(stories, story_graph, [name], 0, tokens, data[2], saes=saes)
    assert off.change != 0 and best.requested[0] < best.requested[1]
