"""Train TopK SAEs on every layer's residual stream of a model, offline, with SAELens.

    python -m benchmarks.train_saes --out DIR                    stories260K, 512 features a layer, minutes on one core
    python -m benchmarks.train_saes --out DIR --quick            a tenth of it, in seconds: for tests and tutorials
    python -m benchmarks.train_saes --out DIR --features 2048 --active 24 --tokens 4000000

Writes one folder per hook, which `SAE.load_from_disk` reads, and prints per SAE the fraction of variance unexplained
(FVU), the mean number of active features and the share of dead ones, all on text that no SAE was trained on.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.data import data_folder, story_model, story_rows
from tl_circuitlasso.models.adapter import adapt


@dataclass(frozen=True)
class Recipe:
    """How SAEs are trained."""

    features: int = 512
    active: int = 16
    tokens: int = 2_000_000
    distinct: int = 400_000  # tokens whose activations are held in memory, and seen several times
    batch: int = 1024
    rate: float = 2e-3
    seed: int = 0


QUICK = Recipe(tokens=200_000, distinct=60_000)


def residual_hooks(model: Any) -> list[str]:
    """The residual stream behind every layer."""
    return [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]


def activations(model: Any, tokens: Int[Tensor, "batch pos"], hooks: list[str]) -> dict[str, Tensor]:
    """Each hook's activations at all positions but the first (BOS), as `sample d_model`."""
    adapter, parts = adapt(model), {hook: [] for hook in hooks}
    for some in tokens.split(64):
        for hook, values in adapter.run(some, None, hooks).items():
            parts[hook].append(values[:, 1:].flatten(0, 1))
    return {hook: torch.cat(values) for hook, values in parts.items()}


def train_sae(acts: Float[Tensor, "sample d_model"], hook: str, recipe: Recipe, **metadata: Any) -> TopKTrainingSAE:
    """One TopK SAE with decoder rows of length 1."""
    torch.manual_seed(recipe.seed)
    config = TopKTrainingSAEConfig(
        d_in=acts.shape[1],
        d_sae=recipe.features,
        k=recipe.active,
        metadata=SAEMetadata(hook_name=hook, prepend_bos=True, **metadata),
    )
    sae = TopKTrainingSAE(config)
    sae.b_dec.data = acts.mean(0)
    steps = max(1, recipe.tokens // recipe.batch)
    trainer = SAETrainerConfig(
        total_training_samples=steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.rate,
        lr_end=recipe.rate / 10,
        lr_decay_steps=steps // 3,
        lr_warm_up_steps=min(100, steps // 10),
        dead_feature_window=200,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(trainer, sae, _batches(acts, recipe)).fit()
    sae.fold_W_dec_norm()
    return sae


def _batches(acts: Float[Tensor, "sample d_model"], recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(acts), generator=generator)
        for rows in order.split(recipe.batch):
            if len(rows) == min(recipe.batch, len(acts)):
                yield acts[rows]


def quality(sae: Any, acts: Float[Tensor, "sample d_model"]) -> dict[str, float]:
    """FVU = sum ||x - decode(encode(x))||^2 / sum ||x - mean||^2, mean active features, share of dead features."""
    with torch.no_grad():
        codes = sae.encode(acts)
        left = (acts - sae.decode(codes)).square().sum()
    fired = codes > 0
    return {
        "FVU": float(left / (acts - acts.mean(0)).square().sum()),
        "active": float(fired.sum(1).float().mean()),
        "dead": float((~fired.any(0)).float().mean()),
    }


def train_all(
    model: Any, hooks: list[str], train: Int[Tensor, "batch pos"], held_out: Int[Tensor, "batch pos"], recipe: Recipe,
    out: Path, name: str = "model",
) -> pd.DataFrame:  # fmt: skip
    """Train, save and measure one SAE per hook."""
    acts, test = activations(model, train, hooks), activations(model, held_out, hooks)
    rows = []
    for hook in hooks:
        start = time.perf_counter()
        sae = train_sae(acts[hook], hook, recipe, model_name=name, context_size=train.shape[1])
        sae.save_inference_model(out / hook)
        seconds = time.perf_counter() - start
        rows.append({"hook": hook, **quality(SAE.load_from_disk(out / hook), test[hook]), "seconds": seconds})
    return pd.DataFrame(rows).set_index("hook")


def load_saes(folder: str | Path) -> Mapping[str, Any]:
    """The SAEs that `train_all` wrote, by hook, in the order of computation."""
    saes = [SAE.load_from_disk(path.parent) for path in sorted(Path(folder).glob("*/cfg.json"))]
    return {str(sae.cfg.metadata.hook_name): sae for sae in saes}


def stories(model: Any, recipe: Recipe, length: int = 128) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """TinyStories: rows to train on, and rows from the validation part."""
    train = data_folder("datasets", "tinystories", "train_part_cased.txt").read_text(encoding="utf-8")
    valid = data_folder("datasets", "tinystories", "valid_part_cased.txt").read_text(encoding="utf-8")
    rows = max(1, recipe.distinct // (length - 1))
    return story_rows(model, train, length=length, rows=rows), story_rows(model, valid, length=length, rows=128)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = story_model(options.model)
    recipe = QUICK if options.quick else Recipe()
    given = {key: getattr(options, key) for key in ("features", "active", "tokens", "rate", "seed")}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    train, held_out = stories(model, recipe)
    hooks = options.hooks or residual_hooks(model)
    table = train_all(model, hooks, train, held_out, recipe, options.out, model.cfg.model_name)
    print(table.round(4).to_string())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, one folder per hook")
    parser.add_argument("--model", type=Path, help="a model's folder with a tokenizer; default: stories260K")
    parser.add_argument("--hooks", nargs="+", help="default: the residual stream behind every layer")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.tokens} tokens instead of {Recipe.tokens}")
    parser.add_argument("--features", type=int, help=f"features per SAE; default {Recipe.features}")
    parser.add_argument("--active", type=int, help=f"k, the active features per token; default {Recipe.active}")
    parser.add_argument("--tokens", type=int, help="training tokens, repeats counted")
    parser.add_argument("--rate", type=float, help=f"learning rate; default {Recipe.rate}")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
