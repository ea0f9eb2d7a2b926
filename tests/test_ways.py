"""The contract of a design: whatever is asked of one stands in one class, so that a new one needs no other file."""

import ast
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.sae.training import plain_sae
from tl_circuitlasso.__main__ import main
from tl_circuitlasso.discover.designs import DESIGNS, way_for
from tl_circuitlasso.discover.designs.moments import ACTIVATION
from tl_circuitlasso.discover.opening import opened
from tl_circuitlasso.discover.run import circuit_lasso, collect_statistics, plan
from tl_circuitlasso.discover.way import Job, Request
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.designs import Activation, Design

DISCOVER = Path(__file__).parents[1] / "tl_circuitlasso" / "discover"
OWN = {"learning_read", "refining", "garrote", "choice"}  # of design "read" alone
KNOWN_BY = {"ReadDesign", "Activation", "Routed", "Component", "Neuron", "Residual"}  # designs, and their bases
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def small() -> Any:
    return architectures.small()


@pytest.fixture(scope="module")
def features() -> tcl.SAEFeatures:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    return tcl.SAEFeatures({hook: plain_sae(x, 30) for hook in HOOKS}, min_count=1)


def prompts(count: int) -> Tensor:
    return torch.randint(31, (count, 8), generator=torch.Generator().manual_seed(0))


def job_of(model: Any, tokens: Tensor, **options: Any) -> AbstractContextManager[Job[Any]]:
    bound = signature(circuit_lasso).bind(model, tokens, **options)
    bound.apply_defaults()
    return opened(Request(**bound.arguments))


def test_a_design_goes_by_one_name() -> None:
    for name, way in DESIGNS.items():
        design = way.of_basis("component")
        assert isinstance(design, Design) and way.name == design.name == name
        assert way.unit(None) and way_for(name, "component") is way


def test_the_command_line_offers_every_design(capsys: pytest.CaptureFixture[str]) -> None:
    """Its list is its own, for a parser that waits for torch is slow to say what it takes."""
    with pytest.raises(SystemExit):
        main(["discover", "--help"])
    (offered,) = re.findall(r"--design \{([\w,]+)\}", capsys.readouterr().out)[:1]
    assert sorted(offered.split(",")) == sorted(DESIGNS)


@pytest.mark.parametrize("kind", [*DESIGNS, "neuron", "features"])
def test_every_way_answers_what_a_job_is_asked(kind: str, small: Any, features: tcl.SAEFeatures) -> None:
    of_basis: dict[str, Any] = {"neuron": {"basis": "neuron"}, "features": {"basis": features}}
    with job_of(small, prompts(16), batch_size=8, **of_basis.get(kind, {"design": kind})) as job:
        stages = job.way.stages(job)
        assert all(stage.bytes >= 0 for stage in stages) and stages[0].passes
        batch = next(iter(job.prompts))
        job.way.timed(job, batch)(batch)
        assert [smaller.batch_size for smaller in job.way.smaller(job)][-1] == job.prompts.fewest
        assert job.way.roomier(job, lambda larger: False) is job and job.way.cuts(job, job) == ()
        assert (job.prompts.fewest == 2) is job.paired and job.used == job.given == 16


def test_a_new_design_is_one_class_and_a_line(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, planned, kept to a memory, collected and learned by a name that no other file knows."""
    options: dict[str, Any] = {"strength": 0.3, "progress": False}
    known = circuit_lasso(small, prompts(16), design="activation", **options)
    with pytest.raises(InputError, match="`design` 'twin' is unknown"):
        circuit_lasso(small, prompts(16), design="twin")
    own = replace(ACTIVATION, name="twin", made=partial(Activation, name="twin"), said="a unit of its own")
    monkeypatch.setitem(DESIGNS, "twin", own)
    graph = circuit_lasso(small, prompts(16), design="twin", memory="1GB", **options)
    assert torch.equal(graph.score, known.score) and torch.equal(graph.kept, known.kept)
    assert graph.provenance["arguments"]["design"] == "twin" and graph.provenance["unit"] == "a unit of its own"
    assert [stage.name for stage in plan(small, prompts(16), design="twin").stages] == ["statistics", "solve"]
    learned = tcl.learn(collect_statistics(small, prompts(16), design="twin", progress=False), strength=0.3)
    torch.testing.assert_close(learned.score, known.score)


@pytest.mark.parametrize("path", sorted(DISCOVER.glob("*.py")), ids=lambda path: path.stem)
def test_no_design_is_known_outside_its_own_files(path: Path) -> None:
    named = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert path.stem in OWN or not named & KNOWN_BY


@pytest.mark.parametrize(
    ("name", "given"), [("corrupted", prompts(8)), ("metric", print), ("budget", 3), ("size", "auto")]
)
def test_features_refuse_what_they_dont_use(name: str, given: Any, small: Any, features: tcl.SAEFeatures) -> None:
    with pytest.raises(InputError, match=f"`{name}` isn't used by circuits of SAE features"):
        circuit_lasso(small, prompts(8), basis=features, **{name: given})
