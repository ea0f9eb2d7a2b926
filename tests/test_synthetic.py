"""Planted problems: they are what they say, and the solver at its defaults finds them."""

from typing import Any

import pytest
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.structure import structure
from tl_circuitlasso.synthetic import CODES, planted, planted_transformer


def test_the_same_seed_is_the_same_problem() -> None:
    one, again, other = planted(seed=3), planted(seed=3), planted(seed=4)
    assert torch.equal(one.features, again.features) and one.circuit == again.circuit
    assert not torch.equal(one.features, other.features)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("width", [1, 3])
def test_every_node_has_unit_variance_and_edges_go_forward(codes: str, width: int) -> None:
    problem = planted(codes=codes, width=width, prompts=400, copies=1.0)
    assert problem.features.shape == (400, 8, 11 * width)
    spread = problem.features.flatten(0, 1).unflatten(1, (-1, width)).square().mean((0, 2)).sqrt()
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.1, rtol=0)
    assert all(problem.index.may_feed(*edge) for edge in problem.edges)
    assert problem.circuit < problem.edges <= problem.candidates
    reached = {"target"}
    for source, target in sorted(problem.circuit, key=lambda edge: -problem.index.position(edge[1])):
        assert target in reached
        reached.add(source)


def test_without_noise_a_node_is_what_its_parents_say() -> None:
    problem = planted(noise=0.0, copies=0.0, cancelling=0.0, seed=2)
    for child in {target for _, target in problem.circuit} - {"target"}:
        seen = problem.seen(child, "routed")
        parts = [
            seen[..., problem.columns(source)] @ matrix
            for (source, target), matrix in problem.maps.items()
            if target == child
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), problem.features[..., problem.columns(child)])


def test_mixing_hides_the_parent_from_its_own_position() -> None:
    problem = planted(seed=1)
    for pattern in problem.patterns.values():
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        assert not bool(pattern.diagonal(dim1=1, dim2=2).any())
    found = {d: learn(problem.statistics(d), strength=0.05).kept_edges() for d in ("routed", "activation")}
    assert len(found["routed"] ^ problem.circuit) < len(found["activation"] ^ problem.circuit)
    assert not planted(mixing=False).patterns


def correlation(problem: Any, source: str, target: str) -> float:
    x, y = (problem.features[..., problem.columns(name)].flatten() for name in (source, target))
    return abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


def test_cancelling_parents_don_t_correlate_with_their_child_and_are_found() -> None:
    options: dict = {"mixing": False, "copies": 0.0, "cancelling": 1.0, "prompts": 300, "heads": 2}
    hidden = []
    for seed in range(10):
        problem = planted(seed=seed, **options)
        silent = [edge for edge in problem.circuit if edge[1] != "target" and correlation(problem, *edge) < 0.05]
        kept = learn(problem.statistics(), strength=0.05).kept_edges() if silent else set()
        hidden += [edge in kept for edge in silent]
    assert len(hidden) >= 5 and sum(hidden) >= 0.8 * len(hidden)


@pytest.mark.parametrize(
    "options", [{}, {"width": 4}, {"codes": "sparse"}, {"codes": "gaussian"}, {"copies": 1.0, "cancelling": 1.0}]
)
def test_the_default_strength_finds_planted_circuits(options: dict[str, Any]) -> None:
    found = []
    for seed in range(2):
        problem = planted(seed=seed, layers=1, **options)
        found.append(structure(learn(problem.statistics()), problem.circuit, problem.candidates))
    assert sum(one.shd for one in found) <= 1 and min(one.auroc for one in found) > 0.98
    assert all(one.shd < one.empty_shd for one in found)


@pytest.mark.parametrize("strength", ["stability", "ebic", 0.05])
def test_other_strengths_learn_from_folds(strength: Any) -> None:
    problem = planted(seed=1, layers=1)
    graph = learn(problem.statistics(folds=10), strength=strength)
    assert graph.kept_edges() >= problem.circuit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "`layers`"),
        ({"noise": 1.5}, "`noise`"),
        ({"copies": -0.1}, "`copies`"),
        ({"codes": "cauchy"}, "`codes`"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planted(**options)


@pytest.mark.parametrize(("options", "message"), [({"design": "read"}, "`design`"), ({"folds": 0}, "`folds`")])
def test_statistics_that_cannot_be_made_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planted().statistics(**options)


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"seed": 0}, {"seed": 1, "content": 1.0, "layers": 1}])
def test_exactly_the_planted_edges_of_a_transformer_do_something(options: dict[str, Any]) -> None:
    """By patching one edge at a time with another prompt's activations."""
    pytest.importorskip("transformer_lens").HookedTransformer  # noqa: B018
    made = planted_transformer(prompts=32, **options)
    with torch.no_grad():
        before = made.model(made.clean).log_softmax(-1)

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return -(before[rows].exp() * (before[rows] - logits.log_softmax(-1))).sum()

    exact = tcl.baselines.exact(made.model, made.clean, made.corrupted, metric, batch_size=512, progress=False)
    effects = {edge: abs(effect) for edge, effect in exact.pair_scores().items()}
    assert set(effects) == made.candidates and made.circuit < made.candidates
    weakest = min(effects[edge] for edge in made.circuit)
    assert weakest > 0.01 * max(effects.values())
    assert max(effects[edge] for edge in made.candidates - made.circuit) < 1e-3 * weakest


def test_what_leaks_into_a_planted_transformer_is_weaker_than_what_is_planted() -> None:
    pytest.importorskip("transformer_lens").HookedTransformer  # noqa: B018
    made = planted_transformer(layers=1, width=3, leak=0.1, weakest=0.8, seed=5)
    read = made.model.unembed.W_U.data[: 3 * 5].unflatten(0, (5, 3)).norm(dim=(1, 2))
    size = dict(zip(made.index.names, read.tolist()))
    planted = {source for source, target in made.circuit if target == "logits"}
    assert min(size[name] for name in planted) > 4 * max(size[name] for name in size if name not in planted) > 0
    assert made.circuit == planted_transformer(layers=1, width=3, weakest=0.8, seed=5).circuit


def test_a_planted_transformer_is_the_same_by_its_seed_and_writes_with_unit_spread() -> None:
    pytest.importorskip("transformer_lens").HookedTransformer  # noqa: B018
    one, again, other = (planted_transformer(seed=seed) for seed in (3, 3, 4))
    assert one.circuit == again.circuit and torch.equal(one.clean, again.clean)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), again.model.parameters()))
    assert not torch.equal(one.clean, other.clean)
    _, cache = one.model.run_with_cache(one.clean)
    for layer in range(2):
        wrote = cache[f"blocks.{layer}.hook_mlp_out"][:, 1:]
        own = wrote[..., wrote.abs().amax((0, 1)) > 0]
        assert own.shape[-1] == 4 and float(own.std()) == pytest.approx(1, abs=0.1)


def test_bad_sizes_of_planted_transformers_are_refused() -> None:
    for wrong in ({"positions": 1}, {"classes": 1}, {"parents": 0}, {"weakest": 1.5}, {"content": -0.1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            planted_transformer(**wrong)
