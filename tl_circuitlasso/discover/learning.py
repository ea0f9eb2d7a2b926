"""From statistics to a graph: one certified regression per child, then relevance from the target.

This is the step that needs no model: a statistics file is all it takes, so a graph can be learned again with another
strength in the time of a solve.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.schema import NODES, TARGET
from tl_circuitlasso.data.sharing import Ranks, as_ranks
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.discover.learning_read import learn_read
from tl_circuitlasso.discover.stopping import CENTRE, widest_gap
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.graph.relevance import narrowest, propagate

LEAST_VARIANCE = 1e-10  # of the largest column: below, a column counts as constant
ROUNDING = 1e-12  # of the largest squared mean: variance that float32 activations have when nothing varies
RESAMPLED = ("cv", "stability")  # strengths that need the statistics in folds
STABLE = 0.8  # share of half-samples that must have an edge
COLLINEAR = 10.0  # standardised coefficients beyond this come from parents that are all but copies of each other
GROUP_STRENGTH = 0.1  # of lambda_max, for components: a path of twenty strengths finds no better edges
GROUP_CENTRE = 0.2  # of the highest score, for components: many columns explain a little of anything
CLASS_STRENGTH = 0.05  # of lambda_max, for class labels where a rule is asked for


@dataclass(frozen=True, eq=False)
class Regression:
    """One child with its possible parents: columns of a Gram, and which node each column belongs to.

    key: the moments that hold the Gram; parents, child: its columns; parent_nodes, child_nodes: their nodes.
    """

    key: str
    parents: Int[Tensor, " source"]
    child: Int[Tensor, " target"]
    parent_nodes: Int[Tensor, " source"]
    child_nodes: Int[Tensor, " target"]


def learn(
    statistics: Statistics,
    *,
    strength: float | str = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    process_group: Any = None,
) -> AttributionGraph:
    """The attribution graph of `statistics` at a `strength`, a fraction of each regression's lambda_max.

    Design `read` is learned as learning_read.py says. In the others component sites are groups (one Frobenius norm per
    parent and child) and other nodes columns of their own (L1). score = share of the child's variance that the parent
    explains, times the child's relevance for the target. "auto" is 0.1 for components, two passes of EBIC for other
    nodes. Kept: weight != 0 and a score above the widest gap near 1 % of the largest (20 % for components), but never
    so high that no path is left; then pruned to paths that reach the target. The processes of a `process_group`
    ("world", or a group of torch.distributed), which all hold the same statistics, deal the children out.

    Raises
    ------
    InputError: fewer than two samples, or a strength that needs folds the statistics don't have.
    """
    ranks = as_ranks(process_group)
    if statistics.meta["design"] == "read":
        return learn_read(statistics, strength=strength, tol=tol, seed=seed, ranks=ranks)
    count = statistics.whole(TARGET).count
    if count < 2:
        raise InputError(f"`tokens` give {count} sample(s): a regression needs at least two, and hundreds to be of use")
    index = NodeIndex.from_json(statistics.meta["index"])
    own: dict[int, Learned] = {}
    work = regressions(statistics, index)
    with ranks.together():
        for number, mine in _dealt(work, ranks):
            own[number] = _solve(work[number], mine, statistics, strength, tol, seed)
    grouped = any(
        size > 1 for (_, size), block in zip(statistics.meta["columns"], index.blocks) if block.features is None
    )
    return assemble(index, _everyones(own, len(work), ranks), GROUP_CENTRE if grouped else CENTRE)


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


def regressions(statistics: Statistics, index: NodeIndex) -> list[Regression]:
    """Every child's regression, in the order of computation."""
    nodes = column_nodes(statistics, index)
    ranks = index.ranks[nodes]
    found = []
    for block, where in zip(index.blocks[:-1], index.slices[:-1]):
        own = ((nodes >= where.start) & (nodes < where.stop)).nonzero().flatten()
        parents = (ranks < block.rank).nonzero().flatten()
        if not parents.numel():
            continue
        if statistics.has(str(block.site)):  # a Gram of the child's own: its parents as it sees them, then itself
            p = parents.numel()
            columns = torch.arange(p + own.numel())
            found.append(Regression(str(block.site), columns[:p], columns[p:], nodes[parents], nodes[own]))
        else:
            found.append(Regression(NODES, parents, own, nodes[parents], nodes[own]))
    p, extra = nodes.numel(), int(statistics.meta["target_columns"])
    columns, target = torch.arange(p + extra), torch.full((extra,), len(index) - 1)
    return [*found, Regression(TARGET, columns[:p], columns[p:], nodes, target)]


def column_nodes(statistics: Statistics, index: NodeIndex) -> Int[Tensor, " column"]:
    """The node of every feature column: its site's only node, or one node a column."""
    nodes = []
    for (_, size), block, where in zip(statistics.meta["columns"], index.blocks, index.slices):
        nodes += [where.start] * size if block.features is None else list(range(where.start, where.stop))
    return torch.tensor(nodes)


