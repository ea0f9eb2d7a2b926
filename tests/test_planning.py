"""`tcl.plan`: what is said before the start is what the run takes, and a run keeps to the memory it is given."""

import warnings
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae.training import plain_sae
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.discover import opening, pace, planning
from tl_circuitlasso.discover.designs import read as reading
from tl_circuitlasso.discover.run import circuit_lasso, plan
from tl_circuitlasso.discover.stages import run_sizes
from tl_circuitlasso.discover.way import Pace, Request, Stage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import memory, read
from tl_circuitlasso.models.build import build_hooked_transformer
from tl_circuitlasso.models.read import ReadDesign

WIDE = {"n_layers": 2, "n_heads": 4, "d_model": 128, "d_head": 32, "d_mlp": 512, "d_vocab": 4000, "n_ctx": 48}
GPT2 = {"act_fn": "gelu_new", "normalization_type": "LN", "seed": 0}
NOISE = 16 << 20  # bytes that a process of thousands of tests takes back of what it had given to the system before
EVEN = Pace(forward=0.5, whole=2.0, regressing=0.0, running=0.0)


@pytest.fixture(scope="module")
def wide() -> Any:
    """Large enough that what is planned stands out of what an allocator rounds up."""
    return build_hooked_transformer({**WIDE, **GPT2}, {}, random_weights=True)


@pytest.fixture(scope="module")
def small() -> Any:
    return architectures.small()


def prompts(count: int, vocab: int = 31, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(seed))


def stages(found: tcl.RunPlan) -> dict[str, Stage]:
    return {stage.name: stage for stage in found.stages}


# ---- bytes ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "read": {},
    "counterparts": {"corrupted": prompts(16, 4000, seed=1), "target": tcl.LogitDiff([3] * 16, [4] * 16)},
    "activation": {"design": "activation", "strength": 0.5, "basis": tcl.Residual(96), "positions": "all"},
    "neurons": {"basis": "neuron"},
}


@pytest.mark.parametrize(
    "kind",
    ["read", "activation", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("counterparts", "neurons"))],
)
def test_no_more_bytes_are_taken_than_planned_and_not_much_less(kind: str, wide: Any) -> None:
    tokens = prompts(16, 4000)
    options = {"positions": "last", "progress": False, "refined": False, **KINDS[kind]}
    planned = peak_of(wide, tokens, batch_size=16, **options)
    circuit_lasso(wide, tokens[:4], **{**options, **shortened(KINDS[kind])})  # loads what is compiled
    _, cost = measured(lambda: circuit_lasso(wide, tokens, batch_size=16, **options))
    if cost.peak_mib is None:
        pytest.skip("this system doesn't tell peaks of memory")
    assert 0.4 * planned < cost.peak_mib * 2**20 <= planned + NOISE, (planned / 2**20, cost.peak_mib)


def peak_of(model: Any, tokens: Tensor, **options: Any) -> int:
    with opened(model, tokens, **options) as job:
        return planning.peak(job)


def shortened(options: dict[str, Any]) -> dict[str, Any]:
    if "corrupted" not in options:
        return {}
    return {"corrupted": options["corrupted"][:4], "target": tcl.LogitDiff([3] * 4, [4] * 4)}


def test_bytes_grow_with_what_is_held(wide: Any) -> None:
    def peak(size: int, length: int = 40) -> int:
        return peak_of(wide, prompts(32, 4000, length), positions="last", batch_size=size)

    assert peak(8) < peak(16) < peak(32) and peak(32, 20) < peak(32, 40)


