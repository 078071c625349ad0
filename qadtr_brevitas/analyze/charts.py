"""Curves with intervals over a few named places: precisions, sizes, distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qadtr_brevitas.drawing import COLORS, new_figure, save_figure, tidy

_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "x", "P")


@dataclass(frozen=True)
class Point:
    """A value with its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """One point for each place; None where there is none.

    Args:
        label: how the legend calls it.
        points: one for each place.
        color: which of the colors; None takes turns.
        dashed: drawn thin and dashed, for figures that are quoted.
    """

    label: str
    points: Sequence[Point | None]
    color: int | None = None
    dashed: bool = False


def draw_curves(
    curves: Sequence[Curve],
    places: Sequence[str],
    path: Path,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    percent: bool = False,
) -> Path:
    """Draws curves over named places, side by side so that no interval hides another.

    Args:
        curves: what to draw.
        places: names along the horizontal axis.
        path: the PNG to write.
        x_label: what the places are.
        y_label: what the values are.
        title: above the picture.
        percent: values are shares; the axis is in percent, from 0 to 100.

    Raises:
        CheckpointError: the file cannot be written.
    """
    # Small, so that words are readable on a phone's width; the legend below takes a line for each curve.
    figure = new_figure(width=5.4, height=3.4 + 0.19 * len(curves))
    axes = figure.subplots()
    measured = [curve for curve in curves if not curve.dashed]
    spread = min(0.06, 0.7 / max(1, len(measured)))
    for number, curve in enumerate(curves):
        # Quoted figures have no intervals that could hide others.
        shift = 0 if curve.dashed else spread * (measured.index(curve) - (len(measured) - 1) / 2)
        found = [(place + shift, point) for place, point in enumerate(curve.points) if point is not None]
        turn = number if curve.color is None else curve.color
        scale = 100 if percent else 1
        axes.errorbar(
            [place for place, _ in found],
            [scale * point.value for _, point in found],
            _intervals([point for _, point in found], scale),
            label=curve.label,
            color=COLORS[turn % len(COLORS)],
            linestyle="--" if curve.dashed else _DASHES[turn // len(COLORS) % len(_DASHES)],
            marker="x" if curve.dashed else _MARKERS[turn % len(_MARKERS)],
            markersize=3 if curve.dashed else 4,
            linewidth=1.0 if curve.dashed else 1.5,
            elinewidth=1,
            capsize=2.5,
        )
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if percent:
        axes.set_ylim(-2, 102)
    tidy(axes)
    if curves:
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    return save_figure(figure, path)


def _intervals(points: Sequence[Point], scale: float) -> tuple[list[float], list[float]] | None:
    """How far intervals reach below and above; None where there are none."""
    if all(point.low is None and point.high is None for point in points):
        return None
    below = [scale * (point.value - (point.value if point.low is None else point.low)) for point in points]
    above = [scale * ((point.value if point.high is None else point.high) - point.value) for point in points]
    return below, above
