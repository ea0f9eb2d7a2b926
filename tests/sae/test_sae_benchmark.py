"""The benchmark of feature edges runs from folder to table."""

import json
from pathlib import Path

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
