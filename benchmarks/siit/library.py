"""The tasks at hand: names (indirect-object identification), brackets, recall, and a two-step sum."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.siit.tasks import Task, Values, Variable
from tl_circuitlasso.demo import ioi

BEGIN = "<bos>"


def names() -> Task:
    """Which of two names is not repeated: duplicate-token -> S-inhibition -> name-mover head.

    An MLP in between says which name stands where: the name mover reads names from it.
    """

    def repeated(tokens: Values) -> Values:
        return _at(ioi.SUBJECT, 1 + ioi.repeated_place(tokens), tokens)

    def inhibit(place: Values) -> Values:
        return _at(ioi.END, place[:, ioi.SUBJECT], place)

    def move(inhibited: Values, name: Values) -> Values:
        other = torch.where(inhibited[:, ioi.END] == 1, name[:, ioi.SECOND], name[:, ioi.FIRST])
        return _at(ioi.END, other, name)

    def twin(tokens: Values) -> Values:
        first = ioi.repeated_place(tokens) == 0
        return _at(ioi.SUBJECT, torch.where(first, ioi.FIRST, ioi.SECOND), tokens, -1)

    def subject(place: Values) -> Values:
        return _at(ioi.END, torch.full_like(place[:, 0], ioi.SUBJECT), place, -1)

    def kept(inhibited: Values, name: Values) -> Values:
        first = inhibited[:, ioi.END] == 1
        return _at(ioi.END, torch.where(first, ioi.SECOND, ioi.FIRST), name, -1)

    weight = torch.full((ioi.LENGTH,), 0.05)
    weight[0], weight[ioi.END] = 0.0, 1.0
    return Task(
        name="names",
        description="the name that is not repeated, at the last word; <none> before it",
        vocabulary=ioi.VOCABULARY,
        classes=ioi.VOCABULARY,
        weight=weight,
        variables=(
            Variable("duplicate token", "head", ("input",), repeated, {"input": "qk"}, twin),
            Variable("name", "mlp", ("input",), lambda tokens: tokens),
            Variable("S-inhibition", "head", ("duplicate token",), inhibit, {"duplicate token": "v"}, subject),
            Variable("name mover", "head", ("S-inhibition", "name"), move, {"S-inhibition": "q", "name": "v"}, kept),
            Variable("output", "logits", ("name mover",), lambda moved: moved),
        ),
        sample=ioi.draw,
        counterpart=ioi.counterpart,
    )


def brackets(length: int = 13) -> Task:
    """Balanced so far, still open, or broken: counts, dips below zero, and both together."""

    def sample(count: int, generator: torch.Generator) -> Values:
        lean = 0.35 + 0.4 * torch.rand(count, 1, generator=generator)
        closing = torch.rand(count, length - 1, generator=generator) > lean
        return _begin(1 + closing.long())

    def level(tokens: Values) -> Values:
        return ((tokens == 1).long() - (tokens == 2).long()).cumsum(dim=1)

    def ever(below: Values) -> Values:
        return below.cummax(dim=1).values

    def verdict(height: Values, broken: Values) -> Values:
        return torch.where(broken == 1, 2, (height > 0).long())

    return Task(
        name="brackets",
        description="after every bracket: balanced, open (more to close) or broken",
        vocabulary=(BEGIN, "(", ")"),
        classes=("balanced", "open", "broken"),
        weight=_after_begin(length),
        variables=(
            Variable("level", "head", ("input",), level),
            Variable("below", "mlp", ("level",), lambda height: (height < 0).long()),
            Variable("ever", "head", ("below",), ever),
            Variable("verdict", "mlp", ("level", "ever"), verdict),
            Variable("output", "logits", ("verdict",), lambda value: value),
        ),
        sample=sample,
        counterpart=_fresh(sample),
    )


def recall(length: int = 14, letters: int = 6) -> Task:
    """What followed this letter the last time: previous-token head, then induction head."""

    def sample(count: int, generator: torch.Generator) -> Values:
        return _begin(1 + torch.randint(letters, (count, length - 1), generator=generator))

    def previous(tokens: Values) -> Values:
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)

    def last_copy(before: Values, tokens: Values) -> Values:
        place = torch.arange(tokens.shape[1])
        seen = (before[:, None, :] == tokens[:, :, None]) & (place[None, :] <= place[:, None])
        return torch.where(seen & (before[:, None, :] > 0), place, 0).max(dim=2).values

    def follow(before: Values, tokens: Values) -> Values:
        return tokens.gather(1, last_copy(before, tokens))

    return Task(
        name="recall",
        description="the letter that followed the last earlier copy of this one; <bos> if none",
        vocabulary=(BEGIN, *"abcdefghijklmnop"[:letters]),
        classes=(BEGIN, *"abcdefghijklmnop"[:letters]),
        weight=_after_begin(length),
        variables=(
            Variable("previous", "head", ("input",), previous, looks=_one_back),
            Variable("follow", "head", ("previous", "input"), follow, looks=last_copy),
            Variable("output", "logits", ("follow",), lambda value: value),
        ),
        sample=sample,
        counterpart=_fresh(sample),
    )


def sums(length: int = 8, base: int = 4) -> Task:
    """Add the first digit to the previous one, then to the same sum one position earlier."""

    def sample(count: int, generator: torch.Generator) -> Values:
        return _begin(1 + torch.randint(base, (count, length - 1), generator=generator))

    def digit(tokens: Values) -> Values:
        return (tokens - 1).clamp(min=0)

    def previous(values: Values) -> Values:
        return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)

    def first(tokens: Values) -> Values:
        value = digit(tokens)[:, 1:2].expand_as(tokens).clone()
        value[:, 0] = 0
        return value

    def before(tokens: Values) -> Values:
        return previous(digit(tokens))

    def to_first(tokens: Values) -> Values:
        return (_places(tokens) > 0).long()

    def total(left: Values, right: Values) -> Values:
        return (left + right) % base

    return Task(
        name="sums",
        description=f"s[p] + s[p - 1] mod {base}, where s[p] = first digit + digit before p",
        vocabulary=(BEGIN, *map(str, range(base))),
        classes=tuple(map(str, range(base))),
        weight=_after_begin(length),
        variables=(
            Variable("first", "head", ("input",), first, looks=to_first),
            Variable("before", "head", ("input",), before, looks=_one_back),
            Variable("sum", "mlp", ("first", "before"), total),
            Variable("shifted", "head", ("sum",), previous, looks=_one_back),
            Variable("total", "mlp", ("sum", "shifted"), total),
            Variable("output", "logits", ("total",), lambda value: value),
        ),
        sample=sample,
        counterpart=_fresh(sample),
    )


TASKS: dict[str, Callable[[], Task]] = {
    "names": names,
    "brackets": brackets,
    "recall": recall,
    "sums": sums,
}


def _at(position: int, value: Int[Tensor, " batch"], like: Values, elsewhere: int = 0) -> Values:
    """`elsewhere` everywhere but `value` at one position."""
    result = torch.full_like(like, elsewhere)
    result[:, position] = value
    return result


def _places(values: Values) -> Values:
    return torch.arange(values.shape[1]).expand_as(values)


def _one_back(values: Values) -> Values:
    return (_places(values) - 1).clamp(min=0)


def _begin(tokens: Int[Tensor, "batch rest"]) -> Values:
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)


def _after_begin(length: int) -> Tensor:
    weight = torch.ones(length)
    weight[0] = 0.0
    return weight


def _fresh(sample: Callable[[int, torch.Generator], Values]) -> Callable[..., Values]:
    """A counterpart that is just another prompt."""
    return lambda tokens, generator: sample(len(tokens), generator)
