"""Shifted and rotated patches: whether a patch works where, and in an orientation, it was not made for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from qadtr_brevitas.attacks.lavan import Lavan
from qadtr_brevitas.attacks.patch_settings import Index, Pixels
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, PatchFacts, VariantFacts
from qadtr_brevitas.evaluation.report.summaries import ASR_NOTE, MEAN_NOTE
from qadtr_brevitas.evaluation.variants import PatchVariants
from qadtr_brevitas.reproduce.analyses.base import (
    Analysis,
    AnalysisContext,
    CraftingAttack,
    Findings,
    PatchFiles,
    TargetClasses,
)
from qadtr_brevitas.reproduce.analyses.charts import draw_records
from qadtr_brevitas.reproduce.analyses.document import Picture, Record
from qadtr_brevitas.reproduce.analyses.patches import reference_patches
from qadtr_brevitas.reproduce.analyses.scores import AttackFacts, Facets, mean_records, score
from qadtr_brevitas.reproduce.analyses.tables import percents, precision_table

_ASR, _CONTROL_ASR = "asr", "asr of a random patch"
_RANDOM_PLACES = "at random places"


@plugin
class Spatial(Analysis):
    """ASR of patches made at the highest precision at one place, shifted from there, and rotated (paper, Table 20).

    Patches are made for random places, and scored there as well. The paper does not say where it shifts patches from;
    18 pixels leave room on images of 32x32 for a patch of 6x6 up to row and column 8.
    """

    patches: PatchFiles = ()
    attack: CraftingAttack = Lavan(size=6)
    targets: TargetClasses = None
    at: Annotated[
        tuple[Index, Index], Field(description="row and column of the place that patches are shifted from")
    ] = (2, 2)
    shifts: Annotated[tuple[Pixels, ...], Field(description="pixels to shift down and to the right")] = (2, 8, 18)
    degrees: Annotated[tuple[float, ...], Field(description="angles to rotate by, in degrees")] = (5, 10, 20, 30)

    def run(self, context: AnalysisContext) -> Findings:
        """Score shifted and rotated patches, and draw shifts.png and turns.png."""
        found: list[Record] = []
        plan = PatchVariants(at=self.at, shifts=self.shifts, degrees=self.degrees)
        for loaded in context.models:
            patches = reference_patches(context, loaded, [self.attack], finished=self.patches, targets=self.targets)
            variants = plan.variants(patches, context.data.test.image_size)
            report = score(context, loaded, patches=[*patches, *variants])
            found += mean_records(report, _ASR, lambda cell: cell.asr, partial(_patch_facets, report))
            found += mean_records(report, _CONTROL_ASR, lambda cell: cell.asr, _control_facets)
        table = precision_table(
            "ASR of patches shifted and rotated",
            found,
            _ASR,
            write=percents,
            facets=("attack", "scored"),
            notes=(f"In percent; patches made at the highest precision. {ASR_NOTE}", MEAN_NOTE),
        )
        shifts = _draw(context, found, "shift", "shifts.png", "shifted down and to the right (pixels)", fixed="degrees")
        turns = _draw(context, found, "degrees", "turns.png", "rotated by (degrees)", fixed="shift")
        return Findings(title="Patches shifted and rotated", records=found, tables=[table], pictures=[shifts, turns])


def _patch_facets(report: EvaluationReport, cell: AttackCell, facts: AttackFacts) -> Facets | None:
    if not isinstance(facts, PatchFacts) or facts.control:
        return None
    variant = facts.variant
    if variant is None:
        return {"attack": facts.family, "scored": _RANDOM_PLACES}
    # A rotated patch has another size than the patch it was made of, so its own family would differ.
    family = report.patch(variant.of).family
    return {"attack": family, "scored": _label(variant), "shift": variant.shift, "degrees": variant.degrees}


def _label(variant: VariantFacts) -> str:
    return variant.label.removeprefix(f"at {variant.at[0]},{variant.at[1]} ") if variant.at else variant.label


def _control_facets(cell: AttackCell, facts: AttackFacts) -> Facets | None:
    if not isinstance(facts, PatchFacts) or not facts.control:
        return None
    place = _RANDOM_PLACES if facts.place == "random" else f"at {facts.place[0]},{facts.place[1]}"
    return {"size": facts.size, "scored": place}


def _draw(
    context: AnalysisContext, found: Sequence[Record], along: str, file: str, label: str, *, fixed: str
) -> Picture:
    """Draw the patches that were moved in one way only: along one facet, while the other is 0."""
    draw_records(
        [record for record in found if record.what == _ASR and record.facets.get(fixed) == 0],
        context.output / file,
        along=along,
        x_label=label,
        y_label="attack success rate (%)",
    )
    return Picture(file=file, caption=f"ASR of patches {label}, with 95 % intervals.")
