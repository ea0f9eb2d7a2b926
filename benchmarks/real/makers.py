"""How the prompts of each task are made: sentences, their counterparts, and the right answer to each.

indirect objects, agreement, capitals, stories: see tasks.py; and
pronouns   "Yesterday the king said that" -> he
opposites  "The opposite of hot is" -> cold
plurals    "One cat, two" -> cats
languages  "The people of France speak" -> French
sequences  "Monday, Tuesday, Wednesday," -> Thursday
repeats    "List: ring ball key cup hat ring ball key" -> cup
"""

import csv
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.data import data_folder, story_rows
from benchmarks.real import wording
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter

SAMPLE = 64  # pairs that say what length the others must have
STORY_LENGTH, PIECES = 24, 1500  # tokens of a piece of text, BOS included, and how many are shuffled
DRAWS = 100_000  # of sentences, after which no new one is hoped for
AGREEMENT = {"seen": "nounpp_train.json", "held-out": "nounpp_test.json"}
STORIES = {"seen": "train_part_cased.txt", "held-out": "valid_part_cased.txt"}


@dataclass(frozen=True)
class Pair:
    """A prompt and its counterpart as token ids, the right answer to each."""

    clean: Sequence[int]
    corrupted: Sequence[int]
    correct: int
    incorrect: int


def encoded(adapter: Adapter, text: str) -> list[int]:
    """The tokens of a prompt as the model is given it, with BOS where that is its habit."""
    return adapter.to_tokens([text])[0][0].tolist()


def word_id(adapter: Adapter, word: str) -> int | None:
    """The token that a word is in the middle of a sentence, None where it's more than one."""
    encode = adapter.model.tokenizer
    before, whole = (encode(text, add_special_tokens=False)["input_ids"] for text in ("the", f"the {word}"))
    return whole[-1] if whole[:-1] == before else None


def single(adapter: Adapter, words: Iterable[str]) -> dict[str, int]:
    """The words that are single tokens, with these."""
    ids = {word: word_id(adapter, word) for word in words}
    return {word: token for word, token in ids.items() if token is not None}


def usual_length(lengths: Iterable[int]) -> int:
    """The most frequent length, of two as frequent the smaller one."""
    counts = Counter(lengths)
    return min(counts, key=lambda length: (-counts[length], length))


Made = tuple[Iterator[Pair], str]


