"""Neuron circuits on subject-verb agreement: how faithful so many neurons are, by whichever method they were found.

    python -m benchmarks.neurons agreement MODEL DATA            faithfulness at each number of neurons, every method
    python -m benchmarks.neurons patching MODEL DATA             correlation of scores with exact patching of neurons
    python -m benchmarks.neurons edges MODEL DATA                edge circuits: |attribution| against the garrote
    python -m benchmarks.neurons steering MODEL CAPITALS         neurons behind states and capitals, scaled

MODEL is a folder as `load_model` reads it (SmolLM2-135M in the tables of the documentation), DATA the folder of
`simple`, `nounpp` and `within_rc` pairs as JSON lines. Neurons are found on training pairs and judged on test pairs:
F = mean logit difference at the last position, everything outside the circuit ablated by its mean over the corrupted
test prompts at the same position; faithfulness = (F(circuit) - F(none)) / (F(model) - F(none)).
"""

import argparse
import csv
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_circuitlasso import LogitDiff, Neuron, baselines, circuit_lasso, evaluate
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.evaluate.features import FeatureOptions, circuit_of, feature_sites
from tl_circuitlasso.evaluate.interventions import intervention
from tl_circuitlasso.evaluate.metrics import PromptMetric
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.feature_patch import Carried, run_features
from tl_circuitlasso.models.loading import load_model
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.neurons import Behaviour, recurring
from tl_circuitlasso.neurons.links import rank_by

SIZES = (100, 200, 300, 500, 1000, 3000)
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Pairs of prompts of one length, and the answers as single tokens."""

    clean: Tensor
    corrupted: Tensor
    correct: Tensor
    incorrect: Tensor

    @property
    def metric(self) -> PromptMetric:
        return evaluate.logit_diff(self.correct, self.incorrect)


def agreement_pairs(model: Any, file: Path, count: int, seed: int = 0) -> Agreement:
    """`count` pairs drawn from a file: those of the commonest length, with answers of one token."""
    adapter = adapt(model)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    random.Random(seed).shuffle(rows)
    found = []
    for row in rows[: 4 * count]:
        prompts = [adapter.model.to_tokens(row[f"{side}_prefix"])[0].tolist() for side in ("clean", "patch")]
        answers = [adapter.model.to_tokens(row[f"{side}_answer"], prepend_bos=False)[0] for side in ("clean", "patch")]
        if len(prompts[0]) == len(prompts[1]) and all(len(answer) == 1 for answer in answers):
            found.append((*prompts, *(int(answer) for answer in answers)))
    length = Counter(len(row[0]) for row in found).most_common(1)[0][0]
    found = [row for row in found if len(row[0]) == length][:count]
    return Agreement(*(torch.tensor([row[i] for row in found]) for i in range(4)))


Method = Callable[[Any, Agreement], AttributionGraph]


def ours(model: Any, data: Agreement, **options: Any) -> AttributionGraph:
    """The secant sweep between the prompts of a pair."""
    target = LogitDiff(data.correct, data.incorrect)
    basis = Neuron(**options)
    return circuit_lasso(
        model, data.clean, corrupted=data.corrupted, basis=basis, design="read", target=target, max_prompts=None,
        progress=False,
    )  # fmt: skip


def unpaired(model: Any, data: Agreement) -> AttributionGraph:
    """The same with partners drawn at random among the prompts."""
    target = LogitDiff(data.correct, data.incorrect)
    return circuit_lasso(
        model, data.clean, basis="neuron", design="read", target=target, max_prompts=None, progress=False
    )


METHODS: dict[str, Method] = {
    "CircuitLasso": ours,
    "CircuitLasso, unpaired": unpaired,
    "RelP": lambda model, data: baselines.relp(model, data.clean, data.corrupted, data.metric),
    "RelP, mean reference": lambda model, data: baselines.relp(
        model, data.clean, data.corrupted, data.metric, reference="mean"
    ),
    "RelP, attention moving": lambda model, data: baselines.relp(
        model, data.clean, data.corrupted, data.metric, attention="moving"
    ),
    "RelP, MLP outputs": lambda model, data: baselines.relp(
        model, data.clean, data.corrupted, data.metric, basis="mlp_out"
    ),
    "gradient x activation": lambda model, data: baselines.gradient_activation(
        model, data.clean, data.corrupted, data.metric
    ),
    "CircuitLasso, corrupted reference": lambda model, data: ours(model, data, reference="corrupted"),
    "IG-10": lambda model, data: baselines.integrated_gradients(model, data.clean, data.corrupted, data.metric),
    "random": lambda model, data: baselines.random_nodes(model),
}


def agreement(
    model: Any, folder: Path, names: Sequence[str], methods: Sequence[str], sizes: Sequence[int], train: int, test: int
) -> pd.DataFrame:
    """Faithfulness of each method's circuits on test pairs, with what finding them took."""
    rows = []
    for name in names:
        seen = agreement_pairs(model, folder / f"{name}_train.json", train)
        unseen = agreement_pairs(model, folder / f"{name}_test.json", test)
        for method in methods:
            graph, cost = measured(lambda method=method, seen=seen: METHODS[method](model, seen))
            found = evaluate.curve(
                model, graph, unseen.clean, unseen.corrupted, unseen.metric, "mean", mean_over="corrupted", sizes=sizes
            )
            rows.append(
                {"set": name, "method": method}
                | {str(size): value for size, value in zip(sizes, found.faithfulness)}
                | {"model": found.model, "none": found.ablated, "CPU s": cost.cpu_seconds}
            )
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
    return pd.DataFrame(rows)


