"""Probes of the final residual stream: they find what the stream says, predict prompts not seen, and fit no noise."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.discover.probing import fit_probe
from tl_circuitlasso.models import Prompts, adapt
from tl_circuitlasso.models.outcome import Probe

SEEN, ALL = 120, 180
TOKENS = architectures.prompts(batch=ALL, length=6)


@pytest.fixture(scope="module")
def model() -> Any:
    return architectures.small()


@pytest.fixture(scope="module")
def stream(model: Any) -> Tensor:
    """The normalised final stream at every prompt's last position, seen prompts first."""
    adapter = adapt(model)
    final = f"blocks.{adapter.shape.n_layers - 1}.hook_resid_post"
    acts = adapter.run(TOKENS, None, [final, "scale.final"])
    return (acts[final] / acts["scale.final"])[:, -1].double()


def probe_of(model: Any, target: Any, tokens: Any = TOKENS[:SEEN]) -> Probe:
    adapter = adapt(model)
    return fit_probe(adapter, Prompts(adapter, tokens), target, last=True, progress=False)[0]


def test_a_number_that_the_stream_says_is_found(model: Any, stream: Tensor) -> None:
    said = stream[:, :3] @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 4
    probe = probe_of(model, tcl.Values(said[:SEEN]))
    left = said[SEEN:] - (stream[SEEN:] @ probe.weight + probe.bias)[:, 0]
    assert float(left.var() / said[SEEN:].var()) < 0.02
    assert float(left.mean().abs()) < 0.1 * float(said.std())


def test_a_label_that_the_stream_says_is_found(model: Any, stream: Tensor) -> None:
    labels = (stream[:, 0] > stream[:, 0].median()).long()
    probe = probe_of(model, tcl.Labels(labels[:SEEN]))
    assert probe.weight.shape == (stream.shape[1], 2)
    right = (stream[SEEN:] @ probe.weight + probe.bias).argmax(1) == labels[SEEN:]
    assert float(right.double().mean()) > 0.9


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_what_the_stream_does_not_say_gets_no_probe(model: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    noise = torch.randn(SEEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target = tcl.Labels((noise > 0).long()) if kind == "labels" else tcl.Values(noise)
    with caplog.at_level(logging.WARNING):
        probe = probe_of(model, target)
    assert not probe.weight.any() and "no linear probe" in caplog.text


def test_few_samples_are_all_used(model: Any, stream: Tensor) -> None:
    """With too few to hold half of them out, the weakest penalty fits what there is."""
    said = stream[:8, 0]
    probe = probe_of(model, tcl.Values(said), TOKENS[:8])
    assert float((said - (stream[:8] @ probe.weight + probe.bias)[:, 0]).abs().max()) < 0.1 * float(said.std())


def test_a_stream_or_a_target_of_another_length_is_refused(model: Any) -> None:
    with pytest.raises(tcl.InputError, match="needs two passes"):
        probe_of(model, tcl.Values(torch.zeros(SEEN)), iter([TOKENS[:SEEN]]))
    with pytest.raises(tcl.InputError, match="one per prompt"):
        probe_of(model, tcl.Values(torch.zeros(5)))


def test_without_the_probe_no_edge_would_have_a_cost(model: Any, stream: Tensor) -> None:
    """The design `read` asks for the probe: its graph explains the number by what writes along it."""
    target = tcl.Values(stream[:SEEN, 0])
    graph = tcl.circuit_lasso(model, TOKENS[:SEEN], target=target, progress=False, refined=False)
    assert graph.n_kept > 0 and float(graph.score.abs().max()) > 0.01 * float(stream[:, 0].std())
