"""The architecture: imports go down the floors, and the light wings load without TransformerLens."""

import ast
import builtins
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tl_circuitlasso"

FLOORS = {  # a room may import those below its floor; docs/architecture.md shows this table
    "errors": 0,
    "_checks": 1, "naming": 1, "progress": 1, "attach": 1,
    "_fits": 2, "data": 2,
    "graph": 3, "solve": 3,
    "models": 4, "formats": 4,
    "synthetic": 5, "experiment": 5, "features": 5, "apps": 5, "demo": 5,
    "baselines": 6,
    "neurons": 7, "evaluate": 7,
    "discover": 8, "testing": 8,
    "bench": 9,
    "comparison": 10,
    "plot": 11,
    "cli": 12,
    "__main__": 13, "__init__": 13,
}  # fmt: skip
UPWARDS = {  # asked for when they are called, never when the room is imported
    ("baselines", "discover"): "the table of methods has the regression's circuit, confirmed",
    ("comparison", "plot"): "a comparison draws itself",
}
HEAVY = ("transformer_lens", "sae_lens")


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).with_suffix("").parts[0], path) for path in PACKAGE.rglob("*.py")]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The other rooms that a module imports anywhere but under TYPE_CHECKING, and whether at once or when called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if id(node) not in guarded and parts[0] == PACKAGE.name and parts[1:2] and parts[1] in FLOORS:
                yield parts[1], node in tree.body


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_imports_go_down(room: str, path: Path) -> None:
    assert room in FLOORS, f"{room} has no floor: give it one in this test and in docs/architecture.md"
    for other, at_once in imports(path):
        known = (room, other) in UPWARDS and not at_once
        assert other == room or known or FLOORS[other] < FLOORS[room], f"{path.name} of {room} imports {other}"


def test_the_page_on_the_architecture_shows_the_floors() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = {
        room: int(cells[0])
        for line in page.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0].isdigit()
        for room in re.findall(r"`(\w+)`", cells[1])
    }
    assert shown == {room: floor for room, floor in FLOORS.items() if room != "__init__"}


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


LIGHT = ("data.statistics", "graph", "solve", "formats", "plot", "discover.designs")
LOADING = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("tl_circuitlasso." + name)
    loaded = {"transformer_lens", "sae_lens"} & set(sys.modules)
    assert not loaded, f"{name} loads {loaded}"
"""


def test_light_parts_load_without_transformer_lens() -> None:
    """One after the other in one Python: what none of them loads together, none loads alone."""
    made = subprocess.run([sys.executable, "-c", LOADING, *LIGHT], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


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
