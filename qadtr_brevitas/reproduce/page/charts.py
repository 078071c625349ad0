"""The curves of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from qadtr_brevitas.evaluation.metrics import Mean
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.views import FLOAT, View, attacked_precisions, sources
from qadtr_brevitas.reproduce.analyses.charts import Curve, Point, draw_curves
from qadtr_brevitas.reproduce.page.blocks import Image
from qadtr_brevitas.reproduce.page.compare import MeasuredValue, PaperComparison, row_name
from qadtr_brevitas.reproduce.page.measures import AT_FLOAT

_MOST_MODELS = 3
_PERCENT = {"asr": "attack success rate (%)", "accuracy": "accuracy (%)", "clean accuracy": "clean accuracy (%)"}


def family_curves(report: EvaluationReport, family: str) -> Image:
    """ASR of one kind of attack on every model against precision."""
    columns = attacked_precisions(report)
    curves: list[Curve] = []
    for number, model in enumerate(report.models):
        own = [curve for curve in _model_curves(View(report, model, family), number, columns) if any(curve.points)]
        # More than a few curves of each of many models are no picture any more.
        curves += own[:1] if len(report.models) > _MOST_MODELS else own
    png = _draw(curves, columns, "precision attacked (bit)", _PERCENT["asr"], percent=True)
    return Image(png, f"ASR of {family} against precision on {report.data.images} images, with 95 % Wilson intervals.")


def _model_curves(view: View, number: int, columns: Sequence[str]) -> Iterator[Curve]:
    """What was made at each precision first, then what was made at 32 bit, on each network, then noise."""
    name = view.model.name
    yield Curve(f"{name}, {view.knowledge}", [_point(view.white_box(p)) for p in columns], number)
    for fingerprint, source in sources(view.report, view.family).items():
        own = fingerprint == view.model.fingerprint
        # What was made at 32 bit is white-box there.
        moved = [None if own and p == FLOAT else _point(view.made_at(p, FLOAT, fingerprint)) for p in columns]
        yield Curve(f"{name}, made at {FLOAT} bit" + ("" if own else f" on {source}"), moved, number)
    yield Curve(f"{name}, random patch", [_point(view.control(p)) for p in columns], number, dashed=True)


def comparison_curves(comparison: PaperComparison) -> Image | None:
    """The paper's figures (dashed) and ours against precision; None where columns are not precisions."""
    table = comparison.table
    if any(list(column) != ["precision"] for column in table.columns):
        return None
    # White-box figures where there are any: they say what an attacker can reach.
    way, ours = max(comparison.ours.items(), key=lambda item: (_count(item[1]), item[0] != AT_FLOAT))
    curves: list[Curve] = []
    for number, ((facets, numbers), found) in enumerate(zip(table.rows, ours, strict=True)):
        if any(found):
            name = row_name(facets)
            points = [our and Point(our.value, *(our.interval or (None, None))) for our in found]
            curves.append(Curve(f"{name}, here", points, number))
            quoted = [None if value is None else Point(value) for value in numbers]
            curves.append(Curve(f"{name}, paper", quoted, number, dashed=True))
    percent = table.unit == "percent"
    columns = [column["precision"] for column in table.columns]
    label = _PERCENT.get(table.what, table.what)
    png = _draw(curves, columns, "precision (bit)", label, percent=percent)
    made = f", {way}" if table.what == "asr" else ""
    return Image(png, f"{table.number} of the paper (dashed) and our figures{made}, with 95 % intervals.")


def _count(rows: Sequence[Sequence[MeasuredValue | None]]) -> int:
    return sum(our is not None for row in rows for our in row)


def _point(mean: Mean | None) -> Point | None:
    return mean and Point(mean.value, *mean.interval)


def _draw(curves: Sequence[Curve], places: Sequence[str], x_label: str, y_label: str, *, percent: bool) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        draw_curves(curves, places, path, x_label=x_label, y_label=y_label, percent=percent)
        return path.read_bytes()
