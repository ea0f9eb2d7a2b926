"""The table of all methods: verdicts from cases that weren't learnt from, and a file that work is resumed from."""

import sys

import pandas as pd
import pytest
import torch

from benchmarks import rivals
from tests.helpers import CASES
from tl_circuitlasso.demo import load_demo
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.stability import Stability


def lines(wrong: tuple[int, ...]) -> list[dict]:
    """Cases of 40 true and 40 false edges; so many of the false ones of each are as steady as its true ones."""
    made = []
    for case, steady in enumerate(wrong):
        shares = [["input", f"m{i}", 1.0, True] for i in range(40)]
        shares += [["input", f"m{i}", float(i < 40 + steady), False] for i in range(40, 80)]
        made.append({"case": f"case_{case}", "method": "EAP", "shares": shares})
    return made


def test_a_case_is_judged_by_thresholds_from_the_others():
    (row,) = rivals.verdicts(lines((0, 0, 0, 30)))
    assert row["in from"] is None and row["out to"] == 0.0  # of all: 30 of 190 are false, too many at .8
    # three cases without a fault would call in what is steady in the last, which with two of them says that none may be
    assert (row["in, true"], row["in, false"]) == (40, 30) and row["abstain, true"] == 120
    assert row["out, false"] == 130 and row["out, true"] == 0
    assert list(rivals.verdicts([one | {"method": one["case"]} for one in lines((0, 0))])) == []  # one case each


def test_a_table_goes_on_where_its_file_ends(tmp_path):
    edges = frozenset({("input", "m0"), ("input", "m1")})
    kept = pd.DataFrame({"source": ["input"], "target": ["m0"], "share": [1.0]})
    record, asked = rivals.Record.of(tmp_path / "table.json"), {"case": "a", "method": "EAP", "resamples": 2}
    record.add(asked | {"CMD": 0.5}, Stability(1.0, kept, (1, 1), edges), edges)
    again = rivals.Record.of(tmp_path / "table.json")
    assert again.lines == record.lines and again.has(asked) and not again.has(asked | {"method": "RelP"})
    assert again.lines[0]["shares"] == [["input", "m0", 1.0, True], ["input", "m1", 0.0, True]]
    assert list(again.frame().columns) == ["case", "method", "resamples", "CMD"]
    with pytest.raises(InputError, match="EAP on a has resamples 2 instead of 3; use another file"):
        again.has(asked | {"resamples": 3})


def test_chance_is_drawn_anew_for_other_prompts_and_the_same_for_the_same():
    demo = load_demo(prompts=4)
    first, again = (rivals._random(demo.model, demo.tokens, demo.corrupted, None).score for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, rivals._random(demo.model, demo.tokens[:3], demo.corrupted[:3], None).score)


def test_prompts_are_grouped_by_the_first_word_that_tells_them_apart():
    assert rivals._templates(torch.tensor([[0, 7, 1], [0, 8, 1], [0, 7, 2]])) == [7, 8, 7]


@pytest.mark.slow
def test_known_circuits_are_run_and_not_run_again(tmp_path, monkeypatch, capsys):
    folder, file = CASES, tmp_path / "table.json"
    words = ["rivals", "cases", str(folder), "--only", "13", "--prompts", "16", "--resamples", "2", "--json", str(file)]
    for methods in (["EAP"], ["EAP", "RelP", "random"]):
        monkeypatch.setattr(sys, "argv", [*words, "--methods", *methods])
        rivals.main()
    shown = capsys.readouterr().out
    assert shown.count("case_13 EAP ") == 1 and "case_13 RelP" in shown and "Means over 1 cases" in shown
    frame = rivals.Record.of(file).frame().set_index("method")
    assert frame.loc["EAP", "SHD"] < frame.loc["random", "SHD"] and frame.loc["random", "stability"] < 1
    assert bool((frame[["forwards", "CMD"]] >= 0).all().all())
