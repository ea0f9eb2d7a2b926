"""How long the library is silent while it works, where there is no terminal: time stamps of the lines that it says.

    python -m benchmarks.silence MODEL                        a Hugging Face name or folder, 32 indirect objects
    python -m benchmarks.silence MODEL --calls pairs,tests
    python -m benchmarks.silence MODEL --every .2             bars speak all the time: what is left has no bar at all
    python -m benchmarks.silence                              the calls on SAE features, on stories260K

For each call: seconds by the clock and of the processor, lines, and the longest silence, from its start or a line to
the next line or its end, by the clock and in processor seconds, which other work on the machine doesn't stretch. The
two lines around it are printed, too.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

import tl_circuitlasso as tcl
from benchmarks.data import data_folder, story_model, story_rows
from benchmarks.real import tasks
from tl_circuitlasso import progress
from tl_circuitlasso.models.loading import load_model

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SAE_FEATURES = 512


@dataclass(frozen=True)
class Moment:
    """When something was said, by the clock and in processor seconds."""

    clock: float
    cpu: float
    said: str

    @classmethod
    def now(cls, said: str) -> "Moment":
        """This very moment."""
        return cls(time.monotonic(), time.process_time(), said)


class Listener(io.TextIOBase):
    """A standard error that isn't a terminal and notes when each line came."""

    def __init__(self) -> None:
        self.moments = [Moment.now("(start)")]

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            self.moments.append(Moment.now(text.strip().splitlines()[-1]))
        return len(text)


@dataclass(frozen=True)
class Silence:
    """What a call took, how often it spoke, and its longest silence, in processor seconds, with what stood around."""

    clock: float
    cpu: float
    lines: int
    silent: float
    silent_clock: float
    between: tuple[str, str]


def listen(call: Callable[[], object]) -> Silence:
    """Run a call and note its silences.

    >>> listen(lambda: None).lines
    0
    """
    listener = Listener()
    with contextlib.redirect_stderr(listener):
        call()
    moments = [*listener.moments, Moment.now("(end)")]
    before, after = max(pairwise(moments), key=lambda two: two[1].cpu - two[0].cpu)
    return Silence(
        clock=moments[-1].clock - moments[0].clock,
        cpu=moments[-1].cpu - moments[0].cpu,
        lines=len(moments) - 2,
        silent=after.cpu - before.cpu,
        silent_clock=max(two[1].clock - two[0].clock for two in pairwise(moments)),
        between=(before.said, after.said),
    )


def component_calls(model: Any, prompts: int) -> dict[str, Callable[[], object]]:
    """Finding and judging circuits of heads and MLPs on indirect objects."""
    task = tasks.task(model, "ioi", prompts=prompts)
    asked: dict[str, Any] = {"target": task.target, "positions": "last"}
    given = (task.clean, task.corrupted, task.metric)
    found: list[Any] = []

    def pairs() -> None:
        found.append(tcl.circuit_lasso(model, task.clean, corrupted=task.corrupted, **asked))

    def graph() -> Any:
        if not found:
            with contextlib.redirect_stderr(io.StringIO()):
                pairs()
        return found[0]

    return {
        "pairs": pairs,
        "alone": lambda: tcl.circuit_lasso(model, task.clean, **asked),
        "eap-ig": lambda: tcl.baselines.eap_ig(model, *given),
        "faithfulness": lambda: tcl.evaluate.faithfulness(model, graph(), *given),
        "curve": lambda: tcl.evaluate.curve(model, graph(), *given),
        "tests": lambda: tcl.evaluate.tests(model, graph(), *given, circuits=20),
    }


def feature_calls() -> dict[str, Callable[[], object]]:
    """Circuits of SAE features of stories260K: freshly made dictionaries, which cost the same as trained ones."""
    model = story_model()
    text = data_folder("datasets", "tinystories", "valid_part_cased.txt").read_text(encoding="utf-8")
    rows = story_rows(model, text, length=64, rows=512)
    saes = {hook: tcl.synthetic.random_sae(model.cfg.d_model, SAE_FEATURES, seed=i) for i, hook in enumerate(HOOKS)}
    basis = tcl.SAEFeatures(saes)
    return {"features": lambda: tcl.circuit_lasso(model, rows, basis=basis)}


def main(arguments: list[str] | None = None) -> int:
    """Run the calls one after the other and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name or a folder; default: SAE features on stories260K")
    parser.add_argument("--prompts", type=int, default=32, help="default %(default)s")
    parser.add_argument("--calls", help="some of them, commas between; default: all")
    parser.add_argument("--every", type=float, default=progress.EVERY, help="seconds between lines of one bar")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    progress.EVERY = options.every
    calls = component_calls(load_model(options.model), options.prompts) if options.model else feature_calls()
    chosen = options.calls.split(",") if options.calls else list(calls)
    if unknown := [name for name in chosen if name not in calls]:
        parser.error(f"--calls has {unknown[0]!r}: there are {', '.join(calls)}")
    print("call          clock    cpu  lines  longest silence (cpu / clock)", flush=True)
    for name in chosen:
        one = listen(calls[name])
        head = f"{name:12s} {one.clock:6.1f} {one.cpu:6.1f} {one.lines:6d}  {one.silent:.1f} / {one.silent_clock:.1f}"
        print(f"{head}\n    {one.between[0][:110]}\n    {one.between[1][:110]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
