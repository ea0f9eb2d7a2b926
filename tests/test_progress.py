"""Progress where there is no terminal: lines, now and then, and none of what is soon done."""

import sys

import pytest

from tl_circuitlasso import progress


def _count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: float, shown: bool = True
) -> str:
    monkeypatch.setattr(progress, "EVERY", every)
    assert not sys.stderr.isatty()
    with progress.bar(total=50, progress=shown, desc="collect", unit="prompt") as counting:
        for _ in range(50):
            counting.update(1)
    return capsys.readouterr().err


def test_lines_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _count(monkeypatch, capsys, 0.0).splitlines()
    assert len(lines) > 3 and all(line.startswith("collect: ") and " to go" in line for line in lines)
    assert lines[-1].startswith("collect: 50 of 50 prompts")


def test_short_and_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _count(monkeypatch, capsys, 10.0) == ""
    assert _count(monkeypatch, capsys, 0.0, shown=False) == ""
