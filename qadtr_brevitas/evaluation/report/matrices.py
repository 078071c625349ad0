"""Transfer tables: precision to precision, model to model; and ASR against patch size, place and angle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qadtr_brevitas.core.precision import FLOAT_BITS
from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.metrics import Mean
from qadtr_brevitas.evaluation.report.layout import Rows, bits, blocks, percent, sizes
from qadtr_brevitas.evaluation.report.schema import EvaluationReport, ModelFacts, PatchFacts
from qadtr_brevitas.evaluation.report.views import (
    FLOAT,
    View,
    attacked_precisions,
    families,
    family_members,
    source_precisions,
    sources,
    targets_note,
)

_AS_MADE = "as made"


def precision_matrices(report: EvaluationReport, family: str) -> list[Table]:
    """Precision the attack was made at x precision attacked, for each pair of source and attacked model."""
    return [
        _precision_matrix(View(report, model, family), fingerprint, source)
        for fingerprint, source in sources(report, family).items()
        for model in report.models
    ]


def model_matrix(report: EvaluationReport, family: str) -> list[Table]:
    """Model it was made on x model attacked, at the precision attacked, from 32 bit and from means over precisions.

    One table with a block for each precision attacked; none where there is one model only.
    """
    origins = sources(report, family)
    if len(origins.keys() | {model.fingerprint for model in report.models}) < 2:
        return []
    views = [View(report, model, family) for model in report.models]
    found = ((bits(p), _model_rows(views, origins, p)) for p in attacked_precisions(report))
    header = ("attacked at", "made on", *(f"on {model.name}" for model in report.models))
    note = (
        "Mean ASR in percent of n images: classified correctly by the attacked model without the attack and not of the "
        f"target class. Targets: {targets_note(report, family)}."
    )
    return [Table(f"{family}: ASR, model to model", header, blocks(found), (note,), labels=2)]


def size_tables(report: EvaluationReport) -> list[Table]:
    """ASR against patch size, for each model and each kind of patch that there are several sizes of."""
    groups: dict[str, dict[str, str]] = {}
    for family in families(report):
        first = family_members(report, family)[0]
        if isinstance(first, PatchFacts):
            groups.setdefault(first.method, {})[family] = first.size
    return [
        _size_table(report, model, method, by_size)
        for method, by_size in groups.items()
        if len(by_size) > 1
        for model in report.models
    ]


def variant_tables(report: EvaluationReport, family: str) -> list[Table]:
    """ASR of patches that were moved or turned, beside the same patches as they were made, for each model."""
    names = {facts.name for facts in family_members(report, family)}
    found = [patch.variant.label for patch in report.patches if patch.variant and patch.variant.of in names]
    labels = list(dict.fromkeys(found))
    return [_variant_table(report, model, family, labels) for model in report.models] if labels else []


def _precision_matrix(view: View, fingerprint: str, source: str) -> Table:
    columns = attacked_precisions(view.report)
    made_at = source_precisions(view.report, view.family, fingerprint)
    found = {f"made at {made}": [percent(view.made_at(p, made, fingerprint)) for p in columns] for made in made_at}
    found["random patch"] = [percent(view.control(p)) for p in columns]
    found["n of ASR"] = [sizes(view.any(p)) for p in columns]
    note = (
        f"Mean ASR in percent of n images: classified correctly by {view.model.name} without the attack and not of the "
        f"target class. Made on {source}; targets: {targets_note(view.report, view.family)}."
    )
    rows = tuple(row[1:] for row in blocks([("", found)]) if row)
    title = f"{view.family}: ASR, {source} to {view.model.name}"
    return Table(title, ("bit", *(f"at {p}" for p in columns)), rows, (note,))


def _model_rows(views: Sequence[View], origins: dict[str, str], precision: str) -> Rows:
    report, family = views[0].report, views[0].family
    rows: dict[str, list[str]] = {}
    for fingerprint, source in origins.items():
        for made in source_precisions(report, family, fingerprint):
            if made in (precision, FLOAT) or "+" in made:
                label = f"{source} at {made}"
                rows[label] = [percent(view.made_at(precision, made, fingerprint)) for view in views]
    rows["random patch"] = [percent(view.control(precision)) for view in views]
    rows["n of ASR"] = [sizes(view.any(precision)) for view in views]
    return rows


def _size_table(report: EvaluationReport, model: ModelFacts, method: str, by_size: dict[str, str]) -> Table:
    views = {size: View(report, model, family) for family, size in by_size.items()}
    smallest_first = dict(sorted(views.items(), key=lambda item: _pixels(report, item[1].family)))
    origins = {key: name for family in by_size for key, name in sources(report, family).items()}
    header = ("made", "size", *map(bits, attacked_precisions(report)))
    targets = "; ".join(dict.fromkeys(targets_note(report, family) for family in by_size))
    notes = (_asr_note(model), f"Targets: {targets}.")
    return Table(
        f"{method}: ASR on {model.name} by patch size",
        header,
        blocks(_view_blocks(smallest_first, origins)),
        notes,
        labels=2,
    )


def _variant_table(report: EvaluationReport, model: ModelFacts, family: str, labels: Sequence[str]) -> Table:
    views = {_AS_MADE: View(report, model, family)}
    views |= {label: View(report, model, family, label) for label in labels}
    header = ("made", "scored", *map(bits, attacked_precisions(report)))
    notes = (
        _asr_note(model),
        f"Targets: {targets_note(report, family)}. Shifts are in pixels, down and to the right.",
    )
    return Table(
        f"{family}: ASR on {model.name} of moved and turned patches",
        header,
        blocks(_view_blocks(views, sources(report, family))),
        notes,
        labels=2,
    )


def _view_blocks(views: dict[str, View], origins: dict[str, str]) -> list[tuple[str, Rows]]:
    """Return rows of the views, in blocks by where the patches were made."""
    report = next(iter(views.values())).report
    columns = attacked_precisions(report)

    def rows(figure: Callable[[View, str], Mean | None], write: Callable[[Mean | None], str] = percent) -> Rows:
        return {label: [write(figure(view, p)) for p in columns] for label, view in views.items()}

    found = [("white-box", rows(lambda view, p: view.white_box(p)))]
    for fingerprint, source in origins.items():
        made = rows(lambda view, p, fingerprint=fingerprint: view.made_at(p, FLOAT, fingerprint))
        found.append((f"on {source} at {FLOAT_BITS} bit", made))
    found.append(("random patch", rows(lambda view, p: view.control(p))))
    n = rows(lambda view, p: view.any(p), sizes)
    alike = len({tuple(row) for row in n.values()}) == 1
    found.append(("n of ASR", {"": next(iter(n.values()))} if alike else n))
    return found


def _asr_note(model: ModelFacts) -> str:
    return (
        f"Mean ASR in percent of n images: classified correctly by {model.name} without the patch and not of the "
        "target class."
    )


def _pixels(report: EvaluationReport, family: str) -> int:
    first = family_members(report, family)[0]
    assert isinstance(first, PatchFacts)
    return first.pixels