# ---- exact patching -------------------------------------------------------------------------------------------------


def exact_patching(model: Any, graph: AttributionGraph, nodes: Sequence[str], data: Agreement) -> dict[str, float]:
    """How much the mean metric falls when one neuron alone carries what it does on the corrupted prompts."""
    setup = intervention(model, data.clean, data.corrupted, data.metric, "patch")
    adapter, sites = setup.adapter, feature_sites(graph, setup.adapter, {})
    other = adapter.run(data.corrupted, None, [site.reads for site in sites])
    whole = data.metric.each(adapter.run(data.clean, None, ["logits"])["logits"], torch.arange(len(data.clean))).mean()
    fallen = {}
    for node in nodes:
        rest = circuit_of(graph, sites, FeatureOptions(rest="keep"), {node}, rest=True)
        logits = run_features(adapter, data.clean, None, sites, rest, Carried({}, {}, other))
        fallen[node] = float(whole - data.metric.each(logits, torch.arange(len(data.clean))).mean())
    return fallen


def patching(model: Any, folder: Path, name: str, methods: Sequence[str], count: int, prompts: int) -> pd.DataFrame:
    """Pearson and Spearman correlation of scores with exact patching, over a sample of neurons.

    Half of the sample are RelP's highest, half are drawn at random from its first `max_nodes`.
    """
    data = agreement_pairs(model, folder / f"{name}_train.json", prompts)
    graphs = {method: METHODS[method](model, data) for method in methods}
    reference = graphs[methods[0]]
    ranked = reference.edge_table().source.tolist()
    nodes = ranked[: count // 2] + random.Random(0).sample(ranked[count // 2 :], count - count // 2)
    exact = exact_patching(model, reference, nodes, data)
    rows = []
    for method, graph in graphs.items():
        score = dict(zip((graph.index.names[i] for i in graph.source.tolist()), graph.score.tolist()))
        mine = pd.Series([score.get(node, 0.0) for node in nodes])
        truth = pd.Series([exact[node] for node in nodes])
        rows.append({"method": method, "Pearson": mine.corr(truth), "Spearman": mine.corr(truth, "spearman")})
    return pd.DataFrame(rows)


# ---- edges ----------------------------------------------------------------------------------------------------------


def edge_circuits(
    model: Any, folder: Path, name: str, linked: int, train: int, test: int, shares: Sequence[float] = SHARES
) -> pd.DataFrame:
    """Faithfulness of the neurons that have a kept edge in and one out, at each share of the candidate edges."""
    seen = agreement_pairs(model, folder / f"{name}_train.json", train)
    unseen = agreement_pairs(model, folder / f"{name}_test.json", test)
    graph = ours(model, seen, linked=linked)
    rows = []
    for how in ("attribution", "garrote"):
        ranked = rank_by(graph, how)
        for share in shares:
            kept = ranked.top_k(round(share * len(ranked))).prune()
            judged = evaluate.faithfulness(
                model, kept, unseen.clean, unseen.corrupted, unseen.metric, "mean", mean_over="corrupted"
            )
            row = {"ranked by": how, "share": share, "edges": kept.n_kept, "neurons": judged.nodes}
            rows.append(row | {"faithfulness": judged.faithfulness, "low": judged.low, "high": judged.high})
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
    return pd.DataFrame(rows)


# ---- steering -------------------------------------------------------------------------------------------------------

HOPS = {
    "state": ("The city of {city} is in the state of", "state"),
    "capital": ("The capital of {state} is", "capital"),
}
FACTORS = (-4, -2, -1, 0, 1, 2, 4)
OTHER = "Once upon a time there was a little girl who lived with her mother in a small house near the forest."


@dataclass(frozen=True, eq=False)
class Facts:
    """Prompts of one hop that the model answers right, their answers' first tokens, and the same of other rows."""

    prompts: list[str]
    answers: Tensor
    others: Tensor


def known_facts(model: Any, file: Path, hop: str) -> Facts:
    """The prompts of a hop whose answer is the model's first choice: only what it knows can be steered."""
    text, answer = HOPS[hop]
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    adapter = adapt(model)
    kept: list[tuple[str, int]] = []
    for row in rows:
        prompt, first = text.format(**row), int(model.to_tokens(f" {row[answer]}", prepend_bos=False)[0, 0])
        logits = adapter.run(model.to_tokens(prompt), None, ["logits"])["logits"]
        if int(logits[0, -1].argmax()) == first:
            kept.append((prompt, first))
    answers = torch.tensor([first for _, first in kept])
    return Facts([prompt for prompt, _ in kept], answers, answers.roll(1))


def steering(model: Any, file: Path, *, foremost: int = 50, share: float = 0.5) -> pd.DataFrame:
    """What scaling the neurons that recur in one hop, and not in the other, does to the answers of both."""
    adapter = adapt(model)
    facts = {hop: known_facts(model, file, hop) for hop in HOPS}
    found, graphs = {}, {}
    for hop, known in facts.items():
        prompts, target = Prompts(adapter, known.prompts, fewest=2), LogitDiff(known.answers, known.others)
        found[hop] = recurring(Behaviour(adapter, prompts, target, None, True, 0), foremost=foremost)
        graphs[hop] = circuit_lasso(
            model, known.prompts, basis="neuron", design="read", target=target, progress=False
        ).threshold(0)  # fmt: skip
    rows = []
    for hop, other in (("state", "capital"), ("capital", "state")):
        cluster = [name for name, seen in found[hop].items() if seen >= share and found[other].get(name, 0) < share]
        cluster = [name for name in cluster if name in graphs[hop].index]
        for factor in FACTORS if cluster else ():
            row: dict[str, Any] = {"cluster": hop, "neurons": len(cluster), "factor": factor}
            for asked, known in facts.items():
                metric = PromptMetric(_probability(known.answers))
                done = evaluate.steer(model, graphs[hop], cluster, factor, known.prompts, metric, other=[OTHER])
                row |= {f"p({asked})": done.after, "loss on other text": done.loss_after}
            rows.append(row)
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows) == 1), flush=True)
    return pd.DataFrame(rows)


