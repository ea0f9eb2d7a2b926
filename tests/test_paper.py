"""Design "paper" and nonlinear parents: the problem as it is written, and edges that no line can see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso.data.schema import NODES
from tl_circuitlasso.discover.designs import learn
from tl_circuitlasso.discover.run import circuit_lasso, collect_statistics
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.designs import FUNCTIONS

SMALL = {"d_model": 8, "d_head": 2, "d_mlp": 12}


def stacked(model: Any, tokens: Tensor, target: tcl.LogitDiff) -> dict[str, np.ndarray]:
    """What every component writes at the last position, centred, by the model's own cache; then the target."""
    logits, cache = model.run_with_cache(tokens)
    parts = {"input": cache["blocks.0.hook_resid_pre"]}
    for layer, block in enumerate(model.blocks):
        z = cache[f"blocks.{layer}.attn.hook_z"]
        parts |= {f"a{layer}.h{head}": z[:, :, head] @ block.attn.W_O[head] for head in range(z.shape[2])}
        parts[f"m{layer}"] = cache[f"blocks.{layer}.hook_mlp_out"]
    rows = torch.arange(len(tokens))
    parts["logits"] = (logits[rows, :, target.correct] - logits[rows, :, target.incorrect])[:, :, None]
    return {name: (x[:, -1] - x[:, -1].mean(0)).detach().double().numpy() for name, x in parts.items()}


def before(name: str, other: str) -> bool:
    """Whether a component comes before another one: heads of a layer before its MLP, never beside one another."""

    def rank(node: str) -> int:
        return -1 if node == "input" else 99 if node == "logits" else 2 * int(node[1]) + (node[0] == "m")

    return rank(name) < rank(other)


def test_the_papers_regression_is_the_one_that_scikit_learn_solves() -> None:
    model = architectures.hooked("gpt2", dtype=torch.float64, **SMALL)
    tokens = architectures.prompts(batch=150)
    target = tcl.LogitDiff([3] * 150, [4] * 150)
    options = {"target": target, "design": "paper", "positions": "last", "progress": False}
    graph = learn(collect_statistics(model, tokens, **options), strength=0.05, tol=1e-10)
    x = stacked(model, tokens, target)
    pairs = [(u, v) for u in x for v in x if before(u, v)]
    largest = max(np.abs(x[u].T @ x[v]).max() / len(tokens) for u, v in pairs)
    expected = {}
    for child in list(x)[1:]:
        parents = [name for name in x if before(name, child)]
        lasso = Lasso(alpha=0.05 * largest, fit_intercept=False, tol=1e-12, max_iter=100_000)
        fit = np.atleast_2d(lasso.fit(np.hstack([x[name] for name in parents]), x[child]).coef_).T
        for parent, block in zip(parents, np.split(fit, len(parents))):
            expected[parent, child] = np.linalg.norm(block)
    found = {(row.source, row.target): row.score for row in graph.edge_table().itertuples()}
    assert found.keys() == expected.keys() and sum(norm > 0 for norm in expected.values()) > 10
    for edge, norm in expected.items():
        assert abs(found[edge]) == pytest.approx(norm, rel=1e-4, abs=1e-6), edge
    assert bool(graph.certificate.converged.all())


def folded() -> tuple[Any, Tensor]:
    """m0 writes an even function of one dimension of the input, m1 another dimension as it is; the logits read both.

    Every prompt holds each token once, so that what is even is exactly uncorrelated with what is odd.
    """
    model = architectures.hooked("no_norm")
    for parameter in model.parameters():
        parameter.data.zero_()
    grid = torch.cartesian_prod(torch.arange(5) - 2.0, torch.arange(6) - 2.5)
    model.embed.W_E.data[1:, :2] = grid
    for block, size, sign, reads, writes in zip(model.blocks, (6.0, 3.0), (1.0, -1.0), (0, 1), (22, 23)):
        block.mlp.W_in.data[reads, :2] = torch.tensor([1.0, -1.0])
        block.mlp.W_out.data[:2, writes] = size * torch.tensor([1.0, sign])
    model.unembed.W_U.data[22:] = torch.randn(2, 31, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(30, generator=generator) + 1 for _ in range(8)]
    return model, torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), row]) for row in rows])


@pytest.mark.parametrize("design", ["activation", "paper"])
def test_what_no_line_can_see_is_found_by_functions(design: str) -> None:
    model, tokens = folded()
    options = {"design": design, "progress": False, "positions": slice(1, None)}
    linear, bent = (circuit_lasso(model, tokens, nonlinear=bent, **options) for bent in (False, True))
    straight = {("input", "m1"), ("m1", "logits")}
    assert linear.kept_edges() == straight
    assert bent.kept_edges() == straight | {("input", "m0"), ("m0", "logits")}
    assert bool(bent.certificate.converged.all()) and bent.provenance["arguments"]["nonlinear"] is True


def test_the_first_function_of_a_node_is_the_node() -> None:
    model, tokens = architectures.hooked("gpt2", **SMALL), architectures.prompts(batch=16)
    for basis in ("component", "neuron"):
        options = {"basis": basis, "design": "activation", "progress": False}
        linear = collect_statistics(model, tokens, **options)
        bent = collect_statistics(model, tokens, nonlinear=True, **options)
        first = bent.whole(NODES).gram()[::FUNCTIONS, ::FUNCTIONS]
        torch.testing.assert_close(first, linear.whole(NODES).gram(), rtol=1e-5, atol=1e-8)
        assert learn(linear).index.names == learn(bent).index.names


def test_statistics_of_functions_are_not_taken_for_those_of_lines(tmp_path: Path) -> None:
    model, tokens = architectures.hooked("gpt2", **SMALL), architectures.prompts(batch=8)
    options = {"design": "activation", "progress": False, "checkpoint": tmp_path / "file"}
    collect_statistics(model, tokens, nonlinear=True, **options)
    with pytest.raises(InputError, match="differs in functions"):
        collect_statistics(model, tokens, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "paper", "strength": "ebic"}, "`strength` 'ebic' chooses one for each child"),
        ({"design": "activation", "basis": "neuron", "nonlinear": True, "strength": "mcp"}, "`strength` 'mcp'"),
        ({"nonlinear": True}, "`nonlinear`"),
        ({"design": "routed", "nonlinear": True}, "`nonlinear`"),
        ({"basis": "neuron", "nonlinear": True}, "`nonlinear`"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        circuit_lasso(architectures.hooked("gpt2"), architectures.prompts(), progress=False, **options)


def test_more_columns_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_circuitlasso.models.designs.MOST_COLUMNS", 200)
    options = {"design": "paper", "progress": False}
    with pytest.raises(InputError, match="`design` 'paper' would regress 264 columns"):
        circuit_lasso(architectures.hooked("gpt2"), architectures.prompts(), **options)
    graph = circuit_lasso(architectures.hooked("gpt2"), architectures.prompts(), basis=tcl.Component(4), **options)
    assert graph.provenance["arguments"]["design"] == "paper"
