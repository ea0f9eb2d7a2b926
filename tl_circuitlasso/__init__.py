"""tl_circuitlasso: sparse circuits of transformers by certified sparse linear regression.

    import tl_circuitlasso as tcl

    graph = model.run_circuit_lasso(tokens)                # any TransformerLens model
    graph.edge_table()

Importing this package is cheap: it loads neither torch nor TransformerLens; every part loads on first use.
Where TransformerLens is installed, `HookedTransformer` and `TransformerBridge` gain the method `run_circuit_lasso`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tl_circuitlasso import errors as errors
from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.attach import attach as _attach
from tl_circuitlasso.errors import CircuitLassoError as CircuitLassoError
from tl_circuitlasso.errors import FormatError as FormatError
from tl_circuitlasso.errors import InputError as InputError
from tl_circuitlasso.errors import ModelError as ModelError
from tl_circuitlasso.errors import SolveError as SolveError
from tl_circuitlasso.errors import StaleCheckpoint as StaleCheckpoint

if TYPE_CHECKING:
    from tl_circuitlasso import apps as apps
    from tl_circuitlasso import baselines as baselines
    from tl_circuitlasso import bench as bench
    from tl_circuitlasso import evaluate as evaluate
    from tl_circuitlasso import formats as formats
    from tl_circuitlasso import plot as plot
    from tl_circuitlasso import solve as solve
    from tl_circuitlasso import synthetic as synthetic
    from tl_circuitlasso import testing as testing
    from tl_circuitlasso.comparison import compare as compare
    from tl_circuitlasso.data.statistics import Statistics as Statistics
    from tl_circuitlasso.data.targets import Labels as Labels
    from tl_circuitlasso.data.targets import LogitDiff as LogitDiff
    from tl_circuitlasso.data.targets import Values as Values
    from tl_circuitlasso.demo import load_demo as load_demo
    from tl_circuitlasso.discover.designs import learn as learn
    from tl_circuitlasso.discover.planning import RunPlan as RunPlan
    from tl_circuitlasso.discover.run import circuit_lasso as circuit_lasso
    from tl_circuitlasso.discover.run import collect_statistics as collect_statistics
    from tl_circuitlasso.discover.run import plan as plan
    from tl_circuitlasso.experiment import Experiment as Experiment
    from tl_circuitlasso.formats.files import read as load  # noqa: F401
    from tl_circuitlasso.graph import AttributionGraph as AttributionGraph
    from tl_circuitlasso.graph.explaining import explain as explain
    from tl_circuitlasso.graph.explaining import supernodes as supernodes
    from tl_circuitlasso.graph.nodes import NodeIndex as NodeIndex
    from tl_circuitlasso.models.bases import Component as Component
    from tl_circuitlasso.models.bases import Neuron as Neuron
    from tl_circuitlasso.models.bases import Residual as Residual
    from tl_circuitlasso.models.cross_layer import CrossLayer as CrossLayer
    from tl_circuitlasso.models.sae import SAEFeatures as SAEFeatures
    from tl_circuitlasso.models.sae import load_sae as load_sae

__version__ = "0.2.0"

_MODULES = ("apps", "baselines", "bench", "evaluate", "formats", "plot", "solve", "synthetic", "testing")
_NAMES = {  # public name: the module that holds it
    "AttributionGraph": "graph",
    "Component": "models.bases",
    "CrossLayer": "models.cross_layer",
    "Labels": "data.targets",
    "Experiment": "experiment",
    "LogitDiff": "data.targets",
    "Neuron": "models.bases",
    "NodeIndex": "graph.nodes",
    "Residual": "models.bases",
    "RunPlan": "discover.planning",
    "SAEFeatures": "models.sae",
    "Statistics": "data.statistics",
    "Values": "data.targets",
    "circuit_lasso": "discover.run",
    "collect_statistics": "discover.run",
    "compare": "comparison",
    "explain": "graph.explaining",
    "learn": "discover.designs",
    "load": "formats.files",
    "load_demo": "demo",
    "load_sae": "models.sae",
    "plan": "discover.run",
    "supernodes": "graph.explaining",
}
_CALLED = {"load": "read"}  # where the function has another name at home
_ERRORS = ("CircuitLassoError", "FormatError", "InputError", "ModelError", "SolveError")

__all__ = sorted(["__version__", "errors", *_ERRORS, *_MODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home, at_home = f"{__name__}.{_NAMES[name]}", _CALLED.get(name, name)
        module = importlib.import_module(home)
        _guard(home, [at_home])
        return getattr(module, at_home)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


_attach()
