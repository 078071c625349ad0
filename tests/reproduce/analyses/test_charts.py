from __future__ import annotations

from pathlib import Path

import pytest

from qadtr_brevitas.reproduce.analyses import Record
from qadtr_brevitas.reproduce.analyses.charts import Curve, draw_records


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