@dataclass(frozen=True, eq=False)
class Learned:
    """A solved regression: weights and explained shares of its children by node, and the proof of each child.

    source, target: positions in the index; weight: coefficient, or Frobenius norm of the block; share: the part of the
    child's variance that the parent's fitted contribution carries; stability: share of half-samples with the edge.
    child: the children's positions, with each one's gap, iterations and whether it converged.
    """

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    share: Float[Tensor, " edge"]
    stability: Float[Tensor, " edge"] | None
    child: Int[Tensor, " child"]
    gap: Float[Tensor, " child"]
    iterations: Int[Tensor, " child"]
    converged: Bool[Tensor, " child"]

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, Tensor]]) -> "Learned":
        """One regression from parts with different children, in the order in which one process solves it."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        edges = (whole["source"] * (int(whole["child"].max()) + 1) + whole["target"]).argsort()
        children = whole["child"].argsort()
        order = {name: children if name in ("child", "gap", "iterations", "converged") else edges for name in whole}
        return cls(**{"stability": None, **{name: x[order[name]] for name, x in whole.items()}})

    def certificates(self, index: NodeIndex) -> list[dict[str, Any]]:
        """The proof of each child as plain data."""
        proofs = zip(self.child.tolist(), self.gap.tolist(), self.iterations.tolist(), self.converged.tolist())
        return [
            {"target": index.names[child], "gap": gap, "iterations": iterations, "converged": converged}
            for child, gap, iterations, converged in proofs
        ]


def _solve(
    regression: Regression,
    mine: Int[Tensor, " mine"],
    statistics: Statistics,
    strength: float | str,
    tol: float,
    seed: int,
) -> Learned:
    """The regression of the child nodes in `mine`."""
    whole = statistics.whole(regression.key)
    gram, mean = whole.gram().cpu(), whole.mean()
    noise = ROUNDING * float(mean.square().max())
    by_source = _scale(gram, regression.parents, regression.parent_nodes, noise)
    by_target = _scale(gram, regression.child, regression.child_nodes, noise)
    chosen = torch.isin(regression.child_nodes, mine)
    by_target = by_target[chosen]
    regression = replace(regression, child=regression.child[chosen], child_nodes=regression.child_nodes[chosen])

    def data(folds: Sequence[int]) -> solve.Moments:
        part = statistics.part(regression.key, folds)
        own = gram if len(folds) == statistics.folds else part.gram(about=mean).cpu()
        return solve.Moments(
            gram=by_source[:, None] * own[regression.parents][:, regression.parents] * by_source,
            cross=by_source[:, None] * own[regression.parents][:, regression.child] * by_target,
            target_sq_norm=own.diagonal()[regression.child] * by_target.square(),
            count=part.count,
        )

    rows, columns = (torch.unique(n, return_inverse=True)[1] for n in (regression.parent_nodes, regression.child_nodes))
    single = rows.max() + 1 == rows.numel() and columns.max() + 1 == columns.numel()
    penalty = solve.L1() if single else solve.Group(rows, columns)
    everything = data(range(statistics.folds))
    if regression.key == TARGET and statistics.rows:
        solution, stability = _classify(statistics, by_source, strength, tol), None
    else:
        parts = [data([fold]) for fold in range(statistics.folds)] if strength in RESAMPLED else []
        solution, stability = _choose(everything, parts, penalty, strength, tol, seed)
    return _by_node(regression, everything, solution, stability, rows, columns)


def _choose(
    data: solve.Moments,
    parts: list[solve.Moments],
    penalty: solve.AbstractPenalty,
    strength: float | str,
    tol: float,
    seed: int,
) -> tuple[solve.Solution, Float[Tensor, "source target"] | None]:
    """The solution at a strength, or at the one that a rule chooses; and how stable each coefficient is, if asked."""
    if strength in RESAMPLED and len(parts) < 2:
        raise InputError(f"`strength` {strength!r} needs statistics in folds: collect them with that strength")
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
    verb = solve.lasso(
        data.gram, data.cross, target_sq_norm=data.target_sq_norm, strength=strength, penalty=penalty, tol=tol
    )
    return verb, None


def _refitted(choice: solve.Choice, penalty: solve.AbstractPenalty) -> Float[Tensor, "source target"]:
    """Rules choose a support, at strengths that shrink what is on it: single nodes get their least-squares values."""
    if not isinstance(penalty, solve.L1):
        return choice.solution.value
    sound = choice.refit.abs().amax(0) <= COLLINEAR
    return torch.where(sound, choice.refit, choice.solution.value)


def _classify(
    statistics: Statistics, by_source: Float[Tensor, " source"], strength: float | str, tol: float
) -> solve.Solution:
    """Class labels by multinomial cross-entropy over the samples that were kept whole."""
    samples = statistics.rows["samples"].cpu()
    features, labels = samples[:, :-1].double() * by_source, samples[:, -1].long()
    level = CLASS_STRENGTH if isinstance(strength, str) else strength
    return solve.multinomial_lasso(features - features.mean(0), labels, strength=level, tol=tol)


def _scale(
    gram: Float[Tensor, "column column"], own: Int[Tensor, " some"], nodes: Int[Tensor, " some"], noise: float
) -> Tensor:
    """What gives every node unit variance over its columns; 0 for nodes that don't vary."""
    variance = gram.diagonal()[own].clamp(min=0)
    by_node = torch.zeros(int(nodes.max()) + 1, dtype=variance.dtype).index_add(0, nodes, variance)[nodes]
    floor = max(LEAST_VARIANCE * float(by_node.max()), noise)
    return torch.where(by_node > floor, by_node.clamp(min=1e-300).rsqrt(), 0.0)


