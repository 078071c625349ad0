"""Scores moved and turned patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qadtr_brevitas.analyze.base import Context, Findings, Picture, Record
from qadtr_brevitas.analyze.curves import draw_records
from qadtr_brevitas.analyze.patches import float_patches
from qadtr_brevitas.analyze.scores import records, score
from qadtr_brevitas.analyze.tables import by_precision, percents
from qadtr_brevitas.evaluate.variants import Moves
from qadtr_brevitas.report import AttackCell, ImageAttackFacts, PatchFacts, Report, VariantFacts
from qadtr_brevitas.report.summaries import ASR_NOTE, MEAN_NOTE

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.spatial import Spatial

_RANDOM = "at random places"


def run(analysis: Spatial, context: Context) -> Findings:
    """As `Spatial.run` says."""
    found: list[Record] = []
    moves = Moves(at=analysis.at, shifts=analysis.shifts, degrees=analysis.degrees)
    for subject in context.subjects:
        made = float_patches(context, subject, [analysis.attack], finished=analysis.patches, targets=analysis.targets)
        variants = moves.variants(made, context.data.test.image_size)
        report = score(context, subject, patches=[*made, *variants], transfer="all")
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


def _moved(report: Report, cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
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
    context: Context, found: Sequence[Record], facet: str, file: str, label: str, shown: Callable[[Record], bool]
) -> Picture:
    draw_records(
        [record for record in found if shown(record)],
        context.output / file,
        along=facet,
        x_label=label,
        y_label="attack success rate (%)",
    )
    return Picture(file, f"ASR of patches {label}, with 95 % intervals.")
