"""The bundled model: indirect-object identification by a circuit that is known.

A transformer of 3 layers with 4 heads each reads "When Mary and John went to the store , John gave a drink to" and
answers "Mary". It was trained by strict interchange interventions on edges (benchmarks/train_siit.py demo) so that it
works the way the circuit of Wang et al. 2022 (arXiv 2211.00593) is told:

    a0.h1  duplicate-token head: which of the two places does the repeated name come from?
    m0     says which name stands where
    a1.h2  S-inhibition head: brings the repeated place to the last word
    a2.h0  name mover: attends to the other place and copies the name m0 wrote there

Exact patching of every single edge confirms that these edges matter and no others; `circuit.json` holds the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load
from torch import Tensor

from tl_circuitlasso.data.storage import parse_json
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.demo.ioi import sentences, text
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index

Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Demo:
    """The model, prompts for it, and the truth.

    Attributes
    ----------
    tokens, corrupted: prompts and their counterparts of equal length (two other names, the other one repeated).
        Every word has the same position in all prompts; position 0 is <bos>, the answer follows the last one.
    correct, incorrect: the name that isn't repeated, and the one that is.
    target: LogitDiff of the two.
    vocabulary: the word of each token id, for labels.
    true_edges, true_nodes: the planted circuit; true_ports: (source, head, port) with q, k and v told apart.
    effects: mean KL(clean || patched) in nats when that edge alone comes from the counterpart, for every candidate.
    """

    model: Any
    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    correct: Int[Tensor, " prompt"]
    incorrect: Int[Tensor, " prompt"]
    vocabulary: tuple[str, ...]
    true_edges: frozenset[Pair]
    true_nodes: frozenset[str]
    true_ports: frozenset[tuple[str, str, str]]
    candidate_edges: frozenset[Pair]
    effects: Mapping[Pair, float]
    roles: Mapping[str, str]  # of each node in the circuit, in a word or two

    @property
    def description(self) -> str:
        return "indirect-object identification, 3 layers of 4 heads, circuit known by construction"

    @property
    def prompts(self) -> list[str]:
        """The prompts as words, without <bos>."""
        return [line.split(" ", 1)[1] for line in text(self.tokens)]

    @property
    def answers(self) -> list[str]:
        """The right next word of each prompt."""
        return self.decode(self.correct)

    @property
    def target(self) -> LogitDiff:
        return LogitDiff(self.correct, self.incorrect)

    @property
    def circuit(self) -> AttributionGraph:
        """The planted circuit as a graph: every candidate edge, its score the measured effect, the true ones kept.

        >>> len(load_demo(prompts=1).circuit.kept_edges())
        6
        """
        graph = AttributionGraph.from_edges(component_index(n_layers=3, n_heads=4), {**self.effects})
        pairs = zip(graph.source.tolist(), graph.target.tolist())
        names = graph.index.names
        return graph.keep([(names[source], names[target]) in self.true_edges for source, target in pairs])

    def decode(self, tokens: Int[Tensor, " count"]) -> list[str]:
        """The word of each token."""
        return [self.vocabulary[token] for token in tokens.tolist()]

    def encode(self, prompt: str) -> Int[Tensor, "1 pos"]:
        """Tokens of one prompt in words, <bos> first.

        Raises
        ------
        InputError: a word that isn't in the vocabulary.
        """
        words = ["<bos>", *prompt.replace(",", " , ").split()]
        if unknown := [word for word in words if word not in self.vocabulary]:
            raise InputError(
                f"`prompt` has words that the bundled model doesn't know: {', '.join(unknown)}. It reads sentences "
                f"such as {self.prompts[0]!r}; `vocabulary` lists its words"
            )
        return torch.tensor([[self.vocabulary.index(word) for word in words]])


def load_demo(prompts: int = 512, seed: int = 0) -> Demo:
    """The bundled model with `prompts` sentences, the same ones for the same seed; no network.

    >>> demo = load_demo(prompts=2)
    >>> sorted(demo.true_edges)[0]
    ('a0.h1', 'a1.h2')

    Raises
    ------
    InputError: fewer than one prompt.
    """
    from tl_circuitlasso.models.demo_model import build_demo_model

    if prompts < 1:
        raise InputError(f"`prompts` is {prompts}: ask for at least one")
    batch, circuit = sentences(prompts, seed), _json("circuit.json")
    return Demo(
        model=build_demo_model(_json("config.json"), load(_data("model.safetensors"))),
        tokens=batch.tokens,
        corrupted=batch.corrupted,
        correct=batch.correct,
        incorrect=batch.incorrect,
        vocabulary=tuple(_json("vocabulary.json")["words"]),
        true_edges=_pairs(circuit["true_edges"]),
        true_nodes=frozenset(circuit["true_nodes"]),
        true_ports=frozenset((u, *v.rsplit(".", 1)) for u, v in circuit["true_edges_qkv"] if v.startswith("a")),
        candidate_edges=_pairs(circuit["candidate_edges"]),
        effects={tuple(edge.split("->")): value for edge, value in circuit["single_edge_effects"].items()},
        roles=circuit["roles"],
    )


def _pairs(edges: list[list[str]]) -> frozenset[Pair]:
    return frozenset((source, target) for source, target in edges)


def _json(name: str) -> Any:
    return parse_json(_data(name).decode(), Path(name))


def _data(name: str) -> bytes:
    return (files("tl_circuitlasso.demo") / name).read_bytes()
