"""Which behaviour is asked about: answers from the command line's words, or from columns of the prompts' file."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import InputError

TARGETS = ("logits", "logit-diff", "labels", "values")
RIGHT, WRONG = ("answer", "answers", "correct", "right"), ("wrong", "incorrect")  # columns that are known by name


@dataclass(frozen=True, eq=False)
class Question:
    """A target, the positions at which it is read, and both in words; `columns`: the answers, to save with prompts."""

    target: Any
    positions: Any
    words: str
    columns: dict[str, list[str]]


def question(arguments: argparse.Namespace, model: Any, prompts: Any, bundled: Any) -> Question:
    """What `--target`, `--answers`, `--wrong` and `--positions` ask; `bundled` is the demo where its prompts are used.

    Prompts that end where an answer comes are read at their last position unless `--positions` says otherwise.

    Raises
    ------
    InputError: answers that are missing, not one token, or not one per prompt.
    """
    kind = arguments.target or ("logit-diff" if arguments.answers or arguments.wrong else "logits")
    target, columns = None, {}
    if kind == "logit-diff" and bundled is not None and not arguments.answers:
        target, columns = bundled.target, {"answer": bundled.answers, "wrong": bundled.decode(bundled.incorrect)}
    elif kind == "logit-diff":
        columns = {
            "answer": _values(arguments, arguments.answers, RIGHT, len(prompts), "--answers"),
            "wrong": _values(arguments, arguments.wrong, WRONG, len(prompts), "--wrong"),
        }
        target = _logit_diff(model, columns)
    elif kind in ("labels", "values"):
        columns = {kind[:-1]: _values(arguments, arguments.answers, (kind[:-1],), len(prompts), "--answers")}
        target = _numbers(kind, columns[kind[:-1]])
    elif arguments.answers or arguments.wrong:
        raise InputError("`--target` logits takes no answers: leave out --answers and --wrong, or ask for logit-diff")
    positions = arguments.positions or ("last" if target is not None or bundled is not None else "all")
    return Question(target, positions, _words(kind, positions), columns)


def _words(kind: str, positions: str) -> str:
    what = {
        "logits": "the model's own logits",
        "logit-diff": "the logit of the answer minus that of the wrong one",
        "labels": "the labels of the prompts",
        "values": "the numbers of the prompts",
    }
    where = {"all": "at all positions but BOS and padding", "last": "at the last position of each prompt"}
    return f"{what[kind]}, {where.get(positions, f'at position {positions}')}"


def _values(
    arguments: argparse.Namespace, given: str | None, known: Sequence[str], count: int, option: str
) -> list[str]:
    """A column of the prompts' file, or one word for all prompts."""
    rows = _table(arguments.prompts)
    names = list(rows[0]) if rows else []
    column = given if given in names else next((name for name in known if name in names), None) if not given else None
    if column is None:
        if given:
            return [given] * count
        raise InputError(f"`{option}` is missing: name a column of {arguments.prompts}, or one word for all prompts")
    values = [str(row[column]) for row in rows if row.get(column)][: arguments.limit]
    if len(values) != count:
        raise InputError(f"`{option}` {column!r} has {len(values)} entries for {count} prompts: fill every row of it")
    return values


def _table(path: Path | None) -> list[dict[str, Any]]:
    from tl_circuitlasso.data import storage

    if path is None or path.suffix.lower() not in storage.TABLES:
        return []
    return storage.parse_table(path.read_text(encoding="utf-8-sig"), path)


def _logit_diff(model: Any, columns: dict[str, list[str]]) -> Any:
    from tl_circuitlasso.data.targets import LogitDiff

    return LogitDiff(*([_token(model, word) for word in columns[name]] for name in ("answer", "wrong")))


def _token(model: Any, word: str) -> int:
    """The token of a word as it comes after a text: with a space in front, unless it only is one token without."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("`--answers` are words, and the model has no tokenizer to read them with")
    forms = dict.fromkeys([word if word[:1].isspace() else f" {word}", word])
    read = {form: tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms}
    if found := [ids[0] for ids in read.values() if len(ids) == 1]:
        return found[0]
    pieces = tokenizer.convert_ids_to_tokens(next(iter(read.values())))
    raise InputError(
        f"`--answers` has {word!r}, which is {len(pieces)} tokens ({' '.join(pieces)}): give one-token words"
    )


def _numbers(kind: str, values: list[str]) -> Any:
    from tl_circuitlasso.data.targets import Labels, Values

    if kind == "labels":
        classes = {name: number for number, name in enumerate(sorted(set(values)))}
        return Labels([classes[value] for value in values])
    try:
        return Values([float(value) for value in values])
    except ValueError as error:
        raise InputError(f"`--answers` isn't numbers ({error}), as --target values needs") from None
