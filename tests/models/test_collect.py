"""Collection: what is interrupted resumes, what belongs to other data is refused, and the model stays as it was."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import architectures
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import LogitDiff, Values
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models import collect as collect_module
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.bases import Component
from tl_circuitlasso.models.collect import Collected, Plan, collect, left_aligned
from tl_circuitlasso.models.designs import Activation, Routed
from tl_circuitlasso.models.read import ReadDesign
from tl_circuitlasso.models.tokens import Batch, Prompts

DESIGNS = {"read": ReadDesign, "activation": Activation, "routed": Routed}


def run(model: Any, tokens: Any, design: str = "read", **options: Any) -> Collected:
    adapter = adapt(model)
    prompts = Prompts(
        adapter, tokens, batch_size=options.pop("batch_size", 4), positions=options.pop("positions", "all")
    )
    rest = {name: options.pop(name) for name in ("checkpoint", "start") if name in options}
    plan = Plan(DESIGNS[design](Component()), options.pop("target", None), last=options.pop("last", False), **options)
    return collect(adapter, prompts, plan, progress=False, **rest)


def interrupted(tokens: torch.Tensor, after: int) -> Iterator[torch.Tensor]:
    """Batches of four, until somebody presses Ctrl-C."""
    for number, part in enumerate(tokens.split(4)):
        if number == after:
            raise KeyboardInterrupt
        yield part


@pytest.mark.parametrize("design", ["read", "activation", "routed"])
def test_a_killed_run_resumes_to_the_same_graph(design: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "CHECKPOINT_SECONDS", 0.0)
    model, tokens, path = architectures.hooked("gpt2"), architectures.prompts(batch=20), tmp_path / "c.safetensors"
    straight = run(model, tokens, design)
    with pytest.raises(KeyboardInterrupt):
        run(model, interrupted(tokens, after=2), design, checkpoint=path)
    assert Statistics.load(path).done == 2
    resumed = run(model, tokens, design, checkpoint=path)
    assert straight.forward_passes == 5 and resumed.forward_passes == 3
    assert 0 < straight.closure == resumed.closure < 1e-4
    one, other = (learn(each.statistics, strength=0.1) for each in (straight, resumed))
    assert one.edge_table().equals(other.edge_table())
    assert resumed.statistics.origin == straight.statistics.origin


def test_a_finished_checkpoint_needs_no_forward_pass(tmp_path: Path) -> None:
    model, tokens, path = architectures.hooked("gpt2"), architectures.prompts(batch=8), tmp_path / "c.safetensors"
    first = run(model, tokens, checkpoint=path)
    again = run(model, tokens, checkpoint=path)
    assert again.forward_passes == 0 and again.prompts == 8
    assert learn(first.statistics).edge_table().equals(learn(again.statistics).edge_table())


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": architectures.prompts(batch=8, seed=1)},
        {"tokens": architectures.prompts(batch=8)[:3]},
        {"positions": "last"},
        {"batch_size": 2},
        {"seed": 1},
        {"design": "activation"},
        {"target": LogitDiff([3] * 8, [4] * 8)},
        {"model": "other weights"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_another_collection_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    plain = {"model": architectures.hooked("gpt2"), "tokens": architectures.prompts(batch=8)}
    run(**plain, checkpoint=tmp_path / "c.safetensors")
    if "model" in change:
        change = {"model": architectures.hooked("gpt2")}
        change["model"].blocks[0].mlp.W_in.data.add_(0.1)
    with pytest.raises(InputError, match="`checkpoint`"):
        run(**{**plain, **change}, checkpoint=tmp_path / "c.safetensors")


def test_a_checkpoint_of_other_answers_is_refused(tmp_path: Path) -> None:
    model, tokens, path = architectures.hooked("gpt2"), architectures.prompts(batch=8), tmp_path / "c.safetensors"
    run(model, tokens, target=LogitDiff([3] * 8, [4] * 8), last=True, checkpoint=path)
    with pytest.raises(InputError, match="`checkpoint`"):
        run(model, tokens, target=LogitDiff([3] * 8, [5] * 8), last=True, checkpoint=path)


@pytest.mark.parametrize("design", ["read", "activation", "routed"])
def test_workers_that_share_the_pilot_add_up_to_the_whole(design: str) -> None:
    model, tokens = architectures.hooked("gpt2", dtype=torch.float64), architectures.prompts(batch=16)
    whole = run(model, tokens, design, batch_size=8).statistics
    first = run(model, tokens[:8], design, batch_size=8).statistics
    second = run(model, tokens[8:], design, batch_size=8, start=first.fresh()).statistics
    both = first + second
    assert both.done == whole.done and both.origin == ""
    for key in whole.moments:
        assert both.moments[key].count == whole.moments[key].count
        torch.testing.assert_close(both.moments[key].gram(), whole.moments[key].gram(), rtol=1e-9, atol=1e-12)
    assert {key: value.shape for key, value in both.sums.items()} == {k: v.shape for k, v in whole.sums.items()}


def test_workers_with_their_own_pilots_do_not_merge() -> None:
    model, tokens = architectures.hooked("gpt2"), architectures.prompts(batch=16)
    parts = [run(model, half, "activation").statistics for half in tokens.split(8)]
    with pytest.raises(InputError, match="pilot"):
        parts[0] + parts[1]


@pytest.mark.parametrize("design", ["read", "activation", "routed"])
def test_what_is_kept_does_not_grow_with_the_number_of_prompts(design: str) -> None:
    def size(statistics: Statistics) -> int:
        tensors = [*statistics.sums.values(), *statistics.fixed.values()]
        tensors += [] if design == "read" else [*statistics.rows.values()]  # of `read` a bounded number is kept whole
        tensors += [part for one in statistics.moments.values() for part in (one.shift, one.total, one.scatter)]
        return sum(tensor.numel() for tensor in tensors)

    model = architectures.hooked("gpt2")
    few, many = (run(model, architectures.prompts(batch=batch), design).statistics for batch in (4, 40))
    assert size(few) == size(many)


def test_one_batch_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapt(architectures.hooked("gpt2"))
    earlier: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    original = type(adapter).run

    def watched(self: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        alive.append(sum(one() is not None for one in earlier))
        acts = original(self, *args, **options)
        earlier[:] = [weakref.ref(value) for value in acts.values()]
        return acts

    monkeypatch.setattr(type(adapter), "run", watched)
    prompts = Prompts(adapter, architectures.prompts(batch=24), batch_size=4)
    collect(adapter, prompts, Plan(ReadDesign(Component()), None, last=False), progress=False)
    assert alive == [0] * 7 and len(earlier) > 20  # one pass for the closure check, six for the batches


def test_the_closure_check_runs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.hooked("gpt2")
    model.blocks[1].mlp.hook_post.add_hook(lambda x, hook: 2 * x)  # somebody's hook makes the model another one
    before = len(model.blocks[1].mlp.hook_post.fwd_hooks)
    try:
        assert run(model, architectures.prompts(batch=4)).closure < 1e-4  # hooks rest while activations are read
    except ModelError as error:
        assert "closure" in str(error)
    assert len(model.blocks[1].mlp.hook_post.fwd_hooks) == before


def test_targets_of_another_length_are_refused_before_any_pass() -> None:
    model = architectures.hooked("gpt2")
    with pytest.raises(InputError, match="`target`"):
        run(model, architectures.prompts(batch=8), target=Values([0.0, 1.0]))
    with pytest.raises(InputError, match="`target`"):
        run(model, iter(architectures.prompts(batch=8).split(4)), "activation", target=Values([0.0, 1.0]))
    with pytest.raises(InputError, match="`target`"):
        run(model, iter(architectures.prompts(batch=8).split(4)), "activation", target=Values([0.0, 1.0] * 5))


def test_pads_go_behind_the_prompt() -> None:
    tokens, mask = architectures.padded()
    moved = left_aligned(Batch(tokens, mask, mask & (tokens != 1), 0))
    assert moved.mask.int().sum(1).tolist() == [6, 7, 9]
    assert all(bool(row[: int(row.sum())].all()) for row in moved.mask)
    for row in range(3):
        assert torch.equal(moved.tokens[row][moved.mask[row]], tokens[row][mask[row]])
        assert torch.equal(moved.tokens[row][moved.keep[row]], tokens[row][mask[row] & (tokens[row] != 1)])
