"""Optimal ablation: never worse than the mean on the fitted prompts, exact where theory knows the answer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.evaluate.test_faithfulness import HOOKED, pair
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate import Optimal
from tl_circuitlasso.evaluate.circuits import as_circuits, prune
from tl_circuitlasso.evaluate.interventions import measure
from tl_circuitlasso.experiment import Experiment
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.ablation import from_values
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.patching import record

BRIDGES = ("gpt2", "pythia", "gptj", "llama", "gemma2", "olmo", "opt", "falcon", "native", "native_attn_only")
EVERY = [pytest.param(make, name, id=f"{make.__name__}-{name}") for make, name in HOOKED] + [
    pytest.param(architectures.bridge, name, id=f"bridge-{name}") for name in BRIDGES
]


def some_circuit(adapter: Any, share: float = 0.5) -> Tensor:
    layout = EdgeLayout(adapter.shape)
    drawn = torch.rand(1, layout.n_sources, layout.n_readers, generator=torch.Generator().manual_seed(2)) < share
    return prune(drawn & layout.mask(), layout)


@pytest.mark.parametrize(("make", "family"), EVERY)
def test_it_is_never_worse_than_the_mean_on_every_architecture(make, family):
    adapter = adapt(make(family))
    clean, _, mask = pair(padded=adapter.shape.causal)
    kept = torch.cat([some_circuit(adapter), torch.zeros_like(some_circuit(adapter))])
    metric = tcl.evaluate.kl(adapter.run(clean, mask, ["logits"])["logits"][:, 4], position=4)
    found = {
        ablation: measure(Experiment(adapter, clean, None, metric, ablation, attention_mask=mask), kept).circuits
        for ablation in ("mean", Optimal(steps=5))
    }
    mean, optimal = (circuits.mean(1) for circuits in found.values())
    assert bool((optimal >= mean - 1e-6).all())
    assert float(optimal[0]) > float(mean[0])  # the circuit's edges leave something to mend


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "shortformer", "pythia"])
def test_the_derivative_is_that_of_the_run(family):
    adapter = adapt(architectures.hooked(family, dtype=torch.float64))
    clean, _, _ = pair()
    layout = EdgeLayout(adapter.shape)
    circuits = as_circuits(some_circuit(adapter), layout)
    generator = torch.Generator().manual_seed(3)
    base = record(adapter, clean).map(lambda part: part.mean(0, keepdim=True).clone())
    along = base.map(lambda part: torch.randn(part.shape, generator=generator, dtype=part.dtype))

    def value(step: float | Tensor, *, gradients: bool = False) -> Tensor:
        moved = base.map(lambda part, push: (part + step * push).expand(2, *part.shape[1:]), along)
        logits = run_circuits(adapter, clean, None, circuits, from_values(adapter, moved), gradients=gradients)
        return logits[0, :, -1, 3].sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(value(step, gradients=True), step)
    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(numeric), rel=1e-4)
    assert all(weight.grad is None for weight in adapter.model.parameters())


def test_with_every_edge_cut_the_optimum_is_the_best_constant_prediction():
    """The ablated model says the same of all prompts, so the best expected log-probability is minus the labels'
    entropy; a model without norms can say anything."""
    model = architectures.hooked("no_norm")
    clean = architectures.prompts(batch=12, length=5)
    labels = torch.tensor([3] * 6 + [4] * 3 + [5] * 3)
    metric = tcl.evaluate.cross_entropy(labels)
    adapter = adapt(model)
    setup = Experiment(adapter, clean, None, metric, Optimal(steps=200, tolerance=1e-6))
    nothing = torch.zeros_like(some_circuit(adapter))
    found = measure(setup, nothing).ablated.mean()
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert float(found) == pytest.approx(float((shares * shares.log()).sum()), abs=0.01)


def test_an_unneeded_component_costs_nothing_and_a_needed_one_does():
    demo = tcl.load_demo(prompts=24)
    layout = EdgeLayout(adapt(demo.model).shape)
    edges = dict.fromkeys(demo.true_edges, 1.0)
    graph = tcl.AttributionGraph.from_edges(layout.index, edges)
    metric = tcl.evaluate.cross_entropy(demo.correct)
    data = (demo.tokens, None, metric)
    how = Optimal(steps=10)
    whole = tcl.evaluate.faithfulness(demo.model, graph, *data, how)
    into_mover = graph.target == layout.index.position("a2.h0")
    less = tcl.evaluate.faithfulness(demo.model, graph.keep(graph.kept & ~into_mover), *data, how)
    assert whole.faithfulness > 0.9 > less.faithfulness
    plain = tcl.evaluate.faithfulness(demo.model, graph, *data, "mean")
    assert whole.circuit >= plain.circuit and whole.ablated >= plain.ablated
    assert whole.forward_passes > plain.forward_passes


def test_constants_fitted_on_some_prompts_are_drawn_by_the_seed():
    adapter = adapt(architectures.hooked("gpt2"))
    clean = architectures.prompts(batch=9)
    metric = tcl.evaluate.next_token(clean)
    kept = some_circuit(adapter)
    runs = [
        measure(Experiment(adapter, clean, None, metric, Optimal(steps=5, prompts=4, seed=seed), batch_size=2), kept)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].circuits, runs[1].circuits)
    assert not torch.allclose(runs[0].circuits, runs[2].circuits)


def test_one_constant_for_all_positions_is_never_worse_than_the_mean_of_all():
    adapter = adapt(architectures.hooked("pythia"))
    clean = architectures.prompts(batch=6)
    metric = tcl.evaluate.next_token(clean)
    kept = some_circuit(adapter)
    found = [
        float(measure(Experiment(adapter, clean, None, metric, ablation), kept).circuits.mean())
        for ablation in ("mean-all", Optimal(positions="shared", steps=10), Optimal(steps=10))
    ]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"positions": "some"}, "`positions` is 'some'"),
        ({"steps": 0}, "`steps` is 0"),
        ({"prompts": 0}, "`prompts` is 0"),
        ({"tolerance": -1.0}, "`tolerance` is -1"),
    ],
)
def test_bad_choices_are_named(how, message):
    with pytest.raises(InputError, match=message):
        Optimal(**how)


def test_a_metric_without_derivative_is_told_what_to_do():
    model = architectures.hooked("gpt2")
    clean, _, _ = pair()
    graph = tcl.baselines.random_edges(model).top_k(30)
    with pytest.raises(InputError, match="`metric` has no derivative"):
        tcl.evaluate.faithfulness(model, graph, clean, None, tcl.evaluate.accuracy([3, 4]), "optimal")
    how = Optimal(metric=tcl.evaluate.next_token(clean), steps=2)
    setup = Experiment(model, clean, None, tcl.evaluate.accuracy([3, 4]), how)
    assert set(measure(setup, some_circuit(setup.adapter)).circuits.flatten().tolist()) <= {0.0, 1.0}
    with pytest.raises(InputError, match="'optimal' fits constants to a circuit"):
        tcl.evaluate.magnitude(model, clean, None, "optimal")
