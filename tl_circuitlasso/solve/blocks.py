"""A whole adjacency matrix from one Gram of all nodes: each rank of blocks against its ancestors.

    min_A  1/2 tr (I - A)' G (I - A) + lambda * penalty(A),   A_st = 0 unless rank(s) < rank(t)

The order makes the problem separable, so blocks of one rank are solved together on the Gram of their ancestors.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_circuitlasso.errors import FormatError, InputError
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
    Raises InputError where the layout doesn't fit the Gram, FormatError for a checkpoint of other data.

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
    key = fingerprint(gram, layout, strength, grouped, penalty, options) if checkpoint is not None else ""
    state = _State.open(checkpoint, key, len(gram))
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

    file: Path | None
    key: str
    value: Tensor
    figures: dict[str, Tensor]
    done: set[int]
    status: Status = Status.SOLVED

    @classmethod
    def open(cls, file: str | Path | None, key: str, nodes: int) -> "_State":
        figures = {"gap": torch.zeros(nodes, dtype=torch.float64), "converged": torch.ones(nodes, dtype=torch.bool)}
        figures["iterations"] = torch.zeros(nodes, dtype=torch.long)
        figures["strength"] = torch.zeros(nodes, dtype=torch.float64)
        figures["strength_max"] = torch.zeros(nodes, dtype=torch.float64)
        state = cls(
            None if file is None else Path(file), key, torch.zeros(nodes, nodes, dtype=torch.float64), figures, set()
        )
        if state.file is not None and state.file.exists():
            state.read()
        return state

    def read(self) -> None:
        try:
            with safe_open(str(self.file), "pt") as stored:
                header = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise FormatError(f"`checkpoint` {self.file} isn't a checkpoint of this library: {error}") from error
        if header.get("key") != self.key:
            raise FormatError(
                f"`checkpoint` {self.file} belongs to other data or options: delete it or name another file"
            )
        self.done, self.status = set(json.loads(header["done"])), Status[header["status"]]
        self.value = tensors.pop("value")
        self.figures = tensors

    def put(self, part: Solution, sources: Tensor, targets: Tensor) -> None:
        self.value[sources[:, None], targets] = part.value.cpu()
        self.figures["gap"][targets] = part.gap.cpu()
        self.figures["converged"][targets] = part.converged.cpu()
        for name in ("iterations", "strength", "strength_max"):
            self.figures[name][targets] = part.stats[name].cpu()
        self.status = part.status if part.status is not Status.SOLVED else self.status

    def finish(self, rank: int) -> None:
        self.done.add(rank)
        if self.file is None:
            return
        header = {"key": self.key, "done": json.dumps(sorted(self.done)), "status": self.status.name}
        draft = self.file.with_name(self.file.name + ".part")
        save_file({"value": self.value, **self.figures}, str(draft), metadata=header)
        os.replace(draft, self.file)

    def solution(self) -> Solution:
        gap, converged = self.figures["gap"], self.figures["converged"]
        stats = {name: self.figures[name] for name in ("iterations", "strength", "strength_max")}
        return Solution(self.value, gap, converged, self.status, stats)
