"""Relatives of EAP-IG: another path of integration, and scores with intervals over resamples of the prompts."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import fraction, whole_number
from tl_circuitlasso.baselines.edges import EdgeLayout, add_products, traced_derivative
from tl_circuitlasso.baselines.gradient import (
    Count,
    Job,
    Metric,
    Setting,
    Step,
    along_inputs,
    attribute,
    facts,
    walked,
)
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.experiment import Experiment, MethodOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.ablation import Ablated
from tl_circuitlasso.models.patching import Written
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tracing import trace


@verb
def eap_gp(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 5,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """EAP along a gradient path (EAP-GP, Zhang et al. 2025, arXiv 2502.06852); arguments as in `eap`.

    A straight line between the inputs runs through regions where the output is flat. Here the path leaves the clean
    embedding x_0 and follows the quickest way to the corrupted output, in steps of equal length:

        x_{k+1} = x_k - |x_0 - x'| / steps * g_k / |g_k|,    g_k = d/dx_k of |f(x_k) - f(x')|^2 / 2,

    with f the logits at real positions and norms over a prompt. The derivative is the mean of those at x_0 ...
    x_{steps-1}. 2 steps forward and 2 steps - 1 backward passes per prompt.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = eap_gp(demo.model, demo.tokens, demo.corrupted, demo.target, steps=2)
    >>> len(graph.top_k(6).kept_edges() & demo.true_edges)  # of the six planted edges
    3
    """
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    return attribute(Setting("eap_gp", setup, steps), _along_gradients)


def _along_gradients(job: Job) -> Iterator[Step]:
    steps = job.setting.steps
    goal = job.cut()
    traced = job.trace()
    difference = traced.values.map(torch.sub, goal.written)
    at, real = traced.values.input, job.batch.mask[..., None]
    stride = (difference.input * real).flatten(1).norm(dim=1).view(-1, 1, 1) / steps
    for k in range(steps):
        yield difference, traced, 1 / steps
        if k + 1 < steps:
            away = _towards(job, at, goal) * real
            length = away.flatten(1).norm(dim=1).view(-1, 1, 1)
            at = at - stride * away / length.clamp_min(torch.finfo(away.dtype).tiny)
            traced = job.trace(start=at)


def _towards(job: Job, at: Float[Tensor, "batch pos d_model"], goal: Ablated) -> Float[Tensor, "batch pos d_model"]:
    """The derivative at the input of half the squared distance to the goal's logits."""
    batch, share = job.batch, job.share
    real = batch.mask[..., None]

    def distance(logits: Tensor) -> Tensor:
        return ((logits - goal.logits) * real).square().sum() / 2

    job.count.forward += share
    job.count.backward += share
    found = trace(job.adapter, batch.clean.tokens, batch.mask, distance, start=at, outputs=True)
    assert found.written is not None
    return found.written.input


@verb
def bootstrap_eap_ig(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    steps: int = 5,
    resamples: int = 20,
    level: int | float = 0.95,
    seed: int = 0,
    **options: Unpack[MethodOptions],
) -> AttributionGraph:
    """EAP-IG with an interval for each edge over resamples of the prompts (arXiv 2510.25786); arguments as in `eap_ig`.

    Kept are the edges whose `level` percentile interval excludes 0. Scores are linear in the prompts' differences, so
    the resamples share the passes of one `eap_ig`; only the products are made again.

    Returns
    -------
    AttributionGraph: extras `low` and `high`, the interval, and `stability`, the share of resamples whose score has the
        sign of the score over all prompts.

    Raises
    ------
    InputError: fewer than 2 resamples, a level outside (0, 1), and as in `eap_ig`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> graph = bootstrap_eap_ig(demo.model, demo.tokens, demo.corrupted, demo.target, steps=2, resamples=5)
    >>> ("a2.h0", "logits") in graph.kept_edges()
    True
    """
    resamples = whole_number("resamples", resamples, least=2, what="of times that prompts are drawn again")
    fraction("level", level, "such as .95", whole=False)
    began = time.perf_counter()
    setup = Experiment.of(model, clean, corrupted, metric, **options)
    setting, adapter = Setting("bootstrap_eap_ig", setup, steps), setup.adapter
    layout, count = EdgeLayout(adapter.shape), Count()
    times = _times_drawn(len(setup), resamples, seed)
    device = adapter.device
    scores = torch.zeros(1 + resamples, layout.n_sources, layout.n_readers, dtype=torch.float64, device=device)
    for job, (difference, traced, share) in walked(setting, count, along_inputs):
        derivative = traced_derivative(adapter, traced)
        for number, weight in enumerate(times[:, job.batch.rows].to(device)):
            drawn = job.batch.mask & (weight > 0)[:, None]
            if bool(drawn.any()):
                part = torch.zeros_like(scores[number])
                add_products(layout, adapter, part, _weighted(difference, weight), derivative, drawn)
                scores[number] += share * part
    found = facts(setting, count, began) | {"resamples": resamples, "level": level, "seed": seed}
    graph = layout.graph(scores[0] / len(setup), found)
    source, column = layout.mask().nonzero(as_tuple=True)
    drawn_scores = (scores[1:] / len(setup)).cpu()[:, source, column]
    tail = (1 - level) / 2
    low, high = (drawn_scores.quantile(q, dim=0) for q in (tail, 1 - tail))
    same = (drawn_scores.sign() == graph.score.sign()).double().mean(0)
    return replace(graph, kept=(low > 0) | (high < 0), extras={"low": low, "high": high, "stability": same})


def _times_drawn(prompts: int, resamples: int, seed: int) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is drawn: once in the first row, at random with replacement in the others."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    times = torch.zeros(resamples, prompts).scatter_add(1, drawn, torch.ones(resamples, prompts))
    return torch.cat([torch.ones(1, prompts), times])


def _weighted(difference: Written, weight: Float[Tensor, " batch"]) -> Written:
    return difference.map(lambda part: part * weight.to(part).view(-1, *[1] * (part.ndim - 1)))
