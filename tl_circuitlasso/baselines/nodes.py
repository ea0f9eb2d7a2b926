"""Attribution of whole nodes: what each component's output does to the metric, through everything that reads it."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.baselines.gradient import Count, Job, Path, Setting, Step, at_clean, walked
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.prompt_forms import AnyPrompts


@verb
def node_scores(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    method: str = "eap",
    steps: int = 5,
    **options: Unpack[MethodOptions],
) -> dict[str, float]:
    """score(u) = mean over prompts of <u_clean - u_ablated, d metric / d (output of u)>, by node name.

    "eap" takes the derivative on the clean prompt, "eap_ig" the mean over embeddings corrupted + k/steps (clean -
    corrupted), k = 1 .. steps; other arguments as in `baselines.eap`. It is that of an MLP's output, not of its input
    (as EAP-IG's node scores have it).

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> scores = node_scores(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> max(scores, key=scores.get)
    'a2.h0'
    """
    path: Path | None = {"eap": at_clean, "eap_ig": _along_inputs}.get(method)
    if path is None:
        raise InputError(f"`method` is {method!r}: write 'eap' or 'eap_ig'")
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    layout = EdgeLayout(setup.adapter.shape)
    scores = torch.zeros(layout.n_sources, dtype=torch.float64)
    for job, step in walked(Setting(method, setup, steps), Count(), path, outputs=True):
        scores += _products(job, step)
    return dict(zip(layout.index.names, (scores / len(setup)).tolist()))


def _along_inputs(job: Job) -> Iterator[Step]:
    clean, steps = job.clean(), job.setting.steps
    ablated = job.ablated()
    difference = clean.map(torch.sub, ablated)
    for k in range(1, steps + 1):
        yield difference, job.trace(start=ablated.input + k / steps * difference.input), 1 / steps


def _products(job: Job, step: Step) -> Float[Tensor, " source"]:
    difference, traced, weight = step
    assert traced.written is not None  # asked for by `outputs=True`
    pairs = zip(difference.in_order, traced.written.in_order)
    return weight * torch.cat([_summed(change * grad, job.batch.mask) for change, grad in pairs]).cpu()


def _summed(product: Tensor, real: Tensor) -> Tensor:
    """The sum over real positions and over each component's own coordinates: one number per component."""
    return product[real].double().sum(0).view(-1, product.shape[-1]).sum(1)