def indirect_objects(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    names = single(adapter, wording.NAMES)
    shared = len(names) < wording.LEAST_NAMES
    if len(names) < 2 + third:
        raise InputError(f"`ioi` needs {2 + third} names that are single tokens: the tokenizer has {len(names)}")
    people = list(names) if shared else list(wording.half(list(names), split))
    pools = [list(single(adapter, words)) or list(words) for words in (wording.PLACES, wording.THINGS)]
    frames = list(itertools.product(wording.half(wording.INDIRECT_OBJECT, split), *pools))
    note = f"{len(people)} names{' (none held out)' if shared else ''}, {len(frames)} sentences"
    return _equal(adapter, "ioi", _indirect_objects(frames, people, names, draw, third), note)


Text = tuple[str, str, int, int]  # a prompt, its counterpart, and the right answer to each


def _indirect_objects(
    frames: list[tuple[str, str, str]], people: list[str], names: dict[str, int], draw: random.Random, third: bool
) -> Iterator[Text]:
    made: set[tuple[str, str]] = set()
    for _ in range(DRAWS):
        frame, place, thing = draw.choice(frames)
        a, b, *others = draw.sample(people, 2 + third)
        subject, receiver = draw.choice([(a, b), (b, a)])
        clean, corrupted = (
            frame.format(a=a, b=b, s=name, place=place, thing=thing) for name in (subject, *(others or [receiver]))
        )
        if (clean, corrupted) not in made:
            made.add((clean, corrupted))
            yield clean, corrupted, names[receiver], names[subject]


def agreement(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    lines = data_folder("datasets", "sva", AGREEMENT[split]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    verbs = single(adapter, {row[side].strip() for row in rows for side in ("clean_answer", "patch_answer")})
    texts = [
        (row["clean_prefix"], row["patch_prefix"], row["clean_answer"].strip(), row["patch_answer"].strip())
        for row in rows
    ]
    usable = [text for text in texts if text[2] in verbs and text[3] in verbs]
    draw.shuffle(usable)
    pairs = ((*text[:2], verbs[text[2]], verbs[text[3]]) for text in usable)
    return _equal(adapter, "agreement", pairs, f"{len(usable)} pairs of {len(rows)} with verbs of one token")


def capitals(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    with data_folder("datasets", "capitals", "city_state_capital.csv").open(encoding="utf-8", newline="") as file:
        capital = {row["state"]: row["capital"].strip() for row in csv.DictReader(file)}
    ids = single(adapter, capital.values())
    states = [state for state, name in capital.items() if name in ids]
    frames = wording.half(wording.CAPITAL, split)
    texts = [
        (frame.format(state=one), frame.format(state=other), ids[capital[one]], ids[capital[other]])
        for frame, (one, other) in itertools.product(frames, itertools.permutations(states, 2))
    ]
    draw.shuffle(texts)
    return _equal(adapter, "capitals", texts, f"{len(states)} states whose capital is one token")


def _equal(adapter: Adapter, name: str, texts: Iterable[Text], note: str) -> Made:
    """Pairs of one length in tokens: the most frequent one among the first of them."""
    stream = (Pair(encoded(adapter, text[0]), encoded(adapter, text[1]), *text[2:]) for text in texts)
    even = (pair for pair in stream if len(pair.clean) == len(pair.corrupted))
    first = list(itertools.islice(even, SAMPLE))
    if not first:
        raise InputError(f"`{name}` has no prompt of its counterpart's length with answers of one token each")
    length = usual_length(len(pair.clean) for pair in first)
    return (pair for pair in itertools.chain(first, even) if len(pair.clean) == length), note


def stories(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    text = data_folder("datasets", "tinystories", STORIES[split]).read_text(encoding="utf-8", errors="replace")
    rows = story_rows(adapter.model, text, length=STORY_LENGTH + 1, rows=PIECES).tolist()
    draw.shuffle(rows)
    pairs = (Pair(row[:-1], other[:-1], row[-1], other[-1]) for row, other in zip(rows, rows[1:] + rows[:1]))
    return pairs, f"{len(rows)} pieces of text"


def pronouns(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    ids = single(adapter, ("he", "she"))
    if len(ids) < 2:
        raise InputError("`pronouns` needs 'he' and 'she' as single tokens: the tokenizer has them not")
    he, she = ids.values()
    texts = [
        text
        for frame, (man, woman) in itertools.product(
            wording.half(wording.PRONOUN, split), itertools.product(*wording.PEOPLE)
        )
        for text in (
            (frame.format(man), frame.format(woman), he, she),
            (frame.format(woman), frame.format(man), she, he),
        )
    ]
    draw.shuffle(texts)
    return _equal(adapter, "pronouns", texts, f"{sum(map(len, wording.PEOPLE))} words for people")


def _chosen(adapter: Adapter, name: str, table: Mapping[str, str], frames: Sequence[str], draw: random.Random) -> Made:
    """A word in a frame, and another word in it: to each its own answer."""
    ids = single(adapter, table.values())
    words = [word for word, answer in table.items() if answer in ids]
    texts = [
        (frame.format(one), frame.format(other), ids[table[one]], ids[table[other]])
        for frame, (one, other) in itertools.product(frames, itertools.permutations(words, 2))
        if table[one] != table[other]
    ]
    draw.shuffle(texts)
    return _equal(adapter, name, texts, f"{len(words)} words with an answer of one token")


def opposites(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    both = {**dict(wording.OPPOSITES), **{b: a for a, b in wording.OPPOSITES}}
    return _chosen(adapter, "opposites", both, wording.half(wording.OPPOSITE, split), draw)


def plurals(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    table = {word: f"{word}s" for word in wording.half(wording.COUNTED, split)}
    return _chosen(adapter, "plurals", table, wording.half(wording.PLURAL, split), draw)


def languages(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    return _chosen(adapter, "languages", dict(wording.LANGUAGES), wording.half(wording.LANGUAGE, split), draw)


def sequences(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    """Three that follow each other in a known order, and three from elsewhere in it; the answer is the next one."""
    runs = [(row, start) for row in wording.ORDERS for start in range(len(row) - 3)]
    ids = single(adapter, {row[start + 3] for row, start in runs})
    frames = wording.half(wording.SEQUENCE, split)
    texts = [
        (frame.format(*row[i : i + 3]), frame.format(*row[j : j + 3]), ids[row[i + 3]], ids[row[j + 3]])
        for frame, ((row, i), (other, j)) in itertools.product(frames, itertools.permutations(runs, 2))
        if row is other and row[i + 3] in ids and row[j + 3] in ids
    ]
    draw.shuffle(texts)
    return _equal(adapter, "sequences", texts, f"{len(runs)} runs of {len(wording.ORDERS)} orders")


def repeats(adapter: Adapter, split: str, draw: random.Random, third: bool) -> Made:
    """Five words and the first three of them again: the fourth follows. In the counterpart the fourth is another."""
    ids = single(adapter, wording.half(wording.THINGS, split))
    if len(ids) < 6:
        raise InputError(f"`repeats` needs 6 words that are single tokens: the tokenizer has {len(ids)}")

    def drawn() -> Iterator[Text]:
        for _ in range(DRAWS):
            *words, other = draw.sample(list(ids), 6)
            changed = [*words[:3], other, words[4]]
            clean, corrupted = (" ".join(["List:", *row, *row[:3]]) for row in (words, changed))
            yield clean, corrupted, ids[words[3]], ids[other]

    return _equal(adapter, "repeats", drawn(), f"{len(ids)} words")


TASKS: dict[str, Callable[[Adapter, str, random.Random, bool], Made]] = {
    "ioi": indirect_objects,
    "agreement": agreement,
    "capitals": capitals,
    "stories": stories,
    "pronouns": pronouns,
    "opposites": opposites,
    "plurals": plurals,
    "languages": languages,
    "sequences": sequences,
    "repeats": repeats,
}
