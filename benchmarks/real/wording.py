"""What prompts of indirect objects and of capitals are made of; every second template and name is held out."""

from collections.abc import Sequence
from typing import TypeVar

SPLITS = ("seen", "held-out")
LEAST_NAMES = 8  # names that a tokenizer must know before some of them are held out

# a and b are introduced, s comes back; a word or mark between blanks is one token of most tokenizers: 14 in all
INDIRECT_OBJECT = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "The {place} was quiet as {a} met {b}. {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} handed a {thing} to",
    "Once {a} and {b} stood at the {place}, {s} sent a {thing} to",
    "Then {a} and {b} went to the {place}. {s} gave a {thing} to",
    "Because {a} and {b} worked at the {place}, {s} offered a {thing} to",
    "While {a} and {b} sat in the {place}, {s} passed a {thing} to",
    "Later {a} and {b} walked to the {place}. {s} brought a {thing} to",
)
CAPITAL = (
    "The capital city of {state} is",
    "In {state}, the capital is",
    "The state capital of {state} is",
    "For {state}, the capital is",
)
NAMES = (
    "Mary", "John", "Anna", "Tom", "Sarah", "Paul", "Emma", "James", "Lucy", "David", "Alice", "Mark", "Laura", "Peter",
    "Julia", "Kevin", "Michael", "Robert", "William", "Richard", "Thomas", "Charles", "Daniel", "Matthew", "Anthony",
    "Steven", "Andrew", "Joshua", "George", "Brian", "Edward", "Jason", "Ryan", "Jacob", "Eric", "Adam", "Ben", "Sam",
    "Tim", "Max", "Jack", "Lily", "Timmy", "Sue", "Amy", "Kate", "Jane", "Lisa", "Rachel", "Rebecca", "Jessica",
    "Jennifer", "Linda", "Elizabeth", "Susan", "Karen", "Nancy", "Helen", "Emily", "Amanda", "Molly", "Bob", "Simon",
    "Martin", "Henry", "Oliver", "Luke", "Leo",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "office", "beach", "station", "house", "garden", "shop", "zoo", "farm", "market",
    "library", "church", "hospital", "restaurant", "hotel", "museum", "lake", "forest",
)  # fmt: skip
THINGS = (
    "drink", "book", "ring", "ball", "letter", "snack", "kiss", "necklace", "bone", "toy", "cake", "gift", "key",
    "cookie", "coin", "card", "hat", "cup", "flower", "picture",
)  # fmt: skip

Word = TypeVar("Word")


def half(words: Sequence[Word], split: str) -> Sequence[Word]:
    """Those of the words that are seen, or those that are held out."""
    return words[SPLITS.index(split) :: 2]
