"""The regressions of design `read`: a certified non-negative garrote over what a child's parents contribute."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data import schema
from tl_circuitlasso.data.schema import FOLDS
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.progress import counted
from tl_circuitlasso.solve import Solution
from tl_circuitlasso.solve.distributed import packed, unpacked

SMALL = 128  # columns up to which regressions are solved side by side: one by one they'd cost overhead most of all
AT_ONCE = 64  # of them
FINEST = 1e-9  # relative duality gap that double precision reaches safely
RESAMPLES = 50  # bootstrap resamples behind an edge's stability
RULES = ("cv", "ebic", "mcp")  # strengths that choose themselves
# A weight is the share that an edge keeps of what it really contributes. Without the bound at 1 the strongest of
# several parents that work alike would stand for all of them, and which one that is changes with the prompts.
WHOLE = 1.0
BOX = solve.L1(non_negative=True, upper=WHOLE)


@dataclass(frozen=True, eq=False)
class Child:
    """One child's regression and costs; columns are the parents in the order of computation, ports q, k, v in turn.

    rows: what each parent contributes, a row a pair and direction; cost, effect: by fold and column; merged: cost by
    fold and parent; judged: by what parents are chosen, the same or a number's squared change.
    """

    node: int
    ports: tuple[int, ...]
    parents: Int[Tensor, " parent"]
    rows: Float[Tensor, "row column"]
    cost: Float[Tensor, "fold column"]
    effect: Float[Tensor, "fold column"] | None
    merged: Float[Tensor, "fold parent"]
    judged: Float[Tensor, "fold parent"]


@dataclass(frozen=True)
class Asked:
    """How sparse the regressions are to be: a fraction of each one's lambda_max, a rule's name, or "auto" and
    "stability", where one lambda holds for all: the same explained part of the target's difference from every edge.

    least: that lambda, in squared units of the target (or nats); pairs: how many the rows stand for; decides: whether
    edges are chosen by it, so that zeros have to be told from small numbers.
    """

    strength: float | str
    least: float
    pairs: float
    tol: float
    decides: bool

    @property
    def start(self) -> float:
        """Where every weight begins: without a penalty the child is the sum of its parents, each with weight 1."""
        return 0.0 if self.decides or not isinstance(self.strength, str) else 1.0

    def at_once(self, child: Child) -> bool:
        """Whether the regression is small, and needs no solver that tells zeros from small numbers."""
        return child.rows.shape[1] <= SMALL and not self.decides and self.strength not in RULES

    def tolerance(self, square: float) -> float:
        """The relative gap that a child of mean square contribution `square` needs."""
        return min(self.tol, max(FINEST, 0.2 * self.least / max(square, 1e-300))) if self.decides else self.tol


def children(statistics: Statistics, index: NodeIndex) -> list[Child]:
    """Every child's regression and costs, in the order of computation."""
    numbers: dict[str, int] = {}
    found, start = [], 0
    rows = statistics.rows[schema.CONTRIBUTIONS]
    for block, where in zip(index.blocks[1:], index.slices[1:]):
        site = block.site
        key = schema.group(site)
        number = numbers[key] = numbers.get(key, -1) + 1
        merged = statistics.sums[schema.cost(key)].cpu()[:, number]
        ports = (1, 2, 3) if site.kind == "head" else (0,)

        stop = start + merged.shape[1] * len(ports)
        names = [PORTS[port] for port in ports]
        cost = _columns(statistics, [schema.cost(key, name) for name in names], number)
        effects = [schema.effect(key, name) for name in names]
        effect = _columns(statistics, effects, number) if effects[0] in statistics.sums else None
        parents = torch.arange(merged.shape[1])
        judged = statistics.sums.get(schema.square(key), statistics.sums[schema.cost(key)]).cpu()[:, number]
        found.append(Child(where.start, ports, parents, rows[:, start:stop], cost, effect, merged, judged))
        start = stop
    return found


def _columns(statistics: Statistics, keys: list[str], number: int) -> Float[Tensor, "fold column"]:
    """One child's part of some sums of its group, side by side."""
    return torch.cat([statistics.sums[key].cpu()[:, number] for key in keys], dim=1)


def garrotes(found: Sequence[Child], asked: Asked, ranks: Ranks = ALONE, *, progress: bool = False) -> list[Solution]:
    """Every child's regression, in their order; `ranks` share them, small ones side by side."""
    groups = _together(found, asked)
    work = counted(groups, len, progress=progress, desc="solve", unit="regression", total=len(found))
    return [one for part in ranks.map(work, lambda some: _packed(_solved(some, asked)), _unpacked) for one in part]


def _together(found: Sequence[Child], asked: Asked) -> list[list[Child]]:
    """The children in groups that are solved at once: small ones where no zero has to be told from a small number."""
    groups: list[list[Child]] = []
    for child in found:
        if groups and len(groups[-1]) < AT_ONCE and asked.at_once(child) and asked.at_once(groups[-1][-1]):
            groups[-1].append(child)
        else:
            groups.append([child])
    return groups


