"""Several evaluations of the same images as one, so that their models stand in one table."""

from __future__ import annotations

from collections.abc import Sequence

from qadtr_brevitas.evaluation.report import EvaluationReport, ImageAttackFacts, PatchFacts
from qadtr_brevitas.evaluation.report.views import disambiguate_patches


def merge_reports(reports: Sequence[EvaluationReport]) -> EvaluationReport:
    """One report with all models; the first one's command, seed and versions stand for all.

    Args:
        reports: at least one, of the same images; models of different names.
    """
    known: dict[str, PatchFacts | ImageAttackFacts] = {}
    renamed = [_with_own_names(report, known) for report in reports]
    first = renamed[0]
    facts = [facts for facts in known.values() if isinstance(facts, PatchFacts)]
    return first.model_copy(
        update={
            "models": tuple(model for report in renamed for model in report.models),
            "patches": disambiguate_patches(facts),
            "attacks": tuple(facts for facts in known.values() if isinstance(facts, ImageAttackFacts)),
            **{
                name: tuple(cell for report in renamed for cell in getattr(report, name))
                for name in ("clean", "cells", "worst_case", "certified")
            },
        }
    )


def _with_own_names(report: EvaluationReport, known: dict[str, PatchFacts | ImageAttackFacts]) -> EvaluationReport:
    """The report with every patch and attack under a name that no other one has; adds them to the known ones."""
    names: dict[str, str] = {}
    for old, facts in report.attack_facts().items():
        new, number = old, 1
        while new in known and known[new] != facts.model_copy(update={"name": new}):
            number += 1
            new = f"{old} ({number})"
        names[old] = new
        if isinstance(facts, PatchFacts) and facts.variant:
            # Of a patch as it was made, which comes before its variants.
            facts = facts.model_copy(
                update={"variant": facts.variant.model_copy(update={"of": names[facts.variant.of]})}
            )
        known[new] = facts.model_copy(update={"name": new})
    cells = tuple(cell.model_copy(update={"attack": names[cell.attack]}) for cell in report.cells)
    return report.model_copy(update={"cells": cells})
