"""Progress where there is no terminal: lines, now and then, and none of what is soon done."""

import re
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso import progress
from tl_circuitlasso.discover import pace
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index


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
    assert len(lines) > 3 and all(line.startswith("collect: ") for line in lines)
    assert all(" to go" in line for line in lines[2:])
    assert lines[-1].startswith("collect: 50 of 50 prompts")


def test_short_and_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _count(monkeypatch, capsys, 10.0) == ""
    assert _count(monkeypatch, capsys, 0.0, shown=False) == ""


def test_one_long_step_says_that_it_is_alive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    for _ in progress.bar(range(1), progress=True, desc="solve", unit="block"):
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[0].startswith("solve: 0 of 1 blocks") and lines[-1].startswith("solve: 1 of 1")
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # nobody speaks of work that is done


def test_short_steps_in_a_row_are_one_piece_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1e6]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def steps(pause: float) -> list[str]:
        now[0] += 100
        for number in range(6):
            with progress.bar(total=1, progress=True, desc=f"step {number}") as counting:
                now[0] += 4
                counting.update()
            now[0] += pause
        return [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]

    assert list(dict.fromkeys(steps(0.5))) == ["step 2", "step 5"]  # after 13 and 13.5 more seconds
    assert steps(2.0) == []  # calls with something else between them stay as quiet as one


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHORT", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sized = {"progress": True, "desc": "read", "total": 3}
    assert list(progress.counted(["ab", "c"], len, **sized)) == ["ab", "c"]
    assert "3/3 prompts" in capsys.readouterr().err


def test_a_bar_on_a_terminal_goes_on_while_one_item_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "SHORT", 0.05)
    for _ in progress.bar(range(1), progress=True, desc="solve", unit="block"):
        time.sleep(0.5)
    told = capsys.readouterr().err
    assert told.count("0/1 blocks") > 2 and "1/1 blocks" in told.splitlines()[-1] and told.endswith("\n")
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SHORT", 10.0)
    assert list(progress.bar(range(2), progress=True, desc="solve", unit="block")) == [0, 1]
    assert capsys.readouterr().err == ""


# ---- who speaks -----------------------------------------------------------------------------------------------------

Call = Callable[..., object]
_METRIC_METHODS = (
    "acdc",
    "bootstrap-eap-ig",
    "clean-corrupted",
    "eap",
    "eap-gp",
    "eap-ig",
    "eap-ig-activations",
    "exact",
    "relp",
)
_WATCHING = ("correlation", "information-flow-routes", "lasso+confirm", "magnitude")


@pytest.fixture(scope="module")
def given() -> tuple[Any, ...]:
    """The small model, its planted circuit, three prompts with partners, and a metric."""
    demo = tcl.load_demo(prompts=3)
    index = component_index(n_layers=3, n_heads=4)
    graph = AttributionGraph.from_edges(index, dict.fromkeys(demo.true_edges, 1.0))
    return demo.model, graph, demo.tokens, demo.corrupted, tcl.evaluate.logit_diff(demo.correct, demo.incorrect)


def _evaluations() -> dict[str, Call]:
    on_graph = {name: getattr(tcl.evaluate, name) for name in ("faithfulness", "completeness", "minimality", "curve")}
    calls: dict[str, Call] = {
        name: lambda run=run, *, given, **options: run(*given, **options) for name, run in on_graph.items()
    }
    calls["tests"] = lambda *, given, **options: tcl.evaluate.tests(*given, circuits=10, **options)
    calls["confirm"] = lambda *, given, **options: tcl.evaluate.confirm(*given, **options)
    calls["stability"] = lambda *, given, **options: tcl.evaluate.stability(
        tcl.baselines.random_edges, given[0], *given[2:], resamples=2, **options
    )
    calls["steer"] = lambda *, given, **options: tcl.evaluate.steer(
        given[0], given[1], ["a2.h0"], 0, given[2], given[4], **options
    )
    return calls


