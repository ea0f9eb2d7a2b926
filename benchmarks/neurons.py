"""Neuron circuits on subject-verb agreement: how faithful so many neurons are, by whichever method they were found.

    python -m benchmarks.neurons agreement MODEL DATA            faithfulness at each number of neurons, every method
    python -m benchmarks.neurons patching MODEL DATA             correlation of scores with exact patching of neurons
    python -m benchmarks.neurons cost MODEL DATA                 passes, processor time, memory by number of pairs
    python -m benchmarks.neurons edges MODEL DATA                edge circuits: |attribution| against the garrote
    python -m benchmarks.neurons steering MODEL CAPITALS         neurons behind states and capitals, scaled

MODEL is a folder as `load_model` reads it (SmolLM2-135M in the tables of the documentation), DATA the folder of
`simple`, `nounpp` and `within_rc` pairs as JSON lines. Neurons are found on training pairs and judged on test pairs:
F = mean logit difference at the last position, everything outside the circuit ablated by its mean over the corrupted
test prompts at the same position; faithfulness = (F(circuit) - F(none)) / (F(model) - F(none)).
"""

import argparse
from pathlib import Path

from benchmarks.neuron_parts.agreement import METHODS, TABLE, agreement
from benchmarks.neuron_parts.cost import costs
from benchmarks.neuron_parts.edges import edge_circuits
from benchmarks.neuron_parts.patching import patching
from benchmarks.neuron_parts.steering import CONTRASTS, steering
from tl_circuitlasso.models.loading import load_model

SETS = ("simple", "nounpp", "within_rc")
SIZES = (100, 200, 300, 500, 1000, 3000, 10000)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("agreement", "patching", "edges", "cost"):
        added = commands.add_parser(command)
        added.add_argument("model")
        added.add_argument("data", type=Path)
        added.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
        added.add_argument("--train", type=int, default=16 if command == "patching" else 300, help="pairs to find with")
        added.add_argument("--test", type=int, default=40, help="pairs to judge on")
        added.add_argument("--methods", nargs="+", default=list(TABLE), choices=list(METHODS))
        added.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
        added.add_argument("--count", type=int, default=300, help="neurons patched one by one")
        added.add_argument("--counts", nargs="+", type=int, default=[32, 128], help="pairs that `cost` is counted for")
        added.add_argument("--linked", type=int, default=128, help="neurons joined by edges")
    added = commands.add_parser("steering")
    added.add_argument("model")
    added.add_argument("data", type=Path, help="the table city_state_capital.csv")
    added.add_argument(
        "--contrast", default=CONTRASTS[0], choices=CONTRASTS, help="counterparts: another answer, or another question"
    )
    arguments = parser.parse_args()
    model, data = load_model(arguments.model), arguments.data
    if arguments.command == "agreement":
        agreement(model, data, arguments.sets, arguments.methods, arguments.sizes, arguments.train, arguments.test)
    if arguments.command == "steering":
        steering(model, data, contrast=arguments.contrast)
        return
    if arguments.command == "patching":
        patching(model, data, arguments.sets, arguments.count, arguments.train)
    if arguments.command == "cost":
        methods = {name: METHODS[name] for name in arguments.methods}
        costs(model, data, arguments.sets[0], methods, arguments.counts)
    for name in arguments.sets if arguments.command == "edges" else ():
        edge_circuits(model, data, name, arguments.linked, arguments.train, arguments.test)


if __name__ == "__main__":
    main()
