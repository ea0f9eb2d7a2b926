"""The benchmark of silences notes when lines come."""

import sys
import time

import pytest

from benchmarks import silence


def test_the_longest_silence_is_between_the_right_lines() -> None:
    def call() -> None:
        for line in ("one", "two"):
            sys.stderr.write(f"{line}\n")
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        sys.stderr.write("three\n")

    found = silence.listen(call)
    assert found.lines == 3 and found.between == ("two", "three")
    assert 0.2 <= found.silent <= found.cpu and found.silent_clock <= found.clock


def test_unknown_calls_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "feature_calls", lambda: {"features": lambda: None})
    with pytest.raises(SystemExit):
        silence.main(["--calls", "nothing"])
    assert "there are features" in capsys.readouterr().err
    assert silence.main([]) == 0 and "features" in capsys.readouterr().out
