"""The architecture: imports go down the floors, and the light wings load without TransformerLens."""

import ast
import builtins
import subprocess
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tl_circuitlasso"

FLOORS = {
    "errors": 0, "_checks": 0, "shapes": 0, "sharing": 0, "attach": 0, "naming": 0, "progress": 0,
    "storage": 1, "sites": 1, "nodes": 1, "statistics": 1, "schema": 1, "targets": 1, "relevance": 1, "stopping": 1,
    "selection": 1, "graph_file": 1, "graph_verbs": 1, "graph": 1, "explaining": 1, "synthetic": 1,
    "synthetic_codes": 1,
    "formats": 2, "models": 2, "solve": 2,
    "evaluate": 3, "baselines": 3, "apps": 3, "demo": 3,
    "garrote": 4, "choice": 4, "learning_read": 4, "learning": 4, "probing": 4, "refining": 4, "confirming": 4,
    "provenance": 4,
    "features": 4, "neurons": 4, "drawing": 4, "discover": 4, "plot": 4, "bench": 4, "comparison": 4, "testing": 4,
    "cli": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
WITHIN_FLOOR_1 = [
    "storage", "sites", "nodes", "statistics", "schema", "targets", "relevance", "stopping", "selection",
    "graph_file", "graph_verbs", "graph", "explaining", "synthetic", "synthetic_codes",
]  # fmt: skip
HEAVY = ("transformer_lens", "sae_lens")


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).with_suffix("").parts[0], path) for path in PACKAGE.rglob("*.py")]


def module_level_imports(path: Path) -> list[str]:
    """Imports that run when the module is imported: those in functions and under TYPE_CHECKING don't count."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def rooms(path: Path, imports: list[str]) -> set[str]:
    names = {name.split(".")[1] for name in imports if name.startswith("tl_circuitlasso.")}
    return names & set(FLOORS)


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_imports_go_down(room: str, path: Path) -> None:
    assert room in FLOORS, f"{room} has no floor: give it one in this test and in docs/architecture.md"
    for other in rooms(path, module_level_imports(path)) - {room}:
        here, there = FLOORS[room], FLOORS[other]
        if here == there == 1:
            assert WITHIN_FLOOR_1.index(other) < WITHIN_FLOOR_1.index(room), f"{path.name} imports {other}"
        elif here == there == 2:
            pytest.fail(f"{path.name}: the wings of floor 2 are mutually blind, but {room} imports {other}")
        else:
            assert there <= here, f"{path.name} (floor {here}) imports {other} (floor {there})"


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_only_models_touch_transformer_lens(room: str, path: Path) -> None:
    everything = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    heavy = [name for name in everything if name.split(".")[0] in HEAVY]
    assert room == "models" or not heavy, f"{path.name} imports {heavy}"


@pytest.mark.parametrize("module", ["graph", "solve", "formats", "statistics", "plot", "learning"])
def test_light_parts_load_without_transformer_lens(module: str) -> None:
    check = f"import tl_circuitlasso.{module}, sys; assert not {{'transformer_lens', 'sae_lens'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent)


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from scopes(inner)


@pytest.mark.parametrize("folder", ["tl_circuitlasso", "tests", "benchmarks"])
def test_every_name_is_defined(folder: str) -> None:
    """What linters can't look for here: they take the axes in annotations for names."""
    missing = []
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        module = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
        known = {name.get_name() for name in module.get_symbols() if name.is_assigned() or name.is_imported()}
        known |= {"__file__", "__name__", *dir(builtins)}
        for scope in scopes(module):
            used = {name.get_name() for name in scope.get_symbols() if name.is_referenced()}
            local = (
                set() if scope is module else {name.get_name() for name in scope.get_symbols() if not name.is_global()}
            )
            missing += [f"{path.name}: {scope.get_name()}: {name}" for name in used - local - known]
    assert missing == []
