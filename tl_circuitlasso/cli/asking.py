"""Which behaviour is asked about: answers from the command line's words, or from columns of the prompts' file."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tl_circuitlasso.cli.prompts import Given
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.naming import COLUMNS

TARGETS = ("logits", "logit-diff", "labels", "values")


@dataclass(frozen=True, eq=False)
class Question:
    """A target, the positions at which it is read, and both in words; `columns`: the answers, to save with prompts."""

    target: Any
    positions: Any
    words: str
    columns: dict[str, list[str]]


@dataclass(frozen=True)
class _Answers:
    """One answer for each prompt, and where they come from, in words."""

    values: list[str]
    source: str


def question(arguments: argparse.Namespace, given: Given) -> Question:
    """What `--target`, `--answers`, `--wrong` and `--positions` ask of the model and prompts.

    Prompts that end where an answer comes are read at their last position unless `--positions` says otherwise.

    Raises
    ------
    InputError: answers that are missing, not one token, or not one per prompt.
    """
    kind = arguments.target or ("logit-diff" if arguments.answers or arguments.wrong else "logits")
    own, target, asked = given.file is None, None, {}
    if kind == "logit-diff" and own and not arguments.answers:
        demo = given.demo
        right, wrong = demo.answers, demo.decode(demo.incorrect)
        target = demo.target
        asked = {"answer": _Answers(right, "the demo's own"), "wrong": _Answers(wrong, "the demo's own")}
    elif kind == "logit-diff":
        asked = {
            "answer": _answers(arguments, given, arguments.answers, COLUMNS["correct"], "--answers"),
            "wrong": _answers(arguments, given, arguments.wrong, COLUMNS["incorrect"], "--wrong"),
        }
        target = _logit_diff(given, asked)
    elif kind in ("labels", "values"):
        asked = {kind[:-1]: _answers(arguments, given, arguments.answers, (kind[:-1],), "--answers")}
        target = _numbers(kind, asked[kind[:-1]].values)
    elif arguments.answers or arguments.wrong:
        raise InputError("`--target` logits takes no answers: leave out --answers and --wrong, or ask for logit-diff")
    positions = arguments.positions or ("last" if target is not None or own else "all")
    columns = {name: answers.values for name, answers in asked.items()}
    return Question(target, positions, _words(kind, positions, [answers.source for answers in asked.values()]), columns)


def _words(kind: str, positions: str, sources: list[str]) -> str:
    what = {
        "logits": "the model's own logits",
        "logit-diff": "the logit of the answer ({}) minus that of the wrong one ({})",
        "labels": "the labels of the prompts ({})",
        "values": "the numbers of the prompts ({})",
    }
    where = {"all": "at all positions but BOS and padding", "last": "at the last position of each prompt"}
    return f"{what[kind].format(*sources)}, {where.get(positions, f'at position {positions}')}"


def _answers(
    arguments: argparse.Namespace, given: Given, asked: str | None, known: Sequence[str], option: str
) -> _Answers:
    """A column of the prompts' file, or one word for all prompts."""
    rows, names = (given.file.rows, given.file.columns) if given.file else ([], [])
    column = asked if asked in names else None if asked else next((name for name in known if name in names), None)
    if column is None:
        if asked:
            _no_slip(asked, names, option)
            return _Answers([asked] * len(given.prompts), f"{asked!r} for all prompts")
        raise InputError(f"`{option}` is missing: name a column of {arguments.prompts}, or one word for all prompts")
    values = ["" if row.get(column) is None else str(row[column]) for row in rows]
    if empty := [number for number, value in enumerate(values, 1) if not value]:
        raise InputError(f"`{option}` {column!r} is empty for prompt {empty[0]}: fill every row of it")
    return _Answers(values, f"column {column!r}")


def _logit_diff(given: Given, asked: dict[str, _Answers]) -> Any:
    from tl_circuitlasso.data.targets import LogitDiff

    options = {"answer": "--answers", "wrong": "--wrong"}
    return LogitDiff(*([_token(given, word, options[name]) for word in asked[name].values] for name in options))


def _token(given: Given, word: str, option: str) -> int:
    """The token of a word as it comes after a text: with a space in front, unless it only is one token without."""
    if given.demo is not None:
        if word.strip() not in given.demo.vocabulary:
            raise InputError(f"`{option}` has {word!r}, which the bundled model doesn't know{_no_column(given)}")
        return given.demo.vocabulary.index(word.strip())
    tokenizer = getattr(given.model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"`{option}` are words, and the model has no tokenizer to read them with")
    forms = dict.fromkeys([word if word[:1].isspace() else f" {word}", word])
    read = {form: tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms}
    unknown = getattr(tokenizer, "unk_token_id", None)
    if found := [ids[0] for ids in read.values() if len(ids) == 1 and ids[0] != unknown]:
        return found[0]
    pieces = tokenizer.convert_ids_to_tokens(next(iter(read.values())))
    if len(pieces) == 1:
        raise InputError(f"`{option}` has {word!r}, which the tokenizer doesn't know{_no_column(given)}")
    raise InputError(
        f"`{option}` has {word!r}, which is {len(pieces)} tokens ({' '.join(pieces)}): give one-token words"
        f"{_no_column(given)}"
    )


def _no_slip(word: str, columns: Sequence[str], option: str) -> None:
    """Refuse a word that is all but the name of a column: it would be an answer to every prompt."""
    if near := get_close_matches(word.lower(), [name.lower() for name in columns], 1, 0.8):
        raise InputError(f"`{option}` {word!r} isn't a column: did you mean {near[0]}? As a word, write {f' {word}'!r}")


def _no_column(given: Given) -> str:
    """What could have been named instead of a word."""
    return f", or a column ({', '.join(given.file.columns)})" if given.file and given.file.rows else ""


def _numbers(kind: str, values: list[str]) -> Any:
    from tl_circuitlasso.data.targets import Labels, Values

    if kind == "labels":
        classes = {name: number for number, name in enumerate(sorted(set(values)))}
        return Labels([classes[value] for value in values])
    try:
        return Values([float(value) for value in values])
    except ValueError as error:
        raise InputError(f"`--answers` isn't numbers ({error}), as --target values needs") from None
