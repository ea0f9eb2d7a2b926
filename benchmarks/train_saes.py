"""Train SAEs and transcoders of several kinds on hooks of a model, offline, with SAELens.

    python -m benchmarks.train_saes --out DIR                    stories260K, 512 features a layer, minutes on one core
    python -m benchmarks.train_saes --out DIR --quick            a tenth of it, in seconds: for tests and tutorials
    python -m benchmarks.train_saes --out DIR --features 2048 --active 24 --tokens 4000000
    python -m benchmarks.train_saes --out DIR --at attn.hook_z   one SAE a layer at another hook
    python -m benchmarks.train_saes --out DIR --at ln2.hook_normalized --kind transcoder      to hook_mlp_out

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
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.data import data_folder, story_model, story_rows
from tl_circuitlasso.models.adapter import adapt

TRANSCODERS = ("transcoder", "skip_transcoder")
KINDS = ("topk", "batchtopk", "standard", *TRANSCODERS)
LEAST_CODES = 1000  # batches' smallest codes from which a transcoder's threshold is told


@dataclass(frozen=True)
class Recipe:
    """How SAEs are trained. `active`: features per token; for "standard" thousandths of L1 penalty instead."""

    kind: str = "topk"
    features: int = 512
    active: int = 16
    tokens: int = 2_000_000
    distinct: int = 400_000  # tokens whose activations are held in memory, and seen several times
    batch: int = 1024
    rate: float = 2e-3
    seed: int = 0


QUICK = Recipe(tokens=200_000, distinct=60_000)


def hooks_at(model: Any, place: str = "hook_resid_post") -> list[str]:
    """One hook of every layer."""
    return [f"blocks.{layer}.{place}" for layer in range(model.cfg.n_layers)]


def written_at(hook: str) -> str:
    """Where a transcoder at `hook` writes: behind the MLP of its layer."""
    return f"{'.'.join(hook.split('.')[:2])}.hook_mlp_out"


def activations(model: Any, tokens: Int[Tensor, "batch pos"], hooks: list[str]) -> dict[str, Tensor]:
    """Each hook's activations at all positions but the first (BOS), as `sample d_model`."""
    adapter, parts = adapt(model), {hook: [] for hook in hooks}
    for some in tokens.split(64):
        for hook, values in adapter.run(some, None, hooks).items():
            parts[hook].append(values[:, 1:].flatten(0, 1).flatten(1))
    return {hook: torch.cat(values) for hook, values in parts.items()}


def train_sae(acts: Float[Tensor, "sample width"], hook: str, recipe: Recipe, **metadata: Any) -> Any:
    """One SAE with decoder rows of length 1."""
    torch.manual_seed(recipe.seed)
    shared = {"d_in": acts.shape[1], "d_sae": recipe.features}
    held = SAEMetadata(hook_name=hook, prepend_bos=True, **metadata)
    match recipe.kind:
        case "topk":
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, k=recipe.active, metadata=held))
        case "batchtopk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared, k=recipe.active, metadata=held))
        case _:
            config = StandardTrainingSAEConfig(**shared, l1_coefficient=recipe.active / 1000, metadata=held)
            sae = StandardTrainingSAE(config)
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


