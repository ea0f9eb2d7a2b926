"""Work in processes of their own, forked from one in which the libraries stand ready.

A new Python spends seconds on importing torch and transformer_lens before it comes to the test. Here one server does
so once, and every process is forked from it: as clean as a new one (nothing of the tests' own process is in it, the
run-time check of annotations neither), but there at once. What tests how the package is imported starts Python anew.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch.multiprocessing

READY = ["pytest", "transformer_lens", "tl_circuitlasso.discover.run", "tests.architectures", "tests.sae.training"]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(READY)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns, or raises, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        return pool.submit(work, *arguments).result()


def as_two(work: Callable[..., None], *arguments: Any, size: int = 2) -> None:
    """Run `work(rank, *arguments)` in two (or `size`) processes at once, rank 0 first; raises if any of them fails."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=size, start_method="forkserver")
