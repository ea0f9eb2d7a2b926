"""Tiny SAEs, trained with SAELens offline in seconds, and a plain object that SAELens never saw."""

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORY_HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 3))


@dataclass(frozen=True, eq=False)
class PlainSAE:
    """The least that the library asks of an SAE: encode, decode, W_dec."""

    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.bias)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec


def plain_sae(x: Tensor, features: int, *, share: float = 0.05, seed: int = 0) -> PlainSAE:
    """Random directions with thresholds at which each feature fires on about `share` of the samples `x`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, x.shape[1], generator=generator), dim=1)
    return PlainSAE(directions.T.contiguous(), directions, -(x @ directions.T).quantile(1 - share, dim=0))


def load_model(folder: Path, name: str) -> Any:
    """One of the reference models, by the loader that lies beside them."""
    spec = importlib.util.spec_from_file_location("load_model", folder / "load_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name)


def story_tokens(tokenizer: Any, text: str, *, prompts: int, length: int) -> Tensor:
    """Prompts of equal length that begin with BOS."""
    ids = tokenizer(text.replace("<|endoftext|>", "\n"), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: prompts * (length - 1)]).view(prompts, length - 1)
    return torch.cat([torch.full((prompts, 1), tokenizer.bos_token_id), rows], 1)


def train_sae(model: Any, tokens: Tensor, hook: str, folder: Path, *, features: int = 256, k: int = 8) -> Path:
    """A TopK SAE after a few hundred steps; the folder that SAELens writes."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=model.cfg.d_model, d_sae=features, k=k, dtype="float32", device="cpu"),
        model_name="stories260K",
        hook_name=hook,
        dataset_path="none",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=tokens.shape[1],
        train_batch_size_tokens=512,
        training_tokens=512 * 100,
        store_batch_size_prompts=32,
        n_batches_in_buffer=16,
        lr=3e-3,
        prepend_bos=True,
        sequence_separator_token=None,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
        device="cpu",
        seed=0,
        verbose=False,
    )
    data = Dataset.from_dict({"tokens": tokens.tolist()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model).run()
    return folder
