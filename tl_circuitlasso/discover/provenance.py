"""What collections cost, for each prompt given: as the record of a graph counts."""

from collections.abc import Mapping
from math import ceil
from typing import Any


def per_prompt(calls: int | float, prompts: int, batch_size: int) -> float:
    """Forward passes of batches as passes per prompt.

    >>> per_prompt(8, 256, 64)
    2.0
    """
    return calls / ceil(prompts / batch_size)


def confirmed(report: Mapping[str, Any], prompts: int) -> float:
    """What measuring took, whose passes are per prompt of its own, for each of the prompts given."""
    return report["forward_passes"] * report["prompts"] / prompts
