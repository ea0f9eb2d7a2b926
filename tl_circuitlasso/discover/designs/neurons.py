"""Neurons by design `read`: circuits of a kind of their own, one sweep per pair of prompts (neurons/)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.targets import Target, take
from tl_circuitlasso.discover.stages import ALLOCATOR, all_batches, batches
from tl_circuitlasso.discover.way import Job, Request, Stage, Way
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import footprint, neuron_scores
from tl_circuitlasso.models.bases import Neuron, as_basis
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.neuron_sweep import SECANT
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.neurons import Behaviour, neuron_circuit

LOGITS = 6  # copies of logits, while two runs of a batch are compared and read
UNUSED = ("checkpoint", "metric", "budget", "size")  # arguments


class Neurons(Way[Neuron]):
    """Each pair of prompts runs and is swept; nothing is regressed but the edges between linked neurons."""

    name = "read"

    def takes(self, design: str, basis: Any) -> bool:
        """Whether a design of a basis is this way's."""
        return design == self.name and isinstance(as_basis(basis), Neuron)

    def asked(self, request: Request, target: Target) -> Neuron:
        basis = as_basis(request.basis)
        assert isinstance(basis, Neuron)
        _check(basis, request.method, request.strength)
        shared = request.process_group if as_ranks(request.process_group).size > 1 else None
        refused = {name: getattr(request, name) for name in UNUSED}
        refused |= {"process_group": shared, "nonlinear": request.nonlinear or None}
        for name, given in refused.items():
            if given is not None:
                raise InputError(f"`{name}` isn't used by basis 'neuron' with design 'read': leave it out")
        return basis

    def pairs(self, what: Neuron) -> bool:
        return True

    def timed(self, job: Job[Neuron], pilot: Batch) -> Callable[[Batch], None]:
        def scored(batch: Batch) -> None:
            rows = torch.arange(len(batch.tokens))
            pairs = None if job.pairs is None else job.pairs.take(rows)
            prompts, target = job.prompts.take(rows), take(job.target, rows)
            behaviour = Behaviour(job.adapter, prompts, target, pairs, job.last, job.seed)
            neuron_circuit(behaviour, replace(job.what, linked=0), strength="auto", progress=False)

        return scored

    def stages(self, job: Job[Neuron]) -> list[Stage]:
        rows, positions = min(job.batch_size, job.used), job.prompts.width
        adapter, shape = job.adapter, job.adapter.shape
        way = neuron_scores.BySweep(SECANT, alone=False)
        keys = {*way.wanted(adapter), *(act("mlp_post", layer) for layer in range(shape.n_layers))}
        acts = 2 * footprint.held(adapter, keys, rows, positions)
        logits = LOGITS * footprint.held(adapter, ["logits"], rows, positions)
        swept = footprint.itemsize(adapter) * rows * positions * (4 * shape.d_mlp + 8 * shape.d_model)
        tally = 8 * 4 * positions * shape.n_layers * shape.d_mlp
        passing = footprint.passing(adapter, rows, positions, logits=True)
        need = ALLOCATOR + footprint.folded(adapter) + acts + tally + max(logits + swept, passing)
        return [Stage("forward and sweep", need, 2 * batches(job), paced=all_batches(job))]

    def run(self, job: Job[Neuron], began: float) -> AttributionGraph:
        basis = job.what
        behaviour = Behaviour(job.adapter, job.prompts, job.target, job.pairs, job.last, job.seed)
        behaviour = behaviour if job.max_prompts is None else behaviour.some(job.max_prompts)
        for _ in behaviour.prompts:  # their hash is known once all have been read
            pass
        graph = neuron_circuit(behaviour, basis, strength=job.strength, progress=job.progress)
        own = {name: getattr(basis, name) for name in ("max_nodes", "linked", "reference")}
        arguments = {"design": self.name, "basis": basis.name, **own, "max_prompts": job.max_prompts}
        known = graph.provenance
        spent = {"unit": known["unit"], "forward": known["forward_passes"], "seconds": known["seconds"]}
        record = job.record(behaviour.prompts, arguments, looked_at=known["prompts"], **spent)
        return replace(graph, provenance={**record, **known, "seconds": record["seconds"]})


def _check(basis: Neuron, method: str, strength: str | int | float) -> None:
    """Refuse a method that cuts edges, and strengths of regressions where there are none."""
    if method != "lasso":
        raise InputError(
            f"`method` {method!r} cuts edges between components; test neurons with `evaluate.faithfulness`"
        )
    if strength != "auto" and (isinstance(strength, str) or not basis.linked):
        raise InputError(
            f"`strength` {strength!r} is for regressions: neurons of design 'read' have them only between linked ones, "
            "as a fraction of lambda_max: use basis=Neuron(linked=...), or leave it at 'auto'"
        )
