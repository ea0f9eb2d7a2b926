"""Transformers whose circuit is known, as folders: model, prompts, and the edges that are really there.

A case is a folder with `model.safetensors`, `config.json`, `edges.json` (`candidate_edges`, `effective_edges`,
`flow_edges`, `gt_edges`, `circuit_nodes`), `data.safetensors` (`clean_tokens`, `corrupt_tokens`) and `meta.json`
(`output_type`). Position 0 is BOS and counts for nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_circuitlasso.data.storage import parse_json
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models.build import build_hooked_transformer

TRUTHS = ("effective", "flow", "gt")
Pair = tuple[str, str]
FILES = ("config.json", "model.safetensors", "edges.json", "data.safetensors", "meta.json")


@dataclass(frozen=True, eq=False)
class Case:
    """A model with prompt pairs and its true circuit.

    Attributes
    ----------
    clean, corrupted: unaligned pairs of prompts of equal length; positions from `first` on count.
    regression: the output is a number at each position, not a prediction among classes.
    truth, candidates: the true edges, and every edge that a method may return.
    true_nodes: input, logits and the components of the circuit.
    certified: no other edge has an effect on the output, so that edges can be scored; nodes always can.
    """

    name: str
    model: Any
    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    first: int
    regression: bool
    truth: frozenset[Pair]
    candidates: frozenset[Pair]
    true_nodes: frozenset[str]
    certified: bool
    port_truth: frozenset[tuple[str, str, str]] | None = None  # the data flow with q, k and v told apart


def load_case(folder: Path, truth: str = "effective") -> Case:
    """The case in `folder`.

    Raises
    ------
    InputError: a missing file, an unknown `truth`, no true edges, or a true edge that isn't a candidate.
    FormatError: a file that isn't what its name says.
    ModelError: weights and config that don't make a model.
    All messages name the case.

    >>> case = load_case(Path("benchmarks/cases/case_33"))                                # from a checkout's root
    >>> case.name, case.certified, len(case.truth)
    ('case_33', True, 2)
    """
    if truth not in TRUTHS:
        raise InputError(f"`truth` is {truth!r}: write 'effective', 'flow' or 'gt'")
    name = folder.name
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise InputError(f"case {name}: {', '.join(missing)} missing in {folder}")
    edges, meta, config = (_json(folder / file) for file in ("edges.json", "meta.json", "config.json"))
    data, weights = _tensors(folder / "data.safetensors"), _tensors(folder / "model.safetensors")
    true, candidates = _pairs(edges, f"{truth}_edges", name), _pairs(edges, "candidate_edges", name)
    check_truth(name, true, candidates)
    try:
        model = build_hooked_transformer(config, weights)
        return Case(
            name=name,
            model=model,
            clean=data["clean_tokens"].long(),
            corrupted=data["corrupt_tokens"].long(),
            first=1,
            regression=meta["output_type"] == "regression",
            truth=true,
            candidates=candidates,
            true_nodes=frozenset({"input", "logits", *edges["circuit_nodes"]}),
            certified=not edges.get("false_effective_edges"),
            port_truth=_ports(edges["flow_edges_qkv"]) if "flow_edges_qkv" in edges else None,
        )
    except KeyError as error:
        raise FormatError(f"case {name}: {error.args[0]!r} is missing in its files") from error
    except CircuitLassoError as error:
        raise type(error)(f"case {name}: {error}") from error


def check_truth(name: str, true: frozenset[Pair], candidates: frozenset[Pair]) -> None:
    """Raise InputError, naming the case, for a truth that nothing can be scored against."""
    if not true:
        raise InputError(f"case {name}: it has no true edges, so nothing can be scored; choose another `truth`")
    if outside := sorted(true - candidates):
        raise InputError(f"case {name}: the true edge {'->'.join(outside[0])} isn't among its candidate edges")


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise FormatError(f"case {path.parent.name}: {path} isn't text ({error})") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"case {path.parent.name}: {path} isn't a whole safetensors file ({error})") from error


def _pairs(edges: Mapping[str, Any], key: str, name: str) -> frozenset[Pair]:
    if key not in edges:
        raise InputError(f"case {name}: edges.json has no `{key}`; it has {', '.join(edges)}")
    return frozenset((str(source), str(target)) for source, target in edges[key])


def _ports(edges: list[list[str]]) -> frozenset[tuple[str, str, str]]:
    """Edges whose head targets carry their port as a suffix, such as a0.h1.q."""
    split = ((source, re.fullmatch(r"(.+?)(?:\.([qkv]))?", target)) for source, target in edges)
    return frozenset((source, found[1], found[2] or "") for source, found in split if found)


def limited(case: Case, prompts: int | None) -> tuple[Tensor, Tensor]:
    """The first `prompts` pairs of a case (None: all)."""
    return case.clean[:prompts], case.corrupted[:prompts]


def case_folders(folder: Path) -> list[Path]:
    """The cases in a folder, by number where they have one: every sub-folder with an `edges.json` or `config.json`.

    Raises
    ------
    InputError: no such folder, or no cases in it.
    """
    if not folder.is_dir():
        raise InputError(f"`folder` {str(folder)!r} is not a folder")
    found = [path for path in folder.iterdir() if path.is_dir() and any((path / file).exists() for file in FILES)]
    if not found:
        raise InputError(f"`folder` {str(folder)!r} holds no cases: sub-folders with {', '.join(FILES)}")
    return sorted(found, key=_number_then_name)


def _number_then_name(path: Path) -> tuple[int, str]:
    digits = "".join(ch for ch in path.name if ch.isdigit())
    return int(digits) if digits else 10**9, path.name


def all_candidates(n_layers: int, n_heads: int) -> frozenset[Pair]:
    """Every edge of a model with attention and MLPs, input -> logits apart (no method is asked for it)."""
    return component_index(n_layers=n_layers, n_heads=n_heads).allowed_pairs() - {("input", "logits")}


def uniform_prompts(vocabulary: int, special: set[int], bos: int, length: int, n: int, seed: int) -> Tensor:
    """Prompts of BOS and uniformly drawn ordinary tokens."""
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    drawn = ordinary[torch.randint(len(ordinary), (n, length - 1), generator=generator)]
    return torch.cat([torch.full((n, 1), bos), drawn], dim=1)
