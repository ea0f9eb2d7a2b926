"""The whole story on one page: tokens -> activations -> statistics -> sparse regressions -> graph.

prompts      Prompts      batches of tokens, masks and the positions that are samples        models/tokens.py
  | adapt, run            one forward pass a batch; nothing is intervened on                 models/adapter.py
activations  dict         batch pos ... by site, freed after each batch
  | design.add            what each child could have read from each possible parent          models/designs.py, read.py
statistics   Statistics   float64 second moments: all that the regressions see               statistics.py
  | learn                 a certified sparse regression per child, relevance from the target learn.py
graph        AttributionGraph
"""

import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.learning import RESAMPLED, learn
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.bases import Basis, as_basis
from tl_circuitlasso.models.collect import Collected, Plan, collect
from tl_circuitlasso.models.designs import Activation, Design, Routed
from tl_circuitlasso.models.device import on_device
from tl_circuitlasso.models.read import ReadDesign, affordable_draws
from tl_circuitlasso.models.tokens import Positions, Prompts
from tl_circuitlasso.probing import fit_probe
from tl_circuitlasso.refining import refine
from tl_circuitlasso.statistics import Statistics
from tl_circuitlasso.targets import Labels, Target, Values, check_length, take

DESIGNS = {"activation": Activation, "read": ReadDesign, "routed": Routed}
FOLDS = 10


def circuit_lasso(
    model: Any,
    tokens: Tensor | list[str] | Mapping[str, Tensor] | Iterable[Any],
    *,
    target: Target = None,
    basis: str | Basis = "component",
    design: str = "read",
    strength: str | int | float = "auto",
    positions: Positions = "all",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    device: Any = None,
    progress: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    max_prompts: int | None = 256,
    refined: bool = True,
) -> AttributionGraph:
    """The sparse circuit behind a model's behaviour on ordinary prompts, from forward passes only.

    For every component (neuron, residual dimension) v with what its possible parents u contribute to it, a certified
    sparse regression says which parents explain it; relevance flows back from the target and says which of those
    explanations matter. CircuitLasso, arXiv 2606.16939.

    Parameters
    ----------
    model: HookedTransformer, HookedSAETransformer or TransformerBridge; left exactly as it was.
    tokens: int tensor (batch, pos), a list of prompts, or an iterable of batches (tensors, or (tokens, mask) pairs).
    target: None = the model's own logits at `positions`; LogitDiff, Labels or Values, one entry per prompt, read at the
        last real position unless `positions` says otherwise.
    basis: "component" (heads and MLPs), "neuron", "residual", or a basis object.
    design: "read" (what a child reads of a parent through its own weights), "routed" or "activation" (the paper's).
    strength: sparsity as a fraction of lambda_max in [0, 1], or "auto", "cv", "ebic", "stability".
    positions: "all" (without BOS and pads), "last", an index, a slice or a bool mask.
    attention_mask: (batch, pos), 1 at real tokens, for padded token tensors.
    batch_size: prompts per forward pass; device: where to run (the model moves there and back).
    progress: bars on a terminal; seed: of everything drawn at random; checkpoint: a file to resume collection from.
    max_prompts: design "read" compares pairs of prompts, and is done after a few hundred: of more, so many are drawn at
        random (None: all). Raise it for a behaviour that is rare among the prompts. Streams are read whole.
    refined: give kept edges of design "read" a second, exact look on a small sample of the prompts (refining.py).

    Returns
    -------
    AttributionGraph: every candidate edge with port, weight and score, and which edges make the circuit.

    Raises
    ------
    InputError: an argument is wrong; the message names it. ModelError: the model can't be read truthfully.

    >>> graph = circuit_lasso(model, tokens)          # doctest: +SKIP
    >>> graph.kept_edges()                            # doctest: +SKIP
    {('input', 'a0.h1'), ('a0.h1', 'm1'), ('m1', 'logits')}
    """
    began = time.perf_counter()
    checked = as_strength(strength)
    chosen = as_design(design, as_basis(basis))
    with on_device(model, device):
        adapter = adapt(model)
        given = Prompts(adapter, tokens, attention_mask=attention_mask, positions=positions, batch_size=batch_size)
        prompts, asked = given, target
        if isinstance(chosen, ReadDesign) and max_prompts is not None:
            prompts, asked = _some(given, target, max_prompts, seed)
        plan = _plan(adapter, prompts, chosen, asked, positions, checked, seed, progress)
        collected = collect(adapter, prompts, plan, progress=progress, checkpoint=checkpoint)
        solving = time.perf_counter()
        graph = learn(collected.statistics, strength=checked, seed=seed)
        refining, looks = time.perf_counter(), 0
        if refined and isinstance(plan.design, ReadDesign):
            graph, looks = refine(adapter, collected.sample, plan, graph, prompts=collected.prompts)
    seconds = {
        "forward and statistics": collected.seconds,
        "solve": refining - solving,
        "second look": time.perf_counter() - refining,
    }
    arguments = {"basis": plan.design.basis.name, "design": design, "strength": strength, "seed": seed}
    if isinstance(plan.design, ReadDesign):
        arguments |= {"max_prompts": max_prompts, "refined": refined}
    record = provenance(adapter, prompts, collected, arguments)
    record |= {"prompts_given": given.n_prompts, "forward_passes": collected.forward_passes + looks}
    return replace(graph, provenance=record | {"seconds": seconds | {"total": time.perf_counter() - began}})


