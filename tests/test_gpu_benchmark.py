"""The one command for a card, rehearsed on the CPU: every part runs, time is kept, and nothing measured is lost."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.device import Device
from benchmarks.gpu.equality import compared
from benchmarks.gpu.parts import TOY, Figures, Part, Size, run_all, table

CPU = Device("cpu", 1.0, 1.0, 1.0)


def lines(path: Path) -> list[Figures]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def endless(device: Device, size: Size) -> Iterator[Figures]:
    yield {"number": 1}
    while True:
        time.sleep(0.01)


def failing(device: Device, size: Size) -> Iterator[Figures]:
    yield {"number": 2}
    raise RuntimeError("no kernel image is available")


def test_a_part_that_hangs_or_fails_costs_nothing_that_was_measured(tmp_path: Path) -> None:
    out, seen = tmp_path / "out.jsonl", []

    def last(device: Device, size: Size) -> Iterator[Figures]:
        seen.extend(lines(out))  # what came before is on the disk already
        yield {"number": 3.0}

    parts = [Part("endless", 1, endless), Part("failing", 1, failing), Part("last", 1, last)]
    began = time.monotonic()
    found = run_all(parts, CPU, TOY, 4.5, out)
    assert 1.0 < time.monotonic() - began < 4.0  # the hanging part had a third, the others what they needed
    assert [line["part"] for line in seen] == ["device", "endless", "endless", "failing", "failing"]
    ends = {line["part"]: line["end"] for line in lines(out) if "end" in line}
    assert ends["endless"].startswith("out of time") and ends["last"] == "done"
    assert "RuntimeError: no kernel image" in ends["failing"] and "test_gpu_benchmark.py" in ends["failing"]
    assert [line["number"] for line in found if "number" in line] == [1, 2, 3.0] and found == lines(out)
    text = table(found)
    assert "last: done" in text and "| number |\n|---|\n| 3 |" in text


def test_no_time_means_no_part(tmp_path: Path) -> None:
    found = run_all([Part("endless", 1, endless)], CPU, TOY, 0.5, tmp_path / "out.jsonl")
    assert found[-1]["end"] == "no time left"


@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert command.main(["--rehearse", "--minutes", "7", "--out", str(out)]) == 0
    found = lines(out)
    assert found[0]["device"].startswith("CPU") and found[0]["TFLOP/s float32"] > 0
    ends = {line["part"]: line["end"] for line in found if "end" in line}
    assert ends == {part.name: "done" for part in command.PARTS}
    equal = [line for line in found if line["part"] == "equality" and "what" in line]
    assert {line["dtype"] for line in equal} == {"float32", "bfloat16"}
    assert {"read", "activation", "SAE features", "eap_ig", "faithfulness"} == {line["what"] for line in equal}
    assert all(line["equal"] == "yes" for line in found if "equal" in line)
    solved = [line for line in found if line["part"] == "solver" and "D" in line]
    assert solved and all(line["worst gap"] <= 1e-4 and line["Lasso s"] > 0 for line in solved)
    graph = next(line for line in found if line["part"] == "graphs" and "circuit s" in line)
    assert graph["circuit s"] > graph["bare s"] > 0 and graph["planned GiB"] > 0
    assert "graphs: done" in capsys.readouterr().out


def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert command.main(["--all", "--out", str(tmp_path / "x")]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not (tmp_path / "x").exists()


def test_a_difference_is_seen() -> None:
    assert compared(torch.ones(3), torch.ones(3), 0.01)["equal"] == "yes"
    assert compared(torch.ones(3), torch.tensor([1.0, 1.0, 1.1]), 0.01)["equal"] == "NO"
