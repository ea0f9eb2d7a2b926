"""The words and templates that prompts are made of; every second template and name is held out."""

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

PRONOUN = (
    "Yesterday the {} said that", "This morning the {} promised that", "At dinner the {} told us that",
    "Later the {} explained that",
)  # fmt: skip
PEOPLE = (
    ("king", "father", "brother", "uncle", "actor", "prince", "waiter", "husband", "grandfather", "nephew"),
    ("queen", "mother", "sister", "aunt", "actress", "princess", "waitress", "wife", "grandmother", "niece"),
)
OPPOSITE = (
    "The opposite of {} is", "As we learned, the opposite of {} is", "Everyone knows that the opposite of {} is",
    "In our game the opposite of {} is",
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("good", "bad"), ("fast", "slow"),
    ("open", "closed"), ("young", "old"), ("rich", "poor"), ("light", "dark"), ("happy", "sad"), ("high", "low"),
    ("early", "late"), ("true", "false"), ("inside", "outside"), ("alive", "dead"), ("full", "empty"),
    ("strong", "weak"), ("hard", "soft"), ("first", "last"),
)  # fmt: skip
PLURAL = (
    "One {}, two",
    "I have one {} and you have two",
    "She saw one {}; he saw three",
    "Here is a {}, there are two",
)
COUNTED = (
    "apple", "dog", "cat", "car", "book", "tree", "house", "chair", "table", "bird", "horse", "cow", "letter", "window",
    "garden", "bottle", "flower", "river", "mountain", "road", "boat", "train", "plane", "ship", "king", "queen", "boy",
    "girl", "teacher", "doctor",
)  # fmt: skip
LANGUAGE = ("The people of {} speak", "In {}, most people speak", "The language of {} is", "Everyone in {} speaks")
LANGUAGES = (
    ("France", "French"), ("Italy", "Italian"), ("Spain", "Spanish"), ("Germany", "German"), ("Russia", "Russian"),
    ("Japan", "Japanese"), ("China", "Chinese"), ("Egypt", "Arabic"), ("Greece", "Greek"), ("Norway", "Norwegian"),
    ("Poland", "Polish"), ("Portugal", "Portuguese"), ("Turkey", "Turkish"), ("England", "English"),
    ("Iran", "Persian"), ("Sweden", "Swedish"), ("Thailand", "Thai"), ("Denmark", "Danish"), ("Israel", "Hebrew"),
)  # fmt: skip
SEQUENCE = ("{}, {}, {},", "They came in order: {}, {}, {},", "Count with me: {}, {}, {},", "Then I said: {}, {}, {},")
ORDERS = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
)

Word = TypeVar("Word")


def half(words: Sequence[Word], split: str) -> Sequence[Word]:
    """Those of the words that are seen, or those that are held out."""
    return words[SPLITS.index(split) :: 2]
