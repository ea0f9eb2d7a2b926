"""`run_circuit_lasso` is on every model class, whichever is imported first, and imports nothing itself."""

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
