"""From user input to batches: every form of prompts, every choice of positions, every kind of bad input."""

from typing import Any

import numpy
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import architectures
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, Prompts, adapt
from tl_circuitlasso.models.positions import kept_positions
from tl_circuitlasso.models.tokens import cuts


@pytest.fixture(scope="module")
def plain() -> Adapter:
    """A model without a tokenizer."""
    return adapt(architectures.small())


@pytest.fixture(scope="module")
def worded() -> Adapter:
    """A model with a tokenizer: <s> = 1, </s> = pad = 2, w3 ... w30."""
    return adapt(architectures.small(architectures.tokenizer()))


def _kept(prompts: Prompts) -> list[list[int]]:
    return [row[keep].tolist() for batch in prompts for row, keep in zip(batch.tokens, batch.keep, strict=True)]


# -- forms of input ------------------------------------------------------------------------------------------------


def test_every_form_of_prompts_gives_the_same_batches(plain: Adapter) -> None:
    tokens, mask = architectures.padded()
    whole = Prompts(plain, tokens, attention_mask=mask, positions="last")
    forms = [
        Prompts(plain, {"input_ids": tokens, "attention_mask": mask.long()}, positions="last"),
        Prompts(plain, [(tokens[:1], mask[:1]), (tokens[1:], mask[1:])], positions="last"),
        Prompts(plain, iter([(tokens, mask)]), positions="last"),
        Prompts(plain, [{"input_ids": tokens, "attention_mask": mask}], positions="last", batch_size=1),
        Prompts(plain, tokens.to(torch.int16), attention_mask=mask.float(), positions="last", batch_size=2),
    ]
    kept = _kept(whole)
    for form in forms:
        assert _kept(form) == kept
        assert form.data_hash() == whole.data_hash()


def test_strings_become_tokens_with_bos_and_mask(worded: Adapter) -> None:
    (batch,) = Prompts(worded, ["w3 w4 w5", "w6"])
    assert batch.tokens.tolist() == [[1, 3, 4, 5], [1, 6, 2, 2]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens[batch.keep].tolist() == [3, 4, 5, 6]


def test_batches_know_where_they_start_and_drop_columns_of_pads(plain: Adapter) -> None:
    tokens, mask = architectures.prompts(batch=5), torch.ones(5, 9, dtype=torch.bool)
    mask[:, :2] = False
    mask[4, -3:] = False
    batches = list(Prompts(plain, tokens, attention_mask=mask, batch_size=2))
    assert [batch.start for batch in batches] == [0, 2, 4]
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 7), (2, 7), (1, 4)]
    assert sum(batch.n_samples for batch in batches) == 4 * 7 + 4


def test_prompts_can_be_read_again_but_iterators_only_once(plain: Adapter) -> None:
    tokens = architectures.prompts()
    prompts = Prompts(plain, tokens)
    assert _kept(prompts) == _kept(prompts)
    once = Prompts(plain, iter([tokens]))
    list(once)
    with pytest.raises(InputError, match="has been read already"):
        list(once)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    left=st.booleans(),
    extra=st.integers(0, 2),
    batch_size=st.integers(1, 3),
)
def test_the_hash_sees_real_tokens_only(
    plain: Adapter, lengths: list[int], left: bool, extra: int, batch_size: int
) -> None:
    width = max(lengths) + extra
    tokens, mask = torch.full((len(lengths), width), 2), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if left else slice(0, length)
        tokens[row, part] = torch.arange(length) + 3 + row
        mask[row, part] = True
    prompts = Prompts(plain, tokens, attention_mask=mask, positions="last", batch_size=batch_size)
    reference = Prompts(plain, [torch.arange(n)[None] + 3 + row for row, n in enumerate(lengths)], positions="last")
    assert _kept(prompts) == _kept(reference)
    assert prompts.data_hash() == reference.data_hash()


def test_the_hash_is_known_only_at_the_end(plain: Adapter) -> None:
    with pytest.raises(InputError, match="after all batches"):
        Prompts(plain, architectures.prompts()).data_hash()


