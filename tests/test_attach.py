"""`run_circuit_lasso` is on every model class, whichever is imported first, and imports nothing itself."""

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import tl_circuitlasso
from tests import architectures
from tl_circuitlasso import attach


def _python(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CHECK = """
import sys, tl_circuitlasso
assert "transformer_lens" not in sys.modules
found = 0
try:
    from transformer_lens import HookedTransformer
    found += "run_circuit_lasso" in vars(HookedTransformer)
except ImportError:
    pass
try:
    from transformer_lens.model_bridge import TransformerBridge
    found += "run_circuit_lasso" in vars(TransformerBridge)
except ImportError:
    pass
assert found
"""


def test_transformer_lens_is_not_imported_but_gains_the_method_when_it_is() -> None:
    _python(CHECK)


@pytest.mark.parametrize("name", attach.HOMES)
def test_classes_that_are_there_already_gain_the_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(name)
    model_class = type(attach.HOMES[name], (), {})
    vars(module)[attach.HOMES[name]] = model_class
    monkeypatch.setitem(sys.modules, name, module)
    attach.attach()
    assert vars(model_class)["run_circuit_lasso"] is attach.run_circuit_lasso


def test_the_method_calls_circuit_lasso(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.small()
    calls = []
    record = lambda *args, **options: calls.append((args, options))  # noqa: E731
    monkeypatch.setitem(vars(tl_circuitlasso), "circuit_lasso", record)
    model.run_circuit_lasso("tokens", strength=0.1)
    assert calls == [((model, "tokens"), {"strength": 0.1})]


def test_the_method_shows_the_signature_and_the_documentation_of_circuit_lasso() -> None:
    model = architectures.small()
    told = inspect.signature(type(model).run_circuit_lasso).parameters
    behind = inspect.signature(tl_circuitlasso.circuit_lasso).parameters
    assert list(told) == ["self", *list(behind)[1:]]
    assert [p.default for p in told.values()][1:] == [p.default for p in behind.values()][1:]
    assert [p.kind for p in told.values()] == [p.kind for p in behind.values()]
    assert inspect.getdoc(type(model).run_circuit_lasso) == inspect.getdoc(tl_circuitlasso.circuit_lasso)


def test_the_package_loads_without_torch_and_quickly() -> None:
    _python(
        "import sys, time; start = time.process_time(); import tl_circuitlasso; spent = time.process_time() - start;"
        "assert not {'torch', 'numpy', 'pandas', 'transformer_lens'} & set(sys.modules);"
        "assert spent < 0.3, spent"
    )


def test_the_package_shows_its_public_names_only() -> None:
    names = dir(tl_circuitlasso)
    assert {"circuit_lasso", "load", "explain", "supernodes", "LogitDiff", "plot"} <= set(names)
    assert all(getattr(tl_circuitlasso, name) is not None for name in names)
    assert not {"Any", "TYPE_CHECKING", "importlib"} & set(names)
    for room in (tl_circuitlasso.evaluate, tl_circuitlasso.baselines, tl_circuitlasso.solve, tl_circuitlasso.apps):
        assert all(callable(getattr(room, name)) or name.isupper() for name in dir(room)), room


def test_attaching_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    attach.attach()
    assert sys.meta_path == finders


def test_a_method_of_the_class_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class HookedTransformer:
        def run_circuit_lasso(self) -> str:
            return "own"

    module = ModuleType("transformer_lens.HookedTransformer")
    vars(module)["HookedTransformer"] = HookedTransformer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    attach.attach()
    assert HookedTransformer().run_circuit_lasso() == "own"
