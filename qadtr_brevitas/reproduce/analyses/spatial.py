"""Patches shifted and turned: does a patch work where and as it was not made?

Scores moved and turned patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from qadtr_brevitas.config.slots import Slot
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.report import AttackCell, EvaluationReport, ImageAttackFacts, PatchFacts, VariantFacts
from qadtr_brevitas.evaluation.report.summaries import ASR_NOTE, MEAN_NOTE
from qadtr_brevitas.evaluation.variants import PatchVariants
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.charts import by_precision, draw_records, percents
from qadtr_brevitas.reproduce.analyses.patches import float_patches, records, score

Pixels = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


@plugin
class Spatial(Analysis):
    """ASR of patches made at the highest precision at one place, shifted from there, and turned (paper, Table 20).

    Patches are made for random places, and scored there as well. The paper does not say where it shifts patches from;
    18 pixels leave room on images of 32x32 for a patch of 6x6 up to row and column 8.
    """

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[Any, Slot(ATTACKS), Field(description="patch attack, used where no patches are given")] = Field(
        default_factory=lambda: {"name": "lavan", "size": 6}
    )
    targets: Annotated[
        tuple[Index, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = None
    at: Annotated[
        tuple[Index, Index], Field(description="row and column of the place that patches are shifted from")
    ] = (
        2,
        2,
    )
    shifts: Annotated[tuple[Pixels, ...], Field(description="pixels to shift down and to the right")] = (2, 8, 18)
    degrees: Annotated[tuple[float, ...], Field(description="angles to turn by")] = (5, 10, 20, 30)

    def run(self, context: AnalysisContext) -> Findings:
        """Scores, and draws shifts.png and turns.png."""
        return run(self, context)


_RANDOM = "at random places"


def run(analysis: Spatial, context: AnalysisContext) -> Findings:
    """As `Spatial.run` says."""
    found: list[Record] = []
    moves = PatchVariants(at=analysis.at, shifts=analysis.shifts, degrees=analysis.degrees)
    for loaded in context.loaded_models:
        made = float_patches(context, loaded, [analysis.attack], finished=analysis.patches, targets=analysis.targets)
        variants = moves.variants(made, context.data.test.image_size)
        report = score(context, loaded, patches=[*made, *variants], transfer="all")
        found += records(report, "asr", lambda cell: cell.asr, partial(_moved, report))
        found += records(report, "asr of a random patch", lambda cell: cell.asr, _control)
    table = by_precision(
        "ASR of patches shifted and turned",
        found,
        "asr",
        write=percents,
        facets=("attack", "scored"),
        notes=(f"In percent; patches made at the highest precision. {ASR_NOTE}", MEAN_NOTE),
    )
    return Findings(
        title="Patches shifted and turned",
        records=found,
        tables=[table],
        pictures=[
            _draw(context, found, "shift", "shifts.png", "shifted down and to the right (pixels)", _only("degrees")),
            _draw(context, found, "degrees", "turns.png", "turned by (degrees)", _only("shift")),
        ],
    )


def _moved(
    report: EvaluationReport, cell: AttackCell, facts: PatchFacts | ImageAttackFacts
) -> Mapping[str, Any] | None:
    if not isinstance(facts, PatchFacts) or facts.control:
        return None
    variant = facts.variant
    if variant is None:
        return {"attack": facts.family, "scored": _RANDOM}
    # Turned patches are of other sizes than the patch they were made of.
    return {"attack": report.patch(variant.of).family, "scored": _words(variant), **_move(variant)}


def _words(variant: VariantFacts) -> str:
    return variant.label.removeprefix(f"at {variant.at[0]},{variant.at[1]} ") if variant.at else variant.label


def _move(variant: VariantFacts) -> dict[str, float]:
    return {"shift": variant.shift, "degrees": variant.degrees}


def _control(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    if not isinstance(facts, PatchFacts) or not facts.control:
        return None
    place = _RANDOM if facts.place == "random" else f"at {facts.place[0]},{facts.place[1]}"
    return {"size": facts.size, "scored": place}


def _only(other: str) -> Callable[[Record], bool]:
    """Patches that were moved in one way only."""
    return lambda record: record.what == "asr" and record.facets.get(other) == 0


def _draw(
    context: AnalysisContext,
    found: Sequence[Record],
    facet: str,
    file: str,
    label: str,
    shown: Callable[[Record], bool],
) -> Picture:
    draw_records(
        [record for record in found if shown(record)],
        context.output / file,
        along=facet,
        x_label=label,
        y_label="attack success rate (%)",
    )
    return Picture(file, f"ASR of patches {label}, with 95 % intervals.")