# -- positions -----------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[2, 2, 1, 5, 6], [1, 7, 8, 2, 2], [1, 9, 1, 5, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [[5, 6], [7, 8], [9, 1, 5, 7]]),
        ("last", [[6], [8], [7]]),
        (0, [[1], [1], [1]]),
        (1, [[5], [7], [9]]),
        (-1, [[6], [8], [7]]),
        (-3, [[1], [1], [1]]),
        (slice(1, None), [[5, 6], [7, 8], [9, 1, 5, 7]]),
        (slice(-2, None), [[5, 6], [7, 8], [5, 7]]),
        (slice(3, 4), [[], [], [5]]),
        (slice(None, None, 2), [[1, 6], [1, 8], [1, 1, 7]]),
        (torch.tensor([True, False, False, True, False]), [[5], [1], [1, 5]]),
        (~MASK | (TOKENS == 5), [[5], [], [5]]),
    ],
)
def test_positions_count_real_tokens_under_any_padding(
    worded: Adapter, positions: Any, expected: list[list[int]]
) -> None:
    assert _kept(Prompts(worded, TOKENS, attention_mask=MASK, positions=positions)) == expected


def test_positions_follow_their_prompts_through_batches(plain: Adapter) -> None:
    chosen = TOKENS == 5
    assert _kept(Prompts(plain, TOKENS, attention_mask=MASK, positions=chosen, batch_size=1)) == [[5], [], [5]]


def test_without_a_tokenizer_bos_is_a_first_token_that_is_always_the_same_and_nowhere_else(plain: Adapter) -> None:
    tokens = architectures.prompts()
    assert all(len(row) == 8 for row in _kept(Prompts(plain, tokens)))
    assert all(len(row) == 9 for row in _kept(Prompts(plain, tokens.index_fill(1, torch.tensor([4]), 1))))
    assert [len(row) for row in _kept(Prompts(plain, tokens[:1]))] == [9]
    other = tokens.clone()
    other[0, 0] = 4
    assert all(len(row) == 9 for row in _kept(Prompts(plain, other)))


def test_a_tokenizer_decides_what_bos_is(worded: Adapter) -> None:
    tokens = architectures.prompts()
    tokens[:, 0] = 4
    assert all(len(row) == 9 for row in _kept(Prompts(worded, tokens)))


