"""The loss and the loop.

One step: prompts x, as many others x', a random subset S of the planted edges and a random subset R of all other
edges (and of the ports that the task rules out). The network runs on x while the reads in S and R come from x'; it must
answer what the causal model answers when only S is swapped:

    loss = CE(network(x; S + R from x'), model(x; S from x'))

S = R = {} is the behaviour loss, S the outgoing edges of one node is interchange-intervention training, R the outgoing
edges of other nodes is its strict form.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from benchmarks.siit.network import Network, Run, Shape
from benchmarks.siit.tasks import (
    Task,
    Trace,
    Values,
    check_placement,
    planted_edges,
    silent_ports,
)

READOUT_CLASSES = 64  # more than any variable has values; negative ones wrap round
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; the seed fixes weights, prompts and subsets.

    circuit_only: share of the steps, from the first, in which every edge outside the circuit is
    patched, so that no way round the circuit is ever found.
    scaffold: share of the steps over which the weight of the scaffold falls from 1 to 0.
    """

    steps: int = 2500
    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    circuit_only: float = 0.4
    scaffold: float = 0.4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, where its variables sit, and how the training went."""

    network: Network
    task: Task
    placement: dict[str, str]
    recipe: Recipe
    seconds: float
    history: list[dict[str, float]]


def train(task: Task, placement: Mapping[str, str], shape: Shape, recipe: Recipe, progress: bool = True) -> Trained:
    """Plant `task` at `placement`; the same arguments give the same weights on one machine."""
    check_placement(task, placement, shape)
    network = Network(shape, recipe.seed)
    loss_of = _Loss(task, placement, network, recipe)
    parameters = list(loss_of.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.05)
    history, start = [], time.perf_counter()
    for step in trange(recipe.steps, desc=f"train {task.name}", disable=not progress):
        loss, accuracy = loss_of(step / recipe.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            history.append({"step": step, "loss": loss.item(), "accuracy": accuracy.item()})
            log.info("step %d: loss %.5f, accuracy %.4f", *history[-1].values())
    network.requires_grad_(False).eval()
    seconds = time.perf_counter() - start
    return Trained(network, task, dict(placement), recipe, seconds, history)


class _Loss(nn.Module):
    """The loss on fresh prompts, with a scaffold that is gone before training ends.

    The scaffold: each variable can be read off its node linearly, and heads look where they should.
    """

    def __init__(self, task: Task, placement: Mapping[str, str], network: Network, recipe: Recipe) -> None:
        super().__init__()
        self.network, self._task, self._recipe = network, task, recipe
        self._masks = _Masks(task, placement, network.shape)
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._hidden = [variable.name for variable in task.variables[:-1]]
        self._placement = placement
        writers = network.shape.writers()
        self._writers = [writers.index(placement[name]) for name in self._hidden]
        self._readout = nn.Parameter(torch.zeros(len(self._hidden), network.shape.d_model, READOUT_CLASSES))

    def forward(self, progress: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Loss, and share of prompts right at every position; `progress` runs from 0 to 1."""
        count, task, generator = self._recipe.batch, self._task, self._generator
        tokens = task.sample(count, generator)
        donor = task.sample(count, generator)  # not the counterpart: that tells what it isn't
        mask, swapped = self._masks.draw(count, progress < self._recipe.circuit_only, generator)
        with torch.no_grad():  # the donor's writers learn when they are on the clean side
            written = self.network(donor).written
        run, trace = self.network(tokens, written, mask), task.trace(tokens, donor, swapped)
        loss, accuracy = _weighted(run.logits, trace.values[task.variables[-1].name], task.weight)
        scaffold = max(0.0, 1.0 - progress / self._recipe.scaffold)
        if scaffold:
            loss = loss + scaffold * (self._readout_loss(run, trace) + self._looks_loss(run, trace))
        return loss, accuracy

    def _readout_loss(self, run: Run, trace: Trace) -> Float[Tensor, ""]:
        """Can every variable be read off, linearly, where it should be?"""
        logits = torch.einsum("bupd,udc->bcup", run.written[:, self._writers], self._readout)
        target = torch.stack([trace.values[name] for name in self._hidden], dim=1)
        each = functional.cross_entropy(logits, target % READOUT_CLASSES, reduction="none")
        return each.sum(dim=2).mean()

    def _looks_loss(self, run: Run, trace: Trace) -> Float[Tensor, ""]:
        """Do heads attend where the causal model says?"""
        loss = run.logits.new_zeros(())
        for name, places in trace.looks.items():
            layer, head = (int(part[1:]) for part in self._placement[name].split("."))
            scores = run.scores[layer][:, head].transpose(1, 2)
            loss = loss + functional.cross_entropy(scores, places, ignore_index=-1)
        return loss


class _Masks:
    """Random subsets of planted and other edges, as masks and as swaps of the causal model."""

    def __init__(self, task: Task, placement: Mapping[str, str], shape: Shape) -> None:
        planted = planted_edges(task, placement)
        others = [edge for edge in shape.candidate_edges() if edge not in set(planted)]
        others += silent_ports(task, placement)
        self._edges = task.edges()
        self._planted = shape.edge_mask(planted).float()
        self._others = shape.edge_mask(others).float()

    def draw(
        self, count: int, circuit_only: bool, generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch reader writer"], dict[tuple[str, str], Bool[Tensor, " batch"]]]:
        inside = _subsets(count, len(self._planted), generator)
        outside = _subsets(count, len(self._others), generator)
        outside[: count if circuit_only else count // 2] = 1.0
        mask = torch.einsum("be,erw->brw", inside, self._planted)
        mask += torch.einsum("be,erw->brw", outside, self._others)
        return mask.clamp(max=1.0), {edge: inside[:, index] > 0 for index, edge in enumerate(self._edges)}


def _subsets(count: int, size: int, generator: torch.Generator) -> Float[Tensor, "batch edge"]:
    """None for a quarter of the rows, one for a quarter, else a share drawn from [0, 1]."""
    kind = torch.randint(4, (count, 1), generator=generator)
    share = torch.rand(count, 1, generator=generator)
    some = torch.rand(count, size, generator=generator) < share
    one = torch.arange(size) == torch.randint(size, (count, 1), generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, one, some).float())


def _weighted(
    logits: Float[Tensor, "batch pos out"], target: Values, weight: Float[Tensor, " pos"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    each = functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    right = (logits.argmax(-1) == target)[:, weight > 0].all(dim=1)
    return (each.mean(dim=0) @ weight) / weight.sum(), right.float().mean()
