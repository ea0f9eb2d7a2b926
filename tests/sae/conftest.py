"""SAEs for the tests: trained once a session on a small language model, and plain objects on the bundled model."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import tl_circuitlasso as tcl
from tests.helpers import shared_folder
from tests.sae import training
from tl_circuitlasso.demo import Demo, load_demo
from tl_circuitlasso.models import adapt

DEMO_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="session")
def stories() -> Any:
    """A real language model of 260 thousand parameters, named as its SAEs name it."""
    model, _ = training.load_model(shared_folder("models"), "stories260K")
    model.cfg.model_name = "stories260K"
    return model


@pytest.fixture(scope="session")
def story_tokens(stories: Any) -> Tensor:
    """200 prompts of 64 tokens, BOS first, that no SAE was trained on."""
    text = shared_folder("datasets", "tinystories", "valid_part_cased.txt").read_text(encoding="utf-8")[:60_000]
    return training.story_tokens(stories.tokenizer, text, prompts=200, length=64)


@pytest.fixture(scope="session")
def sae_folders(stories: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where SAELens saved the trained SAEs, by hook."""
    pytest.importorskip("sae_lens", reason="sae_lens is not installed")
    text = shared_folder("datasets", "tinystories", "train_part_cased.txt").read_text(encoding="utf-8")[:150_000]
    tokens = training.story_tokens(stories.tokenizer, text, prompts=600, length=64)
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # trained once for all workers
    folders = {hook: root / "saes" / hook for hook in training.STORY_HOOKS}
    with FileLock(root / "saes.lock"):
        for hook, folder in folders.items():
            if not folder.exists():
                training.train_sae(stories, tokens, hook, folder)
    return {hook: str(folder) for hook, folder in folders.items()}


@pytest.fixture(scope="session")
def saes(sae_folders: Mapping[str, str]) -> dict[str, Any]:
    """The trained SAEs, loaded."""
    return {hook: tcl.load_sae(folder) for hook, folder in sae_folders.items()}


@pytest.fixture(scope="session")
def story_graph(stories: Any, story_tokens: Tensor, saes: dict[str, Any]) -> tcl.AttributionGraph:
    """The default circuit of the trained SAEs."""
    return tcl.circuit_lasso(stories, story_tokens, basis=tcl.SAEFeatures(saes), progress=False)


@pytest.fixture(scope="session")
def demo() -> Demo:
    return load_demo()


@pytest.fixture(scope="session")
def demo_saes(demo: Demo) -> dict[str, training.PlainSAE]:
    """Plain objects with 48 features on the residual stream behind every layer of the bundled model."""
    mask = torch.ones_like(demo.tokens, dtype=torch.bool)
    acts = adapt(demo.model).run(demo.tokens, mask, DEMO_HOOKS)
    return {
        hook: training.plain_sae(acts[hook][:, 1:].flatten(0, 1), 48, seed=number)
        for number, hook in enumerate(DEMO_HOOKS)
    }
