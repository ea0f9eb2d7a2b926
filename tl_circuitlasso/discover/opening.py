"""From the arguments of a call to a job that is ready to be run, or to be planned: one place where they are checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from tl_circuitlasso._checks import as_seed, file_name, shortened, truth, whole_or_none
from tl_circuitlasso.data.sharing import as_ranks
from tl_circuitlasso.data.targets import as_target
from tl_circuitlasso.discover.confirming import prepare
from tl_circuitlasso.discover.designs import way_for
from tl_circuitlasso.discover.way import Job, Request
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter, adapt
from tl_circuitlasso.models.architecture import refuse_altered
from tl_circuitlasso.models.device import on_device
from tl_circuitlasso.models.memory import as_bytes
from tl_circuitlasso.models.metric import with_tokens
from tl_circuitlasso.models.pairs import PAIR, pairs_of
from tl_circuitlasso.models.tokens import Prompts


@contextmanager
def opened(request: Request) -> Iterator[Job[Any]]:
    """The job, while the model is on the device that was asked for.

    Raises
    ------
    InputError: an argument is wrong; the message names it. ModelError: the model can't be read truthfully.
    """
    ranks, memory = as_ranks(request.process_group), as_bytes(request.memory)
    refined, checkpoint = truth("refined", request.refined), file_name("checkpoint", request.checkpoint)
    strength, target, seed = as_strength(request.strength), as_target(request.target), as_seed(request.seed)
    most = whole_or_none("max_prompts", request.max_prompts, least=PAIR, what="of prompts")
    whole_or_none("budget", request.budget, what="of edges to measure")
    way = way_for(request.design, request.basis)
    what = way.asked(request, target)
    with ranks.together(), on_device(request.model, request.device):
        adapter = adapt(request.model, spread=way.spread)
        refuse_altered(adapter.model)
        options = {name: getattr(request, name) for name in ("attention_mask", "positions", "batch_size")}
        prompts = checked_prompts(adapter, request.tokens, paired=way.pairs(what), **options)
        asked = strength, seed, request.progress, checkpoint, ranks, most, refined, memory
        yield _with_counterparts(request, Job(way, what, adapter, prompts, with_tokens(target, adapter), *asked))


def checked_prompts(adapter: Adapter, tokens: Any, *, paired: bool, **options: Any) -> Prompts:
    """The checked prompts; a design that compares those of a batch also draws them, so it knows all of them."""
    prompts = Prompts(adapter, tokens, **options, fewest=PAIR if paired else 1)
    return prompts.gathered() if paired else prompts


def as_strength(strength: str | int | float) -> str | float:
    """A strength that can be used: a named rule, or a fraction of lambda_max.

    Raises
    ------
    InputError: unknown name, negative, above 1 or not finite.
    """
    names = ("auto", "cv", "ebic", "mcp", "stability")
    if isinstance(strength, str):
        if strength not in names:
            raise InputError(f"`strength` {strength!r} is unknown: use one of {names}, or a number from 0 to 1")
        return strength
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise InputError(
            f"`strength` is {shortened(strength)}: give one of {names}, or a fraction of lambda_max from 0 "
            "(dense) to 1 (empty)"
        )
    return float(strength)


def _with_counterparts(request: Request, job: Job[Any]) -> Job[Any]:
    """The job with the prompts' counterparts, where it reads them, in batches that suit the model, and with what its
    confirmation needs."""
    causal = None
    if request.method == "lasso+confirm":
        options = {"count": job.max_prompts, "seed": job.seed, "budget": request.budget, "size": request.size}
        causal = prepare(job.adapter, job.prompts, request.corrupted, job.target, request.metric, **options)
    if request.corrupted is not None and job.paired:
        job = job.way.with_counterparts(job, pairs_of(job.adapter, job.prompts, request.corrupted))
    else:
        job = job.way.in_room(job)
    return replace(job, causal=causal)
