"""A comparison as HTML: a fragment for notebooks, and a page of its own that needs no network."""

import base64
import html
import io
from typing import Any

import pandas as pd

_MOST_ROWS = 200
_STYLE = """
:root { color-scheme: light; }
body { max-width: 1180px; margin: 32px auto; padding: 0 24px; color: #1b2430; background: #fbfcfd;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 21px; letter-spacing: -.01em; } h2 { font-size: 15px; margin: 28px 0 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #dfe5eb; white-space: nowrap; }
thead th { color: #5d6a79; font-weight: 600; vertical-align: bottom; }
.wide { overflow-x: auto; } img { max-width: 100%; margin-top: 18px; } small { color: #5d6a79; }
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
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1><div class=wide>{as_html(found.table, index=True)}</div>"
        f"<p><small>{html.escape(found.note())}</small></p>"
        f'<img alt="Edges by graph, scores and curves" src="data:image/png;base64,{picture}">'
        f"<h2>Edges in at least one circuit</h2>{as_html(found.overlap.head(_MOST_ROWS), index=False)}"
        f"<h2>Graph by graph</h2><div class=wide>{as_html(found.pairs, index=False)}</div></body></html>"
    )


def as_html(table: pd.DataFrame, *, index: bool) -> str:
    """The table with four digits, and plain words for headings."""
    shown = table.rename(columns=lambda name: str(name).replace("_", " ")).rename_axis(index=None)
    return shown.to_html(index=index, border=0, na_rep="", float_format=lambda value: f"{value:.4g}", justify="right")
