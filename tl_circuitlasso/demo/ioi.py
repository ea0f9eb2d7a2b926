"""Sentences for indirect-object identification: "When Mary and John went to the store, John gave
a drink to" -> "Mary".

All sentences have one skeleton, so every word has the same position in every prompt; words,
names, and which of the two names comes back (the subject) vary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

BEGIN = "<bos>"
SILENT = "<none>"  # what the model says before the sentence reaches its last word
NAMES = (
    "Mary", "John", "Anna", "Tom", "Sarah", "Paul", "Emma", "James",
    "Lucy", "David", "Alice", "Mark", "Laura", "Peter", "Julia", "Kevin",
)  # fmt: skip
SKELETON = (
    (BEGIN,),
    ("When", "After", "While"),
    NAMES,
    ("and",),
    NAMES,
    ("went", "came", "walked"),
    ("to",),
    ("the",),
    ("store", "park", "school", "office", "beach", "station"),
    (",",),
    NAMES,
    ("gave", "handed", "offered"),
    ("a",),
    ("drink", "book", "ring", "ball", "letter", "snack"),
    ("to",),
)
FIRST, SECOND, SUBJECT, END = 2, 4, 10, 14  # positions of the three names and of the last word
LENGTH = len(SKELETON)
VOCABULARY = tuple(dict.fromkeys([SILENT, *(word for slot in SKELETON for word in slot)]))
TOKEN = {word: token for token, word in enumerate(VOCABULARY)}
NAME_TOKENS = tuple(TOKEN[name] for name in NAMES)


@dataclass(frozen=True, eq=False)
class Sentences:
    """Clean prompts, a counterpart of the same length for each, and the two names in question.

    In `corrupted` both names are new and the other one of them comes back, so whatever a component
    knows about the clean prompt is wrong there: the answer, the names, and the repeated place.
    """

    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    correct: Int[Tensor, " prompt"]  # the name that is not repeated
    incorrect: Int[Tensor, " prompt"]  # the name that is


def draw(count: int, generator: torch.Generator) -> Int[Tensor, "prompt pos"]:
    """`count` random sentences as tokens; the two names of a sentence differ."""
    tokens = torch.stack([_words(slot, count, generator) for slot in SKELETON], dim=1)
    names = torch.rand(count, len(NAMES), generator=generator).argsort(dim=1)[:, :2]
    return with_names(tokens, torch.tensor(NAME_TOKENS)[names], _coin(count, generator))


def counterpart(tokens: Int[Tensor, "prompt pos"], generator: torch.Generator) -> Int[Tensor, "prompt pos"]:
    """Same words, two new names, and the other place repeated."""
    names = torch.tensor(NAME_TOKENS)
    used = (names == tokens[:, FIRST, None]) | (names == tokens[:, SECOND, None])
    order = torch.rand(used.shape, generator=generator).masked_fill(used, 2.0).argsort(dim=1)
    return with_names(tokens, names[order[:, :2]], 1 - repeated_place(tokens))


def with_names(
    tokens: Int[Tensor, "prompt pos"],
    names: Int[Tensor, "prompt 2"],
    place: Int[Tensor, " prompt"],
) -> Int[Tensor, "prompt pos"]:
    """The sentences with these two names, of which the one at `place` (0 or 1) comes back."""
    tokens = tokens.clone()
    tokens[:, FIRST], tokens[:, SECOND] = names[:, 0], names[:, 1]
    tokens[:, SUBJECT] = names.gather(1, place[:, None])[:, 0]
    return tokens


def repeated_place(tokens: Int[Tensor, "prompt pos"]) -> Int[Tensor, " prompt"]:
    """0 where the first name comes back, 1 where the second does."""
    return (tokens[:, SUBJECT] == tokens[:, SECOND]).long()


def sentences(count: int, seed: int = 0) -> Sentences:
    """`count` clean prompts and their counterparts, the same for the same seed.

    >>> batch = sentences(2, seed=1)
    >>> batch.tokens.shape, text(batch.tokens)[0].split()[3]
    (torch.Size([2, 15]), 'and')
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = draw(count, generator)
    corrupted = counterpart(tokens, generator)
    names, place = tokens[:, [FIRST, SECOND]], repeated_place(tokens)[:, None]
    return Sentences(
        tokens=tokens,
        corrupted=corrupted,
        correct=names.gather(1, 1 - place)[:, 0],
        incorrect=names.gather(1, place)[:, 0],
    )


def text(tokens: Int[Tensor, "prompt pos"]) -> list[str]:
    """The prompts as words, one space between two."""
    return [" ".join(VOCABULARY[token] for token in row) for row in tokens.tolist()]


def _words(slot: tuple[str, ...], count: int, generator: torch.Generator) -> Int[Tensor, " prompt"]:
    choices = torch.tensor([TOKEN[word] for word in slot])
    return choices[torch.randint(len(slot), (count,), generator=generator)]


def _coin(count: int, generator: torch.Generator) -> Int[Tensor, " prompt"]:
    return torch.randint(2, (count,), generator=generator)
