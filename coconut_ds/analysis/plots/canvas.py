"""Shared by all plots: a canvas without a screen, colours, the style of a panel, saving."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: background, text, faint lines, and one per data series."""

    background: str
    text: str
    faint: str
    series: tuple[str, ...]

    def look(self, index: int) -> tuple[str, str]:
        """Colour and marker of series `index`; 7 colours and 6 markers make 42 different pairs."""
        return self.series[index % len(self.series)], MARKERS[index % len(MARKERS)]


# Okabe and Ito's colours, distinct for any colour vision, without the yellow, which is too faint on white. On a dark
# background blue and green are lighter, and white replaces black.
LIGHT = Theme(
    background="#ffffff",
    text="#30363d",
    faint="#c9d1d9",
    series=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
DARK = Theme(
    background="#171b21",
    text="#c3cad3",
    faint="#3a424c",
    series=("#4BA6E0", "#F0803C", "#2FC79B", "#E09BC3", "#F0B840", "#8FD0F5", "#FFFFFF"),
)

_PANEL_INCHES, _PANEL_DPI, _FONT_POINTS = (4.8, 3.0), 200, 9


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure of `width` x `height` inches that needs no screen."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel(theme: Theme, more_height: float = 0.0) -> tuple[Figure, Axes]:
    """A figure of 960 x 600 px with one pair of axes; readable on a phone. `more_height` in inches."""
    width, height = _PANEL_INCHES
    figure = new_figure(width, height + more_height, _PANEL_DPI)
    figure.set_facecolor(theme.background)
    axes = figure.subplots()
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, labelsize=_FONT_POINTS, length=0, pad=5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.text, fontsize=_FONT_POINTS)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=theme.faint)
    axes.grid(axis="y", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; raises OSError if it cannot be written."""
    path.write_bytes(png(figure))
