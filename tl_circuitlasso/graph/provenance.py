"""Where a graph came from, as plain data, in one form for every method: what was asked, of what, and at what cost.

| key                                  | holds                                                                      |
|--------------------------------------|----------------------------------------------------------------------------|
| `method`                             | "CircuitLasso", or the baseline's name                                     |
| `model`, `architecture`, `d_model`   | the model's name or folder, and its kind                                   |
| `config_hash`, `weights_hash`        | what tells two models apart                                                |
| `versions`                           | of this library, torch, transformer-lens and Python                        |
| `target`                             | "logits", "LogitDiff", "Labels" or "Values"; None: a function, or nothing  |
| `positions`                          | where that is read: "all", "last", an index, ...; None: not known          |
| `prompts`, `prompt_pairs`            | how many were looked at                                                    |
| `unit`                               | of the scores                                                              |
| `forward_passes`, `backward_passes`  | for each prompt given; None: not known                                     |
| `seconds`                            | by stage, and "total"                                                      |

What a method has beside that stands under names of its own. Graphs of earlier releases count passes of batches, or have
seconds as a number: `asked` and `cost` read both.
"""

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MUTE: Mapping[str, Any] = {"target": None, "positions": None}  # what is asked where it isn't known
# of a method that looks at no prompt
FREE: Mapping[str, Any] = {"prompts": None, "unit": None, "forward": 0, "backward": 0, "seconds": {}}
_PACKAGES = ("tl-circuitlasso", "torch", "transformer-lens")


def record(
    method: str,
    model: Mapping[str, Any],
    *,
    prompts: int | None,
    unit: str | None,
    forward: int | float | None,
    backward: int | float | None,
    seconds: Mapping[str, int | float],
    question: Mapping[str, Any] = MUTE,
    prompt_pairs: int | None = None,
    **own: Any,
) -> dict[str, Any]:
    """The record of a graph; `model`: what its adapter says of it, `question`: what the function of that name does.

    >>> spent = {"forward": 2, "backward": 1, "seconds": {"scores": 0.5}}
    >>> made = record("eap", {"model": "gpt2"}, prompts=8, unit="logits", **spent)
    >>> made["forward_passes"], made["seconds"]
    (2.0, {'scores': 0.5, 'total': 0.5})
    """
    passes = {"forward_passes": forward, "backward_passes": backward}
    return {
        "method": method,
        **model,
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        **question,
        "prompts": prompts,
        "prompt_pairs": prompt_pairs,
        "unit": unit,
        **{name: None if count is None else round(float(count), 6) for name, count in passes.items()},
        "seconds": {**seconds, "total": seconds.get("total", sum(seconds.values()))},
        **own,
    }


def question(target: Any, positions: Any) -> dict[str, Any]:
    """What was asked, in words: the kind of target, and where it was read. Of a function nothing is known.

    >>> question(None, slice(1, None))
    {'target': 'logits', 'positions': 'slice(1, None, None)'}
    """
    if callable(target):
        return dict(MUTE)
    where = positions if positions is None or isinstance(positions, (str, int)) else str(positions)
    return {
        "target": "logits" if target is None else type(target).__name__,
        "positions": "mask" if hasattr(positions, "shape") else where,
    }


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


# ---- reading it -----------------------------------------------------------------------------------------------------


def asked(known: Mapping[str, Any]) -> dict[str, str]:
    """What a graph answers, and of which model, as far as its provenance says."""
    arguments = known.get("arguments")
    older = arguments if isinstance(arguments, Mapping) else {}
    found = {name: known.get(name, older.get(name)) for name in ("target", "positions", "model", "weights_hash")}
    return {name: str(value) for name, value in found.items() if isinstance(value, (str, int))}


def cost(known: Mapping[str, Any]) -> dict[str, float | None]:
    """Seconds in all, passes per prompt and peak memory in MiB; None where that isn't known.

    >>> cost({"seconds": 2.5, "forward_passes": 2.0, "backward_passes": 1.0})
    {'seconds': 2.5, 'forward_passes': 2.0, 'backward_passes': 1.0, 'peak_mib': None}
    """
    seconds, passes = known.get("seconds"), known.get("passes_per_prompt")
    counts = {f"{way}_passes": known.get(f"{way}_passes") for way in ("forward", "backward")}
    if isinstance(passes, Mapping):  # of an earlier release, which counted batches beside it
        counts = {f"{way}_passes": passes.get(way) for way in ("forward", "backward")}
    elif known.get("method") == "CircuitLasso" and "target" not in known:  # the same, of a stream
        counts = dict.fromkeys(counts)
    total = seconds.get("total") if isinstance(seconds, Mapping) else seconds
    found = {"seconds": total, **counts, "peak_mib": known.get("peak_mib")}
    sound = {n: x for n, x in found.items() if isinstance(x, (int, float)) and not isinstance(x, bool)}
    return {name: float(sound[name]) if name in sound else None for name in found}


def differences(graphs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What graphs with these provenances should have in common and haven't, in words; of what one doesn't say, nothing.

    >>> differences({"a": {"target": "logits"}, "b": {"target": "LogitDiff"}, "c": {}})
    ['their target differs: logits (a), LogitDiff (b)']
    """
    said = {name: asked(known) for name, known in graphs.items()}
    words = {"target": "target differs", "positions": "positions differ", "model": "model differs"}
    notes = []
    for key, verb in words.items():
        values = {name: one[key] for name, one in said.items() if key in one}
        if len(set(values.values())) > 1:
            notes.append(f"their {verb}: {', '.join(f'{value} ({name})' for name, value in values.items())}")
        elif key == "model" and len({one["weights_hash"] for one in said.values() if "weights_hash" in one}) > 1:
            notes.append("their models have other weights, though one name")
    return notes
