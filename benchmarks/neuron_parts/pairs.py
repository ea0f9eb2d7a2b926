"""Pairs of prompts about subject-verb agreement."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_circuitlasso import evaluate
from tl_circuitlasso.evaluate.metrics import PromptMetric
from tl_circuitlasso.models import adapt


@dataclass(frozen=True, eq=False)
class Agreement:
    """Pairs of prompts of one length, and the answers as single tokens."""

    clean: Tensor
    corrupted: Tensor
    correct: Tensor
    incorrect: Tensor

    @property
    def metric(self) -> PromptMetric:
        return evaluate.logit_diff(self.correct, self.incorrect)


def agreement_pairs(model: Any, file: Path, count: int, seed: int = 0) -> Agreement:
    """`count` pairs drawn from a file: those of the commonest length, with answers of one token."""
    adapter = adapt(model)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    random.Random(seed).shuffle(rows)
    found = []
    for row in rows[: 4 * count]:
        prompts = [adapter.model.to_tokens(row[f"{side}_prefix"])[0].tolist() for side in ("clean", "patch")]
        answers = [adapter.model.to_tokens(row[f"{side}_answer"], prepend_bos=False)[0] for side in ("clean", "patch")]
        if len(prompts[0]) == len(prompts[1]) and all(len(answer) == 1 for answer in answers):
            found.append((*prompts, *(int(answer) for answer in answers)))
    length = Counter(len(row[0]) for row in found).most_common(1)[0][0]
    found = [row for row in found if len(row[0]) == length][:count]
    return Agreement(*(torch.tensor([row[i] for row in found]) for i in range(4)))
