"""The curves of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from qadtr_brevitas.evaluation.metrics import Mean
from qadtr_brevitas.evaluation.report import EvaluationReport
from qadtr_brevitas.evaluation.report.views import FLOAT, View, attacked_precisions, sources
from qadtr_brevitas.reproduce.analyses.charts import Curve, Point, draw_curves
from qadtr_brevitas.reproduce.page.blocks import PageImage
from qadtr_brevitas.reproduce.page.compare import MeasuredCell, MeasuredRow, PaperComparison, row_name
from qadtr_brevitas.reproduce.page.measurements import AT_FLOAT

# With more models, each has a single curve, or the picture would be unreadable.
_MAX_DETAILED_MODELS = 3
_LABELS = {"asr": "attack success rate (%)", "accuracy": "accuracy (%)", "clean accuracy": "clean accuracy (%)"}


def family_curves(report: EvaluationReport, family: str) -> PageImage:
    """Draw the ASR of one family of attacks on every model against precision."""
    columns = attacked_precisions(report)
    curves: list[Curve] = []
    for number, model in enumerate(report.models):
        own = [curve for curve in _model_curves(View(report, model, family), number, columns) if any(curve.points)]
        curves += own[:1] if len(report.models) > _MAX_DETAILED_MODELS else own
    png = _draw(curves, columns, "precision attacked (bit)", _LABELS["asr"], percent=True)
    caption = f"ASR of {family} against precision on {report.data.images} images, with 95 % Wilson intervals."
    return PageImage(png, caption)


def comparison_curves(comparison: PaperComparison) -> PageImage | None:
    """Draw the paper's values (dashed) and ours against precision; None if columns are not precisions."""
    table = comparison.table
    if any(list(column) != ["precision"] for column in table.columns):
        return None
    origin, measured = max(comparison.measured.items(), key=_priority)
    curves: list[Curve] = []
    for number, ((facets, numbers), row) in enumerate(zip(table.rows, measured, strict=True)):
        if any(row):
            name = row_name(facets)
            curves.append(Curve(f"{name}, here", [cell and _cell_point(cell) for cell in row], number))
            quoted = [None if value is None else Point(value) for value in numbers]
            curves.append(Curve(f"{name}, paper", quoted, number, dashed=True))
    columns = [column["precision"] for column in table.columns]
    label = _LABELS.get(table.what, table.what)
    png = _draw(curves, columns, "precision (bit)", label, percent=table.unit == "percent")
    suffix = f", {origin}" if table.what == "asr" else ""
    return PageImage(png, f"{table.number} of the paper (dashed) and our values{suffix}, with 95 % intervals.")


def _model_curves(view: View, number: int, columns: Sequence[str]) -> Iterator[Curve]:
    """Yield the curve of attacks made at each precision, then those made at 32 bit on each network, then noise."""
    name = view.model.name
    yield Curve(f"{name}, {view.knowledge}", [_point(view.white_box(p)) for p in columns], number)
    for variant, (fingerprint, source) in enumerate(sources(view.report, view.family).items(), start=1):
        is_own = fingerprint == view.model.fingerprint
        # At 32 bit, an attack made at 32 bit on the same network is a white-box attack.
        points = [None if is_own and p == FLOAT else _point(view.made_at(p, FLOAT, fingerprint)) for p in columns]
        label = f"{name}, made at {FLOAT} bit" + ("" if is_own else f" on {source}")
        yield Curve(label, points, number, variant=variant)
    yield Curve(f"{name}, random patch", [_point(view.control(p)) for p in columns], number, dashed=True)


def _priority(item: tuple[str, Sequence[MeasuredRow]]) -> tuple[int, bool]:
    """Return a key that prefers the origin with most cells, then white-box attacks, the strongest ones."""
    origin, rows = item
    return sum(cell is not None for row in rows for cell in row), origin != AT_FLOAT


def _cell_point(cell: MeasuredCell) -> Point:
    low, high = cell.interval or (None, None)
    return Point(cell.value, low, high)


def _point(mean: Mean | None) -> Point | None:
    return mean and Point(mean.value, *mean.interval)


def _draw(curves: Sequence[Curve], places: Sequence[str], x_label: str, y_label: str, *, percent: bool) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        draw_curves(curves, places, path, x_label=x_label, y_label=y_label, percent=percent)
        return path.read_bytes()
