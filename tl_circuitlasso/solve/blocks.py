"""A whole adjacency matrix from one Gram of all nodes: each rank of blocks against its ancestors.

    min_A  1/2 tr (I - A)' G (I - A) + lambda * penalty(A),   A_st = 0 unless rank(s) < rank(t)

The order makes the problem separable, so blocks of one rank are solved together on the Gram of their ancestors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.progress import bar
from tl_circuitlasso.solve.base import AbstractPenalty, Solution, Status
from tl_circuitlasso.solve.checkpoint import fingerprint
from tl_circuitlasso.solve.groups import Group
from tl_circuitlasso.solve.lasso import lasso
from tl_circuitlasso.solve.penalties import L1
from tl_circuitlasso.solve.problem import check_finite


@dataclass(frozen=True)
class Layout:
    """Blocks of nodes: `sizes` in node order and the `ranks` of the blocks in the order of computation."""

    sizes: Sequence[int]
    ranks: Sequence[int]

    def members(self) -> Tensor:
        """The block number of every node."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(list(self.sizes), dtype=torch.long))

    def node_ranks(self) -> Tensor:
        """The rank of every node."""
        return torch.tensor(list(self.ranks), dtype=torch.long)[self.members()]


def block_lasso(
    gram: Float[Tensor, "node node"],
    layout: Layout,
    *,
    strength: int | float,
    grouped: bool = False,
    penalty: AbstractPenalty | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Solution:
    """The adjacency (source, target) of nodes in blocks: every node regressed on all nodes of lower rank.

    `grouped` penalises one Frobenius norm per pair of blocks; else `penalty` (default L1) is elementwise over the whole
    (node, node) matrix. With a `checkpoint` file a finished rank is never solved again: an interrupted call resumes.
    Raises InputError where the layout doesn't fit the Gram, StaleCheckpoint for a checkpoint of other data.

    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> block_lasso(gram, Layout([1, 1], [0, 1]), strength=0.5).value.tolist()
    [[0.0, 0.25], [0.0, 0.0]]
    """
    if sum(layout.sizes) != len(gram) or len(layout.sizes) != len(layout.ranks):
        raise InputError(
            f"`layout` describes {sum(layout.sizes)} nodes in {len(layout.sizes)} blocks with"
            f" {len(layout.ranks)} ranks;"
            f" `gram` has {len(gram)} nodes"
        )
    nodes, blocks = layout.node_ranks(), layout.members()
    labels = options.pop("names", None) or [f"block {block}" for block in blocks.tolist()]
    check_finite("gram", gram, labels)
    state = _State.open(checkpoint, (gram, layout, strength, grouped, penalty, options), len(gram))
    for rank in bar(sorted(set(nodes.tolist())), progress=progress, desc="solve", unit="block"):
        if rank in state.done:
            continue
        sources, targets = (nodes < rank).nonzero()[:, 0], (nodes == rank).nonzero()[:, 0]
        if len(sources):
            shape = _penalty(penalty, grouped, blocks, sources, targets)
            part = lasso(
                gram[sources][:, sources],
                gram[sources][:, targets],
                target_sq_norm=gram.diagonal()[targets],
                strength=strength,
                penalty=shape,
                names=[labels[source] for source in sources.tolist()],
                **options,
            )
            state.put(part, sources, targets)
        state.finish(rank)
    return state.solution()


def _penalty(
    penalty: AbstractPenalty | None, grouped: bool, blocks: Tensor, sources: Tensor, targets: Tensor
) -> AbstractPenalty:
    if grouped:
        rows = torch.unique(blocks[sources], return_inverse=True)[1]
        return Group(rows, torch.unique(blocks[targets], return_inverse=True)[1])
    return L1() if penalty is None else penalty.restrict(sources, targets)


@dataclass(eq=False)
class _State:
    """What has been solved so far; the one mutable object here, because it is the checkpoint."""

    kept: Checkpoint | None
    name: str
    value: Tensor
    figures: dict[str, Tensor]
    done: set[int]
    status: Status = Status.SOLVED

    @classmethod
    def open(cls, file: str | Path | None, problem: tuple[Any, ...], nodes: int) -> "_State":
        kept, name = None, ""
        if file is not None:
            name = Path(file).name
            kept = Checkpoint(Path(file).parent, "solve by block", "problem", {"key": fingerprint(problem)})
        found = None if kept is None else kept.read(name)
        if found is not None:
            tensors, data = found
            return cls(kept, name, tensors.pop("value"), tensors, set(data["done"]), Status[data["status"]])
        figures = {"gap": torch.zeros(nodes, dtype=torch.float64), "converged": torch.ones(nodes, dtype=torch.bool)}
        figures["iterations"] = torch.zeros(nodes, dtype=torch.long)
        figures["strength"] = torch.zeros(nodes, dtype=torch.float64)
        figures["strength_max"] = torch.zeros(nodes, dtype=torch.float64)
        return cls(kept, name, torch.zeros(nodes, nodes, dtype=torch.float64), figures, set())

    def put(self, part: Solution, sources: Tensor, targets: Tensor) -> None:
        self.value[sources[:, None], targets] = part.value.cpu()
        self.figures["gap"][targets] = part.gap.cpu()
        self.figures["converged"][targets] = part.converged.cpu()
        for name in ("iterations", "strength", "strength_max"):
            self.figures[name][targets] = part.stats[name].cpu()
        self.status = part.status if part.status is not Status.SOLVED else self.status

    def finish(self, rank: int) -> None:
        self.done.add(rank)
        if self.kept is not None:
            data = {"done": sorted(self.done), "status": self.status.name}
            self.kept.write(self.name, {"value": self.value, **self.figures}, data)

    def solution(self) -> Solution:
        gap, converged = self.figures["gap"], self.figures["converged"]
        stats = {name: self.figures[name] for name in ("iterations", "strength", "strength_max")}
        return Solution(self.value, gap, converged, self.status, stats)
