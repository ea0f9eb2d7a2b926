"""Docstrings as Markdown: underlined headings become bold words, `name: text` entries a list, doctests code blocks.

The house's docstrings are written to be read in an editor, in a form between numpydoc's and plain text; a parser of
either would warn about half of them. This keeps their words and their order.
"""

import re
from typing import Any

import griffe

HEADINGS = ("Parameters", "Attributes", "Returns", "Raises")
ENTRY = re.compile(r"^(\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*): (.*)$")


def markdown(text: str) -> str:
    """The docstring as Markdown.

    >>> print(markdown("A line.\\n\\nRaises\\n------\\nInputError: it's wrong.\\n\\n>>> 1 + 1\\n2"))
    A line.
    <BLANKLINE>
    **Raises**
    <BLANKLINE>
    - `InputError`: it's wrong.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    lines = text.splitlines()
    out: list[str] = []
    listing = fenced = False
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if line.startswith(">>> ") and not fenced:
            out += ["", "```pycon"] if out and out[-1] else ["```pycon"]
            fenced = True
        if fenced and not line.strip():
            out += ["```"]
            fenced = False
        if fenced:
            out.append(line)
        elif line in HEADINGS and set(following) == {"-"}:
            out += [f"**{line}**", ""]
            listing = True
        elif line and set(line) == {"-"} and number and lines[number - 1] in HEADINGS:
            continue
        elif listing and (entry := ENTRY.match(line)):
            out.append(f"- {', '.join(f'`{name}`' for name in entry[1].split(', '))}: {entry[2]}")
        elif listing and line and not line[0].isspace():  # words that are no entry end the list
            out += ["", line] if out[-1].startswith(("- ", " ")) else [line]
        else:
            out.append(line)
    return "\n".join([*out, *(["```"] if fenced else [])])


class AsMarkdown(griffe.Extension):
    """Rewrites every docstring once it's read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
