"""Causal models to plant in a network: variables with parents, prompts, and the right output."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.siit.network import PORTS, Edge, PortEdge, Shape, stage

Values = Int[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class Variable:
    """One step of the causal model: `compute` takes the parents' values in their order.

    ports: for a head, the ports that may read a parent ("qk"); all where it isn't named.
    looks: for a head, from the parents' values the place each position attends to, -1 for any
        (a hint for the start of training; the causal model doesn't depend on it).
    """

    name: str
    kind: str  # "head" | "mlp" | "logits"
    parents: tuple[str, ...]  # other variables, or "input"
    compute: Callable[..., Values]
    ports: Mapping[str, str] = field(default_factory=dict)
    looks: Callable[..., Values] | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A causal model with its prompts; the last variable is the output, its value a class.

    weight: how much each position counts in the loss; positions of weight 0 don't count at all.
    """

    name: str
    description: str
    vocabulary: tuple[str, ...]
    classes: tuple[str, ...]
    weight: Float[Tensor, " pos"]
    variables: tuple[Variable, ...]
    sample: Callable[[int, torch.Generator], Values]
    counterpart: Callable[[Values, torch.Generator], Values]

    def edges(self) -> list[Edge]:
        """(parent, child) by variable name, in the order of computation."""
        return [(parent, child.name) for child in self.variables for parent in child.parents]

    def run(
        self,
        tokens: Values,
        donor: Values | None = None,
        swapped: Mapping[Edge, Bool[Tensor, " batch"]] | None = None,
    ) -> Values:
        """The right output; over `swapped` edges the child sees the parent's value on `donor`."""
        return self.trace(tokens, donor, swapped).values[self.variables[-1].name]

    def trace(
        self,
        tokens: Values,
        donor: Values | None = None,
        swapped: Mapping[Edge, Bool[Tensor, " batch"]] | None = None,
    ) -> "Trace":
        """Every variable's value, and where its head looks, under the same swap."""
        other = self.trace(donor).values if donor is not None else {}
        values, looks = {"input": tokens}, {}
        for child in self.variables:
            seen = []
            for parent in child.parents:
                swap = (swapped or {}).get((parent, child.name))
                value = values[parent]
                seen.append(value if swap is None else torch.where(swap[:, None], other[parent], value))
            values[child.name] = child.compute(*seen)
            if child.looks is not None:
                looks[child.name] = child.looks(*seen)
        return Trace(values, looks)


@dataclass(frozen=True, eq=False)
class Trace:
    """The causal model at work: values of all variables, and the places their heads look at."""

    values: dict[str, Values]
    looks: dict[str, Values]


def place(task: Task, layers: int, heads: int, seed: int) -> dict[str, str]:
    """A node for every variable at random, each after its parents, no two on one node."""
    chooser, last = random.Random(seed), _latest_stages(task, layers)
    nodes = {"input": "input", task.variables[-1].name: "logits"}
    for variable in task.variables[:-1]:
        first = max(stage(nodes[parent]) for parent in variable.parents) + 1
        free = [
            node
            for at in range(int(first), last[variable.name] + 1)
            for node in _nodes_at(at, variable.kind, heads)
            if node not in nodes.values()
        ]
        if not free:
            raise ValueError(
                f"`layers`={layers}, `heads`={heads} leave no node for {variable.name!r} of task "
                f"{task.name!r}; give more layers or heads"
            )
        nodes[variable.name] = chooser.choice(free)
    return nodes


def planted_edges(task: Task, placement: Mapping[str, str]) -> list[Edge]:
    """The task's edges by node name."""
    return [(placement[parent], placement[child]) for parent, child in task.edges()]


def silent_ports(task: Task, placement: Mapping[str, str]) -> list[PortEdge]:
    """Planted edges' ports that the task rules out, by node name."""
    return [
        (placement[parent], placement[child.name], port)
        for child in task.variables
        for parent, allowed in child.ports.items()
        for port in PORTS
        if port not in allowed
    ]


def check_placement(task: Task, placement: Mapping[str, str], shape: Shape) -> None:
    """Raise ValueError where an edge of the task would run backwards or to a missing node."""
    candidates = set(shape.candidate_edges())
    bad = [edge for edge in planted_edges(task, placement) if edge not in candidates]
    if bad:
        raise ValueError(f"`placement` asks for edges the network doesn't have: {bad}")


def _nodes_at(at: int, kind: str, heads: int) -> list[str]:
    if kind == "mlp":
        return [f"m{at // 2}"] if at % 2 else []
    return [] if at % 2 else [f"a{at // 2}.h{head}" for head in range(heads)]


def _latest_stages(task: Task, layers: int) -> dict[str, int]:
    """The last stage at which each variable leaves room for those that read it."""
    latest = {variable.name: 2 * layers - 1 for variable in task.variables}
    for child in reversed(task.variables):
        if child.kind != "logits" and latest[child.name] % 2 != (child.kind == "mlp"):
            latest[child.name] -= 1
        for parent in child.parents:
            if parent != "input" and child.kind != "logits":
                latest[parent] = min(latest[parent], latest[child.name] - 1)
    return latest