def _baselines() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    short = {"acdc": {"threshold": 1e9}, "bootstrap-eap-ig": {"resamples": 2}, "magnitude": {}}
    for name in (*_METRIC_METHODS, *_WATCHING):
        run, few = tcl.baselines.METHODS[name], short.get(name, {"steps": 1})
        calls[name] = lambda run=run, few=few, *, given, **options: run(given[0], *given[2:], **few, **options)
    for name in ("relp", "gradient_activation", "integrated_gradients", "node_scores"):
        run = getattr(tcl.baselines, name)
        calls[f"{name} of nodes"] = lambda run=run, *, given, **options: run(given[0], *given[2:], **options)
    return calls


@pytest.mark.parametrize("name", [*_evaluations(), *_baselines()])
def test_what_takes_long_says_how_far_it_is(
    name: str, given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {**_evaluations(), **_baselines()}[name]
    monkeypatch.setattr(progress, "EVERY", 0.0)
    capsys.readouterr()
    call(given=given)
    lines = [line for line in capsys.readouterr().err.splitlines() if " gone" in line]
    counts = re.search(r": ([\d,]+) of ([\d,]+) \w", lines[-1]) if lines else None
    assert counts is not None and counts[1] == counts[2], f"{name} isn't counted to its end"
    call(given=given, progress=False)
    assert " gone" not in capsys.readouterr().err


def test_a_discovery_counts_what_is_done_and_what_it_solves(
    given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    capsys.readouterr()
    tcl.circuit_lasso(given[0], given[2], positions="last", batch_size=2, refined=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if " gone" in line]
    assert lines[0].startswith("collect: 0 of 3 prompts")  # the first batch isn't done before it is
    assert any(line.startswith("collect: 3 of 3 prompts") for line in lines)
    assert re.match(r"solve: (\d+) of \1 regressions", lines[-1])
    tcl.circuit_lasso(given[0], given[2], positions="last", batch_size=2, refined=False, progress=False)
    assert " gone" not in capsys.readouterr().err


def test_what_is_run_to_say_how_long_it_takes_is_heard_itself(
    given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(pace, "EVERY", 0.0)
    monkeypatch.setattr(pace, "WORTH", 0.0)  # as if it were long
    capsys.readouterr()
    tcl.circuit_lasso(given[0], given[2], positions="last", refined=False)
    assert "time the first prompts: 1 of 1 batches" in capsys.readouterr().err
    tcl.circuit_lasso(given[0], given[2], positions="last", refined=False, progress=False)
    assert capsys.readouterr().err == ""


def test_texts_and_splits_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    demo = tcl.load_demo(prompts=64)
    saes = {"blocks.1.hook_resid_post": tcl.synthetic.random_sae(48, 12)}
    number = torch.arange(64)
    few = {"splits": 1, "sizes": [2]}
    capsys.readouterr()
    tcl.apps.debias(demo.model, saes, demo.tokens, number % 2, number // 2 % 2, **few)
    told = capsys.readouterr().err
    assert "pool: 64 of 64 texts" in told and "debias: 1 of 1 splits" in told
    tcl.apps.debias(demo.model, saes, demo.tokens, number % 2, number // 2 % 2, **few, progress=False)
    assert " gone" not in capsys.readouterr().err


def test_random_circuits_are_heard_while_they_are_drawn(
    given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    capsys.readouterr()
    tcl.evaluate.tests(*given, circuits=10)
    assert "draw random circuits: 10 of 10 circuits" in capsys.readouterr().err


def test_the_second_look_is_heard_while_it_walks(
    given: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    tokens = tcl.load_demo(prompts=32).tokens
    capsys.readouterr()
    tcl.circuit_lasso(given[0], tokens, positions="last")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("second look: ")]
    assert len(lines) > 6 and re.match(r"second look: 1 of 1 batches, ", lines[-1])  # every edge and node is a step
    tcl.circuit_lasso(given[0], tokens, positions="last", progress=False)
    assert " gone" not in capsys.readouterr().err


def test_every_method_is_heard_here() -> None:
    assert {*_METRIC_METHODS, *_WATCHING, "random"} == set(tcl.baselines.METHODS)  # `random` does no work
