"""Commands that find circuits: demo and discover."""

import argparse
from collections.abc import Set
from pathlib import Path
from typing import Any

from tl_circuitlasso.cli.options import command, interactive, number_or_word, position, saes
from tl_circuitlasso.cli.prompts import model_and_prompts
from tl_circuitlasso.errors import InputError


def add(commands: Any) -> None:
    """Declare the commands."""
    added = command(commands, demo)
    added.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    added.add_argument("--prompts", type=int, default=512, help="number of prompts (default: 512)")

    added = command(commands, discover)
    added.add_argument("model", help="a TransformerLens model name, a local folder, or demo (the bundled model)")
    added.add_argument("prompts", type=Path, nargs="?", help="prompts: .txt (one a line), .csv, .tsv or .jsonl")
    added.add_argument("--column", help="column or field that holds the prompt (default: the first)")
    added.add_argument("--limit", type=int, help="use the first N prompts")
    added.add_argument("--out", type=Path, default=Path("circuit"), help="folder to write to (default: circuit)")
    added.add_argument("--basis", choices=["component", "neuron", "residual"], help="default: component")
    added.add_argument(
        "--sae", action="append", metavar="HOOK=PATH", default=[],
        help="features of an SAE at a hook as nodes: a folder of SAELens, or release/sae_id; may be repeated",
    )  # fmt: skip
    added.add_argument("--design", choices=["read", "routed", "activation"], help="default: read")
    added.add_argument("--strength", default="auto", help="auto, cv, ebic, mcp, stability or a fraction of lambda_max")
    added.add_argument("--method", default="lasso", choices=["lasso", "lasso+confirm"])
    added.add_argument("--corrupted", type=Path, help="corrupted partners of the prompts, for lasso+confirm")
    added.add_argument("--positions", default="all", help="all, last or a position")
    added.add_argument("--batch-size", type=int, default=32)
    added.add_argument("--device", help="cpu, cuda, ... (default: where the model is)")
    added.add_argument("--seed", type=int, default=0)
    added.add_argument("--checkpoint", type=Path, help="file to resume an interrupted collection from")


def demo(arguments: argparse.Namespace) -> None:
    """Find the circuit of the bundled model and put it beside the truth."""
    from tl_circuitlasso.demo import load_demo
    from tl_circuitlasso.discover import circuit_lasso
    from tl_circuitlasso.evaluate import structure

    bundled = load_demo(prompts=arguments.prompts)
    print(f"Model: {bundled.description}")
    for prompt, answer in list(zip(bundled.prompts, bundled.answers))[:2]:
        print(f"  {prompt} -> {answer}")
    graph = circuit_lasso(bundled.model, bundled.tokens, positions="last", progress=interactive(arguments))
    truth = structure(graph, bundled.true_edges, bundled.candidate_edges)
    _print_edges(graph, bundled.true_edges)
    print(f"SHD to the known circuit: {truth.shd} (empty graph: {truth.empty_shd}); AUROC {truth.auroc:.4f}")
    _print_stages(graph)
    _write_all(graph, arguments.out, "Indirect object identification, bundled model")


def discover(arguments: argparse.Namespace) -> None:
    """Find the circuit of a model on the prompts of a file, or of the bundled model on its own task."""
    from tl_circuitlasso.discover import circuit_lasso
    from tl_circuitlasso.sharing import under_torchrun

    basis = _basis(arguments)
    model, prompts, corrupted = model_and_prompts(arguments)
    with under_torchrun() as ranks:  # `torchrun -m tl_circuitlasso discover ...` shares the work
        graph = circuit_lasso(
            model,
            prompts,
            basis=basis,
            strength=number_or_word(arguments.strength),
            positions=position(arguments.positions),
            batch_size=arguments.batch_size,
            device=arguments.device,
            seed=arguments.seed,
            checkpoint=arguments.checkpoint,
            progress=interactive(arguments),
            method=arguments.method,
            corrupted=corrupted,
            process_group=ranks,
            **({"design": arguments.design} if arguments.design else {}),
        )
    if ranks.rank:  # all have the same graph, one speaks
        return
    _print_edges(graph, None)
    _print_stages(graph)
    _write_all(graph, arguments.out, f"{arguments.model}: {arguments.prompts or 'its own prompts'}")


def _basis(arguments: argparse.Namespace) -> Any:
    if not arguments.sae:
        return arguments.basis or "component"
    if arguments.basis:
        raise InputError(f"`--basis` {arguments.basis} and `--sae` are two bases: give one of them")
    from tl_circuitlasso.models.sae import SAEFeatures

    return SAEFeatures(saes(arguments.sae))


def _print_edges(graph: Any, truth: Set[tuple[str, str]] | None) -> None:
    table = graph.edge_table()
    record = graph.provenance
    nats = record.get("arguments", {}).get("design") == "read" and "unit" not in record
    unit = " (score: what cutting the edge is expected to cost, in nats)" if nats else ""
    unit = f" (score: contribution to the target, in {record['unit']})" if "unit" in record else unit
    print(f"\nEdges kept{unit}:")
    for row in table[table.kept].head(200).itertuples():
        mark = "" if truth is None else ("  true" if (row.source, row.target) in truth else "  FALSE")
        print(f"  {row.source:>8} -> {row.target:<8}{row.port or ' ':2}{row.score:10.4g}{mark}")
    if (more := int(table.kept.sum()) - 200) > 0:
        print(f"  ... {more:,} more in the files")
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
