"""Where the benchmarks' models and texts lie, and how stories become rows of tokens."""

import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.models.loading import load_model

STORY_END = "<|endoftext|>"


def data_folder(*parts: str) -> Path:
    """A path in the folder of models and data sets: TL_CIRCUITLASSO_DATA, or `shared` beside the repository."""
    root = Path(os.environ.get("TL_CIRCUITLASSO_DATA", Path(__file__).resolve().parents[2] / "shared"))
    if not (path := root.joinpath(*parts)).exists():
        raise SystemExit(f"no data at {path}: set TL_CIRCUITLASSO_DATA to the folder that holds it")
    return path


def story_model(folder: Path | None = None) -> Any:
    """The model in `folder` under the folder's name, stories260K unless another one is named."""
    folder = folder or data_folder("models", "stories260K")
    model = load_model(str(folder))
    model.cfg.model_name = folder.name
    return model


def story_rows(model: Any, text: str, *, length: int = 128, rows: int | None = None) -> Int[Tensor, "batch pos"]:
    """Text as rows of `length` tokens, behind BOS where the model has one; no row runs across the end of a story."""
    bos, found = model.tokenizer.bos_token_id, []
    start = [] if bos is None else [bos]
    width = length - len(start)
    for story in text.split(STORY_END):
        tokens = model.tokenizer(story.strip(), add_special_tokens=False)["input_ids"]
        found += [start + tokens[first : first + width] for first in range(0, len(tokens) - width + 1, width)]
        if rows is not None and len(found) >= rows:
            break
    return torch.tensor(found[:rows])