def _some(prompts: Prompts, target: Target, count: int, seed: int) -> tuple[Prompts, Target]:
    """At most `count` of the prompts, drawn at random, with their part of the target."""
    if prompts.n_prompts is None or prompts.n_prompts <= count:
        return prompts, target
    check_length(target, prompts.n_prompts)
    rows = torch.randperm(prompts.n_prompts, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return prompts.take(rows), take(target, rows)


def collect_statistics(
    model: Any,
    tokens: Tensor | list[str] | Mapping[str, Tensor] | Iterable[Any],
    *,
    target: Target = None,
    basis: str | Basis = "component",
    design: str = "read",
    folds: int = 1,
    positions: Positions = "all",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    start: Statistics | None = None,
) -> Statistics:
    """The first half of `circuit_lasso`: everything that needs the model. `tcl.learn(statistics)` is the second.

    Statistics of disjoint prompts add up, so workers can share the data: the first collects, the others `start` from
    `first.fresh()`, and `learn` takes the sum. `folds` > 1 keeps what the strengths "cv" and "stability" need.

    >>> parts = [collect_statistics(model, half) for half in tokens.chunk(2)]       # doctest: +SKIP
    >>> graph = tcl.learn(parts[0] + parts[1])                                       # doctest: +SKIP
    """
    chosen = as_design(design, as_basis(basis))
    adapter = adapt(model)
    prompts = Prompts(adapter, tokens, attention_mask=attention_mask, positions=positions, batch_size=batch_size)
    plan = replace(_plan(adapter, prompts, chosen, target, positions, "auto", seed, progress), folds=folds)
    return collect(adapter, prompts, plan, progress=progress, checkpoint=checkpoint, start=start).statistics


def _plan(
    adapter: Adapter,
    prompts: Prompts,
    design: Design,
    target: Target,
    positions: Positions,
    strength: str | float,
    seed: int,
    progress: bool,
) -> Plan:
    last = target is not None and isinstance(positions, str) and positions == "all"
    if isinstance(design, ReadDesign) and prompts.n_prompts is not None:
        design = replace(design, draws=affordable_draws(adapter, prompts.n_prompts, prompts.width))
    if isinstance(design, ReadDesign) and isinstance(target, (Labels, Values)):
        design = replace(design, probe=fit_probe(adapter, prompts, target, last=last, progress=progress))
    return Plan(design, target, last=last, folds=FOLDS if strength in RESAMPLED else 1, seed=seed)


def as_design(design: str, basis: Basis) -> Design:
    """The design that a user named, for the basis.

    Raises
    ------
    InputError: no design of that name, or one that needs another basis.
    """
    if design not in DESIGNS:
        raise InputError(f"`design` {design!r} is unknown: use one of {', '.join(map(repr, DESIGNS))}")
    if design != "activation" and basis.name != "component":
        raise InputError(
            f"`design` {design!r} reads whole components: with basis={basis.name!r} use design='activation'"
        )
    return DESIGNS[design](basis)


def as_strength(strength: str | int | float) -> str | float:
    """A strength that can be used: a named rule, or a fraction of lambda_max.

    Raises
    ------
    InputError: unknown name, negative, above 1 or not finite.
    """
    names = ("auto", "cv", "ebic", "stability")
    if isinstance(strength, str):
        if strength not in names:
            raise InputError(f"`strength` {strength!r} is unknown: use one of {names}, or a number from 0 to 1")
        return strength
    if isinstance(strength, bool) or not 0 <= strength <= 1:
        raise InputError(f"`strength` is {strength!r}: give a fraction of lambda_max from 0 (dense) to 1 (empty)")
    return float(strength)


def provenance(
    adapter: Adapter, prompts: Prompts, collected: Collected, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Where a graph came from, as plain data: enough to make it again and to tell two graphs apart."""
    return {
        "method": "CircuitLasso",
        "model": adapter.name,
        "architecture": adapter.architecture,
        "d_model": adapter.shape.d_model,
        "config_hash": adapter.config_hash(),
        "data_hash": prompts.data_hash(),
        "prompts": collected.prompts,
        "arguments": dict(arguments),
        "forward_passes": collected.forward_passes,
        "backward_passes": 0,
        "closure_error": collected.closure,
        "versions": {name: _version(name) for name in ("tl-circuitlasso", "torch", "transformer-lens")}
        | {"python": platform.python_version()},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
