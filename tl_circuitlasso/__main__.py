"""The command line: `circuitlasso` or `python -m tl_circuitlasso`. Each command is one call into the library."""

import argparse
import io
import sys
from collections.abc import Sequence

from tl_circuitlasso import __version__
from tl_circuitlasso.cli import finding, graphs, testing
from tl_circuitlasso.errors import CircuitLassoError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr where the input is at fault."""
    _speak_any_script()
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except CircuitLassoError as error:
        print(f"circuitlasso {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        return 130


def _speak_any_script() -> None:
    """On a terminal that knows ASCII only, other letters (in a path, in a token) are escaped instead of fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="circuitlasso", description="Sparse circuits of transformers by certified sparse linear regression."
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--version", action="version", version=f"circuitlasso {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for subject in (finding, graphs, testing):
        subject.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
