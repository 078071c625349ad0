from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from qadtr_brevitas.reproduce.analyses import Record
from qadtr_brevitas.reproduce.analyses.charts import Curve, Point, draw_curves, draw_records


def test_every_attack_has_a_curve_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Curve] = []
    monkeypatch.setattr(
        "qadtr_brevitas.reproduce.analyses.charts.draw_curves", lambda curves, *rest, **more: drawn.extend(curves)
    )

    def draw(*attacks: str) -> list[tuple[str, int]]:
        drawn.clear()
        records = [
            Record(model="a", precision="4", what="asr", value=0.1 * number, facets={"attack": attack, "size": size})
            for number, attack in enumerate(attacks)
            for size in ("3x3", "4x4")
        ]
        draw_records(records, tmp_path / "x.png", along="size", x_label="", y_label="")
        return [(curve.label, len(curve.points)) for curve in drawn]

    assert draw("lavan") == [("a at 4 bit", 2)]
    assert draw("lavan", "gap") == [("a at 4 bit, lavan", 2), ("a at 4 bit, gap", 2)]


def test_curves_of_one_color_differ_in_line_and_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[object, ...]] = []
    drawn = Axes.errorbar

    def errorbar(self: Axes, *data: object, **style: Any) -> object:
        looks.append((style["color"], style["linestyle"], style["marker"]))
        return drawn(self, *data, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    curves = [Curve(f"{color} {variant}", [Point(0.5)], color, variant) for color in range(3) for variant in range(3)]
    draw_curves(curves, ["4"], tmp_path / "x.png", x_label="", y_label="")
    assert len({(line, marker) for _, line, marker in looks[:3]}) == len({line for _, line, _ in looks[:3]}) == 3
    assert len(set(looks)) == len(curves)
