"""Patches of several sizes: how large must a patch be, and does that depend on the bits?

Makes and scores patches of several sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from qadtr_brevitas.attacks.patch_settings import PatchSettings
from qadtr_brevitas.config.slots import Slot, slot_name
from qadtr_brevitas.core.errors import UsageError
from qadtr_brevitas.core.plugin import Field, plugin
from qadtr_brevitas.core.registry import ATTACKS
from qadtr_brevitas.evaluation.report import AttackCell, ImageAttackFacts, PatchFacts
from qadtr_brevitas.evaluation.report.summaries import ASR_NOTE, MEAN_NOTE
from qadtr_brevitas.reproduce.analyses.base import Analysis, AnalysisContext, Findings, Picture, Record
from qadtr_brevitas.reproduce.analyses.charts import by_precision, draw_records, percents
from qadtr_brevitas.reproduce.analyses.patches import float_patches, records, score

Pixels = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


@plugin
class Size(Analysis):
    """ASR of patches of several sizes, made at the highest precision, at every precision (paper, Table 21)."""

    patches: Annotated[
        tuple[str, ...], Field(description="finished patches, files or folders; none: make them with attack")
    ] = ()
    attack: Annotated[
        Any, Slot(ATTACKS), Field(description="patch attack with a size, used where no patches are given")
    ] = "lavan"
    sizes: Annotated[tuple[Pixels, ...], Field(min_length=1, description="sides or diameters in pixels")] = (
        6,
        8,
        10,
        12,
    )
    targets: Annotated[
        tuple[Index, ...] | None, Field(description="classes that patches are made for; null: the first three")
    ] = None

    def run(self, context: AnalysisContext) -> Findings:
        """Scores, and draws size.png."""
        return run(self, context)


def run(analysis: Size, context: AnalysisContext) -> Findings:
    """As `Size.run` says."""
    attacks = [] if analysis.patches else [_of_size(analysis.attack, size) for size in analysis.sizes]
    found: list[Record] = []
    for loaded in context.loaded_models:
        made = float_patches(context, loaded, attacks, finished=analysis.patches, targets=analysis.targets)
        report = score(context, loaded, patches=sorted(made, key=lambda patch: patch.facts.pixels), transfer="all")
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
    if not isinstance(attack, PatchSettings) or isinstance(attack.size, tuple):
        raise UsageError(f"{slot_name(attack)} has no single size to change: choose another attack, for instance lavan")
    return replace(attack, size=size)


def _made(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    if not isinstance(facts, PatchFacts) or facts.control:
        return None
    return {"attack": f"{facts.method} {facts.apart}".strip(), "size": facts.size}


def _control(cell: AttackCell, facts: PatchFacts | ImageAttackFacts) -> Mapping[str, Any] | None:
    return {"size": facts.size} if isinstance(facts, PatchFacts) and facts.control else None
