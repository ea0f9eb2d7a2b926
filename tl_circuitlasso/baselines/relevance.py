"""Relevance patching of edges: EAP with the gradient of a model whose nonlinearities are held constant.

    score(u -> v) = mean over prompts of sum over positions of <u_clean - u_ablated, R_v>,

with R_v the metric's modified gradient at what v reads on the clean prompt: norms keep their scale, act(x) =
x (act(x) / x) with the ratio constant, each factor of a gated product passes on half, patterns are constant (so nothing
runs through queries and keys). In a model without biases relevance is conserved: with ablation="zero", what flows into
the logits adds up to the metric, and what leaves the input does, too.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.baselines.edges import Chosen, Derivative, EdgeLayout, add_products
from tl_circuitlasso.baselines.gradient import Count, Job, Setting, facts, jobs
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.neuron_scores import Batch, goal_gradient
from tl_circuitlasso.models.neuron_sweep import RELP, Ends, Rules, sweep, through_norm, unembedded, wanted
from tl_circuitlasso.models.patching import Written, written_in, written_keys
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.progress import bar as counting


@verb
def relp_edges(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 1,
    attention: str = "frozen",
    products: str = "half",
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """Relevance patching (Rezaei Jafari et al. 2025, arXiv 2508.21258) of all edges; arguments as in `eap`.

    Two forward passes and one sweep, counted as a backward pass, per prompt.

    Parameters
    ----------
    attention: "frozen" holds attention patterns constant, so that edges into queries and keys score 0; "moving" lets
        them pass on what they do, by their derivative.
    products: "half" gives each factor of a gated product half of the gradient, "whole" all of it.

    Raises
    ------
    InputError: as in `eap`, or another `attention`. ModelError: a mixture of experts.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
    >>> graph = relp_edges(demo.model, demo.tokens, demo.corrupted, metric)
    >>> scores = graph.pair_scores()
    >>> max(scores, key=scores.get)
    ('m0', 'a2.h0')
    """
    rules = rules_of(attention, products)
    began = time.perf_counter()
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    setting, adapter = Setting("relp", setup, 1), setup.adapter
    if adapter.shape.moe:
        raise ModelError(f"`model` ({adapter.name}) routes tokens through experts, for which RelP has no rules")
    layout, count = EdgeLayout(adapter.shape), Count()
    scores = torch.zeros(layout.n_sources, layout.n_readers, dtype=torch.float64, device=adapter.device)
    with counting(total=len(setup), progress=setup.progress, desc="relp", unit="prompt") as bar:
        for job in jobs(setting, count):
            difference, derivative = _swept(job, rules)
            add_products(layout, adapter, scores, difference, derivative, job.batch.mask)
            bar.update(len(job.batch.rows))
    found = facts(setting, count, began) | {"attention": attention, "products": products}
    return layout.graph(scores / len(setup), found)


def rules_of(attention: str, products: str = "half") -> Rules:
    """Which nonlinearities count as constants, and what each factor of a gated product gets.

    Raises
    ------
    InputError: another word than "frozen" or "moving", or than "half" or "whole".
    """
    if attention not in ("frozen", "moving"):
        raise InputError(f"`attention` is {attention!r}: write 'frozen' or 'moving'")
    if products not in ("half", "whole"):
        raise InputError(f"`products` is {products!r}: write 'half' or 'whole'")
    return replace(RELP, attention=attention == "frozen", half=products == "half")


def _swept(job: Job, rules: Rules) -> tuple[Written, Derivative]:
    """What each component writes less what its cut edges carry, and the modified gradient at each reader."""
    adapter, batch = job.adapter, job.batch
    job.count.forward += job.share
    job.count.backward += job.share
    keys = dict.fromkeys(("logits", *written_keys(adapter), *wanted(adapter, rules)))
    acts = adapter.run(batch.clean.tokens, batch.mask, keys)
    ends = Ends(adapter, acts, acts, batch.mask, position_ids(batch.mask))
    start = unembedded(adapter, acts["logits"], acts["logits"], _at_logits(job, acts["logits"]))
    return written_in(adapter, acts).map(torch.sub, job.ablated()), _derivative(ends, start, rules)


def _at_logits(job: Job, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos vocab"]:
    batch = job.batch
    given = Batch(batch.clean.tokens, None, batch.mask, batch.rows)
    return goal_gradient(lambda seen, _: job.experiment.objective(batch.shown(seen), batch.rows), logits, given)[1]


def _derivative(ends: Ends, start: Float[Tensor, "prompt 1 pos d_model"], rules: Rules) -> Derivative:
    adapter = ends.adapter
    unembed = through_norm(ends, adapter.shape.n_layers, start, rules, mlp=False)[:, 0]
    layers = {
        found.layer: (found.mlp, {port: m[:, 0].transpose(1, 2) for port, m in found.ports.items()})
        for found in sweep(ends, start, rules)
    }

    def at(layer: int, port: str, chosen: Chosen) -> Float[Tensor, "head token d_model"] | None:
        if layer == len(layers):
            return unembed[chosen][None]
        at_mlp, ports = layers[layer]
        if port == "":
            assert at_mlp is not None  # such readers are of models with MLPs
            return at_mlp[:, 0][chosen][None]
        if port not in ports:
            return None
        back = torch.bmm(ports[port][chosen].transpose(0, 1), adapter.reader(layer, port).weight.mT)  # type: ignore[arg-type]
        return back * ends.inverse(act("scale.attn", layer))[chosen]

    return at
