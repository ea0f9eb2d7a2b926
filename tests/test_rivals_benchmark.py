"""The table of all methods: verdicts from cases that weren't learnt from, and a file that work is resumed from."""

import sys

import pandas as pd
import pytest
import torch

from benchmarks import rivals
from tests.helpers import shared_folder
from tl_circuitlasso.evaluate.stability import Stability


def lines(wrong: int) -> list[dict]:
    """Four cases of 40 true and 40 false edges; in the odd ones `wrong` false edges are as steady as true ones."""
    made = []
    for case in range(4):
        shares = [["input", f"m{i}", 1.0, True] for i in range(40)]
        shares += [["input", f"m{i}", float(case % 2 and i < 40 + wrong), False] for i in range(40, 80)]
        made.append({"case": f"case_{case}", "method": "EAP", "shares": shares})
    return made


def test_verdicts_are_learnt_on_every_second_case_and_judged_on_the_others():
    (row,) = rivals.verdicts(lines(wrong=6))
    assert (row["in from"], row["out to"]) == (1.0, 0.0)  # the even cases are without a fault
    assert (row["in, true"], row["in, false"]) == (80, 12) and (row["out, true"], row["out, false"]) == (0, 68)
    assert list(rivals.verdicts([one | {"method": one["case"]} for one in lines(0)])) == []  # one case each


def test_a_table_goes_on_where_its_file_ends(tmp_path):
    edges = frozenset({("input", "m0"), ("input", "m1")})
    kept = pd.DataFrame({"source": ["input"], "target": ["m0"], "share": [1.0]})
    record = rivals.Record.of(tmp_path / "table.json")
    record.add({"case": "a", "method": "EAP", "CMD": 0.5}, Stability(1.0, kept, (1, 1), edges), edges)
    again = rivals.Record.of(tmp_path / "table.json")
    assert again.lines == record.lines and again.has("a", "EAP") and not again.has("a", "RelP")
    assert again.lines[0]["shares"] == [["input", "m0", 1.0, True], ["input", "m1", 0.0, True]]
    assert list(again.frame().columns) == ["case", "method", "CMD"]


def test_prompts_are_grouped_by_the_first_word_that_tells_them_apart():
    assert rivals._templates(torch.tensor([[0, 7, 1], [0, 8, 1], [0, 7, 2]])) == [7, 8, 7]


@pytest.mark.slow
def test_known_circuits_are_run_and_not_run_again(tmp_path, monkeypatch, capsys):
    folder, file = shared_folder("interpbench"), tmp_path / "table.json"
    words = ["rivals", "cases", str(folder), "--only", "13", "--prompts", "16", "--resamples", "2", "--json", str(file)]
    for methods in (["EAP"], ["EAP", "RelP", "random"]):
        monkeypatch.setattr(sys, "argv", [*words, "--methods", *methods])
        rivals.main()
    shown = capsys.readouterr().out
    assert shown.count("case_13 EAP ") == 1 and "case_13 RelP" in shown and "Means over 1 cases" in shown
    frame = rivals.Record.of(file).frame().set_index("method")
    assert frame.loc["EAP", "SHD"] < frame.loc["random", "SHD"] and frame.loc["random", "stability"] == 1
    assert bool((frame[["forwards", "CMD"]] >= 0).all().all())
