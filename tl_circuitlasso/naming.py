"""Names: those of a room that `dir` shows, a model's without its folders, and columns that files of prompts have."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

COLUMNS = {  # of a file of prompts: what they hold, and the names that are known for it, the first ones first
    "clean": ("prompt", "text", "clean"),
    "corrupted": ("corrupted",),
    "correct": ("answer", "answers", "correct", "right"),
    "incorrect": ("wrong", "incorrect"),
}


def of_model(name: str) -> str:
    """A model's name as it is shown: of a folder its last part, of the hub's or TransformerLens's names all.

    >>> of_model("/home/me/models/smollm2"), of_model("HuggingFaceTB/SmolLM2-135M"), of_model("gpt2")
    ('smollm2', 'HuggingFaceTB/SmolLM2-135M', 'gpt2')
    """
    folder = Path(name)
    return folder.resolve().name if folder.is_absolute() or folder.is_dir() else name


def directory(room: str, *more: str) -> Callable[[], list[str]]:
    """A `__dir__` for the module `room`: `__all__` where there is one, else what the room holds without an underscore
    and `more`, public names whose home is another room.

    >>> from tl_circuitlasso import plot
    >>> "circuit" in dir(plot), "Path" in dir(plot), "storage" in dir(plot)
    (True, False, False)
    """
    return lambda: sorted([*_public(vars(sys.modules[room]), room), *more])


def _public(names: Mapping[str, Any], room: str) -> list[str]:
    listed = names.get("__all__")
    return list(listed) if listed is not None else [name for name, value in names.items() if _own(name, value, room)]


def _own(name: str, value: Any, room: str) -> bool:
    home = getattr(value, "__module__", room)  # plain data has none
    return not (name.startswith("_") or isinstance(value, ModuleType)) and str(home).startswith(room)