@given(seed=st.integers(0, 10_000), start=st.integers(-6, 6), stop=st.integers(-6, 6))
def test_slices_are_python_slices_of_the_real_tokens(seed: int, start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 30, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.7
    mask[:, 2] = True
    keep = kept_positions(tokens, mask, slice(start, stop), None)
    for row, real, kept in zip(tokens, mask, keep, strict=True):
        assert row[kept].tolist() == row[real].tolist()[start:stop]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ("w3 w4", {}, "`tokens` is one string; put it in a list"),
        ([], {}, "`tokens` is empty"),
        ([""], {}, "prompt 0 is empty"),
        (["w3", ""], {}, "prompt 1 is empty"),
        (["w3", 4], {}, "item 1 is a int"),
        (7, {}, "`tokens` is a int"),
        (torch.zeros(0, 5, dtype=torch.long), {}, "there are no prompts or they are empty"),
        (torch.zeros(5, 0, dtype=torch.long), {}, "there are no prompts or they are empty"),
        (torch.zeros(5, dtype=torch.long), {}, r"needs two, \(batch, pos\)"),
        (torch.zeros(2, 5), {}, "`tokens` are torch.float32"),
        (torch.ones(2, 5, dtype=torch.bool), {}, "`tokens` are torch.bool"),
        (torch.full((2, 5), 31), {}, "run from 31 to 31, outside the vocabulary of 31"),
        (torch.full((2, 5), -1), {}, "outside the vocabulary"),
        (torch.full((2, 33), 3), {}, "are 33 long, the model reads 32"),
        (TOKENS, {"attention_mask": MASK[:, 1:]}, r"`attention_mask` has shape \(3, 4\)"),
        (TOKENS, {"attention_mask": 2 * MASK.long()}, "must hold 1 at real tokens"),
        (TOKENS, {"attention_mask": MASK & (torch.arange(3)[:, None] != 1)}, "all positions of prompt 1 are masked"),
        ([TOKENS], {"attention_mask": MASK}, "in an iterable give pairs"),
        ((TOKENS, MASK), {}, "a mask goes to `attention_mask`"),
        (TOKENS, {"positions": "first"}, "`positions` is 'first'"),
        (TOKENS, {"positions": 1.5}, "`positions` is 1.5"),
        (TOKENS, {"positions": True}, "`positions` is True"),
        (TOKENS, {"positions": torch.tensor([1, 2])}, r"one index per prompt has shape \(2,\)"),
        (TOKENS, {"positions": torch.ones(4, dtype=torch.bool)}, r"has shape \(4,\); it must be \(3, 5\) or \(5,\)"),
        (iter([TOKENS]), {"positions": torch.ones(5, dtype=torch.bool)}, "needs all prompts at once"),
        (TOKENS, {"positions": 5}, "has 5 tokens only"),
        (TOKENS, {"positions": 3, "attention_mask": MASK}, "has 3 tokens only"),
        (TOKENS, {"positions": slice(7, 9)}, "leaves no sample in any prompt"),
        (TOKENS, {"positions": torch.zeros(5, dtype=torch.bool)}, "all positions masked"),
        (torch.ones(3, 1, dtype=torch.long), {}, "all positions masked"),
        (iter([]), {}, "`tokens` has no prompts"),
        (TOKENS, {"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_bad_input_names_the_argument_and_the_remedy(
    worded: Adapter, tokens: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(Prompts(worded, tokens, **options))


def test_strings_without_a_tokenizer_are_refused(plain: Adapter) -> None:
    with pytest.raises(InputError, match="no tokenizer; give token ids"):
        Prompts(plain, ["w3"])


# -- what people hold ----------------------------------------------------------------------------------------------

IDS = [[1, 3, 4, 5], [1, 6], [1, 7, 8]]
TEXTS = ["w3 w4 w5", "w6", "w7 w8"]


class Column:
    """As a column of a table: nothing but `to_numpy`."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def to_numpy(self) -> Any:
        return self.values


def _loader(data: Any, **options: Any) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=2, **options)


def _tokenised(**options: Any) -> Any:
    return architectures.tokenizer()(["<s> " + text for text in TEXTS], add_special_tokens=False, **options)


def _padded_loader() -> Any:
    batch = _tokenised(return_tensors="pt", padding=True)
    data = [
        {"input_ids": ids, "attention_mask": mask} for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    return _loader(data)


HELD = {
    "list of strings": lambda: TEXTS,
    "tuple of strings": lambda: tuple(TEXTS),
    "array of strings": lambda: numpy.array(TEXTS),
    "array of objects": lambda: numpy.array(TEXTS, dtype=object),
    "series of strings": lambda: pandas.Series(TEXTS, index=[4, 2, 9]),
    "any column": lambda: Column(numpy.array(TEXTS, dtype=object)),
    "generator of strings": lambda: (text for text in TEXTS),
    "loader of strings": lambda: _loader(TEXTS),
    "ragged ids": lambda: IDS,
    "tuple of tuples": lambda: tuple(map(tuple, IDS)),
    "series of ids": lambda: pandas.Series(IDS),
    "generator of ids": lambda: iter(IDS),
    "1-d tensors": lambda: [torch.tensor(row) for row in IDS],
    "(1, n) tensors": lambda: [torch.tensor(row)[None] for row in IDS],
    "1-d arrays": lambda: [numpy.array(row) for row in IDS],
    "generator of (1, n) tensors": lambda: (torch.tensor(row)[None] for row in IDS),
    "tokenizer output": lambda: _tokenised(),
    "padded tokenizer output": lambda: _tokenised(padding=True),
    "tokenizer output as tensors": lambda: _tokenised(padding=True, return_tensors="pt"),
    "tokenizer output as arrays": lambda: _tokenised(padding=True, return_tensors="np"),
    "rows of a data set": lambda: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in IDS],
    "loader of dicts": _padded_loader,
    "items of unequal width": lambda: [torch.tensor(IDS[:1]), {"input_ids": IDS[1:]}],
}


@pytest.mark.parametrize("form", HELD)
def test_what_people_hold_is_read(worded: Adapter, form: str) -> None:
    for gather in (False, True):
        prompts = Prompts(worded, HELD[form](), positions=slice(0, None), batch_size=2)
        assert _kept(prompts.gathered() if gather else prompts) == IDS


@pytest.mark.parametrize("wrap", ["tensors", "1-tuples", "dicts", "array", "int32 array", "reversed array", "lists"])
def test_rectangles_are_read(plain: Adapter, wrap: str) -> None:
    tokens = architectures.prompts(batch=5)
    held: Any = {
        "tensors": lambda: _loader(tokens),
        "1-tuples": lambda: _loader(torch.utils.data.TensorDataset(tokens)),
        "dicts": lambda: _loader([{"input_ids": row} for row in tokens]),
        "array": lambda: tokens.numpy(),
        "int32 array": lambda: tokens.numpy().astype("int32"),
        "reversed array": lambda: tokens.flip(0).numpy()[::-1],
        "lists": lambda: tokens.tolist(),
    }[wrap]()
    prompts = Prompts(plain, held, positions=slice(0, None))
    assert _kept(prompts) == tokens.tolist()
    assert prompts.data_hash() == _hash(Prompts(plain, tokens))


def _hash(prompts: Prompts) -> str:
    list(prompts)
    return prompts.data_hash()


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, list], ids=["tensor", "array", "list"])
def test_masks_of_any_kind(plain: Adapter, kind: Any) -> None:
    mask = kind(MASK.long().tolist())
    assert _kept(Prompts(plain, TOKENS, attention_mask=mask)) == _kept(Prompts(plain, TOKENS, attention_mask=MASK))
    chosen = kind((TOKENS == 5).tolist())
    expected = _kept(Prompts(plain, TOKENS, positions=TOKENS == 5))
    assert _kept(Prompts(plain, TOKENS, positions=chosen)) == expected


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, list, tuple], ids=["tensor", "array", "list", "tuple"])
def test_one_index_for_each_prompt(worded: Adapter, kind: Any) -> None:
    prompts = Prompts(worded, TOKENS, attention_mask=MASK, positions=kind([1, -1, 3]), batch_size=2)
    assert _kept(prompts) == [[5], [8], [5]]
    assert _kept(prompts.take(torch.tensor([2, 0]))) == [[5], [5]]
    with pytest.raises(InputError, match="`positions` is 3, but one of the prompts has 3 tokens only"):
        list(Prompts(worded, TOKENS, attention_mask=MASK, positions=kind([3, 0, 0])))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (range(1, 3), [[5, 6], [7, 8], [9, 1]]),
        (range(-2, 0), [[5, 6], [7, 8], [5, 7]]),
        (range(2, 5), [[6], [8], [1, 5, 7]]),
        (range(4, 0, -2), [[6], [8], [1, 7]]),
        (numpy.int64(1), [[5], [7], [9]]),
    ],
    ids=str,
)
def test_ranges_count_real_tokens(worded: Adapter, positions: Any, expected: list[list[int]]) -> None:
    assert _kept(Prompts(worded, TOKENS, attention_mask=MASK, positions=positions)) == expected


@given(count=st.integers(1, 40), size=st.integers(2, 9))
def test_no_prompt_is_left_alone_in_a_batch_of_pairs(count: int, size: int) -> None:
    parts = list(cuts(count, size, fewest=2))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert min(lengths) >= min(2, count) and max(lengths) <= max(size, 3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], "item 0 is a int; each item must be a prompt"),
        ([[3, 4], []], "prompt 1 is empty"),
        ([[3, 4], [99]], "outside the vocabulary"),
        ([[3] * 33], "the model reads 32"),
        ({"text": ["w3"]}, "has 'text', but no 'input_ids'"),
        ([{"text": "w3"}], "item 0 has 'text', but no 'input_ids'"),
        (pandas.DataFrame({"a": ["w3"], "b": ["w4"]}), "give the one column"),
        (numpy.ones((2, 3)), "`tokens` are torch.float64"),
        (["w3", [4]], "item 1 isn't of the kind of item 0"),
        ({"input_ids": TOKENS, "attention_mask": MASK[:, 1:]}, "`attention_mask` has shape"),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS, torch.arange(3))), "item 0 is a list"),
    ],
)
def test_what_is_no_prompt_is_named(worded: Adapter, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(Prompts(worded, tokens))
