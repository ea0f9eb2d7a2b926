"""Hostile files: whatever a reader is given, it answers with a graph or with a FormatError, and soon."""

import json
import random
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.helpers import feature_graph, small_graph
from tl_circuitlasso import formats
from tl_circuitlasso.errors import FormatError
from tl_circuitlasso.formats import _frontend, _read, _tracer_tensors
from tl_circuitlasso.graph import AttributionGraph

Reader = Callable[[Path], Any]
SECONDS = 30  # far above what these small files need, far below what a hang takes


def write_tracer_tensors(path: Path) -> None:
    """The fields of circuit-tracer's graph without its classes, so that no package is needed."""
    page = _frontend.page(small_graph(), slug="", scan="unknown", prompt="", supernodes=None, pinned=())
    data = _tracer_tensors.tensors_of_page(page, small_graph())
    torch.save(data | {"logit_targets": torch.tensor([logit.vocab_idx for logit in data["logit_targets"]])}, path)


TEXT: dict[str, tuple[str, Reader, Callable[[Path], Any]]] = {
    "eap": (".json", formats.from_eap, lambda path: formats.to_eap(small_graph(), path)),
    "circuits_benchmark": (
        ".json",
        formats.from_circuits_benchmark,
        lambda path: formats.to_circuits_benchmark(small_graph(), path),
    ),
    "neuronpedia": (".json", formats.from_neuronpedia, lambda path: formats.to_neuronpedia(feature_graph(), path)),
    "circuit_tracer": (
        ".json",
        formats.from_circuit_tracer,
        lambda path: formats.to_circuit_tracer(small_graph(), path),
    ),
    "guessed": (".json", formats.read, lambda path: formats.to_eap(small_graph(), path)),
    "own": (".json", formats.read, lambda path: feature_graph().save(path)),
    "cytoscape": (".json", formats.from_cytoscape, lambda path: formats.to_cytoscape(small_graph(), path)),
    "graphml": (".graphml", formats.from_graphml, lambda path: formats.to_graphml(feature_graph(), path)),
    "gexf": (".gexf", formats.from_gexf, lambda path: formats.to_gexf(feature_graph(), path)),
}
TENSORS: dict[str, tuple[str, Reader, Callable[[Path], Any]]] = {
    "eap": (".pt", formats.from_eap, lambda path: formats.to_eap(small_graph(), path)),
    "acdc": (".pth", formats.from_acdc, lambda path: formats.to_acdc(small_graph(), path)),
    "auto_circuit": (".pt", formats.from_auto_circuit, lambda path: formats.to_auto_circuit(small_graph(), path)),
    "circuit_tracer": (".pt", formats.from_circuit_tracer, lambda path: write_tracer_tensors(path)),
}
FILES_ONLY = ("guessed", "own")
ALL = {f"{name}{entry[0]}": entry for group in (TEXT, TENSORS) for name, entry in group.items()}
JSON = {name: entry for name, entry in TEXT.items() if entry[0] == ".json"}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, bytes]:
    """A valid file's bytes for every reader."""
    folder = tmp_path_factory.mktemp("valid")
    files = {}
    for name, (suffix, _, write) in ALL.items():
        write(folder / f"graph{suffix}")
        files[name] = (folder / f"graph{suffix}").read_bytes()
    return files


