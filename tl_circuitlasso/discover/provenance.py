"""Where a graph came from, as plain data: enough to make it again, to tell two graphs apart, and to compare costs."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from typing import Any

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.collect import Collected
from tl_circuitlasso.models.feature_collect import CollectedCodes
from tl_circuitlasso.models.tokens import Prompts


def provenance(
    adapter: Adapter, prompts: Prompts, collected: Collected | CollectedCodes, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Versions, model, data, arguments and passes behind what was collected."""
    return made_of(adapter, prompts, arguments) | {
        "prompts": collected.prompts,
        "forward_passes": collected.forward_passes,
        "closure_error": collected.closure,
    }


def made_of(adapter: Adapter, prompts: Prompts, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, model, data and arguments behind any graph."""
    return {
        "method": "CircuitLasso",
        "model": adapter.name,
        "architecture": adapter.architecture,
        "d_model": adapter.shape.d_model,
        "config_hash": adapter.config_hash(),
        "data_hash": prompts.data_hash(),
        "arguments": dict(arguments),
        "backward_passes": 0,
        "versions": {name: _version(name) for name in ("tl-circuitlasso", "torch", "transformer-lens")}
        | {"python": platform.python_version()},
    }


def question(target: Any, positions: Any) -> dict[str, Any]:
    """What was asked, in words: the kind of target, and where it was read."""
    where = positions if isinstance(positions, (str, int)) else str(positions)
    return {
        "target": "logits" if target is None else type(target).__name__,
        "positions": "mask" if hasattr(positions, "shape") else where,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def passes_per_prompt(record: Mapping[str, Any], batch_size: int) -> dict[str, dict[str, float]]:
    """Passes for each prompt given, as the baselines count them; nothing for a stream, whose length isn't known."""
    given, confirm = record["prompts_given"], record.get("confirm", {})
    if given is None:
        return {}
    forward = record["forward_passes"] / ceil(given / batch_size)
    forward += confirm.get("forward_passes", 0) * confirm.get("prompts", 0) / given
    return {"passes_per_prompt": {"forward": round(forward, 4), "backward": 0.0}}
