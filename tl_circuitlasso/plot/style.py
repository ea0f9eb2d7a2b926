"""Colours, figures and files that all pictures share.

The hues are Okabe and Ito's (2008), safe for colour-blind readers, darkened where white paper asks for contrast. Sign
is never told by colour alone: negative edges are dashed and end in a bar.
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError

PORT_COLOURS = {"q": "#0072B2", "k": "#C47A00", "v": "#00795A", "": "#5B6776"}
NEGATIVE = "#C4470D"
SERIES = ("#0072B2", "#D55E00", "#00795A", "#B0568A", "#C47A00", "#3F8FCB", "#5B6776", "#8C6BB1")
INK, FAINT_INK, PAPER, BAND, RULE = "#1B2430", "#7B8794", "#FFFFFF", "#F4F6F9", "#D9DFE6"
NODE_FACES = {"head": "#E8F0FA", "mlp": "#F9EEDD", "end": "#1B2430", "other": "#EFEAF7"}
NODE_RIMS = {"head": "#4F7CAC", "mlp": "#B98A3C", "end": "#1B2430", "other": "#8672B0"}
_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def new_figure(width: float, height: float) -> Figure:
    """A figure that no global list holds on to, so that drawing in a loop keeps no memory."""
    if "ipykernel" in sys.modules:
        from matplotlib import pyplot

        pyplot.switch_backend(pyplot.get_backend())  # a notebook learns to show figures when its backend is loaded
    return Figure(figsize=(width, height), facecolor=PAPER, layout=None)


def axes_for(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The given axes and their figure, or new ones of this size in inches."""
    if ax is not None:
        figure = ax.get_figure(root=True)
        if not isinstance(figure, Figure):
            raise InputError("`ax` belongs to no figure: make it with figure.subplots()")
        return figure, ax
    figure = new_figure(width, height)
    return figure, figure.subplots()


def plain(ax: Axes) -> Axes:
    """Quiet axes: no box, thin rules."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(colors=FAINT_INK, labelsize=8.5, length=3)
    ax.xaxis.label.set(color=INK, size=9.5)
    ax.yaxis.label.set(color=INK, size=9.5)
    return ax


def finished(
    figure: Figure, axes: Axes, title: str | None, path: str | Path | None, *, alone: bool, pad: int = 10
) -> Figure:
    """The figure with its title above `axes`, laid out where these stand `alone`, and saved as `save` does."""
    if title:
        axes.set_title(title, loc="left", size=11.5, weight="bold", color=INK, pad=pad)
    if alone:
        figure.set_layout_engine("tight")
    return save(figure, path)


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write `figure` to `path` in the format of its suffix, whole or not at all; None writes nothing.

    Raises
    ------
    InputError: an unknown suffix, or a path that can't be written to.
    """
    if path is None:
        return figure
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"`path` {str(path)!r} has the suffix {path.suffix!r}: use one of {', '.join(_SUFFIXES)}")
    kind = path.suffix.lower().removeprefix(".")
    storage.write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=180))
    return figure
