"""The published InterpBench models (huggingface.co/cybershiptrooper/InterpBench), read without running their pickles.

The repository keeps configs in `benchmark_metadata.json`, weights as torch state dicts (read with `weights_only`) and
each circuit as a pickled list of pairs of hook names, which a reader that knows no classes at all can read. It has no
prompts: they're drawn uniformly from the case's vocabulary, the corrupted ones independently of the clean ones.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from tl_circuitlasso.bench.cases import Case, Pair, all_candidates, check_truth, uniform_prompts
from tl_circuitlasso.data.storage import parse_json
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError
from tl_circuitlasso.models.build import build_hooked_transformer

METADATA = "benchmark_metadata.json"
PROMPTS = 1000


def download(repository: str) -> Path:
    """A local copy of a hub repository's weights, circuits and metadata.

    Raises
    ------
    InputError: no such repository, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [METADATA, "*/ll_model*.pth", "*/edges.pkl"]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"`folder` {repository!r} is neither a folder nor a hub repository in reach: {error}"
        ) from error


def case_entries(folder: Path) -> list[dict[str, Any]]:
    """The cases that a downloaded repository's metadata lists.

    Raises
    ------
    FormatError: the metadata isn't what it claims to be.
    """
    path = folder / METADATA
    data = parse_json(path.read_text(encoding="utf-8"), path)
    cases = data.get("cases")
    if not isinstance(cases, list) or not all(isinstance(case, dict) and "case_id" in case for case in cases):
        raise FormatError(f"{path}: has no list of cases with a `case_id`")
    return cases


def load_published(folder: Path, entry: dict[str, Any], *, seed: int = 0) -> Case:
    """One published case: its true edges at head level, with q, k and v promoted to their head.

    Raises
    ------
    InputError, FormatError, ModelError: naming the case.
    """
    name = str(entry["case_id"])
    try:
        config = dict(entry["transformer_cfg"])
        model = build_hooked_transformer(config, _weights(_only(folder / name, "ll_model*.pth")))
        candidates = all_candidates(int(config["n_layers"]), int(config["n_heads"]))
        truth = head_edges(read_pairs(_only(folder / name, "edges.pkl")))
        check_truth(name, truth, candidates)
        vocabulary, length = sorted(map(str, entry["vocab"])), int(entry["max_seq_len"])
    except KeyError as error:
        raise FormatError(f"case {name}: the metadata lacks {error.args[0]!r}") from error
    except CircuitLassoError as error:
        raise type(error)(str(error) if str(error).startswith("case ") else f"case {name}: {error}") from error
    special = _special_ids(vocabulary)
    clean, corrupted = (
        uniform_prompts(len(vocabulary) + 2, set(special.values()), special["BOS"], length, PROMPTS, seed + i)
        for i in range(2)
    )
    return Case(
        name=name,
        model=model,
        clean=clean,
        corrupted=corrupted,
        first=1,
        regression=int(config["d_vocab_out"]) == 1,
        truth=truth,
        candidates=candidates,
        true_nodes=frozenset(node for edge in truth for node in edge),
        certified=True,
    )


def _special_ids(vocabulary: list[str]) -> dict[str, int]:
    """BOS and PAD stand among the sorted words; numbers sort before words, so their own order doesn't matter."""
    words = sorted([*vocabulary, "BOS", "PAD"])
    return {word: words.index(word) for word in ("BOS", "PAD")}


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise InputError(f"case {folder.name}: no {pattern} in {folder}")
    return found[-1]


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise FormatError(f"{path}: not a file of plain tensors ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FormatError(f"{path}: holds something else than a table of tensors")
    return state


class _NoClasses(pickle.Unpickler):
    """Reads numbers, strings, lists, tuples and dicts; refuses everything that names a class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of names in a pickle that holds nothing but lists, tuples and strings.

    Raises
    ------
    FormatError: it holds anything else; nothing of it has been run then.
    """
    try:
        data = _NoClasses(io.BytesIO(path.read_bytes())).load()
        return [(source, target) for source, target in data if isinstance(source + target, str)]
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError(f"{path}: not a plain list of edges ({error}); it was not executed") from error


_HEAD_HOOK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(?:[qkvz]|result|[qkv]_input)\[(\d+)\]\Z")
_MLP_HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_mlp_(?:in|out)|mlp\.hook_(?:pre|post))\Z")


def head_edges(pairs: list[Pair]) -> frozenset[Pair]:
    """Edges between hook points as edges between heads and MLPs; those within one node vanish.

    >>> sorted(head_edges([("hook_embed", "blocks.0.hook_q_input[1]"), ("blocks.0.hook_q_input[1]",
    ...     "blocks.0.attn.hook_result[1]"), ("blocks.0.attn.hook_result[1]", "blocks.0.hook_resid_post")]))
    [('a0.h1', 'logits'), ('input', 'a0.h1')]

    Raises
    ------
    FormatError: a hook name that is neither of a head, an MLP, the embeddings nor the end of the model.
    """
    named = {(_node(source), _node(target)) for source, target in pairs}
    return frozenset((source, target) for source, target in named if source != target)


def _node(hook: str) -> str:
    if match := _HEAD_HOOK.match(hook):
        return f"a{match[1]}.h{match[2]}"
    if match := _MLP_HOOK.match(hook):
        return f"m{match[1]}"
    if hook in ("hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"):
        return "input"
    if hook.endswith("hook_resid_post"):
        return "logits"
    raise FormatError(f"the circuit names {hook!r}, which is neither of a head, an MLP, the input nor the output")
