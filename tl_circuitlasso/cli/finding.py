"""Commands that find circuits: demo and discover."""

import argparse
import csv
import io
from collections.abc import Set
from pathlib import Path
from typing import Any

from tl_circuitlasso.cli.asking import TARGETS, Question, question
from tl_circuitlasso.cli.options import MODEL, command, interactive, number_or_word, position, saes, writable
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.naming import of_model


def add(commands: Any) -> None:
    """Declare the commands."""
    added = command(commands, demo)
    added.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    added.add_argument("--prompts", type=int, default=512, help="number of prompts (default: 512)")

    added = command(commands, discover)
    added.add_argument("model", help=MODEL)
    added.add_argument("prompts", type=Path, nargs="?", help="prompts: .txt (one a line), .csv, .tsv, .json or .jsonl")
    added.add_argument("--column", help="column or field that holds the prompt")
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    added.add_argument("--basis", choices=["component", "neuron", "residual"], help="default: component")
    added.add_argument(
        "--sae", action="append", metavar="HOOK=PATH", default=[],
        help="features of an SAE at a hook as nodes: a folder of SAELens, or release/sae_id; may be repeated",
    )  # fmt: skip
    added.add_argument("--design", choices=["read", "routed", "activation", "paper"], help="default: read")
    added.add_argument(
        "--nonlinear", action="store_true",
        help="regress on functions of every parent in place of the parent alone (designs activation and paper)",
    )  # fmt: skip
    added.add_argument("--strength", default="auto", help="auto, cv, ebic, mcp, stability or a fraction of lambda_max")
    added.add_argument(
        "--method", default="lasso", choices=["lasso", "lasso+confirm"],
        help="lasso+confirm cuts every edge that lasso keeps in the model, too (needs --corrupted)",
    )  # fmt: skip
    added.add_argument(
        "--budget", type=int, help="with lasso+confirm: measure so many edges at most, the weakest first"
    )
    added.add_argument(
        "--size",
        help="with lasso+confirm, in place of testing edges: the smallest circuit that keeps this share of what the "
        "model does (auto: 0.9)",
    )
    added.add_argument(
        "--corrupted", metavar="COLUMN",
        help="the prompts with a word changed: a column of their file, or another file (demo: the bundled model's own)",
    )  # fmt: skip
    added.add_argument(
        "--target", choices=TARGETS,
        help="the behaviour: the model's own logits (default), answers over wrong ones (default with --answers), or "
        "labels or numbers of the prompts, in the column of --answers",
    )  # fmt: skip
    added.add_argument("--answers", metavar="COLUMN", help="column of the right answers, or one word for all prompts")
    added.add_argument("--wrong", metavar="COLUMN", help="column of the wrong answers, or one word for all prompts")
    added.add_argument("--positions", help="all, last or a position (default: last where there are answers, else all)")
    added.add_argument("--max-prompts", type=int, default=256, help="look at so many, drawn at random (0: at all)")
    added.add_argument("--save-prompts", action="store_true", help="write the prompts that were read to prompts.csv")
    added.add_argument("--batch-size", type=int, default=32)
    added.add_argument("--device", help="cpu, cuda, ... (default: where the model is)")
    added.add_argument("--memory", help="what the run may take, such as 8GB (default: what is free)")
    added.add_argument("--plan", action="store_true", help="print memory, passes and seconds by stage, and stop")
    added.add_argument("--seed", type=int, default=0)
    added.add_argument("--checkpoint", type=Path, help="file to resume an interrupted collection from")


def demo(arguments: argparse.Namespace) -> None:
    """Find the circuit of the bundled model and put it beside the truth."""
    from tl_circuitlasso.demo import load_demo
    from tl_circuitlasso.discover.run import circuit_lasso
    from tl_circuitlasso.evaluate import structure

    out = writable(arguments.out)
    bundled = load_demo(prompts=arguments.prompts)
    print(f"Model: {bundled.description}")
    for prompt, answer in list(zip(bundled.prompts, bundled.answers))[:2]:
        print(f"  {prompt} -> {answer}")
    graph = circuit_lasso(bundled.model, bundled.tokens, positions="last", progress=interactive(arguments))
    truth = structure(graph, bundled.true_edges, bundled.candidate_edges)
    print("Explained: the model's own logits, at the last position of each prompt")
    _print_edges(graph, bundled.true_edges)
    print(f"SHD to the known circuit: {truth.shd} (empty graph: {truth.empty_shd}); AUROC {truth.auroc:.4f}")
    _print_stages(graph)
    _write_all(graph, out, "Indirect object identification, bundled model")


