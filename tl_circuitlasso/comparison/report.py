"""A comparison as HTML: a fragment for notebooks, and a page of its own that needs no network.

The page holds the tables, the figure and, side by side in one layout, the first two graphs to look around in.
"""

import base64
import html
import io
from typing import Any

import pandas as pd

from tl_circuitlasso.errors import InputError

_MOST_ROWS = 200
_MOST_EDGES = 5000  # of each graph, in the page to look around in
_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --paper: #fbfcfd; --rule: #dfe5eb; --soft: #5d6a79; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf1; --paper: #0f141a; --rule: #2a333e; --soft: #9aa7b5; } }
body { max-width: 1320px; margin: 32px auto; padding: 0 24px; color: var(--ink); background: var(--paper);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 21px; letter-spacing: -.01em; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 28px 0 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
tbody th, td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; max-width: 110px; }
.wide { overflow-x: auto; } .tall { max-height: 560px; overflow: auto; }
iframe { width: 100%; height: 720px; margin-top: 8px; border: 1px solid var(--rule); border-radius: 8px; }
img { max-width: max(100%, 760px); margin-top: 18px; background: #fff; border-radius: 8px; }
small { color: var(--soft); }
@media (max-width: 700px) { body { margin: 16px auto; padding: 0 12px; } iframe { height: 860px; } }
"""


def fragment(found: Any) -> str:
    """The table, what it refers to, and, folded away, the edges."""
    counts = found.overlap["where"].value_counts()
    where = "".join(f"<li>{html.escape(str(name))}: {count:,}</li>" for name, count in counts.items())
    return (
        f"{as_html(found.table, index=True)}<p><small>{html.escape(found.note())}</small></p>"
        f"<details><summary>{len(found.overlap):,} edges in at least one circuit</summary><ul>{where}</ul>"
        f"{as_html(found.overlap.head(_MOST_ROWS), index=False)}</details>"
    )


def page(found: Any) -> str:
    """The tables and the figure as one file."""
    image = io.BytesIO()
    found.plot().savefig(image, format="png", dpi=140)
    picture = base64.b64encode(image.getvalue()).decode("ascii")
    title = html.escape(" · ".join(found.graphs))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{_STYLE}</style>"
        f"</head><body><h1>{title}</h1><div class=wide>{as_html(found.table, index=True)}</div>"
        f"<p><small>{html.escape(found.note())}</small></p>"
        f'<div class=wide><img alt="Edges by graph, scores and curves" src="data:image/png;base64,{picture}"></div>'
        f"{_side_by_side(found)}"
        f"<h2>Edges in at least one circuit</h2><div class='wide tall'>"
        f"{as_html(found.overlap.head(_MOST_ROWS), index=False)}</div>"
        f"<h2>Graph by graph</h2><div class=wide>{as_html(found.pairs, index=False)}</div></body></html>"
    )


def _side_by_side(found: Any) -> str:
    """The first two graphs in one interactive page, inside a frame; why not, where they can't share a layout."""
    from tl_circuitlasso.plot.interactive import page as interactive_page

    (first, one), (second, other) = list(found.graphs.items())[:2]
    title = f"{first} and {second}"
    options = {"title": title, "other": other, "names": (first, second), "max_edges": _MOST_EDGES}
    try:
        inside = html.escape(interactive_page(one, **options), quote=True)
    except InputError as reason:
        return f"<h2>{html.escape(title)}</h2><p>{html.escape(str(reason))}</p>"
    return f'<h2>{html.escape(title)}</h2><iframe title="{html.escape(title)}" srcdoc="{inside}"></iframe>'


def as_html(table: pd.DataFrame, *, index: bool) -> str:
    """The table with four digits, and plain words for headings."""
    shown = table.rename(columns=lambda name: str(name).replace("_", " ")).rename_axis(index=None)
    return shown.to_html(index=index, border=0, na_rep="", float_format=lambda value: f"{value:.4g}", justify="right")
