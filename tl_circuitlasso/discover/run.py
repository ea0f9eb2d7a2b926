"""The whole story on one page: tokens -> activations -> statistics -> sparse regressions -> graph.

prompts      Prompts      batches of tokens, masks and the positions that are samples        models/tokens.py
  | adapt, run            one forward pass a batch; nothing is intervened on                 models/adapter.py
activations  dict         batch pos ... by site, freed after each batch
  | design.add            what each child could have read from each possible parent          models/designs.py, read.py
statistics   Statistics   float64 second moments: all that the regressions see               data/statistics.py
  | learn                 a certified sparse regression per child, relevance from the target learning.py
graph        AttributionGraph
"""

import time
import warnings
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from tl_circuitlasso._checks import as_seed
from tl_circuitlasso.data.schema import COUNT, FOLDS
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Labels, Target, Values, as_target, take
from tl_circuitlasso.discover.asked import as_design
from tl_circuitlasso.discover.confirming import Metric
from tl_circuitlasso.discover.designs import DESIGNS, learn
from tl_circuitlasso.discover.drawing import draw_by_output
from tl_circuitlasso.discover.job import Job, Request, checked_prompts
from tl_circuitlasso.discover.pace import tell_ahead, with_times
from tl_circuitlasso.discover.planning import RunPlan, fitted, peak, unplanned
from tl_circuitlasso.discover.probing import fit_probe
from tl_circuitlasso.discover.provenance import confirmed, per_prompt
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features import FeatureSetup, Rule, learn_features
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.architecture import refuse_altered
from tl_circuitlasso.models.bases import Basis, Neuron
from tl_circuitlasso.models.collect import Plan, collect
from tl_circuitlasso.models.designs import Design
from tl_circuitlasso.models.memory import as_bytes
from tl_circuitlasso.models.metric import with_tokens
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Positions
from tl_circuitlasso.neurons import Behaviour, neuron_circuit
from tl_circuitlasso.solve import RESAMPLED

NO_PATH = (
    "the circuit is empty: no path of edges that matter leads from the input to the target. Give more prompts, or such "
    "that differ in what you ask about (`corrupted`), say what matters (`target`), and where (`positions`)"
)


