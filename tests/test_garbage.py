"""What a call allocates is free when it returns: activations in a circle of references wait for the garbage collector,
which counts objects, not bytes, and comes too late for large models."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.demo import Demo, load_demo
from tl_circuitlasso.synthetic import random_sae


@contextmanager
def left_behind() -> Iterator[list[Any]]:
    """What only the collector could free of what is allocated inside."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.extend(thing for thing in gc.garbage if isinstance(thing, Tensor))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _saes() -> dict[str, Any]:
    return {f"blocks.{layer}.hook_resid_post": random_sae(48, 64, seed=layer) for layer in range(2)}


CALLS: dict[str, Callable[[Demo], object]] = {
    "circuit_lasso": lambda demo: tcl.circuit_lasso(demo.model, demo.tokens, progress=False),
    "contrast pairs": lambda demo: tcl.circuit_lasso(
        demo.model, demo.tokens, corrupted=demo.corrupted, target=demo.target, positions="last", progress=False
    ),
    "neurons": lambda demo: tcl.circuit_lasso(
        demo.model, demo.tokens, corrupted=demo.corrupted, target=demo.target, basis="neuron", progress=False
    ),
    "features": lambda demo: tcl.circuit_lasso(
        demo.model, demo.tokens, basis=tcl.SAEFeatures(_saes(), min_count=2), progress=False
    ),
    "faithfulness": lambda demo: evaluate.faithfulness(demo.model, demo.circuit, *_asked(demo), progress=False),
    "mean ablation": lambda demo: evaluate.faithfulness(
        demo.model, demo.circuit, *_asked(demo), "mean", progress=False
    ),
    "optimal ablation": lambda demo: evaluate.faithfulness(
        demo.model, demo.circuit, *_asked(demo), "optimal", progress=False
    ),
    "curve": lambda demo: evaluate.curve(demo.model, demo.circuit, *_asked(demo), progress=False),
    "tests": lambda demo: evaluate.tests(demo.model, demo.circuit, *_asked(demo), circuits=10, progress=False),
    "eap-ig": lambda demo: baselines.eap_ig(demo.model, *_asked(demo), progress=False),
    "acdc": lambda demo: baselines.acdc(demo.model, *_asked(demo), progress=False),
    "exact": lambda demo: baselines.exact(demo.model, *_asked(demo), progress=False),
}


def _asked(demo: Demo) -> tuple[Any, Any, Any]:
    return demo.tokens, demo.corrupted, demo.target


@pytest.mark.parametrize("name", CALLS)
def test_nothing_large_waits_for_the_garbage_collector(name: str) -> None:
    demo = load_demo(prompts=16)
    CALLS[name](demo)  # what is kept on purpose (folded weights, compiled loops) is there from now on
    with left_behind() as found:
        CALLS[name](demo)
    assert sum(tensor.nbytes for tensor in found) < 1000


def test_a_circle_of_references_is_found() -> None:
    with left_behind() as found:
        circle: list[Any] = [torch.zeros(1000)]
        circle.append(circle)
        del circle
    assert sum(tensor.nbytes for tensor in found) == 4000
