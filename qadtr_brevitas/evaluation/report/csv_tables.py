"""The cells of a report as CSV, with all digits: one line for each cell, shares between 0 and 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qadtr_brevitas.core.table import Cell, Table
from qadtr_brevitas.evaluation.report.schema import EvaluationReport, ImageAttackFacts, PatchFacts, Rate

_RATE = ("count", "n", "value", "low", "high")
_ATTACK_RATES = ("asr", "asr_all", "untargeted", "clean_accuracy", "robust_accuracy")
_CERTIFICATION = ("model", "precision", "method", "fill", "tta", "overlap", "size", "masks")
_CERTIFIED_RATES = ("clean_accuracy", "certified_accuracy")
_CERTIFICATE = ("passes", "weights_fingerprint", "masks_fingerprint", "data_fingerprint")


def cells_csv(report: EvaluationReport) -> str:
    """Return one line for each patch or attack on each model and precision."""
    head = ("model", "precision", "attack", "family", "variant", "target", "threat", "source", "source_precision")
    facts_by_name = report.attack_facts()
    rows: list[tuple[Cell, ...]] = []
    for cell in report.cells:
        facts = facts_by_name[cell.attack]
        source = (facts.source.name, facts.source.precision) if facts.source else (None, None)
        kind = _family_and_variant(facts, facts_by_name)
        rates = _values(getattr(cell, name) for name in _ATTACK_RATES)
        rows.append((cell.model, cell.precision, cell.attack, *kind, cell.target, cell.threat, *source, *rates))
    return Table("Cells", (*head, *_columns(_ATTACK_RATES)), tuple(rows)).csv()


def worst_case_csv(report: EvaluationReport) -> str:
    """Return one line for each model, precision and scope."""
    header = ("model", "precision", "scope", "attacks", "mean", *_columns(["robust_accuracy"]))
    rows = tuple(
        (case.model, case.precision, case.scope, case.attacks, case.mean, *_values([case.robust_accuracy]))
        for case in report.worst_case
    )
    return Table("Worst case", header, rows).csv()


def certified_csv(report: EvaluationReport) -> str:
    """Return one line for each model, precision and certification."""
    header = (*_CERTIFICATION, *_columns(_CERTIFIED_RATES), *_CERTIFICATE)
    rows = tuple(
        (
            *(getattr(cell, name) for name in _CERTIFICATION),
            *_values(getattr(cell, name) for name in _CERTIFIED_RATES),
            *(getattr(cell, name) for name in _CERTIFICATE),
        )
        for cell in report.certified
    )
    return Table("Certified accuracy", header, rows).csv()


def _family_and_variant(
    facts: PatchFacts | ImageAttackFacts, facts_by_name: Mapping[str, PatchFacts | ImageAttackFacts]
) -> tuple[str, str]:
    """Return the family and the label of the variant; a moved patch has the family of the patch it was made from."""
    variant = facts.variant if isinstance(facts, PatchFacts) else None
    return (facts_by_name[variant.of].family, variant.label) if variant else (facts.family, "")


def _columns(names: Iterable[str]) -> list[str]:
    return [f"{name}_{part}" for name in names for part in _RATE]


def _values(rates: Iterable[Rate]) -> list[Cell]:
    return [getattr(rate, part) for rate in rates for part in _RATE]