def circuit_lasso(
    model: Any,
    tokens: AnyPrompts,
    *,
    target: Target = None,
    basis: str | Basis | SAEFeatures = "component",
    design: str = "read",
    nonlinear: bool = False,
    strength: str | int | float = "auto",
    positions: Positions = "all",
    attention_mask: Any = None,
    batch_size: int = 32,
    device: Any = None,
    progress: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    max_prompts: int | None = 256,
    refined: bool = True,
    method: str = "lasso",
    corrupted: AnyPrompts = None,
    metric: Metric | None = None,
    budget: int | None = None,
    size: str | int | float | None = None,
    process_group: Any = None,
    memory: int | str | None = None,
) -> AttributionGraph:
    """The sparse circuit behind a model's behaviour on ordinary prompts, from forward passes only.

    For every component (neuron, residual dimension) v with what its possible parents u contribute to it, a certified
    sparse regression says which parents explain it; relevance flows back from the target and says which of those
    explanations matter. CircuitLasso, arXiv 2606.16939.

    Parameters
    ----------
    model: HookedTransformer, HookedSAETransformer or TransformerBridge; left exactly as it was.
    tokens: int tensor or array (prompt, pos), strings, lists of token ids of any lengths, `tokenizer(...)` output, or
        an iterable of batches such as a DataLoader (models/prompt_forms.py).
    target: None = the model's own logits at `positions`; LogitDiff, Labels or Values, one entry per prompt, read at the
        last real position unless `positions` says otherwise.
    basis: "component" (heads and MLPs), "neuron", "residual", a basis object, or `SAEFeatures` for circuits among SAE
        features (scores are then local, in standard deviations; `checkpoint` is a folder; see models/sae.py). "neuron"
        with design "read" scores every MLP neuron, attention seen, in logits of the target; `Neuron(linked=128)` adds
        the edges between the foremost ones.
    design: "read" (what a child reads of a parent through its own weights), "routed", "activation" (the paper's
        regression with a norm per component), or "paper" (that regression as written: one L1 Lasso on whole outputs).
    nonlinear: regress on functions of every parent in place of the parent alone (designs "activation" and "paper").
    strength: sparsity as a fraction of lambda_max in [0, 1], or "auto", "cv", "ebic", "mcp" (the minimax concave
        penalty, for single coefficients: not for components of several directions), "stability".
    positions: "all" (without BOS and pads), "last", an index, a slice, a range, a bool mask, or one index per prompt.
    attention_mask: (batch, pos), 1 at real tokens, for padded token tensors.
    batch_size: the most prompts of a forward pass, counterparts included (design "read" pairs the prompts of a batch,
        so it runs two at least, and with counterparts no more than whose activations take two fifths of the weights).
    device: where to run (the model moves there and back).
    progress: bars on a terminal, elsewhere a line every ten seconds; before a run that will take so long or longer, a
        line with its time, passes and memory, as `plan` would tell, from a few prompts (not of streams).
    seed: of everything drawn at random; checkpoint: a file to resume collection from.
    max_prompts: design "read" compares pairs of prompts, and is done after a few hundred: of more, all are run once for
        their outputs and so many are drawn from strata of equal or similar output (None: all). A stream's tokens are
        read to its end first, so it gives the graph that a tensor of the same prompts gives.
    refined: give kept edges of design "read" a second, exact look on a small sample of the prompts (refining.py).
    method: "lasso", or "lasso+confirm": each kept edge is then measured by intervention, and dropped where it has no
        effect; `graph.provenance["confirm"]` says how many forward passes that took, and what all edges would have.
    corrupted: a partner of the same length for each prompt: what design "read" compares each prompt with (None: another
        prompt, drawn at random), and what cut edges carry in "lasso+confirm".
    metric: for "lasso+confirm", `metric(logits, rows)` as in `evaluate.faithfulness`. The default is the behaviour that
        was asked for: minus the KL divergence from the model's prediction, or a LogitDiff target's logit difference.
    budget: for "lasso+confirm", the most edges to measure, the weakest first (None: all that are kept).
    size: for "lasso+confirm", in place of testing edges: the smallest circuit that is measured to keep this share of
        the behaviour ("auto": 0.9), found by measuring some fifteen circuits; see `evaluate.smallest`.
    process_group: "world" shares the work among the processes that torchrun started, a torch.distributed group among
        its members: each calls with the same arguments and a model of its own, and each gets the same graph.
    memory: bytes ("8GB") that the run may take beside the model's weights (None: what is free). What is larger is cut
        to fit, first the pairs swept at once, then `batch_size`, with a warning and in `graph.provenance["memory"]`.
        What nobody can say beforehand isn't cut, and refuses a `memory`: streams, design "paper", and `nonlinear`.

    Returns
    -------
    AttributionGraph: every candidate edge with port, weight and score, and which edges make the circuit.

    Raises
    ------
    InputError: an argument is wrong, and the message names it, or not even one pair of prompts fits the memory.
    ModelError: the model can't be read truthfully.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, target=demo.target, positions="last", progress=False)
    >>> sorted(graph.kept_edges() & demo.true_edges)[:2]
    [('a0.h1', 'a1.h2'), ('a1.h2', 'a2.h0')]
    """
    request, began = Request(**locals()), time.perf_counter()  # its fields are the arguments, by their names
    spent = time.process_time()
    with request.opened() as asked_for:
        job, cut = fitted(asked_for, as_bytes(memory))
        tell_of(cut)
        tell_ahead(asked_for, job)
        if isinstance(job.what, SAEFeatures):
            graph = _features(job, job.what, as_bytes(memory))
        elif isinstance(job.what, Neuron):
            graph = _neurons(job, job.what)
        else:
            graph = _components(job, job.what, spent)
    record, total = dict(graph.provenance), time.perf_counter() - began
    if not bool(graph.kept.any()):
        record["warnings"] = [NO_PATH]
        warnings.warn(NO_PATH, stacklevel=2)
    if memory is not None or cut:
        record["memory"] = {"budget": as_bytes(memory), "planned": peak(job), "cut": list(cut)}
    asked = {"strength": strength, "method": method, "seed": job.seed}
    asked |= {} if isinstance(job.what, SAEFeatures) else {"design": design}
    asked |= {"nonlinear": True} if nonlinear else {}
    record["arguments"] = {**question(job.target, positions), **asked, **record["arguments"]}
    return replace(graph, provenance=record | {"seconds": {**record["seconds"], "total": total}})


