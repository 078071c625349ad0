"""Tables with a block for each model: clean accuracy, success rates, and what all attacks together leave.

Which tables a report consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qadtr_brevitas.core.table import Table
from qadtr_brevitas.evaluation.report.layout import EMPTY, Rows, bits, blocks, interval, percent, percent_range, sizes
from qadtr_brevitas.evaluation.report.matrices import model_matrix, precision_matrices, size_tables, variant_tables
from qadtr_brevitas.evaluation.report.schema import EvaluationReport, Scope, WorstCase
from qadtr_brevitas.evaluation.report.views import (
    FLOAT,
    View,
    attacked_precisions,
    families,
    family_members,
    targets_note,
)

ASR_NOTE = (
    "ASR: images that the attack turns into the target class (untargeted: into any wrong class), of the n images that "
    "are classified correctly without it and are not of the target class."
)
MEAN_NOTE = (
    "Several patches or attacks, for instance one for each target class, are given as their mean; its 95 % Wilson "
    "interval is that of the smallest n, because all of them meet the same images."
)
_ENSEMBLE = "patch-auto"
_NOT_IN_SUMMARY = ("clean accuracy", "passes per image")
WORST_NOTE = (
    "Worst case: images that are classified correctly clean and under every one of the attacks. Mean: of the attacks' "
    "robust accuracies. Own attacks: made on this model, at this precision or on a mean over precisions, with "
    "gradients or without. Random patches and moved patches do not count as attacks."
)


def summary_tables(report: EvaluationReport) -> list[Table]:
    """Return what compares models: what attacks do at each precision, and what all of them together leave."""
    found = [summary_table(report, family) for family in families(report)]
    found += [worst_case_table(report)] if report.worst_case else []
    return [*found, certified_table(report)] if report.certified else found


def summary_table(report: EvaluationReport, family: str) -> Table:
    """One block for each model: what it gets right, and what the attacks do to it at each precision."""
    return Table(
        f"{family}: clean accuracy and ASR at each precision",
        _header(report),
        _model_blocks(report, family, _summary),
        (_images_note(report), ASR_NOTE, MEAN_NOTE, _seed_note(report, family)),
        labels=2,
    )


def attacks_table(report: EvaluationReport) -> Table:
    """Every kind of attack on one line: what it does to the model and precision it was made on."""
    columns = attacked_precisions(report)
    found: list[tuple[str, Rows]] = []
    for model in report.models:
        views = [View(report, model, family) for family in families(report)]
        found.append((model.name, {view.family: [percent(view.white_box(p)) for p in columns] for view in views}))
    notes = ("In percent of n images, which differ between attacks: see the tables of each.", ASR_NOTE)
    title = "ASR of each attack, made on the model and precision attacked"
    return Table(title, _header(report), blocks(found), notes, labels=2)


def clean_table(report: EvaluationReport) -> Table:
    """Accuracy without an attack, with its interval."""
    n, available = report.data.images, report.data.available
    note = f"Percent of n = {n} test images" + ("." if n == available else f" (of {available}).")
    return Table("Clean accuracy", _header(report), _model_blocks(report, "", _clean), (note,), labels=2)


def white_box_table(report: EvaluationReport, family: str) -> Table:
    """Attacks against the model and precision they were made on, with every figure that belongs to an ASR."""
    notes = (
        _images_note(report),
        ASR_NOTE,
        "Any wrong class: of the images classified correctly without the attack.",
        MEAN_NOTE,
        _seed_note(report, family),
    )
    given = all(facts.source is None for facts in family_members(report, family))
    title = f"{family}: each precision under {'the patches as given' if given else 'what was made at it'}"
    return Table(title, _header(report), _model_blocks(report, family, _white_box), notes, labels=2)


def worst_case_table(report: EvaluationReport) -> Table:
    """Robust accuracy under all attacks together, beside their mean."""
    return Table(
        "Robust accuracy under all attacks together",
        _header(report),
        _model_blocks(report, "", _worst_case),
        (f"In percent of n = {report.data.images} test images.", WORST_NOTE, *_missing_ensemble(report)),
        labels=2,
    )


def _missing_ensemble(report: EvaluationReport) -> tuple[str, ...]:
    with_pixels = [attack for attack in report.attacks if "eps" in attack.settings]
    if any(attack.attack == _ENSEMBLE for attack in report.attacks):
        return ()
    if not report.patches and len(with_pixels) == len(report.attacks):
        return ()
    return (
        f"The attacks do not include {_ENSEMBLE}, an ensemble of searches for a patch on each image, with which the "
        f"worst case is lower: --attack '{{name: {_ENSEMBLE}, size: 8}}'.",
    )


def certified_table(report: EvaluationReport) -> Table:
    """Return the table of what is proved at each precision, beside what the defense costs."""
    n = sorted({cell.certified_accuracy.n for cell in report.certified})
    notes = (
        f"In percent of n = {' or '.join(map(str, n))} test images (clean accuracy: {report.data.images}).",
        "Certified: images whose prediction under masks is right whatever one patch of the size shows and wherever it "
        "lies; defended: right under masks, no patch. Masks: PatchCleanser's double masking (Xiang et al. 2022), or "
        "one round. A certificate holds for the weights, masks and images whose fingerprints report.json names.",
    )
    return Table(
        "Certified accuracy against one patch", _header(report), _model_blocks(report, "", _certified), notes, labels=2
    )


def _images_note(report: EvaluationReport) -> str:
    return (
        "In percent. Clean accuracy, ASR over all images and robust accuracy (correct with and without the attack) are "
        f"shares of n = {report.data.images} test images."
    )


def _header(report: EvaluationReport) -> tuple[str, ...]:
    return "model", "", *map(bits, attacked_precisions(report))


def _model_blocks(
    report: EvaluationReport, family: str, figures: Callable[[View, Sequence[str]], Rows]
) -> tuple[tuple[str, ...] | None, ...]:
    columns = attacked_precisions(report)
    return blocks((model.name, figures(View(report, model, family), columns)) for model in report.models)


def _seed_note(report: EvaluationReport, family: str) -> str:
    return f"Targets: {targets_note(report, family)}. Seed {report.seed}."


def _summary(view: View, columns: Sequence[str]) -> Rows:
    means = [view.white_box(p) for p in columns]
    return {
        "clean accuracy": [percent(view.clean(p)) for p in columns],
        f"ASR {view.knowledge}": [percent(mean) for mean in means],
        "95 % interval": [interval(mean) for mean in means],
        "ASR, made at 32 bit": [percent(view.made_at(p, FLOAT)) for p in columns],
        "ASR, made on a mean over precisions": [percent(view.eot(p)) for p in columns],
        "ASR of a random patch": [percent(view.control(p)) for p in columns],
        "n of ASR": [sizes(view.any(p)) for p in columns],
        "ASR over all images": [percent(view.white_box(p, lambda cell: cell.asr_all)) for p in columns],
        "robust accuracy": [percent(view.white_box(p, lambda cell: cell.robust_accuracy)) for p in columns],
        **{name: row for name, row in _certified(view, columns).items() if not name.endswith(_NOT_IN_SUMMARY)},
    }


def _clean(view: View, columns: Sequence[str]) -> Rows:
    rates = [view.clean(p) for p in columns]
    return {
        "clean accuracy": [percent(rate) for rate in rates],
        "95 % interval": [percent_range((rate.low, rate.high)) if rate else EMPTY for rate in rates],
    }


def _white_box(view: View, columns: Sequence[str]) -> Rows:
    means = [view.white_box(p) for p in columns]
    return {
        "ASR": [percent(mean) for mean in means],
        "95 % interval": [interval(mean) for mean in means],
        "lowest to highest": [percent_range((mean.low, mean.high)) if mean else EMPTY for mean in means],
        "ASR of a random patch": [percent(view.control(p)) for p in columns],
        "any wrong class": [percent(view.white_box(p, lambda cell: cell.untargeted)) for p in columns],
        "any wrong class, random patch": [percent(view.control(p, lambda cell: cell.untargeted)) for p in columns],
        "ASR over all images": [percent(view.white_box(p, lambda cell: cell.asr_all)) for p in columns],
        "robust accuracy": [percent(view.white_box(p, lambda cell: cell.robust_accuracy)) for p in columns],
        "n of ASR": [sizes(mean) for mean in means],
        "number of attacks": [str(mean.shares) if mean else EMPTY for mean in means],
    }


def _worst_case(view: View, columns: Sequence[str]) -> Rows:
    rows = {"clean accuracy": [percent(view.clean(p)) for p in columns]}
    own, everything = _worst_cases(view, "own", columns), _worst_cases(view, "all", columns)
    rows |= _worst_case_rows("own attacks", own)
    # Without transfers the same figures would stand there twice.
    if [case and case.attacks for case in own] != [case and case.attacks for case in everything]:
        rows |= _worst_case_rows("with transfers", everything)
    return rows


def _certified(view: View, columns: Sequence[str]) -> Rows:
    rows = {"clean accuracy": [percent(view.clean(p)) for p in columns]}
    mine = [cell for cell in view.report.certified if cell.model == view.model.name]
    for name in dict.fromkeys(cell.label for cell in mine):
        found = {cell.precision: cell for cell in mine if cell.label == name}
        rates = [found[p].certified_accuracy if p in found else None for p in columns]
        kept = [found[p].clean_accuracy if p in found else None for p in columns]
        for kind, shares in (("defended", kept), ("certified", rates)):
            rows[f"{name}: {kind}"] = [percent(rate) for rate in shares]
            rows[f"{name}: {kind}, 95 % interval"] = [
                percent_range((rate.low, rate.high)) if rate else EMPTY for rate in shares
            ]
        passes = [found[p].passes if p in found else None for p in columns]
        if any(passes):
            rows[f"{name}: passes per image"] = [EMPTY if mean is None else f"{mean:.0f}" for mean in passes]
    return rows


def _worst_cases(view: View, scope: Scope, columns: Sequence[str]) -> list[WorstCase | None]:
    found = {
        case.precision: case for case in view.report.worst_case if (case.model, case.scope) == (view.model.name, scope)
    }
    return [found.get(p) for p in columns]


def _worst_case_rows(label: str, cases: Sequence[WorstCase | None]) -> dict[str, list[str]]:
    rates = [case and case.robust_accuracy for case in cases]
    return {
        f"{label}: mean": [f"{100 * case.mean:.1f}" if case else EMPTY for case in cases],
        f"{label}: worst case": [percent(rate) for rate in rates],
        f"{label}: 95 % interval": [percent_range((rate.low, rate.high)) if rate else EMPTY for rate in rates],
        f"{label}: number of attacks": [str(case.attacks) if case else EMPTY for case in cases],
    }


def tables(report: EvaluationReport) -> list[Table]:
    """All tables, the ones to read first in front."""
    found = [*_comparison(report), clean_table(report)]
    for family in families(report):
        found.append(white_box_table(report, family))
        found += precision_matrices(report, family)
    return found


def terminal_tables(report: EvaluationReport) -> list[Table]:
    """Return the tables worth a screen: all of one model under one or two kinds of attack, else what compares."""
    count = len(families(report))
    return _comparison(report) if count > 2 or (count and len(report.models) > 1) else tables(report)


def _comparison(report: EvaluationReport) -> list[Table]:
    found = [attacks_table(report)] if len(families(report)) > 1 else []
    found += [summary_table(report, family) for family in families(report)]
    found += [worst_case_table(report)] if report.worst_case else []
    found += [certified_table(report)] if report.certified else []
    for family in families(report):
        found += model_matrix(report, family)
    found += size_tables(report)
    for family in families(report):
        found += variant_tables(report, family)
    return found