def _packed(solutions: list[Solution]) -> dict[str, Tensor]:
    return {f"{number}.{name}": x for number, one in enumerate(solutions) for name, x in packed(one).items()}


def _unpacked(tensors: dict[str, Tensor]) -> list[Solution]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        number, _, rest = name.partition(".")
        found.setdefault(int(number), {})[rest] = x
    return [unpacked(found[number]) for number in sorted(found)]


def _solved(some: Sequence[Child], asked: Asked) -> list[Solution]:
    if asked.strength in RULES:
        return [_chosen(child, asked) for child in some]
    problems = [_problem(child, asked) for child in some]
    if all(asked.at_once(child) for child in some):
        data, least = [one.data for one in problems], torch.tensor([one.least for one in problems]).double()
        least = least.clamp_min(torch.finfo(torch.float64).tiny)  # a child that nothing pulls at
        tol = min(one.tol for one in problems)
        solutions = solve.lassos(data, strength=least, upper=WHOLE, tol=tol, init=asked.start)
    else:
        solutions = [_alone(one, asked) for one in problems]
    return [one.spread(solution) for one, solution in zip(problems, solutions)]


def _chosen(child: Child, asked: Asked) -> Solution:
    """At the strength that a rule finds for this child."""
    rows = child.rows.double()
    total = rows.sum(1)
    parts = torch.arange(len(rows)).tensor_split(FOLDS)
    folds = [_moments(rows[part], total[part], asked.pairs / FOLDS) for part in parts]
    everything = _moments(rows, total, asked.pairs)
    return solve.at_strength(everything, asked.strength, parts=folds, penalty=BOX, tol=asked.tol).solution


@dataclass(frozen=True, eq=False)
class _Problem:
    """A child's regression at a lambda (`least`), on the columns that can enter at it (`able`)."""

    able: Bool[Tensor, " column"]
    data: solve.Moments
    least: float
    tol: float

    def spread(self, solution: Solution) -> Solution:
        """The solution with zeros for the columns left out."""
        value = solution.value.new_zeros(len(self.able), 1)
        value[self.able] = solution.value
        return replace(solution, value=value)


def _problem(child: Child, asked: Asked) -> _Problem:
    """Columns that can't enter, |g_u| |y| <= N lambda, are left out."""
    rows = child.rows.double()
    total = rows.sum(1)
    square = float(total.square().sum()) / asked.pairs
    largest = float((rows.T @ total).amax().clamp_min(0)) / asked.pairs
    least = asked.least if isinstance(asked.strength, str) else float(asked.strength) * largest
    bound = rows.square().sum(0).div(asked.pairs).sqrt() * square**0.5
    able = bound > least if least < largest else torch.zeros_like(bound, dtype=torch.bool)
    if not bool(able.any()):
        able[:1] = True  # a regression on one column, which stays at 0, for the proof
    return _Problem(able, _moments(rows[:, able], total, asked.pairs), least, asked.tolerance(square))


def _alone(one: _Problem, asked: Asked) -> Solution:
    data = one.data
    return solve.lasso(
        data.gram,
        data.cross,
        target_sq_norm=data.target_sq_norm,
        strength=one.least,
        strength_is="absolute",
        penalty=BOX,
        tol=one.tol,
        init=torch.full_like(data.cross, asked.start),
        check=False,  # moments of one set of rows, made here
    )


def _moments(rows: Float[Tensor, "row column"], total: Float[Tensor, " row"], pairs: float) -> solve.Moments:
    gram, cross = rows.T @ rows / pairs, (rows.T @ total)[:, None] / pairs
    return solve.Moments(gram, cross, total.square().sum()[None] / pairs, pairs)


def aligned(found: list[Child]) -> Float[Tensor, " edge"]:
    """How far each edge works for its child: sum of g y over sum of |g y|, y the child's whole contribution; 1 where it
    does in every row, 0 where it works as much against it as for it, or more."""
    parts = []
    for child in found:
        rows = child.rows.double()
        products = rows * rows.sum(1, keepdim=True)
        size = products.abs().sum(0).clamp_min(torch.finfo(products.dtype).tiny)
        parts.append((products.sum(0) / size).clamp_min(0))
    return torch.cat(parts)


def steadiness(
    found: list[Child], relative: Float[Tensor, " edge"], generator: torch.Generator
) -> Float[Tensor, " edge"]:
    """The share of bootstrap resamples of the rows in which `relative`, a multiple of what an edge must reach, stays at
    1 or above, as it grows and falls with the edge's mean |contribution|."""
    count = len(found[0].rows)
    draws = torch.randint(count, (RESAMPLES, count), generator=generator)
    times = torch.zeros(RESAMPLES, count).scatter_add_(1, draws, torch.ones(draws.shape))
    parts, start = [], 0
    for child in found:
        sizes = child.rows.abs()
        grown = times @ sizes / sizes.sum(0).clamp_min(torch.finfo(sizes.dtype).tiny)
        own, start = relative[start : start + sizes.shape[1]], start + sizes.shape[1]
        parts.append((grown.double() * own >= 1).double().mean(0))
    return torch.cat(parts)
