"""Neurons behind states and behind capitals, found by how often they matter, then scaled."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.neuron_parts.pairs import Agreement
from tl_circuitlasso import LogitDiff
from tl_circuitlasso.baselines.neurons import node_graph
from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.evaluate.features import feature_sites
from tl_circuitlasso.evaluate.steer import all_but
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.feature_patch import Carried, run_features
from tl_circuitlasso.models.pairs import pairs_of
from tl_circuitlasso.neurons import Behaviour, recurring

HOPS = {
    "state": ("The city of {city} is in the state of", "state"),
    "capital": ("The capital of {state} is", "capital"),
}
# "answer": another prompt of the hop, so that what all answers of a hop share cancels; "question": the same prompt with
# one word changed, so that it asks for something else, and only what goes with the answer asked for is left.
CONTRASTS = ("answer", "question")
OTHERWISE = {"state": ("state", "country"), "capital": ("capital", "size")}
FACTORS = (-4, -2, -1, 0, 1, 2, 4)
OTHER = "Once upon a time there was a little girl who lived with her mother in a small house near the forest."


def known_facts(model: Any, file: Path, hop: str, most: int) -> Agreement:
    """Prompts of one hop and one length that the model answers right, each with another of them as its partner.

    Only what a model knows can be steered; answers are their first tokens.
    """
    text, answer = HOPS[hop]
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    asked: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
    for row in rows:
        tokens = model.to_tokens(text.format(**row))[0].tolist()
        asked[len(tokens)].append((tokens, int(model.to_tokens(f" {row[answer]}", prepend_bos=False)[0, 0])))
    known = [_answered(model, group) for group in asked.values()]
    foremost = max(known, key=lambda group: len(group[0]))
    tokens, right = (part[:most] for part in foremost)
    if not len(right):
        raise SystemExit(f"the model knows none of these facts ({text!r}): nothing to steer")
    partners = torch.tensor([_partner(right, row) for row in range(len(right))])
    return Agreement(tokens, tokens[partners], right, right[partners])


def _answered(model: Any, group: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    tokens, right = (torch.tensor(part) for part in zip(*group))
    good = adapt(model).run(tokens, None, ["logits"])["logits"][:, -1].argmax(-1) == right
    return tokens[good], right[good]


def _partner(answers: Tensor, row: int) -> int:
    """The next prompt with another answer."""
    others = (answers != answers[row]).nonzero().flatten()
    if not len(others):
        raise SystemExit("the model knows fewer than two of these facts: nothing to steer")
    return int(others[(others > row).nonzero().flatten()[0] if bool((others > row).any()) else 0])


def asked_otherwise(model: Any, hop: str, known: Agreement) -> Agreement:
    """The prompts beside the same with another question, and the answer beside what the model says to that instead."""
    own, other = (_token(model, word) for word in OTHERWISE[hop])
    # Only the question's last mention changes: a city or state may have the word in its name.
    last = known.clean.shape[1] - 1 - (known.clean == own).flip(1).int().argmax(1)
    asked = known.clean.scatter(1, last[:, None], other)
    if not bool((known.clean.gather(1, last[:, None]) == own).all()):
        raise SystemExit(f"a prompt of hop {hop!r} doesn't have the word {OTHERWISE[hop][0]!r} as one token")
    logits = adapt(model).run(asked, None, ["logits"])["logits"][:, -1]
    instead = logits.scatter(1, known.correct[:, None], -torch.inf).argmax(-1)
    return Agreement(known.clean, asked, known.correct, instead)


def _token(model: Any, word: str) -> int:
    tokens = model.to_tokens(f" {word}", prepend_bos=False)[0]
    if len(tokens) != 1:
        raise SystemExit(f"{word!r} isn't one token of this model: the prompts would differ in length")
    return int(tokens[0])


def clusters(model: Any, facts: Mapping[str, Agreement], foremost: int, share: float) -> dict[str, list[str]]:
    """The neurons that are among the foremost in at least a share of a hop's prompts, and in fewer of the other's."""
    found = {}
    for hop, known in facts.items():
        pairs = pairs_of(model, known.clean, known.corrupted)
        target = LogitDiff(known.correct, known.incorrect)
        found[hop] = recurring(Behaviour(pairs.adapter, pairs.clean, target, pairs, True, 0), foremost=foremost)
    made = {}
    for hop, own in found.items():
        others = [seen for other, seen in found.items() if other != hop]
        made[hop] = sorted(
            name for name, part in own.items() if part >= share and all(seen.get(name, 0) < share for seen in others)
        )
    return made


def steering(
    model: Any,
    file: Path,
    *,
    contrast: str = "answer",
    foremost: int = 50,
    share: float = 0.5,
    most: int = 16,
    factors: Sequence[float] = FACTORS,
) -> pd.DataFrame:
    """What scaling the neurons of one hop does to the answers of both hops, to other rows' answers, and elsewhere."""
    facts = {hop: known_facts(model, file, hop, most) for hop in HOPS}
    pairs = facts if contrast == "answer" else {hop: asked_otherwise(model, hop, facts[hop]) for hop in HOPS}
    text = model.to_tokens(OTHER)
    rows = []
    found = clusters(model, pairs, foremost, share)
    print({hop: " ".join(names) for hop, names in found.items()})
    for hop, names in found.items():
        for factor in factors if names else ():
            row: dict[str, Any] = {"cluster": hop, "neurons": len(names), "factor": factor}
            for asked, known in facts.items():
                after = scaled(model, names, factor, known.clean)[:, -1].softmax(-1)
                for part, answers in (("", known.correct), ("another ", known.incorrect)):
                    row[f"p({part}{asked})"] = float(after[torch.arange(len(after)), answers].mean())
            loss = torch.nn.functional.cross_entropy(scaled(model, names, factor, text)[0, :-1], text[0, 1:])
            rows.append(row | {"loss elsewhere": float(loss)})
    table = pd.DataFrame(rows)
    print({hop: len(known.clean) for hop, known in facts.items()}, "prompts that the model answers right")
    print(table.round(3).to_string(index=False), flush=True)
    return table


def scaled(model: Any, neurons: Sequence[str], factor: float, tokens: Tensor) -> Tensor:
    """The logits with some neurons' activations multiplied by a factor at every position."""
    adapter = adapt(model)
    nodes: dict[int, list[int]] = defaultdict(list)
    for layer, neuron in sorted(tuple(map(int, name[1:].split("#"))) for name in neurons):
        nodes[layer].append(neuron)
    graph = node_graph(adapter, "neuron", nodes, torch.ones(len(neurons)), Site("logits"), {})
    sites = feature_sites(graph, adapter, {})
    rest = {site.name: all_but(site, neurons) for site in sites}
    return run_features(adapter, tokens, None, sites, rest, Carried({}, {}, {}, float(factor)))
