"""The trainer: its causal models, its network, the patches it trains and certifies with."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.siit.cases import config  # noqa: E402
from benchmarks.siit.certify import certify  # noqa: E402
from benchmarks.siit.library import TASKS, recall  # noqa: E402
from benchmarks.siit.network import Network, Shape  # noqa: E402
from benchmarks.siit.tasks import Task, check_placement, place, planted_edges, silent_ports  # noqa: E402
from benchmarks.siit.train import Recipe, train  # noqa: E402
from tl_circuitlasso.baselines.exact import exact  # noqa: E402
from tl_circuitlasso.bench.cases import load_case  # noqa: E402
from tl_circuitlasso.demo import ioi  # noqa: E402
from tl_circuitlasso.models.build import build_hooked_transformer  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(task: Task, layers: int = 2, heads: int = 2, norm: str | None = "LN") -> Shape:
    return Shape(layers, heads, 16, 24, len(task.vocabulary), len(task.classes), len(task.weight), norm)


def script():
    spec = importlib.util.spec_from_file_location("train_siit", ROOT / "benchmarks" / "train_siit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TASKS)
def test_swapping_every_edge_gives_the_donors_output_and_none_the_own(name: str) -> None:
    task = TASKS[name]()
    tokens, donor = task.sample(64, generator(1)), task.sample(64, generator(2))
    every = {edge: torch.ones(64, dtype=torch.bool) for edge in task.edges()}
    assert torch.equal(task.run(tokens, donor, every), task.run(donor))
    assert torch.equal(task.run(tokens, donor, {}), task.run(tokens))
    assert (task.run(tokens) != task.run(donor)).any()


@pytest.mark.parametrize("name", TASKS)
def test_outputs_are_classes_and_looks_are_not_ahead(name: str) -> None:
    task = TASKS[name]()
    tokens = task.sample(256, generator())
    trace = task.trace(tokens)
    output = trace.values[task.variables[-1].name][:, task.weight > 0]
    assert output.min() >= 0 and output.max() < len(task.classes) and len(output.unique()) > 1
    for places in trace.looks.values():
        assert (places <= torch.arange(places.shape[1])).all()


def test_every_single_edge_of_each_task_matters_to_its_causal_model() -> None:
    for make in TASKS.values():
        task = make()
        tokens = task.sample(256, generator(3))
        donor = task.counterpart(tokens, generator(4))
        for edge in task.edges():
            swapped = {edge: torch.ones(256, dtype=torch.bool)}
            assert (task.run(tokens, donor, swapped) != task.run(tokens)).any(), (task.name, edge)


def test_brackets_by_hand() -> None:
    task = TASKS["brackets"]()
    tokens = torch.tensor([[0, 1, 1, 2, 2, 2, 1]])  # ( ( ) ) ) (
    assert task.run(tokens)[0, 1:].tolist() == [1, 1, 1, 0, 2, 2]


def test_sums_by_hand() -> None:
    task = TASKS["sums"]()
    tokens = torch.tensor([[0, 4, 2, 3]])  # digits 3 1 2: s = 3, 3 + 3, 3 + 1 mod 4
    assert task.run(tokens)[0, 1:].tolist() == [3, (2 + 3) % 4, (0 + 2) % 4]


def test_recall_by_hand() -> None:
    task = TASKS["recall"]()
    tokens = torch.tensor([[0, 1, 2, 3, 1, 4, 1]])  # a b c a d a
    assert task.run(tokens)[0, 1:].tolist() == [0, 0, 0, 2, 0, 4]


@pytest.mark.parametrize("name", TASKS)
def test_placement_is_a_circuit_of_the_network(name: str) -> None:
    task = TASKS[name]()
    for seed in range(20):
        placement = place(task, layers=4, heads=8, seed=seed)
        check_placement(task, placement, Shape(4, 8, 64, 64, 5, 5, 8))
        assert len(set(placement.values())) == len(placement)
        assert {edge[:2] for edge in silent_ports(task, placement)} <= set(planted_edges(task, placement))


def test_a_network_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="`layers`=2"):
        place(TASKS["names"](), layers=2, heads=4, seed=0)
    with pytest.raises(ValueError, match="`placement`"):
        task = TASKS["recall"]()
        check_placement(
            task, {"input": "input", "previous": "a1.h0", "follow": "a1.h1", "output": "logits"}, small(task)
        )
    with pytest.raises(ValueError, match="`d_model`"):
        Shape(2, 3, 16, 16, 5, 5, 8)


@pytest.mark.parametrize("norm", ["LN", None])
def test_network_is_the_hooked_transformer_it_is_saved_as(norm: str | None) -> None:
    task = TASKS["sums"]()
    network = Network(small(task, layers=3, norm=norm), seed=1)
    for parameter in network.parameters():  # biases and norms start at 0 and 1: make them count
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel()))
    tokens = task.sample(8, generator())
    model = build_hooked_transformer(config(network.shape), network.tl_state())
    with torch.no_grad():
        torch.testing.assert_close(network(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_patching_every_edge_of_a_writer_replaces_it() -> None:
    task = TASKS["sums"]()
    network = Network(small(task), seed=2)
    tokens, donor = task.sample(4, generator(1)), task.sample(4, generator(2))
    writers = network.shape.writers()
    with torch.no_grad():
        own, other = network(tokens), network(donor)
        everything = torch.ones(4, len(network.shape.readers()), len(writers))
        assert torch.allclose(network(tokens, other.written, everything).logits, other.logits, atol=1e-5)
        assert torch.allclose(network(tokens, other.written, 0 * everything).logits, own.logits, atol=1e-5)
        last = network.shape.edge_mask([("m1", "logits")]).float().expand(4, -1, -1)
        stream = own.written.sum(1) + sum(layer.b_O for layer in network.layers)
        swapped = stream + (other.written - own.written)[:, writers.index("m1")]
        expected = network.ln_final(swapped) @ network.unembed
        assert torch.allclose(network(tokens, other.written, last).logits, expected, atol=1e-5)


def test_certificates_agree_with_the_library_that_patches_a_hooked_transformer() -> None:
    task = TASKS["sums"]()
    trained = train(task, place(task, 3, 2, 0), small(task, layers=3), Recipe(steps=2, batch=4), progress=False)
    proof = certify(trained, prompts=8, seed=7)
    draws = generator(7)
    tokens = task.sample(8, draws)
    donor = task.counterpart(tokens, draws)
    model = build_hooked_transformer(config(trained.network.shape), trained.network.tl_state())
    with torch.no_grad():
        clean = model(tokens).double().log_softmax(-1)

    def minus_divergence(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        log = logits.double().log_softmax(-1)
        return -(clean[rows].exp() * (clean[rows] - log)).sum(-1)[:, 1:].mean(1).sum()

    table = exact(model, tokens, donor, minus_divergence).edge_table()
    found = {(row.source, row.target, row.port): row.score for row in table.itertuples()}
    for edge, effect in proof.port_effects.items():
        assert found[edge] == pytest.approx(effect, abs=1e-6), edge
    for (parent, child), effect in proof.effects.items():
        if not child.startswith("a"):
            assert found[parent, child, ""] == pytest.approx(effect, abs=1e-6), (parent, child)


def test_training_plants_a_circuit_and_is_deterministic() -> None:
    task = recall(length=6, letters=3)
    placement = {"input": "input", "previous": "a0.h1", "follow": "a1.h0", "output": "logits"}
    recipe = Recipe(steps=60, batch=32, rate=5e-3, seed=3)
    first = train(task, placement, small(task), recipe, progress=False)
    again = train(task, placement, small(task), recipe, progress=False)
    assert first.history[-1]["loss"] < 0.7 * first.history[0]["loss"]
    for name, value in first.network.tl_state().items():
        assert torch.equal(value, again.network.tl_state()[name]), name


def test_a_case_folder_can_be_loaded_and_is_honest_about_a_circuit_that_did_not_take(tmp_path: Path) -> None:
    folder = tmp_path / "case_recall"
    status = script().main(
        [
            "recall",
            "--layers",
            "2",
            "--heads",
            "2",
            "--d-model",
            "16",
            "--steps",
            "3",
            "--batch",
            "8",
            "--out",
            str(folder),
        ]
    )
    assert status == 1  # three steps plant nothing
    case = load_case(folder, truth="gt")
    assert len(case.truth) == 4 and case.clean.shape == (1000, 14)
    assert len(case.candidates) == len(Shape(2, 2, 16, 32, 7, 7, 14).candidate_edges())
    assert not load_file(folder / "data.safetensors")["clean_tokens"].is_floating_point()


def test_counterparts_of_sentences_share_no_name_and_repeat_the_other_place() -> None:
    tokens = ioi.draw(500, generator(5))
    other = ioi.counterpart(tokens, generator(6))
    assert (ioi.repeated_place(tokens) != ioi.repeated_place(other)).all()
    names = [ioi.FIRST, ioi.SECOND]
    assert not (tokens[:, names, None] == other[:, None, names]).any()
    rest = [position for position in range(ioi.LENGTH) if position not in (*names, ioi.SUBJECT)]
    assert torch.equal(tokens[:, rest], other[:, rest])


def test_certificate_of_an_untrained_network_is_not_certified() -> None:
    task = TASKS["sums"]()
    trained = train(task, place(task, 3, 2, 0), small(task, layers=3), Recipe(steps=1, batch=4), progress=False)
    proof = certify(trained, prompts=64)
    assert not proof.certified
    assert set(proof.effects) == set(trained.network.shape.candidate_edges())
    assert min(proof.effects.values()) > -1e-9
