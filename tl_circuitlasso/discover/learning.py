"""From statistics to a graph: one certified regression per child, then relevance from the target.

This is the step that needs no model: a statistics file is all it takes, so a graph can be learned again with another
strength in the time of a solve.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.schema import TARGET
from tl_circuitlasso.data.sharing import Ranks, as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover.learning_read import learn_read
from tl_circuitlasso.discover.regressions import Learned, Problem, Regression, by_node, regressions
from tl_circuitlasso.discover.stopping import CENTRE, widest_gap
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.graph.relevance import narrowest, propagate

RESAMPLED = ("cv", "stability")  # strengths that need the statistics in folds
STABLE = 0.8  # share of half-samples that must have an edge
COLLINEAR = 10.0  # standardised coefficients beyond this come from parents that are all but copies of each other
GROUP_STRENGTH = 0.1  # of lambda_max, for components: a path of twenty strengths finds no better edges
GROUP_CENTRE = 0.2  # of the highest score, for components: many columns explain a little of anything
CLASS_STRENGTH = 0.05  # of lambda_max, for class labels where a rule is asked for
WHOLE_STRENGTH = 0.001  # of the one lambda_max of all regressions in design "paper"; the paper names none


def learn(
    statistics: Statistics,
    *,
    strength: float | str = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    process_group: Any = None,
) -> AttributionGraph:
    """The attribution graph of `statistics` at a `strength`, a fraction of each regression's lambda_max.

    Design `read` is learned as learning_read.py says, `paper` as `_in_one` does. In the others component sites are
    groups (one Frobenius norm per parent and child) and other nodes columns of their own (L1); in nonlinear ones all
    functions of a parent share a norm. score = share of the child's variance that the parent explains, times the
    child's relevance for the target. "auto" is 0.1 for groups, two passes of EBIC for single columns. Kept: weight != 0
    and a score above the widest gap near 1 % of the largest (20 % for components), but never so high that no path is
    left; then pruned to paths that reach the target. The processes of a `process_group` ("world", or a group of
    torch.distributed), which all hold the same statistics, deal the children out.

    Raises
    ------
    InputError: fewer than two samples, a strength that needs folds the statistics don't have, or one that the design
    doesn't have.
    """
    ranks = as_ranks(process_group)
    if statistics.meta["design"] == "read":
        return learn_read(statistics, strength=strength, tol=tol, seed=seed, ranks=ranks)
    count = statistics.whole(TARGET).count
    if count < 2:
        raise InputError(f"`tokens` give {count} sample(s): a regression needs at least two, and hundreds to be of use")
    index = NodeIndex.from_json(statistics.meta["index"])
    if statistics.meta["design"] == "paper":
        return _in_one(statistics, index, strength, tol, ranks)
    own: dict[int, Learned] = {}
    work = regressions(statistics, index)
    with ranks.together():
        for number, mine in _dealt(work, ranks):
            own[number] = _solve(Problem(work[number], mine, statistics), strength, tol, seed)
    found = _everyones(own, len(work), ranks)
    share = torch.cat([one.share for one in found])
    score = propagate(*_ends(found), share, ranks=index.ranks, roots=torch.tensor([len(index) - 1]))
    grouped = any(
        size > 1 for (_, size), block in zip(statistics.meta["columns"], index.blocks) if block.features is None
    )
    return assemble(index, found, score, GROUP_CENTRE if grouped else CENTRE)


def _in_one(
    statistics: Statistics, index: NodeIndex, strength: float | str, tol: float, ranks: Ranks
) -> AttributionGraph:
    """The paper's regression as it is written, with all children in one problem:

        min_A  1/2M ||X - X A||_F^2 + lambda sum |A_st|,   A_st = 0 unless s comes before t

    X: what every component writes, centred and otherwise as it is; nonlinear: a norm for the functions of one
    coordinate in place of |A_st|. `strength` is a fraction of the one lambda_max of all children, "auto" 0.001. An
    edge's score and weight are its block's Frobenius norm. Kept: scores above the widest gap near 20 % of the highest,
    but never so high that no path is left, then pruned to paths.
    """
    level = whole_strength(strength)
    work = regressions(statistics, index)
    whole = [Problem(one, one.child_nodes, statistics, scaled=False, by_entry=True) for one in work]
    largest = max(float(problem.penalty.strength_max(problem.data.cross).max()) for problem in whole)
    own: dict[int, Learned] = {}
    with ranks.together():
        for number, mine in _dealt(work, ranks):
            problem = replace(whole[number], mine=mine)
            if problem.regression.key == TARGET and statistics.rows:
                solution = _classify(problem, level, tol)
            else:
                solution = _lasso(problem, level * largest, tol, strength_is="absolute")
            own[number] = by_node(problem, solution)
    found = _everyones(own, len(work), ranks)
    return assemble(index, found, torch.cat([one.weight.abs() for one in found]), GROUP_CENTRE)


def whole_strength(strength: float | str) -> float:
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


def _dealt(work: Sequence[Regression], ranks: Ranks) -> Iterator[tuple[int, Int[Tensor, " mine"]]]:
    """The regressions by number with the child nodes that fall to this process; children are dealt out in turn."""
    before = 0
    for number, regression in enumerate(work):
        children = regression.child_nodes.unique()
        mine = children[(before + torch.arange(len(children))) % ranks.size == ranks.rank]
        before += len(children)
        if len(mine):
            yield number, mine


def _everyones(own: Mapping[int, "Learned"], count: int, ranks: Ranks) -> list["Learned"]:
    """All regressions' results, from the parts that the processes have solved."""
    if ranks.size == 1:
        return [own[number] for number in range(count)]
    named = {f"{number}/{name}": x for number, one in own.items() for name, x in vars(one).items() if x is not None}
    parts = ranks.gather(named)
    return [
        Learned.joined([under for part in parts if (under := _under(f"{number}/", part))]) for number in range(count)
    ]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _solve(problem: Problem, strength: float | str, tol: float, seed: int) -> Learned:
    """One regression, each child at a strength of its own."""
    if problem.regression.key == TARGET and problem.statistics.rows:
        return by_node(problem, _classify(problem, CLASS_STRENGTH if isinstance(strength, str) else strength, tol))
    return by_node(problem, *_choose(problem, strength, tol, seed))


