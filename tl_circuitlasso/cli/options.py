"""What several commands share: how they are declared, and how words on the command line become values."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import FormatError, InputError

GRAPH = "a graph: .safetensors, .json or a folder of ours, or a file of any format of `convert`"


def command(commands: Any, run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
    """A parser for the command that `run` carries out, with its docstring for help."""
    about = (run.__doc__ or "").strip()
    added = commands.add_parser(run.__name__, help=about.splitlines()[0], description=about)
    added.set_defaults(run=run)
    return added


def interactive(arguments: argparse.Namespace) -> bool:
    """Whether progress bars are wanted: on a terminal, unless told to be quiet."""
    return sys.stderr.isatty() and not arguments.quiet


def number_or_word(text: str) -> str | float:
    """A strength: a fraction, or the name of a rule."""
    try:
        return float(text)
    except ValueError:
        return text


def position(text: str) -> str | int:
    """A position, or the name of some."""
    return int(text) if text.lstrip("-").isdigit() else text


def load_graph(path: Path, format: str | None = None) -> Any:
    """The graph in a file of any format."""
    from tl_circuitlasso import formats

    return formats.read(path, format)


def load_graphs(paths: list[Path]) -> dict[str, Any]:
    """Graphs by the names of their files, `name=path` where a name is given; equal names are numbered."""
    named: dict[str, Any] = {}
    for path in paths:
        given, equals, rest = str(path).partition("=")
        taken = bool(equals) and not path.exists()
        name = given if taken else (path.stem if path.suffix else path.name)
        if name in named:
            name = f"{name} ({len(named) + 1})"
        named[name] = load_graph(Path(rest) if taken else path)
    return named


def load_truth(path: Path) -> Any:
    """The true edges in a JSON list of pairs, or in a graph file: the edges that it keeps."""
    import json

    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}: can't be read as JSON ({error}); give a list of [source, target]") from None
        if isinstance(data, list):
            if not all(isinstance(edge, list) and all(isinstance(end, str) for end in edge) for edge in data):
                raise FormatError(f"{path}: not a list of [source, target] pairs of node names")
            return [tuple(edge) for edge in data]
    return load_graph(path)


def saes(words: list[str]) -> dict[str, str]:
    """`HOOK=PATH` words as a mapping."""
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (hook, _, path) in zip(words, pairs) if not (hook and path)]:
        raise InputError(f"`--sae` is {bad[0]!r}: write HOOK=PATH, such as blocks.4.hook_resid_post=saes/layer4")
    named = {hook: path for hook, _, path in pairs}
    if len(named) < len(pairs):
        raise InputError(f"`--sae` names a hook twice: one SAE for each of {', '.join(named)}")
    return named
