"""Exact patching: what each edge does when it alone comes from the counterpart's run."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.siit.network import Edge, Network, PortEdge
from benchmarks.siit.tasks import Values, planted_edges
from benchmarks.siit.train import Trained

THRESHOLD = 0.01  # of the largest edge's effect


@dataclass(frozen=True, eq=False)
class Certificate:
    """Effects are mean KL(clean || patched) in nats over the positions that count."""

    true_edges: list[Edge]
    effective_edges: list[Edge]
    effects: dict[Edge, float]
    effective_ports: list[PortEdge]  # by the same measure, each port of a planted edge patched alone
    port_effects: dict[PortEdge, float]
    accuracy: float  # share of prompts answered right everywhere
    interchange: dict[str, float]  # variable -> accuracy when its node comes from the counterpart
    strict: float  # accuracy when every edge outside the circuit comes from the counterpart

    @property
    def false_effective_edges(self) -> list[Edge]:
        return sorted(set(self.effective_edges) - set(self.true_edges))

    @property
    def idle_true_edges(self) -> list[Edge]:
        return sorted(set(self.true_edges) - set(self.effective_edges))

    @property
    def gap(self) -> float:
        """The weakest planted edge's effect over the strongest other edge's."""
        others = [effect for edge, effect in self.effects.items() if edge not in self.true_edges]
        return min(self.effects[edge] for edge in self.true_edges) / max(max(others), 1e-12)

    @property
    def certified(self) -> bool:
        return not self.false_effective_edges and not self.idle_true_edges


def certify(trained: Trained, prompts: int = 400, seed: int = 10_000) -> Certificate:
    """Patch every candidate edge alone, every variable's node, and all other edges together."""
    generator = torch.Generator().manual_seed(seed)
    tokens = trained.task.sample(prompts, generator)
    donor = trained.task.counterpart(tokens, generator)
    patch = _Patch(trained, tokens, donor)
    shape, true = trained.network.shape, planted_edges(trained.task, trained.placement)
    candidates = shape.candidate_edges()
    masks = shape.edge_mask(candidates)
    effects = {edge: patch.effect(mask) for edge, mask in zip(candidates, masks, strict=True)}
    largest = max(effects.values())
    ports = [edge for edge in shape.port_edges() if edge[:2] in true]
    port_masks = shape.edge_mask(ports)
    port_effects = {edge: patch.effect(mask) for edge, mask in zip(ports, port_masks, strict=True)}
    others = [mask for edge, mask in zip(candidates, masks, strict=True) if edge not in true]
    return Certificate(
        true_edges=true,
        effective_edges=[edge for edge in candidates if effects[edge] > THRESHOLD * largest],
        effects=effects,
        effective_ports=[edge for edge in ports if port_effects[edge] > THRESHOLD * largest],
        port_effects=port_effects,
        accuracy=patch.accuracy(torch.zeros_like(masks[0]), trained.task.run(tokens)),
        interchange=_interchange(trained, patch, tokens, donor),
        strict=patch.accuracy(torch.stack(others).any(dim=0), trained.task.run(tokens)),
    )


class _Patch:
    """The network on clean prompts, with reads under a mask taken from the counterparts."""

    def __init__(self, trained: Trained, tokens: Values, donor: Values) -> None:
        self._network: Network = trained.network
        self._tokens = tokens
        self._counts = trained.task.weight > 0
        with torch.no_grad():
            self._donor = trained.network(donor).written
            self._clean = self.logits(None)

    @torch.no_grad()
    def logits(self, mask: Bool[Tensor, "reader writer"] | None) -> Float[Tensor, "batch pos out"]:
        if mask is None:
            return self._network(self._tokens).logits[:, self._counts]
        each = mask.float().expand(len(self._tokens), -1, -1)
        return self._network(self._tokens, self._donor, each).logits[:, self._counts]

    def effect(self, mask: Bool[Tensor, "reader writer"]) -> float:
        clean = self._clean.double().log_softmax(-1)
        patched = self.logits(mask).double().log_softmax(-1)
        return (clean.exp() * (clean - patched)).sum(-1).mean().item()

    def accuracy(self, mask: Bool[Tensor, "reader writer"], target: Int[Tensor, "batch pos"]) -> float:
        right = self.logits(mask).argmax(-1) == target[:, self._counts]
        return right.all(dim=1).float().mean().item()


def _interchange(trained: Trained, patch: _Patch, tokens: Values, donor: Values) -> dict[str, float]:
    """Swap all a variable's outgoing edges, in the network and in the causal model alike."""
    task, shape, result = trained.task, trained.network.shape, {}
    every = torch.ones(len(tokens), dtype=torch.bool)
    for variable in task.variables[:-1]:
        node = trained.placement[variable.name]
        out = [edge for edge in shape.candidate_edges() if edge[0] == node]
        swapped = {edge: every for edge in task.edges() if edge[0] == variable.name}
        target = task.run(tokens, donor, swapped)
        result[variable.name] = patch.accuracy(shape.edge_mask(out).any(dim=0), target)
    return result
