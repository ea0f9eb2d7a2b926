"""The record of what `circuit_lasso` makes: what its collections cost, for each prompt given."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from tl_circuitlasso.graph.provenance import question, record
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.tokens import Prompts


def provenance(
    adapter: Adapter,
    prompts: Prompts,
    arguments: Mapping[str, Any],
    *,
    target: Any,
    positions: Any,
    looked_at: int,
    unit: str,
    forward: float,
    seconds: Mapping[str, float],
    **own: Any,
) -> dict[str, Any]:
    """The record of a graph; `looked_at` of the prompts decided, `positions` is where the target was really read."""
    return record(
        "CircuitLasso",
        adapter.facts(),
        question=question(target, positions),
        prompts=looked_at,
        unit=unit,
        forward=forward,
        backward=0,
        seconds=seconds,
        arguments=dict(arguments),
        data_hash=prompts.data_hash(),
        **own,
    )


def per_prompt(calls: int | float, prompts: int, batch_size: int) -> float:
    """Forward passes of batches as passes per prompt.

    >>> per_prompt(8, 256, 64)
    2.0
    """
    return calls / ceil(prompts / batch_size)


def confirmed(report: Mapping[str, Any], prompts: int) -> float:
    """What measuring took, whose passes are per prompt of its own, for each of the prompts given."""
    return report["forward_passes"] * report["prompts"] / prompts
