"""What measuring circuits costs, and how faithful circuits of growing size are.

    python -m benchmarks.faithfulness cost                 GPT-2 small's shape, random weights, 8 pairs of 32 tokens
    python -m benchmarks.faithfulness cases FOLDER         default circuits of the demo and of models with a known truth
    python -m benchmarks.faithfulness stories FOLDER       next-token loss of a TinyStories model, several prompt sets
    python -m benchmarks.faithfulness stories FOLDER --plot curves.svg --json curves.json

`cost` compares one evaluation, and a curve of ten sizes, with a re-enactment of how the EAP-IG package evaluates a
circuit: every head's output is written out in d_model, every head reads copies of the residual stream of its own
through q, k and v, the differences of all nodes are one (batch, pos, node, d_model) tensor, and each size is a call of
its own.

`cases` says of each default circuit whether it is faithful (.95 or more, patched from the corrupted prompts, minus the
KL divergence or squared distance to the model's own output as metric) with no more edges than the truth plus 20 %, and
how faithful the truth itself is. `stories` ranks edges by signed score, as MIB does for CPR, on training text, and
evaluates them on other text, once for each of `--seeds` disjoint prompt sets.

FOLDER of `cases` holds folders as `circuitlasso bench` reads them; that of `stories` holds `models/stories260K`
(config.json, model.safetensors, tokenizer.json) and `datasets/tinystories`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.cost import Problem, logit_difference
from benchmarks.data import story_model
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.bench.cases import Case, case_folders, limited, load_case
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.bench.methods import BATCH, objective
from tl_circuitlasso.demo import load_demo
from tl_circuitlasso.discover.run import circuit_lasso
from tl_circuitlasso.evaluate.circuits import as_circuits, prune, score_matrix
from tl_circuitlasso.evaluate.curves import MIB_SHARES, Curve, select
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.patch import run_circuits

# ---- the package's way ----------------------------------------------------------------------------------------------


def package_way(model: Any, clean: Tensor, corrupted: Tensor, kept: Tensor, layout: EdgeLayout) -> Tensor:
    """The circuit's logits as the package computes them: a corrupted run and a patched one, everything written out."""
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for flag in flags:
        setattr(model.cfg, flag, True)
    try:
        with torch.no_grad():
            return _PackageRun(model, kept, layout).logits(clean, corrupted)
    finally:
        for flag in flags:
            setattr(model.cfg, flag, False)


class _PackageRun:
    """Each reader's input hook adds, for its cut edges, corrupted minus current outputs of all sources."""

    def __init__(self, model: Any, kept: Tensor, layout: EdgeLayout) -> None:
        self.model, self.layout = model, layout
        self.cut = (~kept & layout.mask()).float()

    def logits(self, clean: Tensor, corrupted: Tensor) -> Tensor:
        width = self.model.cfg.d_model
        self.difference = torch.zeros(*clean.shape, self.layout.n_sources, width)
        self.model.run_with_hooks(corrupted, fwd_hooks=list(self._writers(1.0)))
        return self.model.run_with_hooks(clean, fwd_hooks=[*self._writers(-1.0), *self._readers()])

    def _writers(self, sign: float) -> list[tuple[str, Callable[..., None]]]:
        def add(rows: Any) -> Callable[..., None]:
            def hook_function(activation: Tensor, hook: Any) -> None:
                self.difference[:, :, rows] += sign * activation

            return hook_function

        heads, found = self.layout.shape.n_heads, [("hook_embed", add(0))]
        for layer in range(self.layout.shape.n_layers):
            first = 1 + layer * (heads + 1)
            found.append((f"blocks.{layer}.attn.hook_result", add(slice(first, first + heads))))
            found.append((f"blocks.{layer}.hook_mlp_out", add(first + heads)))
        return found

    def _readers(self) -> list[tuple[str, Callable[..., Tensor]]]:
        def read(layer: int, port: str, wide: bool) -> Callable[..., Tensor]:
            sources, columns = self.layout.sources_of(layer, port), self.layout.columns(layer, port)
            cut = self.cut[:sources, columns]

            def hook_function(activation: Tensor, hook: Any) -> Tensor:
                change = torch.einsum("bpsd,sr->bprd", self.difference[:, :, :sources], cut)
                return activation + (change if wide else change[:, :, 0])

            return hook_function

        layers, found = self.layout.shape.n_layers, []
        for layer in range(layers):
            found += [(f"blocks.{layer}.hook_{p}_input", read(layer, p, True)) for p in "qkv"]
            found.append((f"blocks.{layer}.hook_mlp_in", read(layer, "", False)))
        return [*found, (f"blocks.{layers - 1}.hook_resid_post", read(layers, "", False))]


