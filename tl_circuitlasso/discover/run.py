"""The whole story on one page: tokens -> activations -> statistics -> sparse regressions -> graph.

prompts      Prompts      batches of tokens, masks and the positions that are samples        models/tokens.py
  | adapt, run            one forward pass a batch; nothing is intervened on                 models/adapter.py
activations  dict         batch pos ... by site, freed after each batch
  | design.add            what each child could have read from each possible parent          models/designs.py, read.py
statistics   Statistics   float64 second moments: all that the regressions see               data/statistics.py
  | learn                 a certified sparse regression per child, relevance from the target discover/designs/
graph        AttributionGraph
"""

import time
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from tl_circuitlasso._checks import as_seed, file_name, warn
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.data.targets import Target, as_target
from tl_circuitlasso.discover.confirming import Metric
from tl_circuitlasso.discover.designs import named
from tl_circuitlasso.discover.opening import checked_prompts, opened
from tl_circuitlasso.discover.pace import tell_ahead, with_times
from tl_circuitlasso.discover.planning import RunPlan, fitted, peak, unplanned
from tl_circuitlasso.discover.way import Job, Request
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.architecture import refuse_altered
from tl_circuitlasso.models.bases import Basis
from tl_circuitlasso.models.collect import collect
from tl_circuitlasso.models.metric import with_tokens
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Positions

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
    with opened(request) as asked_for:
        job, cut = fitted(asked_for, asked_for.memory)
        tell_of(cut)
        tell_ahead(asked_for, job)
        graph = job.way.run(job, spent)
    record, total = dict(graph.provenance), time.perf_counter() - began
    if not bool(graph.kept.any()):
        record["warnings"] = [NO_PATH]
        warn(NO_PATH)
    if memory is not None or cut:
        record["memory"] = {"budget": job.memory, "planned": peak(job), "cut": list(cut)}
    asked = {"strength": strength, "method": method, "seed": job.seed}
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
    with opened(request) as asked:
        if why := unplanned(asked):
            raise InputError(f"nothing can be planned {why}")
        job, cut = fitted(asked, asked.memory)
        return with_times(RunPlan.of(asked, job, cut, asked.memory), job)


def tell_of(cut: tuple[str, ...]) -> None:
    """Warn of what was cut to fit the memory."""
    if cut:
        warn(f"the run wouldn't fit the memory, so it was cut: {'; '.join(cut)}")


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
    way, ranks = named(design), as_ranks(process_group)
    what = way.of_basis(basis, nonlinear=nonlinear)
    target, seed, file = as_target(target), as_seed(seed), file_name("checkpoint", checkpoint)
    with ranks.together():
        adapter = adapt(model, spread=way.spread)
        refuse_altered(adapter.model)
        options = {"attention_mask": attention_mask, "positions": positions, "batch_size": batch_size}
        prompts = checked_prompts(adapter, tokens, paired=what.paired, **options)
        asked = with_tokens(target, adapter), "auto", seed, progress, file, ranks
        planned, _ = way.plan(Job(way, what, adapter, prompts, *asked))
        options = {"progress": progress, "checkpoint": file, "start": start, "ranks": ranks}
        return collect(adapter, prompts, replace(planned, folds=folds), **options).statistics
