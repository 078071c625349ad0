"""Makes and scores patches of several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qadtr_brevitas.analyze.base import Context, Findings, Picture, Record
from qadtr_brevitas.analyze.curves import draw_records
from qadtr_brevitas.analyze.patches import float_patches
from qadtr_brevitas.analyze.scores import records, score
from qadtr_brevitas.analyze.tables import by_precision, percents
from qadtr_brevitas.errors import UsageError
from qadtr_brevitas.recipe.slots import slot_name
from qadtr_brevitas.report import AttackCell, ImageAttackFacts, PatchFacts
from qadtr_brevitas.report.summaries import ASR_NOTE, MEAN_NOTE

if TYPE_CHECKING:
    from qadtr_brevitas.analyze.size import Size


def run(analysis: Size, context: Context) -> Findings:
    """As `Size.run` says."""
    attacks = [] if analysis.patches else [_of_size(analysis.attack, size) for size in analysis.sizes]
    found: list[Record] = []
    for subject in context.subjects:
        made = float_patches(context, subject, attacks, finished=analysis.patches, targets=analysis.targets)
        report = score(context, subject, patches=sorted(made, key=lambda patch: patch.facts.pixels), transfer="all")
        found += records(report, "asr", lambda cell: cell.asr, _made)
        found += records(report, "asr of a random patch", lambda cell: cell.asr, _control)
    notes = (f"In percent; patches made at the highest precision. {ASR_NOTE}", MEAN_NOTE)
    draw_records(
        [record for record in found if record.what == "asr"],
        context.output / "size.png",
        along="size",
        x_label="size of the patch (pixels)",
        y_label="attack success rate (%)",
    )
    return Findings(
        title="Patches of several sizes",
        records=found,
        tables=[
            by_precision("ASR by patch size", found, "asr", write=percents, facets=("attack", "size"), notes=notes),
            by_precision(
                "ASR of random patches by size", found, "asr of a random patch", write=percents, facets=("size",)
            ),
        ],
        pictures=[Picture("size.png", "ASR by patch size, with 95 % intervals.")],
    )


def _of_size(attack: Any, size: int) -> Any:
    if not hasattr(attack, "size") or isinstance(attack.size, tuple):
        raise UsageError(f"{slot_name(attack)} has no single size to change: choose another attack, for instance lavan")
    return replace(attack, size=size)


def _made(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    if not isinstance(facts, PatchFacts) or facts.control:
        return None
    return {"attack": f"{facts.method} {facts.apart}".strip(), "size": facts.size}


def _control(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    return {"size": facts.size} if isinstance(facts, PatchFacts) and facts.control else None