# ---- cost -----------------------------------------------------------------------------------------------------------


def cost(problem: Problem, *, repeats: int = 2, package: bool = True) -> pd.DataFrame:
    """Processor seconds, in bare forward passes, of one circuit at each size and of the curve over all of them."""
    model, (clean, corrupted) = problem.model(), problem.pairs()
    adapter = adapt(model)
    layout = EdgeLayout(adapter.shape)
    ranking = baselines.random_edges(model)
    counts = [int(share * int(layout.mask().sum())) for share in MIB_SHARES]
    circuits = prune(select(score_matrix(ranking, layout), layout, counts, False, "greedy"), layout)

    def bare() -> None:
        with torch.no_grad():
            model(clean)

    def one(kept: Tensor) -> Tensor:
        ablated = from_run(adapter, corrupted, None)
        return run_circuits(adapter, clean, None, as_circuits(kept[None], layout), ablated)[0]

    def whole() -> Curve:
        return evaluate.curve(model, ranking, clean, corrupted, logit_difference, rule="greedy", batch_size=len(clean))

    bare()  # the first pass pays for allocations
    base = _seconds(bare, 3)
    rows = []
    for share, kept in zip(MIB_SHARES, circuits):
        ours = _seconds(lambda kept=kept: one(kept), repeats) / base
        theirs = (
            _seconds(lambda kept=kept: package_way(model, clean, corrupted, kept, layout), 1) / base
            if package
            else None
        )
        rows.append({"share": share, "edges": int(kept.sum()), "ours": ours, "package's way": theirs})
    total = None if not package else sum(row["package's way"] for row in rows)
    rows.append({"share": "curve", "edges": None, "ours": _seconds(whole, 1) / base, "package's way": total})
    return pd.DataFrame(rows).assign(**{"forward pass, s": base})


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return min(measured(call)[1].cpu_seconds for _ in range(repeats))


# ---- models with a known circuit ------------------------------------------------------------------------------------


def cases(folder: Path, *, prompts: int = 256) -> pd.DataFrame:
    """The default circuit of the demo and of each case: its size and faithfulness beside those of the truth."""
    rows = [judged(demo_case(prompts), prompts)]
    rows += [judged(load_case(path), prompts) for path in case_folders(folder)]
    return pd.DataFrame(rows)


def demo_case(prompts: int) -> Case:
    demo = load_demo(prompts=prompts)
    index = component_index(n_layers=3, n_heads=4)
    candidates = frozenset((s, t) for s in index.names for t in index.names if index.may_feed(s, t))
    truth = frozenset(demo.true_edges)
    nodes = frozenset(name for edge in truth for name in edge)
    return Case(
        "demo", demo.model, demo.tokens, demo.corrupted, demo.tokens.shape[1] - 1, False, truth, candidates, nodes, True
    )


def judged(case: Case, prompts: int) -> dict[str, Any]:
    clean, corrupted = limited(case, None)
    found = circuit_lasso(case.model, clean, positions=slice(case.first, None), progress=False)
    clean, corrupted = limited(case, prompts)
    metric = objective(case, clean, corrupted, "distance")
    index = found.index
    truth = AttributionGraph.from_edges(index, dict.fromkeys(sorted(case.truth), 1.0))
    kept = found.kept_edges()
    ours, theirs = (
        evaluate.faithfulness(case.model, graph, clean, corrupted, metric, batch_size=BATCH) for graph in (found, truth)
    )
    few = len(kept) <= 1.2 * len(case.truth)
    return {
        "case": case.name,
        "edges": len(kept),
        "truth": len(case.truth),
        "certified": case.certified,
        "faithfulness": ours.faithfulness,
        "low": ours.low,
        "high": ours.high,
        "truth's": theirs.faithfulness,
        "reached": few and ours.faithfulness >= 0.95,
        "extra": " ".join(f"{s}->{t}" for s, t in sorted(kept - case.truth)),
        "missing": " ".join(f"{s}->{t}" for s, t in sorted(case.truth - kept)),
    }


# ---- a real model ---------------------------------------------------------------------------------------------------


