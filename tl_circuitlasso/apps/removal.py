"""Which features to zero so that a label can't be told any more: four ways to rank them, and how many to take.

A Lasso keeps one of several features that tell the same, and what it leaves out tells the label to the next probe. So
the circuit's ranking goes in rounds: a sparse logistic regression, its support, strongest first; then the same among
the features that are left, for `ROUNDS` rounds.

How many to take is told without the classes of texts on which class and concept are independent. A probe trained where
they agree says 1 on a share A_1 of held-out texts of class 1 (and concept 1), A_0 of those of class 0, and on shares
r_1, r_0 of the texts that tell the concept, with and without it. Where half of the latter are of either class,

    P(1 | class 0, concept 1) = 2 r_1 - A_1,   P(1 | class 1, concept 0) = 2 r_0 - A_0,   and so its accuracy there is
    1/2 + 1/2 [(A_1 - A_0) - (r_1 - r_0)]:    what it knows of the class, less what it takes from the concept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.apps.pooling import Pooled
from tl_circuitlasso.apps.probes import Probe, train_probe

WAYS = ("circuit", "gradient", "probe", "random")
ROUNDS = 12
HELD = 3  # one text in so many is held out while the number of features is chosen


@dataclass(frozen=True, eq=False)
class Told:
    """What texts tell of a label: their codes, the label, and a probe of it."""

    codes: Float[Tensor, "text feature"]
    label: Int[Tensor, " text"]
    reads: Float[Tensor, " feature"]  # what the probe reads of a unit of each feature

    def ranked(self, way: str, strength: float, seed: int) -> Int[Tensor, " feature"]:
        """The features, those that tell most of the label first."""
        match way:
            case "circuit":
                return circuit_order(self.codes, self.label, strength)
            case "gradient":
                size = (self._difference() * self.reads).abs()
            case "probe":
                size = self.reads.abs()
            case _:
                fires = (self.codes > 0).any(0)
                size = torch.rand(len(fires), generator=torch.Generator().manual_seed(seed)) + fires
        return size.argsort(descending=True, stable=True)

    def _difference(self) -> Float[Tensor, " feature"]:
        one, other = (self.codes[self.label == label].mean(0) for label in (1, 0))
        return one - other


def circuit_order(
    codes: Float[Tensor, "text feature"], y: Int[Tensor, " text"], strength: float, rounds: int = ROUNDS
) -> Int[Tensor, " feature"]:
    """Features by round, then by |A_iy| in standard deviations of the codes; those left over by their pull on y."""
    spread = codes.std(0)
    ready = torch.where(spread > 0, (codes - codes.mean(0)) / spread.clamp(min=1e-300), 0.0)
    rest, order = (spread > 0).nonzero().flatten(), []
    for _ in range(rounds):
        if not len(rest):
            break
        size = solve.logistic_lasso(ready[:, rest], y, strength=strength).value[:, 0].abs()
        order.append(rest[size.argsort(descending=True, stable=True)][: int((size > 0).sum())])
        rest = rest[size == 0]
    taken = torch.zeros(len(spread), dtype=torch.bool)
    taken[torch.cat([*order, rest[:0]])] = True
    pull = torch.where(taken, -1.0, (ready.T @ (y - y.double().mean()).to(ready)).abs())
    return torch.cat([*order, pull.argsort(descending=True, stable=True)[: int((~taken).sum())]])


def expected_accuracy(
    says: tuple[Int[Tensor, " held"], Int[Tensor, " told"]], y: Int[Tensor, " held"], concept: Int[Tensor, " told"]
) -> float:
    """The accuracy above, of a probe's answers on held-out texts of class y, and on those that tell the concept.

    >>> answers = torch.tensor([1, 1, 0, 0])
    >>> expected_accuracy((answers, torch.tensor([1, 0, 1, 0])), answers, answers)      # blind to the concept
    1.0
    >>> expected_accuracy((answers, answers), answers, answers)                         # tells nothing else
    0.5
    """
    (held, told), of = says, lambda some, label, value: float(some[label == value].double().mean())
    return 0.5 + 0.5 * ((of(held, y, 1) - of(held, y, 0)) - (of(told, concept, 1) - of(told, concept, 0)))


def chosen_number(
    pooled: Pooled, order: Int[Tensor, " feature"], sizes: list[int], agreeing: Int[Tensor, " train"],
    classes: Int[Tensor, " text"], told: Int[Tensor, " told"], concept: Int[Tensor, " text"],
) -> int:  # fmt: skip
    """The number of features whose zeroing makes the expected accuracy of a probe trained again highest."""
    held = torch.arange(len(agreeing)) % HELD == 0
    train, test = agreeing[~held], agreeing[held]
    expected = []
    for size in sizes:
        x = pooled.without(order[:size])
        probe: Probe = train_probe(x[train], classes[train])
        says = (probe.says(x[test]).long(), probe.says(x[told]).long())
        expected.append(expected_accuracy(says, classes[test], concept[told]))
    return sizes[max(range(len(sizes)), key=expected.__getitem__)]
