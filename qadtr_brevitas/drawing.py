"""How every picture begins and ends: colors, a figure without a window, and a PNG that is complete or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qadtr_brevitas.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would pick a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=_DPI, format="png", facecolor="white"))
    return path


def tidy(axes: Axes) -> None:
    """Faint horizontal lines behind the curves, and no frame where there is no scale."""
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
