"""What is regressed on what: every child's columns and its parents', in one Gram, and the solution by node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.data.schema import NODES, TARGET
from tl_circuitlasso.data.statistics import Statistics
from tl_circuitlasso.graph.nodes import NodeIndex

LEAST_VARIANCE = 1e-10  # of the largest column: below, a column counts as constant
ROUNDING = 1e-12  # of the largest squared mean: variance that float32 activations have when nothing varies


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


def regressions(statistics: Statistics, index: NodeIndex) -> list[Regression]:
    """Every child's regression, in the order of computation; of a child's functions the first is explained."""
    nodes = column_nodes(statistics, index)
    ranks, functions = index.ranks[nodes], int(statistics.meta.get("functions", 1))
    found = []
    for block, where in zip(index.blocks[:-1], index.slices[:-1]):
        own = ((nodes >= where.start) & (nodes < where.stop)).nonzero().flatten()[::functions]
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
    """The node of every feature column: its site's only node, or as many of each node as it has functions."""
    nodes, functions = [], int(statistics.meta.get("functions", 1))
    for (_, size), block, where in zip(statistics.meta["columns"], index.blocks, index.slices):
        own = torch.arange(where.start, where.stop).repeat_interleave(functions)
        nodes.append(torch.full((size,), where.start) if block.features is None else own)
    return torch.cat(nodes)


@dataclass(frozen=True, eq=False)
class Problem:
    """A regression with its data: what a solver is given.

    whole, mine: the regression, and the nodes among its children that are to be solved for.
    scaled: every node at unit variance; else activations stay as they are, but for nodes that don't vary, which are 0.
    by_entry: the parents' coordinates enter one by one (all functions of one together); else whole nodes do.
    """

    whole: Regression
    mine: Int[Tensor, " mine"]
    statistics: Statistics
    scaled: bool = True
    by_entry: bool = False

    @cached_property
    def regression(self) -> Regression:
        """That of the child nodes in `mine`."""
        chosen = torch.isin(self.whole.child_nodes, self.mine)
        return replace(self.whole, child=self.whole.child[chosen], child_nodes=self.whole.child_nodes[chosen])

    @cached_property
    def by_source(self) -> Float[Tensor, " source"]:
        """What the parents' columns are multiplied with."""
        return self._scale(self.whole.parents, self.whole.parent_nodes)

    @cached_property
    def by_target(self) -> Float[Tensor, " target"]:
        """What the child's columns are multiplied with."""
        every = self._scale(self.whole.child, self.whole.child_nodes)
        return every[torch.isin(self.whole.child_nodes, self.mine)]

    @cached_property
    def _moments(self) -> tuple[Float[Tensor, "column column"], Float[Tensor, "coord column"]]:
        whole = self.statistics.whole(self.whole.key)
        return whole.gram().cpu(), whole.mean()

    @cached_property
    def data(self) -> solve.Moments:
        """All samples."""
        return self._data(self._moments[0], self.statistics.whole(self.whole.key).count)

    def folds(self) -> list[solve.Moments]:
        """The parts that the statistics are kept in, about the mean of all."""
        parts = [self.statistics.part(self.regression.key, [fold]) for fold in range(self.statistics.folds)]
        return [self._data(part.gram(about=self._moments[1]).cpu(), part.count) for part in parts]

    def _data(self, gram: Float[Tensor, "column column"], count: int) -> solve.Moments:
        of, by_source, by_target = self.regression, self.by_source, self.by_target
        return solve.Moments(
            gram=by_source[:, None] * gram[of.parents][:, of.parents] * by_source,
            cross=by_source[:, None] * gram[of.parents][:, of.child] * by_target,
            target_sq_norm=gram.diagonal()[of.child] * by_target.square(),
            count=count,
        )

    @cached_property
    def rows(self) -> Int[Tensor, " source"]:
        """The parent that each column belongs to, by number."""
        return torch.unique(self.regression.parent_nodes, return_inverse=True)[1]

    @cached_property
    def columns(self) -> Int[Tensor, " target"]:
        """The child that each column belongs to, by number."""
        return torch.unique(self.regression.child_nodes, return_inverse=True)[1]

    @cached_property
    def penalty(self) -> solve.AbstractPenalty:
        """L1 where every coefficient is an edge of its own, else a norm for those that are in or out together."""
        rows, columns = self.rows, self.columns
        if self.by_entry:
            functions = int(self.statistics.meta.get("functions", 1))
            rows, columns = torch.arange(len(rows)) // functions, torch.arange(len(columns))
        single = rows.max() + 1 == rows.numel() and columns.max() + 1 == columns.numel()
        return solve.L1() if single else solve.Group(rows, columns)

    def _scale(self, own: Int[Tensor, " some"], nodes: Int[Tensor, " some"]) -> Float[Tensor, " some"]:
        """What gives every node unit variance over its columns; 0 for nodes that don't vary."""
        gram, mean = self._moments
        variance = gram.diagonal()[own].clamp(min=0)
        by_node = torch.zeros(int(nodes.max()) + 1, dtype=variance.dtype).index_add(0, nodes, variance)[nodes]
        floor = max(LEAST_VARIANCE * float(by_node.max()), ROUNDING * float(mean.square().max()))
        full = by_node.clamp(min=1e-300).rsqrt() if self.scaled else torch.ones_like(by_node)
        return torch.where(by_node > floor, full, 0.0)


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


def by_node(
    problem: Problem, solution: solve.Solution, stability: Float[Tensor, "source target"] | None = None
) -> Learned:
    """Sum squared coefficients and explained variance over each (parent node, child node) block."""
    regression, data, rows, columns = problem.regression, problem.data, problem.rows, problem.columns
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
