"""Exact patching of neurons, one at a time: the yardstick of every score that is a neuron's contribution."""

import re
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso._checks import fraction
from tl_circuitlasso.baselines.gradient import unit_of
from tl_circuitlasso.baselines.neurons import node_graph
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.provenance import question, record
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.neuron_patch import patched_neurons, plain_run
from tl_circuitlasso.models.neuron_scores import Scoring
from tl_circuitlasso.models.pairs import Metric
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar as counting

_NAME = re.compile(r"m(\d+)#(\d+)")


@verb
def exact_neurons(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    neurons: Collection[str],
    step: int | float = 1.0,
    attention_mask: Tensor | None = None,
    batch_size: int = 96,
    progress: bool = True,
) -> AttributionGraph:
    """The metric's fall when one neuron alone does what it does on the corrupted prompt, for each of `neurons`.

    score(u) = 1/step mean over prompts of F(u) - F(u + step (u' - u)), with F the metric of the clean run where the
    neuron does u, u' what it does on the corrupted prompt, at all positions together. One forward pass per neuron and
    prompt, from the neuron's layer on.

    Parameters
    ----------
    neurons: names such as "m3#17".
    step: how far to go. 1 is patching; small ones tend to gradient x activation, so that a score which changes with
        `step` belongs to a neuron whose effect isn't linear.
    batch_size: rows run at once, neurons times prompts. Others as in `relp`.

    Raises
    ------
    InputError: names that aren't neurons of the model, or a step outside (0, 1]; ModelError: no MLPs, or a mixture of
    experts.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    >>> graph = exact_neurons(demo.model, demo.tokens, demo.corrupted, metric, neurons=["m0#3", "m2#5"])
    >>> sorted(graph.kept_nodes())
    ['logits', 'm0#3', 'm2#5']
    """
    began = time.perf_counter()
    options = {"attention_mask": attention_mask, "batch_size": min(batch_size, 32), "progress": progress}
    setup = Experiment.of(model, clean, corrupted, metric, **options).ready(cut=False)
    if setup.corrupted is None:
        raise InputError("`corrupted` is missing: neurons are patched with what they do there")
    adapter, objective = setup.adapter, setup.objective
    at_once = setup.batch_size if isinstance(model, Experiment) else batch_size
    Scoring(adapter, lambda logits, batch: logits.sum(), "neuron", "corrupted")  # refuses models without neurons
    chosen, size = _chosen(adapter, neurons), fraction("step", step, "of the way to the corrupted activation")
    fallen = {layer: torch.zeros(len(own), dtype=torch.float64) for layer, own in chosen.items()}
    count = sum(map(len, chosen.values()))
    with (
        counting(total=count * len(setup), progress=setup.progress, desc="exact_neurons", unit="prompt") as bar,
        torch.no_grad(),
    ):
        for batch in setup.pairs:
            plain = plain_run(adapter, batch.clean.tokens, batch.corrupted.tokens, batch.mask, chosen)
            whole = float(objective(batch.shown(plain.logits), batch.rows))
            for layer, own in chosen.items():
                which = torch.nn.functional.one_hot(torch.tensor(own), adapter.shape.d_mlp).bool()[:, None]
                for places in torch.arange(len(own)).split(max(1, at_once // len(batch.rows))):
                    logits = patched_neurons(adapter, plain, layer, which[places], size)
                    values = [float(objective(batch.shown(one), batch.rows)) for one in logits]
                    fallen[layer][places] += whole - torch.tensor(values, dtype=torch.float64)
                    bar.update(len(places) * len(batch.rows))
    score = torch.cat(list(fallen.values())) / (len(setup) * size)
    facts = record(
        "exact_neurons",
        adapter.facts(),
        question=question(setup.metric, "last"),
        prompts=len(setup),
        prompt_pairs=len(setup),
        unit=unit_of(setup.metric),
        forward=count + 2,
        backward=0,
        seconds={"scores": time.perf_counter() - began},
        basis="neuron",
        reference="corrupted",
        step=size,
    )
    return node_graph(adapter, "neuron", chosen, score, Site("logits"), facts)


def _chosen(adapter: Adapter, neurons: Collection[str]) -> dict[int, list[int]]:
    """By layer, which neurons."""
    if isinstance(neurons, str) or not neurons:
        raise InputError(f"`neurons` is {neurons!r}: give a list of names such as 'm3#17'")
    shape, found = adapter.shape, defaultdict(set)
    for name in neurons:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or int(match[1]) >= shape.n_layers or int(match[2]) >= shape.d_mlp:
            raise InputError(
                f"`neurons` has {name!r}: the model's neurons are m0#0 to m{shape.n_layers - 1}#{shape.d_mlp - 1}"
            )
        found[int(match[1])].add(int(match[2]))
    return {layer: sorted(found[layer]) for layer in sorted(found)}
