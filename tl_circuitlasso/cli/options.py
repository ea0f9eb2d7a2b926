"""What several commands share: how they are declared, and how words on the command line become values."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tl_circuitlasso.errors import FormatError, InputError

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
MODEL = "a TransformerLens model name, a local folder, or demo (the bundled model)"
GRAPH = "a graph: .safetensors, .json or a folder of ours, or a file of any format of `convert`"

METRIC = "what is measured: logit-diff (default), prob-diff, cross-entropy, accuracy, kl or next-token"
ABLATION = (
    "what cut edges carry: what they do on the corrupted prompt (patch, default), a mean, zero or the best constant"
)


def command(commands: Any, run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
    """A parser for the command that `run` carries out, with its docstring for help."""
    about = (run.__doc__ or "").strip()
    added = commands.add_parser(run.__name__, help=about.splitlines()[0], description=about)
    added.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress")
    added.set_defaults(run=run)
    return added


def writable(folder: Path) -> Path:
    """`folder`, made where it isn't there; tried before the work, whose result would have nowhere to go.

    Raises
    ------
    InputError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"`--out` {folder} can't be written to ({error.strerror}): name another folder") from None


def writable_file(path: Path, suffixes: Sequence[str]) -> Path:
    """`path`, if it ends in one of `suffixes` and its folder can be written to.

    Raises
    ------
    InputError: another suffix, or a folder that can't be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"`--out` {path} ends in {path.suffix!r}: write one of {', '.join(suffixes)}")
    writable(path.parent)
    return path


def interactive(arguments: argparse.Namespace) -> bool:
    """Whether progress is wanted: a bar on a terminal, a line now and then elsewhere, unless told to be quiet."""
    return not arguments.quiet


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
    """The graph in a file of any format.

    Raises
    ------
    FormatError: no such file, or none that can be read.
    """
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder")
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
