"""Neuron circuits: which of all MLP neurons a behaviour runs through, by one secant sweep per pair of prompts.

Each prompt has a partner: its corrupted one, or another prompt drawn at random. Between the two runs every nonlinearity
is replaced by its secant, so that the contributions of all neurons, attention included, come from one linear sweep:

    score(u) = mean over prompts of sum_p m_u[p] (u[p] - r_u[p])

where r_u[p] is the mean of u over the partners at that position (or what u does in the prompt's own partner): how much
of the target's difference runs through neuron u, positive where it helps. Pairs drawn at random count from the lower
value of the target to the higher one. Two forward passes and one sweep per prompt for all neurons together; what is
kept does not grow with the prompts.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.baselines.neurons import score_graph
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.graph import Text
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.bases import Neuron
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.neuron_scores import BySweep, Scoring, multiplied
from tl_circuitlasso.models.neuron_sweep import SECANT
from tl_circuitlasso.models.pairs import NO_PAIRS
from tl_circuitlasso.neurons.behaviour import Behaviour
from tl_circuitlasso.neurons.links import link
from tl_circuitlasso.neurons.tally import Tally
from tl_circuitlasso.progress import bar as counting

SHARE = 0.005  # of the target's difference: what a kept neuron carries at least,
OF_LARGEST = 0.05  # or of the foremost neuron's contribution, where neurons carry little of it
PROMOTED = 5  # tokens shown for each neuron: those that its output weights favour


def neuron_circuit(behaviour: Behaviour, basis: Neuron, *, strength: str | float, progress: bool) -> AttributionGraph:
    """The graph of edges from neurons to the target: the `max_nodes` of largest |score|, the circuit kept.

    Kept are the neurons that carry at least `SHARE` of the target's difference (or `OF_LARGEST` of the foremost one's
    contribution, where that is less). With `basis.linked` the graph holds only so many neurons, or those that carry
    that share of the difference, and the direct effects between them (see `link`).

    Raises
    ------
    InputError: no prompt has a partner, or the target can't be read from logits. ModelError: no MLPs, or experts.
    """
    began = time.perf_counter()
    adapter = behaviour.adapter
    scoring = Scoring(adapter, behaviour.reading, "neuron", "corrupted")
    total = adapter.shape.n_layers * adapter.shape.d_mlp
    if isinstance(basis.linked, int) and basis.linked > total:
        raise InputError(f"`linked` is {basis.linked}, but the model has only {total} neurons")
    tally = Tally(behaviour.prompts.width, total, basis.reference)
    bar = counting(behaviour.pairs(), progress=progress, desc="neurons", unit="batch")
    way = BySweep(SECANT, alone=False)
    for batch, key, at, own, other in multiplied(scoring, lambda: iter(bar), behaviour.n_prompts, way):
        assert other is not None  # every pair has a partner
        tally.add(key, batch, at, own, other)
    if not tally.prompts:
        raise InputError(NO_PAIRS)
    found = {key: tally.contributions(key).sum(0) for key in scoring.keys}
    difference = scoring.count.difference / tally.prompts
    facts = {
        "unit": "contribution to the target, logits",
        "reference": basis.reference,
        "difference": difference,
        "prompt_pairs": tally.prompts,
        "prompts": behaviour.n_prompts,
        "forward_passes": round(scoring.count.forward, 6),
        "backward_passes": 0.0,
        "sweeps": round(scoring.count.backward, 6),
    }
    count = _joined(basis, found, difference) or basis.max_nodes
    graph = score_graph(adapter, "neuron", found, readout.target_site(behaviour.target), count, facts)
    size = graph.score.abs()
    kept = (size >= min(SHARE * abs(difference), OF_LARGEST * float(size.max()))) & (size > 0)
    graph = replace(graph, kept=kept, node_info=_about(adapter, behaviour, graph, tally))
    seconds = {"forward and sweep": time.perf_counter() - began}
    if basis.linked:
        before = time.perf_counter()
        graph = link(graph, adapter, behaviour, strength=strength)
        seconds["edges"] = time.perf_counter() - before
    return replace(graph, provenance={**graph.provenance, "seconds": seconds})


def _joined(basis: Neuron, found: Mapping[str, Float[Tensor, " neuron"]], difference: float) -> int:
    """How many of the foremost neurons are joined by edges."""
    if isinstance(basis.linked, int):
        return basis.linked
    sizes = torch.cat(list(found.values())).abs() / abs(difference) if difference else torch.zeros(1)
    if not (count := int((sizes >= basis.linked).sum())):
        raise InputError(
            f"`linked` is {basis.linked}: no neuron carries so much of the target's difference, the foremost "
            f"{float(sizes.max()):.2g}"
        )
    return count


# ---- what is known of a neuron --------------------------------------------------------------------------------------


def _about(adapter: Adapter, behaviour: Behaviour, graph: AttributionGraph, tally: Tally) -> dict[str, dict[str, Any]]:
    """Of every neuron its contribution; of the kept ones also where it is made, and which tokens its output favours."""
    info: dict[str, dict[str, Any]] = {}
    for name, score in zip(graph.index.names, graph.score.tolist()):
        info[name] = {"contribution": score}
    kept = {graph.index.names[i] for i in graph.source[graph.kept].tolist()}
    text = Text(adapter)
    for block in graph.index.blocks[:-1]:
        own = [neuron for neuron in block.features or () if f"{block.site}#{neuron}" in kept]
        if not own:
            continue
        favoured = _favoured(adapter, block.site.layer, own)
        places = tally.places(act("mlp_post", block.site.layer), own, behaviour, text)
        for number, neuron in enumerate(own):
            facts = info[f"{block.site}#{neuron}"]
            facts |= places[number]
            facts["top_logits"] = [text.of(token) for token in favoured[number]]
    return info


def _favoured(adapter: Adapter, layer: int, neurons: list[int]) -> list[list[int]]:
    """The tokens whose logits a neuron's output weights raise most, directly."""
    logits = adapter.mlp(layer).w_out[neurons] @ adapter.unembed()[0]
    return logits.topk(min(PROMOTED, logits.shape[1]), dim=1).indices.tolist()