def plan(model: Any, tokens: AnyPrompts, **arguments: Any) -> RunPlan:
    """What `circuit_lasso(model, tokens, ...)` with the same arguments will take: bytes, passes and seconds by stage.

    Bytes and passes are told from shapes. Seconds are those of a few prompts that are run here, scaled up; what depends
    on what is found (how many edges a second look takes up) is an upper bound, and marked so.

    Raises
    ------
    InputError: as `circuit_lasso`; for streams, design "paper" and `nonlinear`, of which nobody can say it; even the
    smallest doesn't fit `memory`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=64)
    >>> ahead = plan(demo.model, demo.tokens, positions="last")
    >>> [stage.name for stage in ahead.stages], ahead.stages[0].passes
    (['statistics', 'solve', 'second look'], 1.0)
    """
    try:
        given = signature(circuit_lasso).bind(model, tokens, **arguments)
    except TypeError as error:
        raise InputError(f"`plan` takes the arguments of `circuit_lasso`: {error}") from None
    given.apply_defaults()
    request = Request(**given.arguments)
    with request.opened() as asked:
        if why := unplanned(asked):
            raise InputError(f"nothing can be planned {why}")
        budget = as_bytes(request.memory)
        job, cut = fitted(asked, budget)
        return with_times(RunPlan.of(asked, job, cut, budget), job)


def tell_of(cut: tuple[str, ...]) -> None:
    """Warn of what was cut to fit the memory."""
    if cut:
        warnings.warn(f"the run wouldn't fit the memory, so it was cut: {'; '.join(cut)}", stacklevel=3)


def _components(job: Job, design: Design, began: float) -> AttributionGraph:
    """Components, neurons or residual dimensions: statistics, regressions, a second look, and confirmation if asked.
    `began`: processor seconds when the call began, whose cost counts what was timed for the line ahead of it, too."""
    prompts, target, drawn, twins, causal = job.prompts, job.target, None, job.twins, job.causal
    max_prompts = job.max_prompts
    many = max_prompts is not None and prompts.n_prompts is not None and prompts.n_prompts > max_prompts
    if design.paired and many:
        assert max_prompts is not None
        drawn = draw_by_output(
            job.adapter, prompts, target, max_prompts, job.seed, progress=job.progress, ranks=job.ranks
        )
        prompts, target = prompts.take(drawn.rows), take(target, drawn.rows)
        twins = None if twins is None else twins.take(drawn.rows)
        design = replace(design, weight=drawn.weight)
    plan, probing = _plan(replace(job, prompts=prompts, target=target), design)
    options = {"progress": job.progress, "checkpoint": job.checkpoint, "ranks": job.ranks}
    collected = collect(job.adapter, prompts, plan, twins=twins, **options)
    clock = [time.perf_counter()]
    options = {"strength": job.strength, "seed": job.seed, "progress": job.progress, "process_group": job.ranks}
    graph = learn(collected.statistics, **options)
    clock.append(time.perf_counter())
    looks = 0
    look_again = DESIGNS[plan.design.name].look_again
    if job.refined and look_again is not None:
        options = {"prompts": collected.prompts, "ranks": job.ranks, "progress": job.progress}
        graph, looks = look_again(job.adapter, collected.sample, plan, graph, **options)
    clock.append(time.perf_counter())
    if causal is not None:
        graph = causal.apply(graph, job.adapter, seed=job.seed, progress=job.progress, ranks=job.ranks)
    clock.append(time.perf_counter())
    solve, second, measured = (after - before for before, after in pairwise(clock))
    seconds = {"forward and statistics": collected.seconds, "solve": solve, "second look": second}
    seconds |= {} if causal is None else {"confirm": measured}
    arguments: dict[str, Any] = {"basis": plan.design.basis.name}
    if plan.design.paired:
        arguments |= {"max_prompts": max_prompts, "refined": job.refined}
    given = job.prompts.n_prompts or collected.prompts
    before = probing + (0 if drawn is None else drawn.forward_passes)
    calls = before + (collected.forward_passes + looks) * job.sides
    passes = per_prompt(calls, given, job.batch_size)
    own: dict[str, Any] = {"closure_error": collected.closure, "processes": job.ranks.size}
    own |= {"prompts_given": job.prompts.n_prompts, "batch_size": job.batch_size}
    if collected.forward_seconds > 0 and job.adapter.device.type == "cpu":
        bare = collected.forward_seconds * given / (collected.prompts * job.sides)
        own["forward_equivalents"] = round((time.process_time() - began) / bare, 2)
    if COUNT in collected.statistics.sums:
        own["prompt_pairs"] = int(collected.statistics.sums[COUNT].sum())
        own["partners"] = "random" if twins is None else "corrupted"
    if drawn is not None:
        own["drawn"] = {"prompts": len(drawn.rows), "strata": drawn.strata}
    for report in (graph.provenance.get(name) for name in ("confirm", "smallest") if causal is not None):
        passes += 0 if report is None else confirmed(report, given)
    unit = DESIGNS[plan.design.name].unit(job.target)
    record = job.record(prompts, arguments, looked_at=collected.prompts, unit=unit, forward=passes, seconds=seconds)
    return replace(graph, provenance={**graph.provenance, **record, **own})