def train_transcoder(
    read: Float[Tensor, "sample width"], written: Float[Tensor, "sample out"], hook: str, recipe: Recipe,
    **metadata: Any,
) -> Any:  # fmt: skip
    """One transcoder: the largest `active` codes a token are let through, in the end those above one threshold.

    x -> relu(x W_enc + b_enc) W_dec + b_dec, with W_skip x for "skip_transcoder".
    """
    torch.manual_seed(recipe.seed)
    width, out, skips = read.shape[1], written.shape[1], recipe.kind == "skip_transcoder"
    held = SAEMetadata(hook_name=hook, hook_name_out=written_at(hook), prepend_bos=True, **metadata)
    sizes = {"d_in": width, "d_out": out, "d_sae": recipe.features, "apply_b_dec_to_input": False, "metadata": held}
    kinds: Any = (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig) if skips else (
        JumpReLUTranscoder, JumpReLUTranscoderConfig
    )  # fmt: skip
    coder = kinds[0](kinds[1](**sizes))
    spread = (read - read.mean(0)).norm(dim=1).mean()
    coder.W_enc.data = torch.nn.functional.normalize(torch.randn(width, recipe.features), dim=0) / spread
    coder.W_dec.data = 0.1 * written.std() * torch.randn(recipe.features, out)
    coder.b_enc.data, coder.b_dec.data = -(read.mean(0) @ coder.W_enc.data), written.mean(0)
    weights = [parameter for name, parameter in coder.named_parameters() if name != "threshold"]
    steps, least = max(1, recipe.tokens // recipe.batch), []
    optimiser = torch.optim.Adam(weights, recipe.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, steps)
    both = _batches(torch.cat([read, written], 1), recipe)
    for _ in range(steps):
        x, y = next(both).split([width, out], 1)
        codes = torch.relu(x @ coder.W_enc + coder.b_enc)
        bar = codes.flatten().topk(len(x) * recipe.active).values[-1].detach()
        least = [*least[-LEAST_CODES:], bar]
        fitted = torch.where(codes >= bar, codes, 0.0) @ coder.W_dec + coder.b_dec
        fitted = fitted + x @ coder.W_skip.T if skips else fitted
        loss = (y - fitted).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    coder.threshold.data.fill_(float(torch.stack(least[-100:]).mean()))
    coder.fold_W_dec_norm()
    return coder


def _batches(acts: Float[Tensor, "sample d_model"], recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        order = torch.randperm(len(acts), generator=generator)
        for rows in order.split(recipe.batch):
            if len(rows) == min(recipe.batch, len(acts)):
                yield acts[rows]


def quality(
    sae: Any, acts: Float[Tensor, "sample width"], written: Float[Tensor, "sample out"] | None = None
) -> dict[str, float]:
    """FVU = sum ||y - decode(encode(x))||^2 / sum ||y - mean||^2, mean active features, share of dead features.

    y is `written`, for transcoders; x itself otherwise.
    """
    there = acts if written is None else written
    with torch.no_grad():
        codes = sae.encode(acts)
        fitted = sae.decode(codes)
        skip = getattr(sae, "W_skip", None)
        left = (there - (fitted if skip is None else fitted + acts @ skip.T)).square().sum()
    fired = codes > 0
    return {
        "FVU": float(left / (there - there.mean(0)).square().sum()),
        "active": float(fired.sum(1).float().mean()),
        "dead": float((~fired.any(0)).float().mean()),
    }


def train_all(
    model: Any, hooks: list[str], train: Int[Tensor, "batch pos"], held_out: Int[Tensor, "batch pos"], recipe: Recipe,
    out: Path, name: str = "model",
) -> pd.DataFrame:  # fmt: skip
    """Train, save and measure one SAE or transcoder per hook."""
    rows, metadata = [], {"model_name": name, "context_size": train.shape[1]}
    for hook in hooks:
        ends = [hook, written_at(hook)] if recipe.kind in TRANSCODERS else [hook]
        acts, test = (list(activations(model, tokens, ends).values()) for tokens in (train, held_out))
        start = time.perf_counter()
        trains: Any = train_transcoder if recipe.kind in TRANSCODERS else train_sae
        sae = trains(*acts, hook, recipe, **metadata)
        if recipe.kind in TRANSCODERS:
            sae.save_model(out / hook)
        else:
            sae.save_inference_model(out / hook)
        seconds = time.perf_counter() - start
        rows.append({"hook": hook, **quality(SAE.load_from_disk(out / hook), *test), "seconds": seconds})
    return pd.DataFrame(rows).set_index("hook")


def load_saes(folder: str | Path) -> Mapping[str, Any]:
    """The SAEs that `train_all` wrote, by hook, in the order of computation."""
    saes = [SAE.load_from_disk(path.parent) for path in sorted(Path(folder).glob("*/cfg.json"))]
    return {str(sae.cfg.metadata.hook_name): sae for sae in saes}


def stories(model: Any, recipe: Recipe, length: int = 128) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """TinyStories: rows to train on, and rows from the validation part."""
    train = data_folder("datasets", "tinystories", "train_part_cased.txt").read_text(encoding="utf-8")
    valid = data_folder("datasets", "tinystories", "valid_part_cased.txt").read_text(encoding="utf-8")
    rows = max(1, min(recipe.distinct, recipe.tokens) // (length - 1))
    return story_rows(model, train, length=length, rows=rows), story_rows(model, valid, length=length, rows=128)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = story_model(options.model)
    recipe = QUICK if options.quick else Recipe()
    given = {key: getattr(options, key) for key in ("kind", "features", "active", "tokens", "rate", "seed")}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    train, held_out = stories(model, recipe)
    hooks = options.hooks or hooks_at(model, options.at)
    table = train_all(model, hooks, train, held_out, recipe, options.out, model.cfg.model_name)
    print(table.round(4).to_string())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, one folder per hook")
    parser.add_argument("--model", type=Path, help="a model's folder with a tokenizer; default: stories260K")
    parser.add_argument("--hooks", nargs="+", help="default: one of every layer, that of --at")
    parser.add_argument("--at", default="hook_resid_post", help="the hook of each layer; default %(default)s")
    parser.add_argument("--kind", choices=KINDS, help=f"default {Recipe.kind}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.tokens} tokens instead of {Recipe.tokens}")
    parser.add_argument("--features", type=int, help=f"features per SAE; default {Recipe.features}")
    parser.add_argument("--active", type=int, help=f"k, or 1000 x L1 for standard; default {Recipe.active}")
    parser.add_argument("--tokens", type=int, help="training tokens, repeats counted")
    parser.add_argument("--rate", type=float, help=f"learning rate; default {Recipe.rate}")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
