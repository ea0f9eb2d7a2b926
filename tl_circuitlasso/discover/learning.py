"""From statistics to a graph: one certified regression per child, then relevance from the target.

This is the step that needs no model: a statistics file is all it takes, so a graph can be learned again with another
strength in the time of a solve.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.schema import TARGET
from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover.regressions import Learned, Problem, Regression, by_node, regressions
from tl_circuitlasso.discover.stopping import CENTRE, lowered, widest_gaps
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.graph.relevance import narrowest, propagate
from tl_circuitlasso.progress import bar as counting

GROUP_STRENGTH = 0.1  # of lambda_max, for components: a path of twenty strengths finds no better edges
GROUP_CENTRE = 0.2  # of the highest score, for components: many columns explain a little of anything
WHOLE_STRENGTH = 0.001  # of the one lambda_max of all regressions in design "paper"; the paper names none


def learn_children(
    statistics: Statistics, *, strength: float | str, tol: float, seed: int, progress: bool, ranks: Ranks
) -> AttributionGraph:
    """Every child by a regression of its own, at a `strength` that is a fraction of its lambda_max.

    Component sites are groups (one Frobenius norm per parent and child), other nodes columns of their own (L1); in
    nonlinear designs all functions of a parent share a norm. score = share of the child's variance that the parent
    explains, times the child's relevance for the target. "auto" is 0.1 for groups, two passes of EBIC for single
    columns. Kept: weight != 0 and a score above the widest gap near 1 % of the largest (20 % for components), but never
    so high that no path is left; then pruned to paths that reach the target.

    Raises
    ------
    InputError: fewer than two samples, or a strength that needs folds the statistics don't have.
    """
    index = _index(statistics)
    work = regressions(statistics, index)

    def solved(regression: Regression, mine: Tensor) -> Learned:
        return _solve(Problem(regression, mine, statistics), strength, tol, seed)

    found = _everyones(work, solved, progress, ranks)
    share = torch.cat([one.share for one in found])
    score = propagate(*_ends(found), share, ranks=index.ranks, roots=torch.tensor([len(index) - 1]))
    grouped = any(
        size > 1 for (_, size), block in zip(statistics.meta["columns"], index.blocks) if block.features is None
    )
    return assemble(index, found, score, GROUP_CENTRE if grouped else CENTRE)


def learn_in_one(
    statistics: Statistics, *, strength: float | str, tol: float, seed: int, progress: bool, ranks: Ranks
) -> AttributionGraph:
    """The paper's regression as it is written, with all children in one problem:

        min_A  1/2M ||X - X A||_F^2 + lambda sum |A_st|,   A_st = 0 unless s comes before t

    X: what every component writes, centred and otherwise as it is; nonlinear: a norm for the functions of one
    coordinate in place of |A_st|. `strength` is a fraction of the one lambda_max of all children, "auto" 0.001. An
    edge's score and weight are its block's Frobenius norm. Kept: scores above the widest gap near 20 % of the highest,
    but never so high that no path is left, then pruned to paths. Nothing is drawn at random.

    Raises
    ------
    InputError: fewer than two samples, or a rule that chooses a strength for each child.
    """
    index = _index(statistics)
    level = whole_strength(strength)
    work = regressions(statistics, index)
    put = partial(Problem, statistics=statistics, scaled=False, by_entry=True)
    numbers = [one for one in work if not _of_classes(one, statistics)]
    largest = max((_limit(put(one, one.child_nodes)) for one in numbers), default=0.0)

    def solved(regression: Regression, mine: Tensor) -> Learned:
        problem = put(regression, mine)
        if _of_classes(regression, statistics):
            return by_node(problem, _classify(problem, level, tol))
        options = {"penalty": problem.penalty, "tol": tol, "strength_is": "absolute"}
        return by_node(problem, solve.at_strength(problem.data, level * largest, **options).solution)

    found = _everyones(work, solved, progress, ranks)
    return assemble(index, found, torch.cat([one.weight.abs() for one in found]), GROUP_CENTRE)


def _of_classes(regression: Regression, statistics: Statistics) -> bool:
    """Whether the child is a class label, of which whole samples are kept."""
    return regression.key == TARGET and bool(statistics.rows)


def _limit(problem: Problem) -> float:
    """lambda_max: above it, all coefficients of the regression are 0."""
    return float(problem.penalty.strength_max(problem.data.cross).max())


def _index(statistics: Statistics) -> NodeIndex:
    """The nodes, of statistics that have enough samples."""
    count = statistics.whole(TARGET).count
    if count < 2:
        raise InputError(f"`tokens` give {count} sample(s): a regression needs at least two, and hundreds to be of use")
    return NodeIndex.from_json(statistics.meta["index"])


def whole_strength(strength: int | float | str) -> float:
    """The fraction of lambda_max that all children share.

    Raises
    ------
    InputError: a rule that chooses a strength for each of them.
    """
    if isinstance(strength, str) and strength != "auto":
        raise InputError(
            f"`strength` {strength!r} chooses one for each child, and in design 'paper' all share one: give a fraction "
            "of lambda_max, or use design='activation'"
        )
    return WHOLE_STRENGTH if isinstance(strength, str) else strength


def _everyones(
    work: Sequence[Regression], solved: Callable[[Regression, Tensor], Learned], progress: bool, ranks: Ranks
) -> list[Learned]:
    """All regressions, each solved in as many parts as there are processes: child nodes are dealt out in turn."""
    parts: list[tuple[Regression, Tensor]] = []
    before = 0
    for regression in work:
        children = regression.child_nodes.unique()
        turns = (before + torch.arange(len(children))) % ranks.size
        parts += [(regression, children[turns == turn]) for turn in range(ranks.size)]
        before += len(children)

    def tensors(part: tuple[Regression, Tensor]) -> dict[str, Tensor]:
        return {name: x for name, x in vars(solved(*part)).items() if x is not None} if len(part[1]) else {}

    made = ranks.map(counting(parts, progress=progress, desc="solve", unit="regression"), tensors, dict)
    shares = [made[first : first + ranks.size] for first in range(0, len(made), ranks.size)]
    return [Learned.joined([part for part in share if part]) for share in shares]


def _solve(problem: Problem, strength: float | str, tol: float, seed: int) -> Learned:
    """One regression, each child at a strength of its own."""
    data, penalty = problem.data, problem.penalty
    if _of_classes(problem.whole, problem.statistics):
        level = solve.CLASS_STRENGTH if isinstance(strength, str) else strength
        return by_node(problem, _classify(problem, level, tol))
    grouped = isinstance(penalty, solve.Group)
    rule = "ebic" if strength == "mcp" and grouped else strength  # "mcp" weighs entries
    parts = problem.folds() if strength in solve.RESAMPLED and problem.statistics.folds > 1 else []
    options: dict[str, Any] = {
        "auto": GROUP_STRENGTH if grouped else "auto",
        "penalty": penalty,
        "tol": tol,
        "seed": seed,
    }
    found = solve.at_strength(data, rule, parts=parts, **options)
    value = found.solution.value if grouped else found.unshrunk()
    return by_node(problem, replace(found.solution, value=value), found.stability)


def _classify(problem: Problem, strength: float, tol: float) -> solve.Solution:
    """Class labels by multinomial cross-entropy over the samples that were kept whole."""
    samples = problem.statistics.rows["samples"].cpu()
    features, labels = samples[:, :-1].double() * problem.by_source, samples[:, -1].long()
    return solve.multinomial_lasso(features - features.mean(0), labels, strength=strength, tol=tol)


def _ends(found: Sequence[Learned]) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    return torch.cat([one.source for one in found]), torch.cat([one.target for one in found])


def assemble(
    index: NodeIndex, found: Sequence[Learned], score: Float[Tensor, " edge"], centre: float
) -> AttributionGraph:
    """The graph of all regressions, with |score| as given and the signs of the weights."""
    (source, target), weight = _ends(found), torch.cat([one.weight for one in found])
    way = narrowest(source, target, score, ranks=index.ranks, start=0, end=len(index) - 1)
    bar = widest_gaps(score, centre)
    bar = lowered(bar, way) if way > 0 else bar
    stabilities = [one.stability for one in found if one.stability is not None]
    stable = {"stability": torch.cat(stabilities)} if len(stabilities) == len(found) else {}
    graph = AttributionGraph(
        index=index,
        source=source,
        target=target,
        port=torch.zeros_like(source),
        score=score * torch.where(weight < 0, -1.0, 1.0),
        weight=weight,
        kept=(weight != 0) & (score > bar),
        extras=stable,
        certificates=tuple(row for one in found for row in one.certificates(index)),
    )
    return graph.prune()
