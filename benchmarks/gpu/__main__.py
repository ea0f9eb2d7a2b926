"""Everything that a card is to do, measured in one go.

    python -m benchmarks.gpu --all --minutes 8 --out card.jsonl        every part, each in its share of the time
    python -m benchmarks.gpu --only solver grams --minutes 5 --out card.jsonl
    python -m benchmarks.gpu --rehearse --out toy.jsonl                every part at toy size on the CPU: does it run?
    python -m benchmarks.gpu --only solver --sources 2048 --out card.jsonl

A line of JSON for every figure, written as it is measured, so that what was measured is kept whatever happens later;
the first line names the device and what it reaches, and the last of each part says how it ended. A table at the end.
"""

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu import equality, features, graphs, ranks, solver
from benchmarks.gpu.device import Device
from benchmarks.gpu.parts import FULL, TOY, Part, run_all, table

PARTS = [
    Part("equality", 2, equality.equality),
    Part("graphs", 5, graphs.graphs),
    Part("pairs", 2, features.pairs),
    Part("solver", 3, solver.families),
    Part("grams", 1, solver.grams),
    Part("ranks", 0.5, ranks.one_rank),
]


def load() -> None:
    """Import what parts would import while their time is measured."""
    for name in ("torch._dynamo", "torch.profiler", "torch.distributed", "transformer_lens", "numba"):
        importlib.import_module(name)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; 1 where a part failed, 2 without a card."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--only", nargs="+", choices=names, help="some parts")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--sources", type=int, nargs="+", help="sizes of the Lassos (default: 8k, 16k, 32k)")
    parser.add_argument("--out", type=Path, required=True, help="where the lines go")
    given = parser.parse_args(arguments)
    if not (given.all or given.only or given.rehearse):
        parser.error("say --all, --only PART or --rehearse")
    if not given.rehearse and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--rehearse runs the same on the CPU, at toy size)")
        return 2
    size = TOY if given.rehearse else FULL
    size = replace(size, sources=tuple(given.sources)) if given.sources else size
    load()
    device = Device.measured("cpu", 128) if given.rehearse else Device.measured("cuda", 8192)
    print(json.dumps(device.facts), flush=True)
    parts = [part for part in PARTS if not given.only or part.name in given.only]
    found = run_all(parts, device, size, 60 * given.minutes, given.out)
    print(table(found))
    wrong = [line for line in found if line.get("end", "done") != "done" or line.get("equal") == "NO"]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
