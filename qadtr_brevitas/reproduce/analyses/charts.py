"""Curves with intervals over a few named places: precisions, sizes, distances.

Records as curves: one for each model, precision and attack, along one facet.

Numbers as colors.

Records as tables: a line for each model and facet, a column for each precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qadtr_brevitas.core.extras import require
from qadtr_brevitas.evaluation.report.layout import EMPTY, Table, bits
from qadtr_brevitas.evaluation.report.plots import COLORS, new_figure, save_figure, tidy
from qadtr_brevitas.quant.inference import sorted_modes
from qadtr_brevitas.reproduce.analyses.base import Record

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


def draw_records(
    shown: Sequence[Record], path: Path, *, along: str, x_label: str, y_label: str, title: str = ""
) -> Path:
    """Draws shares in percent, a curve for each model, precision and attack; records with the same place on it once.

    Args:
        shown: what to draw.
        path: the PNG to write.
        along: the facet along the horizontal axis, in the order of the records.
        x_label: what it is.
        y_label: what the values are.
        title: above the picture.

    Raises:
        CheckpointError: the file cannot be written.
    """
    places = list(dict.fromkeys(record.facets[along] for record in shown))
    attacks = {record.facets.get("attack") for record in shown}
    curves: dict[str, list[Point | None]] = {}
    for record in shown:
        which = f", {record.facets.get('attack')}" if len(attacks) > 1 else ""
        points = curves.setdefault(f"{record.model} at {bits(record.precision)}{which}", [None] * len(places))
        if record.value is not None:
            points[places.index(record.facets[along])] = Point(record.value, record.low, record.high)
    return draw_curves(
        [Curve(label, points) for label, points in curves.items()],
        list(map(_word, places)),
        path,
        x_label=x_label,
        y_label=y_label,
        title=title,
        percent=True,
    )


def _word(place: Any) -> str:
    return f"{place:g}" if isinstance(place, float) else str(place)


def heat(values: Tensor, *, most: float | None = None) -> Tensor:
    """A colored picture (3, H, W) in [0, 1] of nonnegative values (H, W).

    Args:
        values: finite.
        most: the value with the brightest color; None for the largest there is.
    """
    colormaps = require("matplotlib", extra="report", purpose="drawing").colormaps
    top = float(values.max()) if most is None else most
    scaled = (values / top if top > 0 else torch.zeros_like(values)).clamp(0, 1)
    colors = torch.from_numpy(colormaps["magma"](scaled.double().cpu().numpy()))
    return colors[..., :3].permute(2, 0, 1).float()


Write: TypeAlias = Callable[[float], str]


def by_precision(
    title: str,
    records: Sequence[Record],
    what: str,
    *,
    write: Write,
    facets: Sequence[str],
    notes: Sequence[str] = (),
) -> Table:
    """One kind of number at each precision.

    Args:
        title: of the table.
        records: numbers of all kinds.
        what: the kind that is shown.
        write: how a number is written.
        facets: what tells lines apart, beside the model.
        notes: below the table.
    """
    shown = [record for record in records if record.what == what]
    columns = sorted_modes({record.precision for record in shown})
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for record in shown:
        line = (record.model, *(str(record.facets.get(name, "")) for name in facets))
        cells.setdefault(line, {})[record.precision] = EMPTY if record.value is None else write(record.value)
    rows = tuple((*line, *(found.get(column, EMPTY) for column in columns)) for line, found in cells.items())
    return Table(title, ("model", *facets, *map(bits, columns)), rows, tuple(notes), labels=1 + len(facets))


def decimals(count: int) -> Write:
    """Numbers with so many figures that count, also where they are tiny."""
    return lambda value: f"{value:.{count}g}" if 0 < abs(value) < 10**-count else f"{value:.{count}f}"


def percents(value: float) -> str:
    """Shares in percent."""
    return f"{100 * value:.1f}"
