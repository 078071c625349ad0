"""Records as curves: one for each model, precision and attack, along one facet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadtr_brevitas.analyze.base import Record
from qadtr_brevitas.analyze.charts import Curve, Point, draw_curves
from qadtr_brevitas.report.layout import bits


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
