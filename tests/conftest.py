"""Strict test mode: one thread, fixed seed, shape annotations checked by beartype, no network."""

import gc
import os
import webbrowser

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"

from tests import annotations  # noqa: E402

annotations.install("tl_circuitlasso")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Modules and tests stay till the end: the collector needn't walk them again and again (half of some tests)."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    annotations.forget()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems() -> None:
    """Examples that show a page open no window: also those of modules, which no fixture of this folder reaches."""
    webbrowser.open = lambda *_, **__: True  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