def _lasso(problem: Problem, strength: float, tol: float, **options: Any) -> solve.Solution:
    data = problem.data
    return solve.lasso(
        data.gram,
        data.cross,
        target_sq_norm=data.target_sq_norm,
        strength=strength,
        penalty=problem.penalty,
        tol=tol,
        **options,
    )


def _choose(
    problem: Problem, strength: float | str, tol: float, seed: int
) -> tuple[solve.Solution, Float[Tensor, "source target"] | None]:
    """The solution at a strength, or at the one that a rule chooses; and how stable each coefficient is, if asked."""
    data, penalty, parts = problem.data, problem.penalty, []
    if strength in RESAMPLED:
        if problem.statistics.folds < 2:
            raise InputError(f"`strength` {strength!r} needs statistics in folds: collect them with that strength")
        parts = problem.folds()
    if strength == "stability":
        stability = solve.stability(parts, penalty=penalty, tol=tol, seed=seed)
        solution = solve.select(data, rule="fixed", penalty=penalty, tol=tol).solution
        return replace(solution, value=solution.value * (stability >= STABLE)), stability
    if strength == "auto" and isinstance(penalty, solve.Group):
        strength = GROUP_STRENGTH
    if isinstance(strength, str):
        rule = "ebic" if strength == "mcp" and isinstance(penalty, solve.Group) else strength  # "mcp" weighs entries
        choice = solve.select(data, rule=rule, folds=parts, penalty=penalty, tol=tol)
        return replace(choice.solution, value=_refitted(choice, penalty)), None
    return _lasso(problem, strength, tol), None


def _refitted(choice: solve.Choice, penalty: solve.AbstractPenalty) -> Float[Tensor, "source target"]:
    """Rules choose a support, at strengths that shrink what is on it: single nodes get their least-squares values."""
    if not isinstance(penalty, solve.L1):
        return choice.solution.value
    sound = choice.refit.abs().amax(0) <= COLLINEAR
    return torch.where(sound, choice.refit, choice.solution.value)


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
    bar = widest_gap(score, centre)
    stabilities = [one.stability for one in found if one.stability is not None]
    stable = {"stability": torch.cat(stabilities)} if len(stabilities) == len(found) else {}
    graph = AttributionGraph(
        index=index,
        source=source,
        target=target,
        port=torch.zeros_like(source),
        score=score * torch.where(weight < 0, -1.0, 1.0),
        weight=weight,
        kept=(weight != 0) & (score > (min(bar, way * (1 - 1e-9)) if way > 0 else bar)),
        extras=stable,
        certificates=tuple(row for one in found for row in one.certificates(index)),
    )
    return graph.prune()
