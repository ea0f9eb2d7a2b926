"""Names of activations are written in one place."""

import ast
from pathlib import Path

import pytest

from tl_circuitlasso.models.names import KINDS, act

PACKAGE = Path(__file__).parents[2] / "tl_circuitlasso"
AT_HOME = {"names.py"}
SPELLED = tuple(f"{kind}." for kind in KINDS)


@pytest.mark.parametrize("room", ["apps", "baselines", "discover", "evaluate", "features", "models", "neurons"])
def test_no_name_is_spelled_elsewhere(room: str) -> None:
    """`act("z", layer)`, whose kind a type checker knows, in place of text, whose fault shows when it is run."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in (PACKAGE / room).rglob("*.py")
        if path.name not in AT_HOME
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr) and _spells_a_name(node)
    ]
    assert not found


def _spells_a_name(node: ast.JoinedStr) -> bool:
    first = node.values[0]
    whole = len(node.values) == 2 and isinstance(first, ast.Constant) and isinstance(node.values[1], ast.FormattedValue)
    return whole and first.value in SPELLED


def test_a_name_is_a_kind_and_a_layer() -> None:
    assert act("scale.attn_out", 3) == "scale.attn_out.3" and len(set(KINDS)) == len(KINDS)
