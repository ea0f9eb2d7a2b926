"""From user input to batches: every form of prompts, every choice of positions, every kind of bad input."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import architectures
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, Prompts, adapt
from tl_circuitlasso.models.positions import kept_positions


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
