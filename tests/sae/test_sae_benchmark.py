"""The benchmark of feature edges runs from folder to table."""

import json
from pathlib import Path

import pandas as pd

from benchmarks import sae_features


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
