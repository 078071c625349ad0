"""Curves with intervals over a few named places, such as precisions or sizes, and numbers as colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qadtr_brevitas.evaluation.report.layout import bits
from qadtr_brevitas.evaluation.report.plots import COLORS, new_figure, save_figure, tidy
from qadtr_brevitas.reproduce.analyses.document import FacetValue, Record

_LINE_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "x", "P")


@dataclass(frozen=True)
class Point:
    """A value, and its interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """One point for each place.

    Args:
        label: its name in the legend.
        points: one for each place; None if there is none.
        color: number of its color; None for the number of the curve.
        variant: number among the curves of one color, which differ in line style and marker.
        dashed: drawn thin and dashed, for quoted values.
    """

    label: str
    points: Sequence[Point | None]
    color: int | None = None
    variant: int = 0
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
    """Draw curves over named places, slightly apart so that no interval hides another.

    Args:
        curves: the curves.
        places: names along the horizontal axis.
        path: the PNG file to write.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        title: title above the picture.
        percent: values are shares in [0, 1]; the axis is in percent, from 0 to 100.

    Raises:
        CheckpointError: the file cannot be written.
    """
    # Small, so that text is readable on the width of a phone; the legend below takes a line for each curve.
    figure = new_figure(width=5.4, height=3.4 + 0.19 * len(curves))
    axes = figure.subplots()
    measured = [curve for curve in curves if not curve.dashed]
    spread = min(0.06, 0.7 / max(1, len(measured)))
    for number, curve in enumerate(curves):
        # Quoted values have no intervals that could hide others.
        shift = 0 if curve.dashed else spread * (measured.index(curve) - (len(measured) - 1) / 2)
        found = [(place + shift, point) for place, point in enumerate(curve.points) if point is not None]
        style = number if curve.color is None else curve.color
        scale = 100 if percent else 1
        axes.errorbar(
            [place for place, _ in found],
            [scale * point.value for _, point in found],
            _error_bars([point for _, point in found], scale),
            label=curve.label,
            color=COLORS[style % len(COLORS)],
            linestyle="--"
            if curve.dashed
            else _LINE_STYLES[(style // len(COLORS) + curve.variant) % len(_LINE_STYLES)],
            marker="x" if curve.dashed else _MARKERS[(style + curve.variant) % len(_MARKERS)],
            markerfacecolor="white" if curve.variant else None,
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


def draw_records(
    records: Sequence[Record], path: Path, *, along: str, x_label: str, y_label: str, title: str = ""
) -> Path:
    """Draw shares in percent, with a curve for each model, precision and attack.

    Args:
        records: the records, one for each point.
        path: the PNG file to write.
        along: the facet along the horizontal axis, in the order of the records.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        title: title above the picture.

    Raises:
        CheckpointError: the file cannot be written.
    """
    places = list(dict.fromkeys(record.facets[along] for record in records))
    attacks = {record.facets.get("attack") for record in records}
    curves: dict[str, list[Point | None]] = {}
    for record in records:
        attack = f", {record.facets.get('attack')}" if len(attacks) > 1 else ""
        points = curves.setdefault(f"{record.model} at {bits(record.precision)}{attack}", [None] * len(places))
        if record.value is not None:
            points[places.index(record.facets[along])] = Point(record.value, record.low, record.high)
    return draw_curves(
        [Curve(label, points) for label, points in curves.items()],
        list(map(_place_name, places)),
        path,
        x_label=x_label,
        y_label=y_label,
        title=title,
        percent=True,
    )


def heat_map(values: Tensor, *, largest: float | None = None) -> Tensor:
    """Return a colored picture (3, H, W) in [0, 1] of nonnegative values.

    Args:
        values: (H, W), finite.
        largest: the value with the brightest color; None for the largest of the values.
    """
    from matplotlib import colormaps

    top = float(values.max()) if largest is None else largest
    scaled = (values / top if top > 0 else torch.zeros_like(values)).clamp(0, 1)
    colors = torch.from_numpy(colormaps["magma"](scaled.double().cpu().numpy()))
    return colors[..., :3].permute(2, 0, 1).float()


def _error_bars(points: Sequence[Point], scale: float) -> tuple[list[float], list[float]] | None:
    """Return how far intervals reach below and above the values; None if there are no intervals."""
    if all(point.low is None and point.high is None for point in points):
        return None
    below = [scale * (point.value - (point.value if point.low is None else point.low)) for point in points]
    above = [scale * ((point.value if point.high is None else point.high) - point.value) for point in points]
    return below, above


def _place_name(place: FacetValue) -> str:
    return f"{place:g}" if isinstance(place, float) else str(place)