def _features(job: Job, basis: SAEFeatures, memory: int | None) -> AttributionGraph:
    """Features of SAEs: one regression per pair of hooks; `memory` is theirs, too, where the basis has none."""
    basis = basis if basis.memory is not None or memory is None else replace(basis, memory=memory)
    rule = Rule(job.strength, basis.penalty, basis.draws, seed=job.seed)
    folder = None if job.checkpoint is None else Path(job.checkpoint)
    setup = FeatureSetup(job.target, job.last, rule, job.adapter.device, folder, job.progress, job.ranks)
    graph, codes = learn_features(job.adapter, job.prompts, basis, setup)
    passes = per_prompt(codes.forward_passes, job.prompts.n_prompts or codes.prompts, job.batch_size)
    spent = {"forward": passes, "seconds": graph.provenance["seconds"]}
    unit = "standard deviations of the target's code"
    record = job.record(job.prompts, basis.arguments(), looked_at=codes.prompts, unit=unit, **spent)
    own = {"closure_error": codes.closure, "processes": job.ranks.size, "batch_size": job.batch_size}
    return replace(graph, provenance={**graph.provenance, **record, **own})


def _neurons(job: Job, basis: Neuron) -> AttributionGraph:
    """Neurons by design `read`: one sweep per pair of prompts."""
    behaviour = Behaviour(job.adapter, job.prompts, job.target, job.pairs, job.last, job.seed)
    behaviour = behaviour if job.max_prompts is None else behaviour.some(job.max_prompts)
    for _ in behaviour.prompts:  # their hash is known once all have been read
        pass
    graph = neuron_circuit(behaviour, basis, strength=job.strength, progress=job.progress)
    arguments = {
        "basis": basis.name,
        "max_nodes": basis.max_nodes,
        "linked": basis.linked,
        "reference": basis.reference,
        "max_prompts": job.max_prompts,
    }
    known = graph.provenance
    spent = {"unit": known["unit"], "forward": known["forward_passes"], "seconds": known["seconds"]}
    record = job.record(behaviour.prompts, arguments, looked_at=known["prompts"], **spent)
    return replace(graph, provenance={**record, **known, "seconds": record["seconds"]})


def collect_statistics(
    model: Any,
    tokens: AnyPrompts,
    *,
    target: Target = None,
    basis: str | Basis = "component",
    design: str = "read",
    nonlinear: bool = False,
    folds: int = 1,
    positions: Positions = "all",
    attention_mask: Any = None,
    batch_size: int = 32,
    progress: bool = True,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    start: Statistics | None = None,
    process_group: Any = None,
) -> Statistics:
    """The first half of `circuit_lasso`: everything that needs the model. `tcl.learn(statistics)` is the second.

    Statistics of disjoint prompts add up, so workers can share the data: the first collects, the others `start` from
    `first.fresh()`, and `learn` takes the sum. `folds` > 1 keeps what the strengths "cv" and "stability" need. With a
    `process_group`, as in `circuit_lasso`, torch.distributed does this: every process gets the statistics of all.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> options = {"positions": "last", "progress": False}
    >>> parts = [collect_statistics(demo.model, half, **options) for half in demo.tokens.chunk(2)]
    >>> tcl.learn(parts[0] + parts[1]).nodes[0]
    'input'
    """
    chosen, ranks = as_design(design, basis, nonlinear=nonlinear), as_ranks(process_group)
    target, seed = as_target(target), as_seed(seed)
    with ranks.together():
        adapter = adapt(model)
        refuse_altered(adapter.model)
        prompts = checked_prompts(adapter, tokens, chosen.paired, attention_mask, positions, batch_size)
        job = Job(adapter, prompts, with_tokens(target, adapter), chosen, "auto", seed, progress, checkpoint, ranks)
        plan = replace(_plan(job, chosen)[0], folds=folds)
        options = {"progress": progress, "checkpoint": checkpoint, "start": start, "ranks": ranks}
        return collect(adapter, prompts, plan, **options).statistics


def _plan(job: Job, design: Design) -> tuple[Plan, int]:
    """What to collect, and the forward passes that it took to know."""
    passes = 0
    adapter, prompts, target = job.adapter, job.prompts, job.target
    if design.paired and prompts.n_prompts is not None:
        design = replace(design, draws=job.draws)
    if design.paired and isinstance(target, (Labels, Values)):
        probe, passes = fit_probe(adapter, prompts, target, last=job.last, progress=job.progress, ranks=job.ranks)
        design = replace(design, probe=probe)
    folds = FOLDS if job.strength in RESAMPLED else 1
    return Plan(design, target, last=job.last, folds=folds, seed=job.seed), passes