def _probability(answers: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, rows: logits[:, -1].softmax(-1)[torch.arange(len(rows)), answers[rows]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("agreement", "patching", "edges"):
        added = commands.add_parser(command)
        added.add_argument("model")
        added.add_argument("data", type=Path)
        added.add_argument("--sets", nargs="+", default=["nounpp"], choices=["simple", "nounpp", "within_rc"])
        added.add_argument("--train", type=int, default=300)
        added.add_argument("--test", type=int, default=40)
        added.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
        added.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
        added.add_argument("--count", type=int, default=300, help="neurons patched one by one")
        added.add_argument("--linked", type=int, default=128, help="neurons joined by edges")
    added = commands.add_parser("steering")
    added.add_argument("model")
    added.add_argument("data", type=Path, help="the table city_state_capital.csv")
    arguments = parser.parse_args()
    model, data = load_model(arguments.model), arguments.data
    if arguments.command == "agreement":
        agreement(model, data, arguments.sets, arguments.methods, arguments.sizes, arguments.train, arguments.test)
    if arguments.command == "steering":
        steering(model, data)
        return
    for name in arguments.sets if arguments.command == "patching" else ():
        table = patching(model, data, name, arguments.methods, arguments.count, arguments.train)
        print(f"{name}: {arguments.count} neurons, {arguments.train} pairs")
        print(table.round(3).to_string(index=False))
    for name in arguments.sets if arguments.command == "edges" else ():
        print(f"{name}: direct effects between {arguments.linked} neurons")
        edge_circuits(model, data, name, arguments.linked, arguments.train, arguments.test)


if __name__ == "__main__":
    main()