def answers(read: Reader, source: Any) -> None:
    """Read, and check that the answer is a graph or a FormatError that comes soon."""
    start = time.monotonic()
    try:
        assert isinstance(read(source), AttributionGraph)
    except FormatError as error:
        assert str(error)
    assert time.monotonic() - start < SECONDS


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """What is done to a file's bytes: kind, place as a fraction, new bytes."""
    kind = st.sampled_from(["cut", "flip", "insert", "delete", "repeat"])
    return draw(st.lists(st.tuples(kind, st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))


def damaged(raw: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, new in damage:
        at = int(place * len(raw))
        match kind:
            case "cut":
                raw = raw[:at]
            case "flip":
                raw = raw[:at] + new + raw[at + len(new) :]
            case "insert":
                raw = raw[:at] + new + raw[at:]
            case "delete":
                raw = raw[:at] + raw[at + len(new) :]
            case _:
                raw = raw[:at] + raw[at : at + 64] * 3 + raw[at + 64 :]
    return raw


@pytest.mark.parametrize("name", ALL)
@given(damages())
def test_damaged_bytes(name: str, valid, tmp_path, damage) -> None:
    suffix, read, _ = ALL[name]
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(damaged(valid[name], damage))
    answers(read, path)


@pytest.mark.parametrize("name", ALL)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))))
def test_arbitrary_bytes(name: str, tmp_path, raw: bytes) -> None:
    suffix, read, _ = ALL[name]
    path = tmp_path / f"arbitrary{suffix}"
    path.write_bytes(raw)
    answers(read, path)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.integers(-3, 70_000),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        ["input", "m0", "a0.h1", "logits", "a0.h1->m0", "blocks.0.hook_mlp_in", "0_1_1", "E", "#3", "m0#-1"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested lists and dicts."""
    found, todo = [], [data]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here))
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], (dict, list)):
                todo.append(here[key])
    return found


def spoil(data: Any, changes: list[tuple[int, str, Any]]) -> None:
    """Replace, remove or rename entries of nested data."""
    for number, kind, value in changes:
        spots = places(data)
        if not spots:
            return
        container, key = spots[number % len(spots)]
        if kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[str(value)[:20]] = container.pop(key)
        else:
            container[key] = value


CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.sampled_from(["replace", "replace", "remove", "rename"]), VALUES),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", JSON)
@given(CHANGES)
def test_changed_json(name: str, valid, tmp_path, changes) -> None:
    suffix, read, _ = JSON[name]
    data = json.loads(valid[f"{name}{suffix}"])
    spoil(data, changes)
    path = tmp_path / f"changed{suffix}"
    path.write_text(json.dumps(data), encoding="utf-8")
    answers(read, path)
    if name not in FILES_ONLY:
        answers(read, data)


@pytest.mark.parametrize("name", TENSORS)
@given(CHANGES)
def test_changed_tensors(name: str, valid, tmp_path, changes) -> None:
    suffix, read, _ = TENSORS[name]
    data = torch.load(BytesIO(valid[f"{name}{suffix}"]), weights_only=True)
    spoil(data, changes)
    answers(read, data)


ODD_TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.full((2, 2), float("nan")),
        torch.zeros(1).expand(1 << 45),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.int8),
        torch.ones(4, dtype=torch.bool),
        torch.eye(3).to_sparse(),
        torch.arange(1 << 10),
        torch.tensor([[1 << 62, -1, 5]]),
        torch.empty(2, 2, device="meta"),
    ]
)


@pytest.mark.parametrize("name", TENSORS)
@given(st.integers(0, 1 << 20), ODD_TENSORS)
def test_odd_tensors(name: str, valid, number: int, tensor: torch.Tensor) -> None:
    suffix, read, _ = TENSORS[name]
    data = torch.load(BytesIO(valid[f"{name}{suffix}"]), weights_only=True)
    spoil(data, [(number, "replace", tensor)])
    answers(read, data)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "9" * 10_000, "-", '"\\ud800"', "NaN", "1e999", "", "\0"]
)
def test_bombs_in_json(name: str, text: str, tmp_path) -> None:
    suffix, read, _ = JSON[name]
    path = tmp_path / f"bomb{suffix}"
    path.write_text(text)
    with pytest.raises(FormatError, match="bomb"):
        read(path)


@pytest.mark.parametrize("name", ALL)
def test_missing_files_and_folders(name: str, tmp_path) -> None:
    suffix, read, _ = ALL[name]
    with pytest.raises(FormatError, match="no such file"):
        read(tmp_path / f"none{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FormatError, match="folder"):
        read(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("name", TEXT)
def test_files_past_the_size_limit(name: str, valid, tmp_path, monkeypatch) -> None:
    suffix, read, _ = TEXT[name]
    path = tmp_path / f"large{suffix}"
    path.write_bytes(valid[f"{name}{suffix}"])
    monkeypatch.setattr(_read, "MAX_VALUES", 3)
    with pytest.raises(FormatError, match="too many"):
        read(path)


def test_a_file_that_is_too_large_is_not_opened(tmp_path) -> None:
    path = tmp_path / "sparse.json"
    with path.open("wb") as file:
        file.truncate(_read.MAX_TEXT + 1)
    with pytest.raises(FormatError, match="more than"):
        formats.from_eap(path)


def test_compressed_archives_are_refused(valid, tmp_path) -> None:
    path = tmp_path / "graph.pt"
    with zipfile.ZipFile(BytesIO(valid["eap.pt"])) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    with pytest.raises(FormatError, match="compressed"):
        formats.from_eap(path)


def test_archives_that_unpack_to_too_much_are_refused(valid, tmp_path, monkeypatch) -> None:
    path = tmp_path / "graph.pt"
    path.write_bytes(valid["eap.pt"])
    monkeypatch.setattr(_read, "MAX_ARCHIVE", 100)
    with pytest.raises(FormatError, match="unpacks"):
        formats.from_eap(path)


class _Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


@pytest.mark.parametrize("name", TENSORS)
def test_code_in_a_file_never_runs(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    suffix, read, _ = TENSORS[name]
    torch.save({"edges_scores": _Attack()}, tmp_path / f"attack{suffix}")
    with pytest.raises(FormatError, match=r"io\.open"):
        read(tmp_path / f"attack{suffix}")
    assert not (tmp_path / "attacked").exists()


def test_a_small_file_cannot_ask_for_a_large_graph() -> None:
    cfg = {"n_layers": 400, "n_heads": 200, "parallel_attn_mlp": False, "d_model": 1}
    start = time.monotonic()
    with pytest.raises(FormatError, match="wrong `cfg`"):
        formats.from_eap({"cfg": cfg, "nodes": {}, "edges": {}})
    assert time.monotonic() - start < SECONDS


@settings(max_examples=10)
@given(st.integers(0, 1 << 30))
def test_deep_and_wide_values_in_every_place(seed: int) -> None:
    rng = random.Random(seed)
    deep: Any = []
    for _ in range(rng.randrange(2_000)):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    data = formats.to_eap(small_graph())
    container, key = rng.choice(places(data))
    container[key] = deep
    answers(formats.from_eap, data)
