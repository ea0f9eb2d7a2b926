"""What measuring circuits costs, and how faithful circuits of growing size are.

    python -m benchmarks.faithfulness cost                 GPT-2 small's shape, random weights, 8 pairs of 32 tokens
    python -m benchmarks.faithfulness stories FOLDER       next-token loss of a TinyStories model, with both curves
    python -m benchmarks.faithfulness stories FOLDER --plot curves.png --json curves.json

`cost` compares one evaluation, and a curve of ten sizes, with a re-enactment of how the EAP-IG package evaluates a
circuit: every head's output is written out in d_model, every head reads copies of the residual stream of its own
through q, k and v, the differences of all nodes are one (batch, pos, node, d_model) tensor, and each size is a call of
its own.

FOLDER holds `models/stories260K` (config.json, model.safetensors, tokenizer.json) and `datasets/tinystories`.
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
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.bench.measure import measured
from tl_circuitlasso.discover import circuit_lasso
from tl_circuitlasso.evaluate.circuits import as_circuits, prune, score_matrix
from tl_circuitlasso.evaluate.curves import MIB_SHARES, Curve, select
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.build import build_hooked_transformer
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


# ---- a real model ---------------------------------------------------------------------------------------------------


def stories(folder: Path, *, prompts: int, length: int, train: int, absolute: bool = False) -> dict[str, Curve]:
    """Curves of CircuitLasso, EAP-IG, EAP, chance and magnitude: next-token loss on stories, mean ablation.

    Graphs are made on `train` prompts of the training text, curves on `prompts` others of the validation text.
    """
    model = _story_model(folder)
    texts = folder / "datasets" / "tinystories"
    found = _windows(folder, texts / "train_part_cased.txt", train, length)
    fresh = _windows(folder, texts / "valid_part_cased.txt", prompts, length)
    metric, ours = evaluate.next_token(found), {"ablation": "mean"}
    graphs: dict[str, AttributionGraph] = {
        "CircuitLasso": circuit_lasso(model, found, progress=False),
        "EAP-IG": baselines.eap_ig(model, found, found, metric, **ours),
        "EAP": baselines.eap(model, found, found, metric, **ours),
        "magnitude": evaluate.magnitude(model, found, None, **ours),
        "random": baselines.random_edges(model),
    }
    return evaluate.curves(model, graphs, fresh, None, evaluate.next_token(fresh), absolute=absolute, **ours)


def _story_model(folder: Path) -> Any:
    from safetensors.torch import load_file

    home = folder / "models" / "stories260K"
    return build_hooked_transformer(
        json.loads((home / "config.json").read_text()), load_file(home / "model.safetensors")
    )


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
    tell = commands.add_parser("stories")
    tell.add_argument("folder", type=Path)
    tell.add_argument("--prompts", type=int, default=64)
    tell.add_argument("--train", type=int, default=128)
    tell.add_argument("--length", type=int, default=64)
    tell.add_argument("--absolute", action="store_true", help="rank edges by |score|")
    tell.add_argument("--plot", type=Path)
    tell.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "cost":
        problem = Problem(**{name: getattr(arguments, name) for name in vars(Problem())})
        print(cost(problem, repeats=arguments.repeats, package=not arguments.no_package).to_string(index=False))
    else:
        tell_stories(arguments)


def tell_stories(arguments: argparse.Namespace) -> None:
    """Print, draw and save the curves."""
    sizes = {name: getattr(arguments, name) for name in ("prompts", "length", "train", "absolute")}
    made = stories(arguments.folder, **sizes)
    table = pd.DataFrame({name: [*curve.faithfulness, curve.cpr, curve.cmd] for name, curve in made.items()})
    table.index = pd.Index([*made["CircuitLasso"].shares, "CPR", "CMD"])
    print(table.round(3).to_string())
    print(pd.DataFrame({name: curve.sizes for name, curve in made.items()}, index=MIB_SHARES).to_string())
    if arguments.json:
        arguments.json.write_text(json.dumps({name: vars(curve) for name, curve in made.items()}, indent=1))
    if arguments.plot:
        from tl_circuitlasso import plot

        plot.curves(made, arguments.plot, title="stories260K: next-token loss on TinyStories, mean ablation")


if __name__ == "__main__":
    main()
