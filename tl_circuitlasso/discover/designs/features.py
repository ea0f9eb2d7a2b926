"""Features of SAEs, as nodes of circuits: one regression per pair of hooks (features/)."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.discover.provenance import per_prompt
from tl_circuitlasso.discover.stages import ALLOCATOR, all_batches, run_sizes
from tl_circuitlasso.discover.way import Job, Request, Stage, Way
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features import FeatureSetup, Rule, learn_features
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import footprint, readout
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Batch

DESIGNS = ("read", "activation")  # the names that a caller may leave or write: `mixing` says where parents are seen
UNUSED = ("corrupted", "metric", "budget", "size")  # arguments


class Features(Way[SAEFeatures]):
    """Codes of all prompts, and regressions between those of two hooks."""

    def takes(self, design: str, basis: Any) -> bool:
        """Whether a design of a basis is this way's."""
        return isinstance(basis, SAEFeatures)

    def asked(self, request: Request, target: Target) -> SAEFeatures:
        _check(request)
        return request.basis

    def timed(self, job: Job[SAEFeatures], pilot: Batch) -> Callable[[Batch], None]:
        encoders = job.what.encoders(cross_layer=True)

        def encoded(batch: Batch) -> None:
            acts = job.adapter.run(batch.tokens, batch.mask, list(encoders))
            for hook, encoder in encoders.items():
                for rows in batch.keep.nonzero().split(encoder.rows_at_once()):
                    encoder.encode(acts[hook][tuple(rows.T)])

        return encoded

    def stages(self, job: Job[SAEFeatures]) -> list[Stage]:
        """Encoding; what the regressions take is known only when it's known which features fire, and checked then."""
        rows, positions = run_sizes(job)
        adapter, encoders = job.adapter, job.what.encoders(cross_layer=True).values()
        widths = {encoder.hook: encoder.width for encoder in encoders}
        hooks = {name for encoder in encoders for name in (encoder.hook, *encoder.outputs)}
        patterns = [act("pattern", layer) for layer in range(adapter.shape.n_layers)]
        mixed = patterns if job.what.mixing in ("mean", "heads") else ()
        keys = [*hooks, *mixed, *readout.wanted(adapter, job.target)]
        acts = footprint.held(adapter, keys, rows, positions, widths)
        dense = max(4 * 4 * min(encoder.rows_at_once(), rows * positions) * encoder.features for encoder in encoders)
        logits = 8 * adapter.shape.d_model**2 * 3 if job.target is None else 0
        passing = footprint.passing(adapter, rows, positions, logits="logits" in keys)
        need = ALLOCATOR + acts + max(dense, passing, logits)
        encoding = Stage("encode", need, ceil(job.given / job.batch_size), paced=all_batches(job))
        return [encoding, Stage("solve", 0, at_most=True)]

    def run(self, job: Job[SAEFeatures], began: float) -> AttributionGraph:
        """`memory` is the regressions', too, where the basis has none."""
        basis = replace(job.what, memory=job.memory) if job.what.memory is None else job.what
        rule = Rule(job.strength, basis.penalty, basis.draws, seed=job.seed)
        setup = FeatureSetup(job.target, job.last, rule, job.adapter.device, job.checkpoint, job.progress, job.ranks)
        graph, codes = learn_features(job.adapter, job.prompts, basis, setup)
        passes = per_prompt(codes.forward_passes, job.prompts.n_prompts or codes.prompts, job.batch_size)
        spent = {"forward": passes, "seconds": graph.provenance["seconds"]}
        unit = "standard deviations of the target's code"
        record = job.record(job.prompts, basis.arguments(), looked_at=codes.prompts, unit=unit, **spent)
        own = {"closure_error": codes.closure, "processes": job.ranks.size, "batch_size": job.batch_size}
        return replace(graph, provenance={**graph.provenance, **record, **own})


def _check(request: Request) -> None:
    """Refuse what circuits of SAE features don't use."""
    if request.nonlinear:
        raise InputError(
            "`nonlinear` is for components, neurons and residual dimensions: leave it out with SAEFeatures"
        )
    if request.design not in DESIGNS:
        raise InputError(
            f"`design` {request.design!r} is for components: SAEFeatures(mixing=...) says where parents are seen"
        )
    if request.method != "lasso":
        raise InputError(
            f"`method` {request.method!r} cuts edges between components; check features with `evaluate.edges`"
        )
    for name in UNUSED:
        if getattr(request, name) is not None:
            raise InputError(f"`{name}` isn't used by circuits of SAE features: leave it out")
    if request.strength == "mcp" and request.basis.penalty != "l1":
        raise InputError(
            f"`strength` 'mcp' is a penalty of its own and doesn't go with {request.basis.penalty!r}: use "
            "SAEFeatures(..., penalty='l1')"
        )
