"""`model.run_circuit_lasso(tokens)` on every HookedTransformer and TransformerBridge.

The method is set on the class, so models made before and after the import have it, and so do subclasses
(HookedSAETransformer, SAETransformerBridge). transformer_lens takes seconds to import, so it is not imported for
this: where it isn't loaded yet, the method is set at the moment it is. The method's signature and documentation are
those of `circuit_lasso`, read from its source, so that they are there before that is imported, too.
"""

import ast
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# The module that defines each class; in TransformerLens 4.x only the second exists.
HOMES = {
    "transformer_lens.HookedTransformer": "HookedTransformer",
    "transformer_lens.model_bridge.bridge": "TransformerBridge",
}
METHOD = "run_circuit_lasso"


def run_circuit_lasso(self: Any, tokens: Any, **options: Any) -> Any:
    """`tl_circuitlasso.circuit_lasso(self, tokens, ...)`; `_describe` puts that function's documentation here."""
    import tl_circuitlasso

    return tl_circuitlasso.circuit_lasso(self, tokens, **options)


def attach() -> None:
    """Set the method on the model classes: now where their modules are loaded, else when they are loaded."""
    for name in HOMES:
        if isinstance(module := sys.modules.get(name), ModuleType):
            _set_on(module)
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _set_on(module: ModuleType) -> None:
    model_class = vars(module).get(HOMES[module.__name__])
    if isinstance(model_class, type) and METHOD not in vars(model_class):  # a method of the class's own stays
        _describe()
        setattr(model_class, METHOD, run_circuit_lasso)


def _describe() -> None:
    """Give the method the signature and the documentation of the function behind it, with `self` for `model`."""
    tree = ast.parse((Path(__file__).parent / "discover" / "run.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "circuit_lasso")
    spec, kinds = function.args, inspect.Parameter
    first = [_parameter(argument, kinds.POSITIONAL_OR_KEYWORD, None) for argument in spec.args]
    rest = [_parameter(a, kinds.KEYWORD_ONLY, value) for a, value in zip(spec.kwonlyargs, spec.kw_defaults)]
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD), *first[1:], *rest]
    returned = ast.unparse(function.returns) if function.returns else inspect.Signature.empty
    vars(run_circuit_lasso)["__signature__"] = inspect.Signature(parameters, return_annotation=returned)
    run_circuit_lasso.__doc__ = ast.get_docstring(function)


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    said = ast.unparse(argument.annotation) if argument.annotation else inspect.Parameter.empty
    value = inspect.Parameter.empty if default is None else _value(default)
    return inspect.Parameter(argument.arg, kind, default=value, annotation=said)


def _value(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except ValueError:  # a name: said as it is written
        return _Written(ast.unparse(expression))


@dataclass(frozen=True)
class _Written:
    text: str

    def __repr__(self) -> str:
        return self.text


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the two modules be found as always, and sets the method once they are loaded."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in HOMES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader)
        return spec


class _Announcing(importlib.abc.Loader):
    """A loader that does what the given one does, then sets the method."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _set_on(module)
