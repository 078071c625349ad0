"""Merging evaluations of the same images into one report, so that their models stand in one table."""

from __future__ import annotations

from collections.abc import Sequence

from qadtr_brevitas.evaluation.report import EvaluationReport, ImageAttackFacts, PatchFacts
from qadtr_brevitas.evaluation.report.views import disambiguate_patches


def merge_reports(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """Return one report with all models; command, seed and versions are those of the first report.

    Args:
        reports: at least one, all of the same images, with models of different names.
    """
    known: dict[str, PatchFacts | ImageAttackFacts] = {}
    renamed = [_with_unique_names(report, known) for report in reports]
    patches = [facts for facts in known.values() if isinstance(facts, PatchFacts)]
    return renamed[0].model_copy(
        update={
            "models": tuple(model for report in renamed for model in report.models),
            "patches": disambiguate_patches(patches),
            "attacks": tuple(facts for facts in known.values() if isinstance(facts, ImageAttackFacts)),
            "clean": tuple(cell for report in renamed for cell in report.clean),
            "cells": tuple(cell for report in renamed for cell in report.cells),
            "worst_case": tuple(case for report in renamed for case in report.worst_case),
            "certified": tuple(cell for report in renamed for cell in report.certified),
        }
    )


def _with_unique_names(report: EvaluationReport, known: dict[str, PatchFacts | ImageAttackFacts]) -> EvaluationReport:
    """Return the report with a name of its own for every different patch and attack, and add them to the known ones."""
    names: dict[str, str] = {}
    for old, facts in report.attack_facts().items():
        new, number = old, 1
        while new in known and known[new] != facts.model_copy(update={"name": new}):
            number += 1
            new = f"{old} ({number})"
        names[old] = new
        if isinstance(facts, PatchFacts) and facts.variant:
            # The patch as it was made comes before its variants.
            variant = facts.variant.model_copy(update={"of": names[facts.variant.of]})
            facts = facts.model_copy(update={"variant": variant})
        known[new] = facts.model_copy(update={"name": new})
    cells = tuple(cell.model_copy(update={"attack": names[cell.attack]}) for cell in report.cells)
    return report.model_copy(update={"cells": cells})