def stories(
    folder: Path,
    *,
    prompts: int,
    length: int,
    train: int,
    seeds: int = 1,
    absolute: bool = False,
    ablation: str = "mean",
) -> list[dict[str, Curve]]:
    """Curves of CircuitLasso, EAP-IG, EAP, magnitude and chance: next-token loss on stories, one dict for each seed.

    Graphs are made on `train` prompts of the training text, curves on `prompts` others of the validation text; each
    seed takes the next prompts of both.
    """
    model = story_model(folder / "models" / "stories260K")
    texts = folder / "datasets" / "tinystories"
    train_sets = _windows(folder, texts / "train_part_cased.txt", seeds * train, length).split(train)
    fresh_sets = _windows(folder, texts / "valid_part_cased.txt", seeds * prompts, length).split(prompts)
    return [
        _story_curves(model, found, fresh, seed, absolute, ablation)
        for seed, (found, fresh) in enumerate(zip(train_sets, fresh_sets))
    ]


def _story_curves(
    model: Any, found: Tensor, fresh: Tensor, seed: int, absolute: bool, ablation: str
) -> dict[str, Curve]:
    metric = evaluate.next_token(found)
    ours: Any = {"ablation": ablation}
    graphs: dict[str, AttributionGraph] = {
        "CircuitLasso": circuit_lasso(model, found, progress=False, seed=seed),
        "EAP-IG": baselines.eap_ig(model, found, None, metric, **ours),
        "EAP": baselines.eap(model, found, None, metric, **ours),
        "magnitude": evaluate.magnitude(model, found, None, **ours),
        "random": baselines.random_edges(model, seed=seed),
    }
    return evaluate.curves(model, graphs, fresh, None, evaluate.next_token(fresh), absolute=absolute, **ours)


def _windows(folder: Path, text: Path, count: int, length: int) -> Tensor:
    """The first `count` windows of a text, each behind a BOS token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "models" / "stories260K" / "tokenizer.json"))
    raw = text.read_text(encoding="utf-8", errors="replace")[: 8 * count * length].replace("<|endoftext|>", " ")
    ids = torch.tensor(tokenizer.encode(raw, add_special_tokens=False).ids)[: count * (length - 1)]
    windows = ids.view(-1, length - 1)
    return torch.cat([torch.ones(len(windows), 1, dtype=torch.long), windows], 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("cost")
    for name, value in {**vars(Problem()), "prompts": 8, "batch_size": 8}.items():
        measure.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    measure.add_argument("--repeats", type=int, default=2)
    measure.add_argument("--no-package", action="store_true")
    known = commands.add_parser("cases")
    known.add_argument("folder", type=Path)
    known.add_argument("--prompts", type=int, default=256)
    tell = commands.add_parser("stories")
    tell.add_argument("folder", type=Path)
    tell.add_argument("--prompts", type=int, default=64)
    tell.add_argument("--train", type=int, default=128)
    tell.add_argument("--length", type=int, default=64)
    tell.add_argument("--seeds", type=int, default=1, help="disjoint prompt sets")
    tell.add_argument("--ablation", default="mean", choices=["mean", "mean-all", "zero"])
    tell.add_argument("--absolute", action="store_true", help="rank edges by |score|")
    tell.add_argument("--plot", type=Path)
    tell.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "cost":
        problem = Problem(**{name: getattr(arguments, name) for name in vars(Problem())})
        print(cost(problem, repeats=arguments.repeats, package=not arguments.no_package).to_string(index=False))
    elif arguments.command == "cases":
        print(cases(arguments.folder, prompts=arguments.prompts).round(3).to_string(index=False))
    else:
        tell_stories(arguments)


def tell_stories(arguments: argparse.Namespace) -> None:
    """Print, draw and save the curves."""
    sizes = {name: getattr(arguments, name) for name in ("prompts", "length", "train", "seeds", "absolute", "ablation")}
    made = stories(arguments.folder, **sizes)
    for name, figures in (("CPR", "cpr"), ("CMD", "cmd")):
        table = pd.DataFrame([{method: getattr(curve, figures) for method, curve in one.items()} for one in made])
        print(f"{name}, one row for each prompt set, and their mean")
        print(pd.concat([table, table.mean().to_frame("mean").T]).round(4).to_string())
    first = made[0]
    table = pd.DataFrame({name: curve.faithfulness for name, curve in first.items()}, index=first["EAP"].shares)
    print("faithfulness at each share of the edges, first prompt set, and the edges left after pruning")
    left = pd.DataFrame({f"{name}, edges": curve.sizes for name, curve in first.items()}, index=table.index)
    print(pd.concat([table.round(3), left], axis=1).to_string())
    if arguments.json:
        sets = [{name: vars(curve) for name, curve in one.items()} for one in made]
        arguments.json.write_text(json.dumps(sets, indent=1))
    if arguments.plot:
        from tl_circuitlasso import plot

        plot.curves(first, arguments.plot, title="stories260K: next-token loss on TinyStories, mean ablation")


if __name__ == "__main__":
    main()