def discover(arguments: argparse.Namespace) -> None:
    """Find the circuit of a model on the prompts of a file, or of the bundled model on its own task."""
    from tl_circuitlasso.cli.prompts import given
    from tl_circuitlasso.data.sharing import under_torchrun
    from tl_circuitlasso.discover.run import circuit_lasso, plan

    basis, out = _basis(arguments), arguments.out if arguments.plan else writable(arguments.out)
    found = given(arguments)
    asked = question(arguments, found)
    with under_torchrun() as ranks:  # `torchrun -m tl_circuitlasso discover ...` shares the work
        options = {
            "target": asked.target,
            "basis": basis,
            "strength": number_or_word(arguments.strength),
            "positions": position(asked.positions),
            "batch_size": arguments.batch_size,
            "device": arguments.device,
            "seed": arguments.seed,
            "checkpoint": arguments.checkpoint,
            "progress": interactive(arguments),
            "max_prompts": arguments.max_prompts or None,
            "method": arguments.method,
            "budget": arguments.budget,
            "size": None if arguments.size is None else number_or_word(arguments.size),
            "corrupted": found.corrupted,
            "process_group": ranks,
            "nonlinear": arguments.nonlinear,
            "memory": arguments.memory,
            **({"design": arguments.design} if arguments.design else {}),
        }
        run = plan if arguments.plan else circuit_lasso
        graph = run(found.model, found.prompts, **options)
    if ranks.rank:  # all have the same graph, one speaks
        return
    if arguments.plan:
        print(graph)
        return
    print(f"Explained: {asked.words}")
    _print_edges(graph, None)
    _print_stages(graph)
    if arguments.save_prompts:
        _save_prompts(out / "prompts.csv", found.texts, asked)
    _write_all(graph, out, _title(arguments))


def _title(arguments: argparse.Namespace) -> str:
    """Model and prompts by their names, without the folders that they lie in."""
    prompts = "its own prompts" if arguments.prompts is None else arguments.prompts.name
    return f"{of_model(arguments.model)}: {prompts}"


def _save_prompts(path: Path, prompts: list[str], asked: Question) -> None:
    """The prompts as they were read, with their answers, so that the run can be repeated."""
    from tl_circuitlasso.data.storage import write_text

    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerows([["prompt", *asked.columns], *zip(prompts, *asked.columns.values())])
    write_text(path, file.getvalue())


def _basis(arguments: argparse.Namespace) -> Any:
    if not arguments.sae:
        return arguments.basis or "component"
    if arguments.basis:
        raise InputError(f"`--basis` {arguments.basis} and `--sae` are two bases: give one of them")
    from tl_circuitlasso.models.sae import SAEFeatures

    return SAEFeatures(saes(arguments.sae))


def _print_edges(graph: Any, truth: Set[tuple[str, str]] | None) -> None:
    table = graph.edge_table()
    print(f"\nEdges kept{_unit(graph)}:")
    for row in table[table.kept].head(200).itertuples():
        mark = "" if truth is None else ("  true" if (row.source, row.target) in truth else "  FALSE")
        print(f"  {row.source:>8} -> {row.target:<8}{row.port or ' ':2}{row.score:10.4g}{mark}")
    if (more := int(table.kept.sum()) - 200) > 0:
        print(f"  ... {more:,} more in the files")
    if truth is not None and (missed := sorted(truth - graph.kept_edges())):
        print("  missed: " + ", ".join(f"{source} -> {target}" for source, target in missed))


def _unit(graph: Any) -> str:
    """What a score means, where the graph's provenance says."""
    unit = graph.provenance.get("unit")
    return f" (score: {unit})" if unit else ""


def _print_stages(graph: Any) -> None:
    seconds = graph.provenance.get("seconds", {})
    print("Time: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))


def _write_all(graph: Any, out: Path, title: str) -> None:
    from tl_circuitlasso import plot as plots

    graph.save(out)
    plots.interactive(graph, out / "graph.html", title=title)
    plots.circuit(graph, out / "graph.png", title=title)
    print(f"Wrote graph.json, graph.safetensors and graph.png to {out}")
    print(f"Open {out / 'graph.html'} in a web browser")