def _by_node(
    regression: Regression,
    data: solve.Moments,
    solution: solve.Solution,
    stability: Float[Tensor, "source target"] | None,
    rows: Int[Tensor, " source"],
    columns: Int[Tensor, " target"],
) -> Learned:
    """Sum squared coefficients and explained variance over each (parent node, child node) block."""
    value = solution.value
    if value.shape[1] != columns.numel():  # one column of coefficients per class of a single label
        columns = columns.new_zeros(value.shape[1])
    shape = (int(rows.max()) + 1, int(columns.max()) + 1)
    entries = (rows[:, None] * shape[1] + columns).flatten()
    squares = torch.zeros(shape[0] * shape[1], dtype=value.dtype).index_add(0, entries, value.square().flatten())
    parts = _explained(_unshrunk(value, data), data.gram, rows)
    explained = torch.zeros(shape, dtype=value.dtype).index_add(1, columns, parts)
    source, target = (torch.unique(n) for n in (regression.parent_nodes, regression.child_nodes))
    sign = value.sign().flatten() if shape == tuple(value.shape) else 1.0
    return Learned(
        source=source.repeat_interleave(shape[1]),
        target=target.repeat(shape[0]),
        weight=squares.sqrt() * sign,
        share=(explained / _variance(data, solution, columns, explained)).flatten(),
        stability=None
        if stability is None
        else squares.new_zeros(len(squares)).scatter_reduce(0, entries, stability.flatten(), "amax"),
        child=target,
        gap=torch.stack([solution.gap[columns == j].max() for j in range(shape[1])]).double(),
        iterations=torch.as_tensor(solution.stats["iterations"]).max().expand(shape[1]),
        converged=torch.stack([solution.converged[columns == j].all() for j in range(shape[1])]),
    )


def _unshrunk(value: Float[Tensor, "source target"], data: solve.Moments) -> Float[Tensor, "source target"]:
    """Each column times the factor that fits its target best: a penalty shrinks, and shares are to be free of it."""
    if value.shape != data.cross.shape:
        return value
    fitted, along = (value * (data.gram @ value)).sum(0), (value * data.cross).sum(0)
    return value * torch.where(fitted > 0, along / fitted.clamp(min=1e-300), 1.0)


def _variance(
    data: solve.Moments, solution: solve.Solution, columns: Int[Tensor, " target"], explained: Tensor
) -> Float[Tensor, " child"]:
    """What shares are shares of: the child's variance; for class labels, all that the parents explain together."""
    if data.target_sq_norm.numel() == columns.numel():
        total = torch.zeros(int(columns.max()) + 1, dtype=explained.dtype)
        return total.index_add(0, columns, data.target_sq_norm).clamp(min=1e-300)
    return explained.sum(0).clamp(min=1e-300)


def _explained(
    value: Float[Tensor, "source target"], gram: Float[Tensor, "source source"], rows: Int[Tensor, " source"]
) -> Float[Tensor, "group target"]:
    """The variance of each row group's contribution: diag(A_g' G_gg A_g)."""
    if int(rows.max()) + 1 == rows.numel():
        return value.square() * gram.diagonal()[:, None]
    parts = [(value[own], gram[own][:, own]) for own in (rows == group for group in range(int(rows.max()) + 1))]
    return torch.stack([(part * (own @ part)).sum(0) for part, own in parts])


def assemble(index: NodeIndex, found: Sequence[Learned], centre: float = CENTRE) -> AttributionGraph:
    """The graph of all regressions, scored by relevance for the target."""
    source, target, weight, share = (
        torch.cat([getattr(one, name) for one in found]) for name in ("source", "target", "weight", "share")
    )
    score = propagate(source, target, share, ranks=index.ranks, roots=torch.tensor([len(index) - 1]))
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
