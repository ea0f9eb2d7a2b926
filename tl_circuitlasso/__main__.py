"""The command line: `circuitlasso` or `python -m tl_circuitlasso`. Each command is one call into the library."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr where the input is at fault."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CircuitLassoError as error:
        print(f"circuitlasso {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    return 0


def demo(arguments: argparse.Namespace) -> None:
    """Find the circuit of the bundled model and put it beside the truth."""
    from tl_circuitlasso.demo import load_demo
    from tl_circuitlasso.discover import circuit_lasso
    from tl_circuitlasso.evaluate import structure

    bundled = load_demo(prompts=arguments.prompts)
    print(f"Model: {bundled.description}")
    for prompt, answer in list(zip(bundled.prompts, bundled.answers))[:2]:
        print(f"  {prompt} -> {answer}")
    graph = circuit_lasso(bundled.model, bundled.tokens, positions="last", progress=_interactive(arguments))
    truth = structure(graph, bundled.true_edges, bundled.candidate_edges)
    _print_edges(graph, bundled.true_edges)
    print(f"SHD to the known circuit: {truth.shd} (empty graph: {truth.empty_shd}); AUROC {truth.auroc:.4f}")
    _print_stages(graph)
    _write_all(graph, arguments.out, "Indirect object identification, bundled model")


def discover(arguments: argparse.Namespace) -> None:
    """Find the circuit of a model on the prompts of a file, or of the bundled model on its own task."""
    from tl_circuitlasso.discover import circuit_lasso

    model, prompts = _model_and_prompts(arguments)
    graph = circuit_lasso(
        model,
        prompts,
        basis=arguments.basis,
        design=arguments.design,
        strength=_strength(arguments.strength),
        positions=_positions(arguments.positions),
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
        checkpoint=arguments.checkpoint,
        progress=_interactive(arguments),
    )
    _print_edges(graph, None)
    _print_stages(graph)
    _write_all(graph, arguments.out, f"{arguments.model}: {arguments.prompts or 'its own prompts'}")


def plot(arguments: argparse.Namespace) -> None:
    """Draw a saved graph as HTML, PNG or SVG by the suffix of --out."""
    from tl_circuitlasso import plot as plots
    from tl_circuitlasso.graph import AttributionGraph

    graph = AttributionGraph.load(arguments.graph)
    if arguments.threshold is not None:
        graph = graph.threshold(arguments.threshold)
    if arguments.out.suffix == ".html":
        plots.interactive(graph, arguments.out, title=arguments.title)
    else:
        plots.circuit(graph, arguments.out, title=arguments.title)
    print(f"wrote {arguments.out}")


def info(arguments: argparse.Namespace) -> None:
    """Say what a saved graph holds and where it came from."""
    from tl_circuitlasso.graph import AttributionGraph

    graph = AttributionGraph.load(arguments.graph)
    print(graph)
    if len(graph.certificate):
        worst = graph.certificate.gap.max()
        share = graph.certificate.converged.mean()
        print(f"certificates: {len(graph.certificate)} regressions, {share:.0%} converged, worst gap {worst:.1e}")
    print(json.dumps(dict(graph.provenance), indent=1, default=str))


def evaluate(arguments: argparse.Namespace) -> None:
    """Put saved graphs to the test on the model: faithfulness, completeness and curves by intervention."""
    from tl_circuitlasso import evaluate as evaluation
    from tl_circuitlasso import plot as plots
    from tl_circuitlasso.graph import AttributionGraph
    from tl_circuitlasso.models.loading import load_model

    model = load_model(arguments.model)
    pairs = evaluation.read_pairs(arguments.prompts, arguments.limit)
    metric = evaluation.metric_by_name(arguments.metric, model, pairs)
    graphs = {path.stem if path.suffix else path.name: AttributionGraph.load(path) for path in arguments.graphs}
    report = evaluation.report(model, graphs, pairs.clean, pairs.corrupted, metric, arguments.ablation)
    print(report)
    if arguments.out:
        plots.curves(report.curves, arguments.out)
        print(f"wrote {arguments.out}")


def bench(arguments: argparse.Namespace) -> None:
    """Run methods over a folder of models with known circuits and print one table."""
    from tl_circuitlasso import bench as benches

    methods = arguments.methods.split(",") if arguments.methods else None
    report = benches.interpbench(
        arguments.folder, methods, truth=arguments.truth, progress=_interactive(arguments), json_path=arguments.json
    )
    print(report)


def _model_and_prompts(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    if arguments.model == "demo":
        from tl_circuitlasso.demo import load_demo

        bundled = load_demo(prompts=arguments.limit or 512)
        if arguments.prompts is None:
            return bundled.model, bundled.tokens
        given = read_prompts(arguments.prompts, arguments.column, arguments.limit)
        rows = [bundled.encode(prompt) for prompt in given]
        if len({row.shape[1] for row in rows}) > 1:
            raise InputError("`prompts` differ in length: the bundled model reads sentences of one form, word by word")
        return bundled.model, torch.cat(rows)
    from tl_circuitlasso.models.loading import load_model

    if arguments.prompts is None:
        raise InputError("`prompts` is missing: name a .txt, .csv, .tsv or .jsonl file (only `demo` brings its own)")
    return load_model(arguments.model), read_prompts(arguments.prompts, arguments.column, arguments.limit)


def read_prompts(path: Path, column: str | None, limit: int | None) -> list[str]:
    """The prompts of a text file (one a line), a CSV or TSV (a column), or JSON lines (a field).

    Raises
    ------
    InputError: no such file or column, or no prompts in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"`--prompts` {path} can't be read ({error}): give a .txt, .csv, .tsv or .jsonl file"
        ) from None
    if path.suffix in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    elif path.suffix == ".jsonl":
        rows = [_json_row(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        return _some([line for line in text.splitlines() if line.strip()], path, limit)
    names = list(rows[0]) if rows else []
    column = column or (names[0] if names else "")
    if rows and column not in names:
        raise InputError(f"`--column` {column!r} isn't in {path}: it has {', '.join(names)}")
    return _some([str(row[column]) for row in rows if row.get(column)], path, limit)


def _some(prompts: list[str], path: Path, limit: int | None) -> list[str]:
    if not prompts:
        raise InputError(f"`--prompts` {path} holds no prompts: put one on each line")
    return prompts[:limit]


def _json_row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise FormatError(f"{path}, line {number}: a {type(row).__name__} where an object is expected")
    return row


def _strength(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _positions(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdigit() else text


def _interactive(arguments: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not arguments.quiet


def _print_edges(graph: Any, truth: Set[tuple[str, str]] | None) -> None:
    table = graph.edge_table()
    print("\nEdges kept (score: what cutting the edge is expected to cost, in nats):")
    for row in table[table.kept].itertuples():
        mark = "" if truth is None else ("  true" if (row.source, row.target) in truth else "  FALSE")
        print(f"  {row.source:>8} -> {row.target:<8}{row.port or ' ':2}{row.score:10.4g}{mark}")
    if truth is not None and (missed := sorted(truth - graph.kept_edges())):
        print("  missed: " + ", ".join(f"{source} -> {target}" for source, target in missed))


def _print_stages(graph: Any) -> None:
    seconds = graph.provenance.get("seconds", {})
    print("Time: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))


def _write_all(graph: Any, out: Path, title: str) -> None:
    from tl_circuitlasso import plot as plots

    graph.save(out)
    plots.interactive(graph, out / "graph.html", title=title)
    plots.circuit(graph, out / "graph.png", title=title)
    print(f"Wrote graph.json, graph.safetensors, graph.html and graph.png to {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="circuitlasso", description="Sparse circuits of transformers by certified sparse linear regression."
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, demo)
    command.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    command.add_argument("--prompts", type=int, default=512, help="number of prompts (default: 512)")

    command = _command(commands, discover)
    command.add_argument("model", help="a TransformerLens model name, a local folder, or demo (the bundled model)")
    command.add_argument("prompts", type=Path, nargs="?", help="prompts: .txt (one a line), .csv, .tsv or .jsonl")
    command.add_argument("--column", help="column or field that holds the prompt (default: the first)")
    command.add_argument("--limit", type=int, help="use the first N prompts")
    command.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    command.add_argument("--basis", default="component", choices=["component", "neuron", "residual"])
    command.add_argument("--design", default="read", choices=["read", "routed", "activation"])
    command.add_argument("--strength", default="auto", help="auto, cv, ebic, stability or a fraction of lambda_max")
    command.add_argument("--positions", default="all", help="all, last or a position")
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--device", help="cpu, cuda, ... (default: where the model is)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--checkpoint", type=Path, help="file to resume an interrupted collection from")

    command = _command(commands, plot)
    command.add_argument("graph", type=Path, help="a saved graph: .safetensors, .json or a folder")
    command.add_argument("--out", type=Path, required=True, help="an .html, .png or .svg file")
    command.add_argument("--threshold", type=float, help="keep the edges with |score| of at least this")
    command.add_argument("--title")

    command = _command(commands, info)
    command.add_argument("graph", type=Path, help="a saved graph: .safetensors, .json or a folder")

    command = _command(commands, evaluate)
    command.add_argument("model", help="a TransformerLens model name, or a local folder")
    command.add_argument("prompts", type=Path, help=".csv, .tsv or .jsonl with clean, corrupted, correct, incorrect")
    command.add_argument("graphs", type=Path, nargs="+", help="saved graphs")
    command.add_argument("--metric", default="logit-diff")
    command.add_argument("--ablation", default="patch", choices=["patch", "mean", "zero"])
    command.add_argument("--limit", type=int, help="use the first N prompts")
    command.add_argument("--out", type=Path, help="draw the curves to this .png or .svg")

    command = _command(commands, bench)
    command.add_argument("suite", choices=["interpbench"])
    command.add_argument("folder", help="a folder of cases, or a hub repository such as cybershiptrooper/InterpBench")
    command.add_argument("--json", type=Path, help="write every figure of every case here")
    command.add_argument("--methods", help="comma-separated; default: all")
    command.add_argument("--truth", default="effective", choices=["effective", "flow", "gt"])
    return parser


def _command(commands: Any, run: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0], description=run.__doc__)
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
