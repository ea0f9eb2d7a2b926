"""Commands that read graphs: info, plot, compare, convert and check."""

import argparse
import json
from pathlib import Path
from typing import Any

from tl_circuitlasso.cli.judging import judged, say_other_questions
from tl_circuitlasso.cli.options import (
    ABLATION,
    GRAPH,
    METRIC,
    PICTURES,
    command,
    interactive,
    load_graph,
    load_graphs,
    load_truth,
    writable_file,
)
from tl_circuitlasso.errors import InputError


def add(commands: Any) -> None:
    """Declare the commands."""
    added = command(commands, info)
    added.add_argument("graph", type=Path, help=GRAPH)

    added = command(commands, plot)
    added.add_argument("graph", type=Path, help=GRAPH)
    added.add_argument("--out", type=Path, required=True, help="an .html, .png or .svg file")
    added.add_argument("--other", type=Path, help="a second graph, to stand beside it in the .html page")
    added.add_argument("--heatmap", action="store_true", help="draw the adjacency matrix instead of the layers")
    added.add_argument("--threshold", type=float, help="keep the edges with |score| of at least this")
    added.add_argument("--title", help="above the picture (default: the graph's own)")

    added = command(commands, compare)
    added.add_argument("graphs", type=Path, nargs="+", metavar="GRAPH", help=f"{GRAPH}; NAME=PATH to name it")
    added.add_argument("--truth", type=Path, help="the known circuit: a JSON list of [source, target], or a graph")
    added.add_argument("--edges", type=int, help="cut every circuit to so many edges")
    added.add_argument(
        "--faithfulness", nargs=2, metavar=("MODEL", "PROMPTS"),
        help="measure each circuit on the model, on prompt pairs as in `evaluate` (demo demo: the bundled ones)",
    )  # fmt: skip
    added.add_argument("--metric", default="logit-diff", help=METRIC)
    added.add_argument(
        "--ablation", default="patch", choices=["patch", "mean", "mean-all", "zero", "optimal"], help=ABLATION
    )
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument(
        "--out", type=Path, action="append", default=[], help=".html, .csv or a picture; may be repeated"
    )

    added = command(commands, convert)
    added.add_argument("source", type=Path, metavar="IN", help="the file or folder to read")
    added.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write")
    formats = ", ".join(_NAMES)
    added.add_argument("--from", dest="read_as", metavar="FORMAT", help=f"default: told by the file. One of {formats}")
    added.add_argument("--to", dest="write_as", metavar="FORMAT", help="default: told by the suffix, where it is clear")
    added.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="for the writer, such as task=ioi for mib"
    )

    added = command(commands, check)
    added.add_argument("submission", type=Path, help="a folder for MIB's leaderboard, or a Neuronpedia .json")


# as in formats.READERS, which would load torch for --help
_NAMES = (
    "circuit-lasso", "acdc", "auto-circuit", "circuit-tracer", "circuits-benchmark", "cytoscape", "eap", "gexf",
    "graphml", "mib", "neuronpedia",
)  # fmt: skip


def info(arguments: argparse.Namespace) -> None:
    """Say what a saved graph holds and where it came from."""
    graph = load_graph(arguments.graph)
    print(graph)
    if len(graph.certificate):
        worst = graph.certificate.gap.max()
        share = graph.certificate.converged.mean()
        print(f"certificates: {len(graph.certificate)} regressions, {share:.0%} converged, worst gap {worst:.1e}")
    print(json.dumps(dict(graph.provenance), indent=1, default=str))


def plot(arguments: argparse.Namespace) -> None:
    """Draw a saved graph as HTML, PNG or SVG by the suffix of --out."""
    from tl_circuitlasso import plot as plots

    page = arguments.out.suffix.lower() in (".html", ".htm")
    writable_file(arguments.out, (".html", ".htm", *PICTURES))
    if arguments.heatmap and page:
        raise InputError(f"`--heatmap` is a picture: write one of {', '.join(PICTURES)}, not {arguments.out.name}")
    if arguments.other and not page:
        raise InputError(f"`--other` stands beside the graph in a page: write an .html file, not {arguments.out.name}")

    graph = load_graph(arguments.graph)
    if arguments.threshold is not None:
        graph = graph.threshold(arguments.threshold)
    if page:
        other = load_graph(arguments.other) if arguments.other else None
        names = [path.stem for path in (arguments.graph, arguments.other) if path]
        distinct = names if len(set(names)) == 2 else None
        plots.interactive(graph, arguments.out, title=arguments.title, other=other, names=distinct)
    else:
        (plots.adjacency if arguments.heatmap else plots.circuit)(graph, arguments.out, title=arguments.title)
    print(f"Wrote {arguments.out}: {graph.n_kept} edges. Open it in a {'web browser' if page else 'picture viewer'}")


def compare(arguments: argparse.Namespace) -> None:
    """Put graphs side by side: agreement, distance to a known circuit, faithfulness, and what they cost."""
    from tl_circuitlasso.comparison import compare as compare_graphs

    for path in arguments.out:
        writable_file(path, (".html", ".csv", *PICTURES))
    truth = load_truth(arguments.truth) if arguments.truth else None
    given = load_graphs(arguments.graphs)
    found = compare_graphs(given, truth, edges=arguments.edges, **_on_model(arguments))
    print(found)
    if arguments.faithfulness:
        say_other_questions(given, arguments.metric, arguments.ablation)
    print(found.overlap.head(40).round(4).to_string(index=False))
    for path in arguments.out:
        found.save(path)
        print(f"Wrote {path}")
    if pages := [path for path in arguments.out if path.suffix.lower() == ".html"]:
        print(f"Open {pages[0]} in a web browser")


def _on_model(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.faithfulness:
        return {}
    name, prompts = arguments.faithfulness
    asked = judged(name, Path(prompts), arguments.metric, arguments.limit)
    return {**asked.as_options(), "ablation": arguments.ablation, "progress": interactive(arguments)}


def convert(arguments: argparse.Namespace) -> None:
    """Read a graph in any format and write it in another."""
    from tl_circuitlasso import formats

    read_as = arguments.read_as or formats.guess(arguments.source)
    graph = formats.read(arguments.source, read_as)
    options = dict(formats.option(word) for word in arguments.option)
    written = formats.write(graph, arguments.out, arguments.write_as, **options)
    print(f"{arguments.source} ({read_as}) -> {arguments.out} ({written}): {graph.n_kept} of {len(graph)} edges kept")


def check(arguments: argparse.Namespace) -> int:
    """Say why MIB's leaderboard or Neuronpedia would turn a submission down; exit 1 where they would."""
    from tl_circuitlasso import formats

    path = arguments.submission
    if path.suffix == ".json":
        formats.check_neuronpedia(path)
        faults = []
    else:
        faults = formats.check_mib(path)
    print("\n".join(faults) or f"{path}: nothing wrong")
    return 1 if faults else 0
