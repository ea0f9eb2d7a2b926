"""The benchmark of feature edges runs from folder to table."""

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import cola, sae_features


def test_figures_goals_layers_and_costs_are_printed(stories, sae_folders, tmp_path: Path, capsys) -> None:
    folder = Path(next(iter(sae_folders.values()))).parent
    sizes = {"tokens": 3000, "held-out": 24, "prompts": 2, "gradient-prompts": 1, "strongest": 10, "sample": 10}
    small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert sae_features.main(["--saes", str(folder), "--json", str(tmp_path / "edges.json"), *small]) == 0
    printed = capsys.readouterr().out
    for part in ("CircuitLasso", "gradient", "correlation", "non-edges", "held_out_r2", "forward passes", "solve"):
        assert part in printed
    rows = json.loads((tmp_path / "edges.json").read_text())
    assert {row["set"] for row in rows} == {"strongest", "kept", "non-edges"}


def test_edges_through_attention_are_told_apart() -> None:
    rows = [("", 1.0, 2.0, True), ("", -2.0, 3.0, True), ("v", 0.1, 0.3, False), ("v", 0.2, 0.4, True)]
    table = pd.DataFrame(rows, columns=["port", "weight", "effect", "real"]).assign(method="ours", set="kept")
    found = sae_features.by_port(table)
    assert found.loc[("ours", "")].tolist() == [2, 0.5, 1.0, 1.0]
    assert found.loc[("ours", "v")].tolist() == [2, 1.0, 0.5, 1.0]


@pytest.mark.slow
def test_circuits_on_sentences_are_judged_by_nodes_and_edges(stories, sae_folders, capsys) -> None:
    folder = Path(next(iter(sae_folders.values()))).parent
    words = "--rows 300 --gradient-rows 12 --gradient-prompts 1 --steps 2 --prompts 6 --nodes 60 --edges 60 200"
    assert cola.main(["--saes", str(folder), "--length", "16", *words.split()]) == 0
    printed = capsys.readouterr().out
    for part in ("twins carried", "persistence", "merging", "dropping", "circuit, ", "SHIFT, ", "random"):
        assert part in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("nodes", "edges"))]
    assert [row[1] for row in rows] == ["60", "60", "200"] * 3
    complete = [float(row[5]) for row in rows]
    assert sum(complete[:3]) < sum(complete[6:])  # taking the circuit away does more than taking chance away


def test_random_circuits_have_edges_between_the_same_hooks(story_graph) -> None:
    drawn, again = (cola.at_random(story_graph, seed) for seed in (0, 1))
    hooks = [
        {tuple(node.rpartition("#")[0] for node in edge) for edge in graph.candidate_edges()}
        for graph in (drawn, story_graph)
    ]
    assert hooks[0] == hooks[1] and len(drawn) <= len(story_graph)
    assert len(again.kept_edges() & drawn.kept_edges()) < len(drawn) / 2