# ---- passes and seconds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_prompts": 12},
        {"target": tcl.Values(torch.arange(24) % 5)},
        {"target": tcl.Labels(torch.arange(24) % 2)},
        {"corrupted": prompts(24, length=8, seed=1), "target": tcl.LogitDiff([3] * 24, [4] * 24)},
        {"design": "activation", "strength": 0.5, "basis": tcl.Component(None)},
        {"design": "routed", "strength": 0.5},
    ],
    ids=["read", "drawn", "values", "labels", "counterparts", "activation", "routed"],
)
def test_as_many_passes_are_run_as_planned(options: dict[str, Any], small: Any) -> None:
    given = {"batch_size": 8, "refined": False, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = circuit_lasso(small, prompts(24, length=8), **given)
    told = plan(small, prompts(24, length=8), **given).passes
    assert told == pytest.approx(graph.provenance["forward_passes"], abs=1e-6) and told > 0


def test_a_second_look_takes_no_more_passes_than_planned(small: Any) -> None:
    given = {"batch_size": 8, "progress": False}
    record = circuit_lasso(small, prompts(24, length=6), **given).provenance
    planned = plan(small, prompts(24, length=6), **given)
    first = stages(planned)["statistics"].passes
    assert first is not None and first < record["forward_passes"] <= planned.passes
    assert stages(planned)["second look"].at_most


def test_neurons_take_two_passes_a_prompt(small: Any) -> None:
    given = {"basis": "neuron", "batch_size": 8, "progress": False}
    record = circuit_lasso(small, prompts(24, length=8), **given).provenance
    assert plan(small, prompts(24, length=8), **given).passes == record["forward_passes"] == 2


def test_features_are_planned_as_far_as_they_are_known(small: Any) -> None:
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    given = {"basis": tcl.SAEFeatures({hook: plain_sae(x, 30) for hook in hooks}, min_count=1), "batch_size": 8}
    planned = plan(small, prompts(24, length=8), **given)
    assert stages(planned)["encode"].passes == 1 and stages(planned)["encode"].seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = circuit_lasso(small, prompts(24, length=8), progress=False, **given).provenance
    assert record["forward_passes"] == planned.passes


def test_seconds_are_the_first_batchs_scaled_to_all(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace.measure(_job(small)).whole > 0
    monkeypatch.setattr(pace, "measure", lambda job, most: EVEN)
    found = stages(plan(small, prompts(40, length=8), batch_size=8, max_prompts=16, refined=False))
    assert found["outputs"].seconds == 0.5 * 40 and found["outputs"].forwards == 1.0
    assert found["statistics"].seconds == 2.0 * 16 and found["statistics"].forwards == 1.6


class Begun(Exception):
    """The run has begun."""


def _said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("circuit_lasso: ")]


@pytest.mark.parametrize("partners", [None, prompts(24, length=8, seed=1)], ids=["alone", "counterparts"])
def test_a_long_run_says_what_it_takes_before_it_starts(
    partners: Tensor | None, small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pace, "WORTH", 0.0)
    monkeypatch.setattr(pace, "EVERY", 0.0)
    given = {"corrupted": partners, "target": tcl.LogitDiff([3] * 24, [4] * 24), "batch_size": 8, "refined": False}

    def begins(*_: Any) -> None:
        assert len(_said(capsys)) == 1
        raise Begun

    monkeypatch.setattr(reading.Read, "run", begins)
    with pytest.raises(Begun):
        circuit_lasso(small, prompts(24, length=8), **given)
    monkeypatch.undo()
    circuit_lasso(small, prompts(24, length=8), **given)
    assert not _said(capsys)  # a short run has nothing to say


def test_the_line_ahead_holds_time_passes_and_memory(
    small: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked_at = []

    def even(job: Any, most: int | None) -> Pace:
        looked_at.append(most)
        return EVEN

    monkeypatch.setattr(pace, "WORTH", 0.0)
    monkeypatch.setattr(pace, "measure", even)
    monkeypatch.setattr(pace, "EVERY", 0.0)
    given = {"batch_size": 8, "refined": False}
    planned = plan(small, prompts(40, length=8), **given)
    graph = circuit_lasso(small, prompts(40, length=8), **given)
    (line,) = _said(capsys)
    assert "about 0:01:20 for 40 of 40 prompts on cpu (statistics 0:01:20, solve 0:00:00)" in line
    assert f"up to {planned.passes:.2f} passes a prompt and {memory.in_words(planned.bytes)}" in line
    assert looked_at == [None, pace.TOLD] and graph.provenance["forward_passes"] == planned.passes
    circuit_lasso(small, prompts(40, length=8), progress=False, **given)
    assert not _said(capsys)


def test_what_nobody_can_know_is_said_to_be_a_least(small: Any) -> None:
    known = Stage("statistics", 10**6, passes=1.0, seconds=61.0)
    whole = tcl.RunPlan(
        (known,), prompts=8, used=8, batch_size=8, asked_batch_size=8, device="cpu", free=None, budget=None
    )
    assert whole.brief().startswith("about 0:01:01 ") and "up to 1.00 passes" in whole.brief()
    open_ended = replace(whole, stages=(known, Stage("confirm", 10, passes=None)))
    assert open_ended.brief().startswith("more than 0:01:01 ") and "at least 1.00 passes" in open_ended.brief()


def _job(model: Any) -> Any:
    with opened(model, prompts(8, length=8)) as job:
        return job


def opened(model: Any, tokens: Tensor, **options: Any) -> Any:
    bound = signature(circuit_lasso).bind(model, tokens, **options)
    bound.apply_defaults()
    return opening.opened(Request(**bound.arguments))


def test_a_plan_reads_as_a_table_and_leaves_the_model_alone(small: Any) -> None:
    before = {name: weight.clone() for name, weight in small.named_parameters()}
    text = str(plan(small, prompts(24, length=8), batch_size=8, memory="1GB"))
    lines = text.splitlines()
    assert lines[0].startswith("24 of 24 prompts in batches of 8 on cpu") and "kept below 1.0 GB" in lines[0]
    for stage in ("statistics", "solve", "second look", "all"):
        assert any(line.startswith(stage) for line in lines)
    assert all(torch.equal(weight, before[name]) for name, weight in small.named_parameters())
    assert not any(point.fwd_hooks for point in small.hook_dict.values())


# ---- a budget -------------------------------------------------------------------------------------------------------


def test_what_a_run_has_room_for_is_left_as_it_is(small: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        graph = circuit_lasso(small, prompts(24, length=8), progress=False, memory="1GB")
    assert graph.provenance["memory"]["cut"] == [] and graph.provenance["batch_size"] == 32


def test_fewer_pairs_at_once_change_no_number(wide: Any) -> None:
    tokens = prompts(16, 4000)
    given = {"batch_size": 16, "target": tcl.LogitDiff([3] * 16, [4] * 16), "refined": False, "progress": False}
    given |= {"positions": "last"}
    whole = circuit_lasso(wide, tokens, **given)
    room = _smallest(wide, tokens, 16, **given) + (1 << 20)
    with pytest.warns(UserWarning, match="pairs swept at once"):
        cut = circuit_lasso(wide, tokens, memory=room, **given)
    record = cut.provenance["memory"]
    assert record["budget"] == room >= record["planned"] and [what[:5] for what in record["cut"]] == ["pairs"]
    assert cut.provenance["batch_size"] == 16
    assert torch.allclose(cut.score, whole.score, rtol=1e-4, atol=1e-7)


def test_counterparts_share_a_batch_as_far_as_their_activations_are_small(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large model fewer run at once than `batch_size`; the graph is the same."""
    target = tcl.LogitDiff([3] * 24, [4] * 24)
    given = {"corrupted": prompts(24, length=8, seed=1), "target": target, "progress": False, "refined": False}
    tokens = prompts(24, length=8)
    whole = circuit_lasso(small, tokens, **given)
    assert whole.provenance["batch_size"] == 16
    monkeypatch.setattr(reading, "HELD", 0)
    monkeypatch.setattr(reading, "HELD_SHARE", 1e-9)
    cut = circuit_lasso(small, tokens, **given)
    assert cut.provenance["batch_size"] == 1 and cut.kept_edges() == whole.kept_edges()
    torch.testing.assert_close(cut.score, whole.score, rtol=1e-3, atol=1e-4 * float(whole.score.abs().max()))


def test_half_a_batch_is_counterparts(small: Any) -> None:
    given = {"corrupted": prompts(24, length=8, seed=1), "target": tcl.LogitDiff([3] * 24, [4] * 24), "batch_size": 8}
    with opened(small, prompts(24, length=8), **given) as job:
        assert run_sizes(job) == (8, 8) and job.batch_size == 4
        cut = job.batched(1)
        assert run_sizes(cut) == (2, 8) and planning.differences(job, cut) == ("batch_size 8 to 2",)


def test_a_batch_is_cut_where_that_is_needed_and_the_run_keeps_to_it(wide: Any) -> None:
    tokens = prompts(16, 4000)
    given = {"batch_size": 16, "positions": "last", "refined": False, "progress": False}
    room = (_smallest(wide, tokens, 4, **given) + _smallest(wide, tokens, 8, **given)) // 2
    with pytest.warns(UserWarning, match="batch_size 16 to 4"):
        circuit_lasso(wide, tokens, memory=room, **given)  # what is imported at the first call isn't the run's
        graph, cost = measured(lambda: circuit_lasso(wide, tokens, memory=room, **given))
    assert graph.provenance["batch_size"] == 4 and graph.provenance["forward_passes"] == 1
    assert plan(wide, tokens, memory=room, **given).batch_size == 4
    assert cost.peak_mib is None or cost.peak_mib * 2**20 <= room + NOISE


def _smallest(model: Any, tokens: Tensor, size: int, **options: Any) -> int:
    """What the run needs in batches of a size with one pair swept at once."""
    with opened(model, tokens, **options) as job:
        assert isinstance(job.what, ReadDesign)
        return planning.peak(replace(job, what=replace(job.what, swept=1)).batched(size))


def test_what_is_free_is_the_budget_where_none_is_given(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompts(16, length=8)
    needed = planning.peak(_job(small))
    monkeypatch.setattr(planning, "free_bytes", lambda device: needed // 1000)
    with pytest.raises(InputError, match=r"are free on cpu, but .* takes"):
        circuit_lasso(small, tokens, progress=False)
    monkeypatch.setattr(planning, "free_bytes", lambda device: None)  # a system that doesn't say
    assert "memory" not in circuit_lasso(small, tokens, progress=False, refined=False).provenance


@pytest.mark.parametrize("options", [{}, {"design": "activation"}, {"basis": "neuron"}])
def test_too_little_memory_is_refused_before_anything_is_run(options: dict[str, Any], small: Any) -> None:
    with pytest.raises(InputError, match=r"`memory` is 0\.0 MB, but .* prompt\(s\) in a batch"):
        circuit_lasso(small, prompts(16, length=8), memory=1000, **options)


@pytest.mark.parametrize("wrong", ["much", "8 XB", "0GB", 0, -1, 2.5, True, [8]])
def test_no_amount_of_memory(wrong: Any) -> None:
    with pytest.raises(InputError, match="`memory`"):
        memory.as_bytes(wrong)


def test_a_wrong_amount_is_named_before_anything_is_run(small: Any) -> None:
    with pytest.raises(InputError, match="`memory` is '8 XB'"):
        circuit_lasso(small, prompts(8, length=8), memory="8 XB")


def test_what_cant_be_planned_is_refused(small: Any) -> None:
    stream = iter([prompts(8, length=8)])
    with pytest.raises(InputError, match="stream"):
        plan(small, stream, design="activation")
    with pytest.raises(InputError, match="`memory` can't be kept to"):
        circuit_lasso(small, iter([prompts(8, length=8)]), design="activation", memory="1GB")
    for options in ({"design": "paper", "strength": 0.5}, {"design": "activation", "nonlinear": True, "strength": 0.5}):
        with pytest.raises(InputError, match=r"nothing can be planned .*('paper'|nonlinear=True)"):
            plan(small, prompts(8, length=8), **options)
        with pytest.raises(InputError, match=r"`memory` can't be kept to .*('paper'|nonlinear=True)"):
            circuit_lasso(small, prompts(8, length=8), memory="1GB", **options)
    with pytest.raises(InputError, match="arguments of `circuit_lasso`"):
        plan(small, prompts(8, length=8), batchsize=8)


def test_fewest_rows_are_the_last_thing_cut(small: Any) -> None:
    with opened(small, prompts(40, length=8)) as job:
        smallest = list(job.way.smaller(job))[-1].what
    assert isinstance(smallest, ReadDesign) and smallest.rows == read.FEWEST_ROWS and smallest.swept == 1


def test_units_of_memory() -> None:
    assert memory.as_bytes("8GB") == 8 * 10**9 and memory.as_bytes("512 MiB") == 1 << 29 and memory.as_bytes(7) == 7
