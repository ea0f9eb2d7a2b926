"""Every public function has an example in its documentation, and the example runs.

Public is what `dir` of the package and of its rooms shows, what the reference lists, and what a graph can do. That
examples do what they say is tested where doctests are; here it is counted that there are some, and that they call the
function that they stand under.
"""

import doctest
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tl_circuitlasso as tcl

# What can't run here: it takes live objects of tools that aren't dependencies, or a model with a tokenizer, and none is
# bundled.
ELSEWHERE = {
    "from_auto_circuit_edges", "from_eap_graph", "from_transformer_lens", "to_auto_circuit_edges",
    "to_circuit_tracer_graph", "to_eap_graph", "to_transformer_lens",
    "metric_by_name",
}  # fmt: skip


def _shown() -> Iterator[Any]:
    """What `dir` of the package and of its rooms shows, and the pages of the reference."""
    for name in dir(tcl):
        found = getattr(tcl, name)
        yield from (getattr(found, inner) for inner in dir(found)) if inspect.ismodule(found) else (found,)
    if importlib.util.find_spec("mkdocs") is None:  # the reference's pages are listed by a hook of it
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "site"))
    hooks = importlib.import_module("hooks")
    for _, names in hooks.REFERENCE.values():
        for path in (path for name in names.split() for path in hooks._paths(name)):
            module, _, leaf = path.rpartition(".")
            yield getattr(importlib.import_module(module), leaf)


def _public() -> dict[str, Any]:
    """Functions, and the methods of a graph, by where they are defined."""
    functions = [found for found in _shown() if inspect.isfunction(found)]
    methods = [
        getattr(found, "__func__", found)
        for kind in tcl.AttributionGraph.__mro__[:-1]
        for name, found in vars(kind).items()
        if not name.startswith("_")
    ]
    every = [*functions, *filter(inspect.isfunction, methods)]
    return {f"{f.__module__}.{f.__qualname__}": f for f in every if f.__module__.startswith("tl_circuitlasso")}


PUBLIC = _public()


def test_the_count_is_of_something() -> None:
    assert len(PUBLIC) > 130 and "tl_circuitlasso.discover.run.circuit_lasso" in PUBLIC


@pytest.mark.parametrize("path", sorted(PUBLIC))
def test_a_public_function_has_an_example_that_calls_it(path: str) -> None:
    function = PUBLIC[path]
    examples = doctest.DocTestParser().get_examples(function.__doc__ or "")
    name = function.__name__
    assert any(f"{name}(" in example.source for example in examples), f"{path} has no example that calls it"
    runs = any(not example.options.get(doctest.SKIP) for example in examples if f"{name}(" in example.source)
    assert runs or name in ELSEWHERE, f"the example of {path} is never run"
